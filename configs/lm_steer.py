"""LM-Steer: one linear map of the output word embeddings, learned from texts of both sentiments, at several strengths.

Source: Han et al. 2024.

    python experiments/main.py --config=configs/lm_steer.py[:yelp|:tiny]
    python experiments/ablate.py --config=configs/lm_steer.py[:yelp|:tiny]
"""

from configs import sentiment

SETTINGS = dict(
    bundled=dict(fit=dict(steps=300, batch=16, tokens=96, rank=64), strengths=(-3.0, -1.0, 1.0, 3.0)),
    yelp=dict(
        fit=dict(steps=300, batch=32, tokens=24, rank=64, dummy="none", schedule="linear"),
        strengths=(-5.0, -3.0, 3.0, 5.0),
    ),
    tiny=dict(fit=dict(steps=2, batch=4, tokens=16, rank=2), strengths=(-1.0, 1.0)),
)


def arms(arg):
    return dict(lm_steer=dict(method="lm_steer", **sentiment.of_world(SETTINGS, arg)))


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "LM-Steer", dict(top_p=dict(method="truncate"), **arms(arg)))


def sweep():
    for rank in (16, 256):
        for dummy in ("none", "drop"):
            yield {"methods.lm_steer.fit.rank": rank, "methods.lm_steer.fit.dummy": dummy}
