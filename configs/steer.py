"""Steering: a vector from labelled texts, added to the residual stream at several strengths.

Sources: Subramani et al. 2022; Turner et al. 2023; Rimsky et al. 2024; Zou et al. 2023.

    python experiments/main.py --config=configs/steer.py[:yelp|:gemma|:tiny]
    python experiments/ablate.py --config=configs/steer.py[:yelp|:gemma|:tiny]

Expected in the yelp world: the share of positive text rises with the scale, from below the base at negative to above it
at positive ones, and perplexity rises with the size of the scale. In the bundled world the share rises from 0.21 at -12
to 0.59 at 8, around 0.48 of top-p alone; perplexity stays at the base's up to 8 either way and is a quarter higher at
12, where the positive side gains no more. Wall time: three minutes on 2 cores after the LM is there. In the gemma
world, on Gemma 3 270M, it rises from .17 at -0.4 to 1.00 at 0.4, around .63 of top-p alone, and in every step between;
perplexity, 18 without control, is below 30 up to 0.1 either way, about 140 at -0.4 and 155 at 0.4.
"""

from configs import sentiment

STREAM = (-0.4, -0.2, -0.1, 0.1, 0.2, 0.4)  # shares of the length of the stream, as `normalise` says
SETTINGS = dict(
    bundled=dict(fit=dict(sites="all", pool="mean", tokens=48), strengths=(-12.0, -8.0, -4.0, 4.0, 8.0, 12.0)),
    yelp=dict(fit=dict(sites="middle", pool="mean", tokens=48), strengths=(-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)),
    gemma=dict(fit=dict(sites="middle", pool="mean", normalise="stream", tokens=48), strengths=STREAM),
    tiny=dict(fit=dict(sites="middle", pool="mean", tokens=16), strengths=(-1.0, 1.0)),
)


def arms(arg):
    return dict(steer=dict(method="steer", **sentiment.of_world(SETTINGS, arg)))


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "Steering", dict(top_p=dict(), **arms(arg)))


def sweep():
    for sites in ("all", "middle"):
        for scale in (-1.0, 1.0):
            yield {"methods.steer.fit.sites": sites, "methods.steer.strengths": (scale,)}
