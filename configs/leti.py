"""Learning from success, failure and feedback in words: Quark with two classes in place of quantiles.

A text should have between 8 and 12 words; for one that has more, the feedback of the reward is "3 words too many". The
arm `quark` sorts texts by how far their length is from the request, `negative_aware` has one token for failure and one
for success, and `leti` also puts the feedback before each text that it learns, from samples of the last round as in its
paper. All arms make the same number of updates.

Sources: Lu et al. 2022; negative-aware training, Wang et al. 2024; LeTI, Wang et al. 2023, which also mixes in texts of
its pretraining (not done here).

    python experiments/main.py --config=configs/leti.py[:yelp|:tiny]

Expected, not measured yet: with two classes more texts have the right length after the same number of rounds than with
quantiles, because each class gets more of the updates; feedback helps where texts fail in different ways.
"""

from configs import quark, reward


def arms(arg):
    best = quark.arms(arg)["quark"]
    both = best | dict(fit=best["fit"] | dict(tokens=2, sorting=dict(thresholds="judge")), strengths=(0.0, 1.0))
    leti = both | dict(fit=both["fit"] | dict(sorting=dict(thresholds="judge", feedback=True), pool="last"))
    return dict(quark=best, negative_aware=both, leti=leti)


def get_config(arg="bundled"):
    request = "between 2 and 4 words" if arg == "tiny" else "between 8 and 12 words"
    length = dict(length=dict(kind="length", target=request))
    methods = {label: arm | dict(rewards=length) for label, arm in arms(arg).items()}
    config = reward.experiment(arg, "Success, failure and words about it", dict(top_p=dict(), **methods))
    config.judges.update(length)  # a count, which needs no other judge
    return config
