"""Conditional steering: towards positive text, but only for prompts that a probe calls negative.

Source: Lee et al. 2024; which texts open the gate is a setting (`field` and `values`).

    python experiments/main.py --config=configs/cast.py[:yelp|:gemma|:tiny|:paper]
    python experiments/ablate.py --config=configs/cast.py[:yelp|:tiny]

Beside it is the same vector without a gate. Expected, not measured yet: on prompts that lean to the negative the two
move the share of positive text alike; on all others conditional steering leaves the samples of the language model as
they are. `paper` is Qwen 1.5 1.8B, the smallest of the paper's models.
"""

from configs import sentiment, steer


def arms(arg):
    plain = sentiment.of_world(steer.SETTINGS, arg)
    gate = dict(field="label", values=(0,), gate=dict(pool="mean"))
    strengths = plain["strengths"][-1:]
    made = dict(cast=dict(method="cast", fit=plain["fit"] | gate, strengths=strengths))
    if arg != "tiny":
        made["steer"] = dict(method="steer", fit=plain["fit"], strengths=strengths)
    return made


def get_config(arg="bundled"):
    if arg == "paper":
        return sentiment.paper("Qwen/Qwen1.5-1.8B", "Conditional steering", dict(top_p=dict(), **arms("gemma")))
    return sentiment.experiment(arg, "Conditional steering", dict(top_p=dict(), **arms(arg)))


def sweep():
    for least in (0.3, 0.5, 0.7):
        yield {"methods.cast.fit.gate.least": least}
