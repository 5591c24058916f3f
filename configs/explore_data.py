"""Exploring what fine-tuning added: a model is tuned on texts of another kind, which the contrast with itself shows.

Source: Isonuma & Titov 2024, contrastive generative exploration, in its static and its iterative version.

    python experiments/main.py --config=configs/explore_data.py[:yelp|:tiny]

The tuning data of this experiment are the positive texts. Expected: at a strength of 0 the share of positive text is
that of the tuned model, and at 1 it is at least that, with a higher perplexity under the base; after rounds of the
iterative version texts differ more from each other (dist-2).
"""

from configs import sentiment

EXPLORE = dict(bundled=dict(n=100, max_new=40), yelp=dict(n=100, max_new=20), tiny=dict(n=4, max_new=4, batch=4))
CONTRAST = dict(
    bundled=dict(training=dict(steps=50, batch=16, tokens=48)),
    yelp=dict(training=dict(steps=50, batch=16, tokens=32)),
    tiny=dict(adapter=dict(rank=2), training=dict(steps=2, batch=4, tokens=16)),
)


def arms(arg):
    fit = dict(where=dict(label=1), **sentiment.training(arg))
    rounds = 1 if arg == "tiny" else 3
    again = dict(rounds=rounds, explore=sentiment.of_world(EXPLORE, arg), contrast=sentiment.of_world(CONTRAST, arg))
    strengths = (1.0,) if arg == "tiny" else (0.0, 0.5, 1.0)
    return dict(
        explore_static=dict(method="explore_data", fit=fit, strengths=strengths),
        explore_iterative=dict(method="explore_data", fit=fit | again, strengths=strengths),
    )


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "Exploring data", dict(top_p=dict(), **arms(arg)))
