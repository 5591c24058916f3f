"""Concept activation vectors: probes of labelled texts, met by the least change of the residual stream.

Source: Zhang et al. 2025 (GCAV), section 3.

    python experiments/main.py --config=configs/cav.py[:yelp|:tiny]
    python experiments/ablate.py --config=configs/cav.py[:yelp|:tiny]
"""

from configs import sentiment

STRENGTHS = (-1.0, -0.5, 0.5, 1.0)
SETTINGS = dict(
    bundled=dict(fit=dict(pool="mean", p0=0.95, tokens=48), strengths=STRENGTHS),
    yelp=dict(fit=dict(pool="mean", p0=0.999, tokens=48), strengths=STRENGTHS),
    tiny=dict(fit=dict(pool="mean", tokens=16), strengths=(-1.0, 1.0)),
)


def arms(arg):
    return dict(cav=dict(method="cav", **sentiment.of_world(SETTINGS, arg)))


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "Concept activation vectors", dict(top_p=dict(method="truncate"), **arms(arg)))


def sweep():
    for p0 in (0.75, 0.9, 0.99):
        for top in (1, 3):
            yield {"methods.cav.fit.p0": p0, "methods.cav.fit.top": top}
