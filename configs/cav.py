"""Concept activation vectors: probes of labelled texts, met by the least change of the residual stream.

Source: Zhang et al. 2025 (GCAV).

    python experiments/main.py --config=configs/cav.py[:yelp|:gemma|:tiny]
    python experiments/ablate.py --config=configs/cav.py[:yelp|:gemma|:tiny]

Expected, the share of positive text (perplexity under the base) at strengths −1, −0.5, top-p alone, 0.5, 1:
yelp      0.43 (70), 0.49 (53), 0.58 (37), 0.67 (49), 0.74 (68); the probe's held-out accuracy is 0.84
bundled   0.23 (2.5), 0.37 (2.1), 0.48 (2.1), 0.52 (2.1), 0.59 (2.3), though its accuracy is only 0.6
gemma     0.20 (201), 0.23 (39), 0.63 (18), 0.73 (77), 0.50 (639); Gemma 3 270M, its text is broken at ±1
One middle layer serves better there than all, whose steps add up: in the yelp world ±0.5 is then as far as ±1. With
c = 1 the targets are met and no text of that world moves; with c = 1e-4 the bundled LM writes no more words. Wall time:
a few minutes on 2 cores after the LM is there.
"""

from configs import sentiment

STRENGTHS = (-1.0, -0.5, 0.5, 1.0)
SETTINGS = dict(
    bundled=dict(fit=dict(pool="mean", sites="middle", p0=0.95, tokens=48), strengths=STRENGTHS),
    yelp=dict(fit=dict(pool="mean", sites="middle", p0=0.9999, tokens=48), strengths=STRENGTHS),
    gemma=dict(fit=dict(pool="mean", sites="middle", p0=0.9999, tokens=48), strengths=(-0.5, -0.25, 0.25, 0.5)),
    tiny=dict(fit=dict(pool="mean", tokens=16), strengths=(-1.0, 1.0)),
)


def arms(arg):
    return dict(cav=dict(method="cav", **sentiment.of_world(SETTINGS, arg)))


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "Concept activation vectors", dict(top_p=dict(), **arms(arg)))


def sweep():
    for sites in ("all", "middle"):
        for c in (1e-3, 1.0):
            yield {"methods.cav.fit.sites": sites, "methods.cav.fit.inverse_l2": c}
