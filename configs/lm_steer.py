"""LM-Steer: one linear map of the output word embeddings, learned from texts of both sentiments, at several strengths.

Source: Han et al. 2024.

    python experiments/main.py --config=configs/lm_steer.py[:yelp|:gemma|:tiny]
    python experiments/ablate.py --config=configs/lm_steer.py[:yelp|:gemma|:tiny]

Expected: the share of positive text moves both ways with the strength, in every world. Bundled: from .48 without
control to .05 at -3 and .74 at 3, at the base's perplexity. Yelp: from .58 to .35 at -5 (perplexity 50, without control
37) and .76 at 5 (35). There the first dimension reads (`lm_steer.words`) "atmosphere, yummy, fun, always, great" on one
side and "refused, forgot, sorry, rude" on the other. Gemma 3 270M: from .63 to .37 at -5, .77 at 5 and .95 at 10, with
a perplexity of 17 to 21 throughout (18 without control). Wall time on one core: 20 seconds bundled after the LM is
there, some minutes for Yelp.
"""

from configs import sentiment

SETTINGS = dict(
    bundled=dict(
        fit=dict(rank=64, dummy="drop", training=dict(steps=300, batch=16, tokens=96)), strengths=(-3.0, -1.0, 1.0, 3.0)
    ),
    yelp=dict(
        fit=dict(rank=64, dummy="none", training=dict(steps=300, batch=32, tokens=24, schedule="linear")),
        strengths=(-5.0, -3.0, 3.0, 5.0),
    ),
    gemma=dict(
        # The texts differ from the prompts in more than their sentiment, which the dummy steer takes up.
        fit=dict(rank=64, dummy="drop", training=dict(steps=120, batch=8, tokens=24, schedule="linear")),
        strengths=(-10.0, -5.0, 5.0, 10.0),
    ),
    tiny=dict(fit=dict(rank=2, dummy="drop", training=dict(steps=2, batch=4, tokens=16)), strengths=(-1.0, 1.0)),
)


def arms(arg):
    return dict(lm_steer=dict(method="lm_steer", **sentiment.of_world(SETTINGS, arg)))


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "LM-Steer", dict(top_p=dict(), **arms(arg)))


def sweep():
    for rank in (16, 256):
        for dummy in ("none", "drop"):
            yield {"methods.lm_steer.fit.rank": rank, "methods.lm_steer.fit.dummy": dummy}
