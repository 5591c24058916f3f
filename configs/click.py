"""Click: bad samples of the LM itself are made less likely, as a whole, than good ones of the same prompt.

Source: Zheng et al. 2023.

    python experiments/main.py --config=configs/click.py[:yelp|:yelp_down|:repetition|:tiny]
    python experiments/ablate.py --config=configs/click.py[:yelp|:tiny]

The rounds, samples and updates are those of the world, so that it is compared with the other methods at equal cost; the
paper's tables have one round of 20 samples a prompt.

Expected on Yelp: from .32 positive to .73 at half the strength and .78 at all of it, at 1.3 and 1.7 times the
perplexity.
"""

from configs import reward

SETTINGS = {
    "repetition": dict(gamma=0.3, margin=15.0),
    "tiny": dict(gamma=0.1, margin=15.0, threshold="median"),
}


def arms(arg):
    fit = SETTINGS.get(arg, dict(gamma=0.1, margin=15.0))
    if arg in ("yelp", "yelp_down"):
        fit = fit | dict(training=dict(steps=75))  # of pairs
    return dict(click=dict(method="click", strengths=(0.5, 1.0), fit=fit))


def get_config(arg="bundled"):
    return reward.experiment(arg, "Click", dict(top_p=dict(), **arms(arg)))


def sweep():
    yield {"methods.click.fit.pair": "above"}
    for margin in (5.0, 30.0):
        yield {"methods.click.fit.margin": margin}
    for gamma in (0.0, 0.5):  # 0 learns from the positives alone
        yield {"methods.click.fit.gamma": gamma}
    yield {"methods.click.fit.rounds": 1}
