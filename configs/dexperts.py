"""DExperts: a positive and a negative expert, combined with the base model's logits at several alphas.

Source: Liu et al. 2021, section 3 (sentiment) and equation 2; the base is filtered before they are combined, and alpha
is 3.2 for positive and -3.2 for negative text. `anti` is the paper's anti-only arm. `guidance` and `prompted` need no
fit: classifier-free guidance (Sanchez et al. 2023) and the model after an instruction as the expert; contrastive
decoding (O'Brien & Lewis 2023) is `kind="contrastive"` with a smaller model, which `paper` has.

    python experiments/main.py --config=configs/dexperts.py[:yelp|:gemma|:tiny|:paper]
    python experiments/ablate.py --config=configs/dexperts.py[:yelp|:gemma|:tiny]

Expected: the share of positive text rises steeply with alpha and falls as steeply below 0; perplexity under
the base rises with its size. Wall time: six minutes on 2 cores after the LM is there. Gemma 3 270M, with experts of 40
updates: .28, .42, .63 (top-p alone), .80 and .92 at alpha -1, -0.5, 0, 0.5 and 1, perplexity 17 to 25.
"""

from configs import sentiment

PAPER = dict(
    adapter=dict(kind="full"), training=dict(steps=300, batch=64, tokens=128, rate=5e-5, warmup=0, schedule="linear")
)
STRENGTHS = (-3.2, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.2)


def arms(arg):
    strengths = {"tiny": (-1.0, 1.0), "gemma": (-1.0, -0.5, 0.5, 1.0)}.get(arg, STRENGTHS)
    fit = sentiment.training(arg)
    return dict(dexperts=dict(method="dexperts", fit=fit, strengths=strengths, truncate_first=True))


def others(arg):
    """What else the two sides can be; the first shares the anti-expert of `arms`."""
    common = dict(method="dexperts", truncate_first=True)
    text = "This is a very positive review. "
    return dict(
        anti=common | dict(fit=sentiment.training(arg) | dict(sides="anti"), strengths=(0.5, 1.0)),
        guidance=common | dict(init=dict(kind="guidance", alpha=0.5), strengths=(0.5,)),
        prompted=common | dict(init=dict(kind="instruction", instruction=text, alpha=1.0), strengths=(1.0,)),
    )


def paper_arms():
    small = dict(kind="contrastive", amateur="openai-community/gpt2", alpha=0.5)
    common = dict(method="dexperts", truncate_first=True)
    return dict(
        dexperts=common | dict(fit=PAPER, strengths=(-3.2, 3.2)),
        anti=common | dict(fit=PAPER | dict(sides="anti"), strengths=(-3.2, 3.2)),
        contrastive=dict(method="dexperts", init=small, strengths=(0.5,)),
    )


def get_config(arg="bundled"):
    if arg == "paper":
        return sentiment.paper("openai-community/gpt2-large", "DExperts", dict(top_p=dict(), **paper_arms()), n=25)
    found = arms(arg) if arg in ("tiny", "gemma") else arms(arg) | others(arg)
    return sentiment.experiment(arg, "DExperts", dict(top_p=dict(), **found))


def sweep():
    for first in (True, False):
        for alpha in (-1.0, 1.0):
            yield {"methods.dexperts.truncate_first": first, "methods.dexperts.strengths": (alpha,)}
