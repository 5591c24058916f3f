"""Inference-time intervention: the attention heads that know the sentiment best are moved along it.

Source: Li et al. 2023; the mean difference, 48 of 1,024 heads, α = 15 and the last token are those of the authors'
code.

    python experiments/main.py --config=configs/iti.py[:yelp|:gemma|:tiny|:paper]
    python experiments/ablate.py --config=configs/iti.py[:yelp|:tiny]

Small models have few heads, so that here a quarter of them acts. Expected, not measured yet: the share of positive text
rises with the strength, as with `steer`, until perplexity breaks. `paper` is Llama 7B with the authors' settings.
"""

from configs import sentiment

SETTINGS = dict(
    bundled=dict(fit=dict(top=2, pool="mean", tokens=48), strengths=(-10.0, -5.0, 5.0, 10.0)),
    yelp=dict(fit=dict(top=12, tokens=48), strengths=(-10.0, -5.0, 5.0, 10.0)),
    gemma=dict(fit=dict(top=18, tokens=48), strengths=(-10.0, -5.0, 5.0, 10.0)),
    tiny=dict(fit=dict(top=1, tokens=16), strengths=(-5.0, 5.0)),
)


def arms(arg):
    return dict(iti=dict(method="iti", **sentiment.of_world(SETTINGS, arg)))


def get_config(arg="bundled"):
    if arg == "paper":
        made = dict(iti=dict(method="iti", fit=dict(top=48, limit=5000, tokens=64), strengths=(15.0,)))
        return sentiment.paper("huggyllama/llama-7b", "Inference-time intervention", dict(top_p=dict(), **made))
    return sentiment.experiment(arg, "Inference-time intervention", dict(top_p=dict(), **arms(arg)))


def sweep():
    for kind in ("mean", "probe"):
        for top in (1, 4):
            yield {"methods.iti.fit.kind": kind, "methods.iti.fit.top": top}
