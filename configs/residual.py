"""RMT: a plug-in beside a frozen model follows control texts that name a class and a number of words.

Source: Zhang et al. 2023; alpha ½, three blocks and the learning rates of `paper` are the authors'.

    python experiments/main.py --config=configs/residual.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/residual.py[:yelp|:tiny]

The plug-in is trained alone on the world's labelled texts, then as a mixture on the same texts with their control
texts. `paper` has GPT-2 Large as its base. Expected: more positive text than from fine-tuning the plug-in alone, at a
perplexity near the base's at alpha ½ and far above it at alpha 1, and lengths within two words.
"""

from configs import sentiment

SMALL = dict(
    bundled=dict(width=64, depth=3, heads=4),
    yelp=dict(width=128, depth=3, heads=8),
    tiny=dict(width=8, depth=1, heads=2),
)
TEXT = dict(template="Sentiment: {label}; Words: {length}", labels=("negative", "positive"))
WANTED = "Sentiment: positive; Words: 12"
PAPER = dict(
    shape=dict(width=1280, depth=3, heads=8),
    pretrain=dict(batch=64, tokens=64, rate=5e-5, steps=10000),
    training=dict(batch=64, tokens=64, rate=5e-5, steps=5000),
)


def arms(arg):
    training = sentiment.training(arg)["training"]
    steps = training["steps"] if arg == "tiny" else 3 * training["steps"]
    fit = TEXT | dict(wanted=WANTED, shape=SMALL.get(arg, SMALL["yelp"]), pretrain=training | dict(steps=steps))
    strengths = (0.5,) if arg == "tiny" else (0.25, 0.5, 1.0)
    return dict(residual=dict(method="residual", fit=fit | dict(training=training), strengths=strengths))


def get_config(arg="bundled"):
    if arg == "paper":
        fit = PAPER | TEXT | dict(wanted=WANTED)
        made = dict(residual=dict(method="residual", fit=fit, strengths=(0.5,)))
        filters = dict(top_p=0.98, repetition_penalty=1.25, no_repeat_ngram=3)
        return sentiment.paper("gpt2-large", "RMT", made, truncate_first=True, filter=filters)
    return sentiment.experiment(arg, "RMT", dict(top_p=dict(), **arms(arg)))


def sweep():
    for alpha in (0.3, 0.7):
        yield {"methods.residual.fit.alpha": alpha}
