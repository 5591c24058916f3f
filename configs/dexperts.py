"""DExperts: a positive and a negative expert, combined with the base model's logits at several alphas.

Source: Liu et al. 2021, section 3 (sentiment) and equation 2; the base is filtered before they are combined.

    python experiments/main.py --config=configs/dexperts.py[:yelp|:gemma|:tiny]
    python experiments/ablate.py --config=configs/dexperts.py[:yelp|:gemma|:tiny]

Expected: the share of positive text rises steeply with alpha and falls as steeply below 0; perplexity under
the base rises with its size. Wall time: six minutes on 2 cores after the LM is there. Gemma 3 270M, with experts of 40
updates: .28, .42, .63 (top-p alone), .80 and .92 at alpha -1, -0.5, 0, 0.5 and 1, perplexity 17 to 25.
"""

from configs import sentiment

STRENGTHS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)


def arms(arg):
    strengths = {"tiny": (-1.0, 1.0), "gemma": (-1.0, -0.5, 0.5, 1.0)}.get(arg, STRENGTHS)
    fit = sentiment.training(arg)
    return dict(dexperts=dict(method="dexperts", fit=fit, strengths=strengths, truncate_first=True))


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "DExperts", dict(top_p=dict(), **arms(arg)))


def sweep():
    for first in (True, False):
        for alpha in (-1.0, 1.0):
            yield {"methods.dexperts.truncate_first": first, "methods.dexperts.strengths": (alpha,)}
