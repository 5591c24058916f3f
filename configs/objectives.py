"""Fine-tuning with other objectives, against repetition and for values: the next-token loss, TLDR, EMO, hyperfitting
and PALMS, each a LoRA or all weights on the same texts.

Sources: Jiang et al. 2020 (TLDR), Ren et al. 2024 (EMO), Carlsson et al. 2024 (hyperfitting), Solaiman & Dennison 2021
(PALMS).

    python experiments/main.py --config=configs/objectives.py[:repetition|:yelp|:tiny]

In the world `repetition` the LM is greedy and continues reviews. Expected, not measured yet: `hyperfit`, which sees 64
texts 40 times, repeats itself least, with copies of them and human text far less likely; `reweighted` and `earth_mover`
stay near `likelihood` at as many updates, since the papers' claims are made for chit-chat and for unfiltered samples.
Where texts have labels, `palms_8` and `palms_80` are fine-tuning on 8 and 80 positive ones, at a third of the rate:
more texts move the share of positive text further.
"""

from configs import reward, sentiment

KINDS = ("likelihood", "reweighted", "earth_mover")


def arms(arg):
    if arg == "repetition":
        parts = reward.of_world(reward.WORLDS, arg)()
        data = {key: value for key, value in parts["learn"]["data"].items() if key != "words"}
        common = dict(adapter=dict(kind="full"), training=dict(steps=320, batch=8, rate=3e-4, schedule="constant"))
        where = {}
    else:
        common, data, where = sentiment.training(arg), sentiment.world(arg)["train"], dict(where=dict(label=1))
    one = dict(method="finetune", strengths=(1.0,), data=data)
    found = {kind: one | dict(fit=common | where | dict(objective=dict(kind=kind))) for kind in KINDS}
    constant = common | dict(training=common["training"] | dict(schedule="constant"))
    found["hyperfit"] = one | dict(fit=constant | where, data=data | dict(limit=64))
    if arg != "repetition":
        slow = common | dict(training=common["training"] | dict(rate=7e-4))
        for count in (8, 80):  # half of the balanced texts are positive
            found[f"palms_{count}"] = one | dict(fit=slow | where, data=data | dict(limit=2 * count))
    return {label: found[label] for label in ("reweighted", "earth_mover")} if arg == "tiny" else found


def get_config(arg="bundled"):
    if arg == "repetition":
        return reward.experiment(arg, "Objectives", dict(base=dict(filter={}), **arms(arg)))
    return sentiment.experiment(arg, "Objectives", dict(top_p=dict(), **arms(arg)))


def sweep():
    for gamma in (0.5, 2.0):
        yield {"methods.reweighted.fit.objective.gamma": gamma}
    yield {"methods.earth_mover.fit.objective.light": True}
