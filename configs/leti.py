"""Learning from success and failure, and from what is said of a failure: Quark with two classes in place of quantiles.

A text should have between 8 and 12 words; of one that has not the reward says "3 words too many". The arm `quark` sorts
by how far a text is off, `negative_aware` has the tokens of failure and success alone, and `leti` learns each text
behind what is said of it, from the samples of the last round as its paper does. All make as many updates.

Sources: Lu et al. 2022; negative-aware training, Wang et al. 2024; LeTI, Wang et al. 2023, which also mixes in texts of
its pretraining (not done here).

    python experiments/main.py --config=configs/leti.py[:yelp|:tiny]

Expected, not measured yet: both classes reach more texts of the right length than quantiles in as many rounds, because
each sees more of the updates; what is said of failures helps where they fail in different ways.
"""

from configs import quark, reward


def arms(arg):
    best = quark.arms(arg)["quark"]
    both = best | dict(fit=best["fit"] | dict(tokens=2, sorting=dict(thresholds="judge")), strengths=(0.0, 1.0))
    said = both | dict(fit=both["fit"] | dict(sorting=dict(thresholds="judge", feedback=True), pool="last"))
    return dict(quark=best, negative_aware=both, leti=said)


def get_config(arg="bundled"):
    request = "between 2 and 4 words" if arg == "tiny" else "between 8 and 12 words"
    length = dict(length=dict(kind="length", target=request))
    methods = {label: arm | dict(rewards=length) for label, arm in arms(arg).items()}
    config = reward.experiment(arg, "Success, failure and words about it", dict(top_p=dict(), **methods))
    config.judges.update(length)  # a count, which needs no other judge
    return config
