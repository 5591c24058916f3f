"""Preferences: DPO, IPO, iREPO, SPIN and FIGA, from pairs of the LM's own samples or of samples and human texts.

Sources: Rafailov et al. 2023 (DPO), Azar et al. 2024 (IPO), Chen et al. 2024 (SPIN), Le et al. 2024 (iREPO), Guo et al.
2024 (FIGA).

    python experiments/main.py --config=configs/preference.py[:yelp|:yelp_down|:tiny]
    python experiments/ablate.py --config=configs/preference.py[:yelp|:tiny]

Expected, not measured yet: the share of positive text rises with each; iREPO, which learns by how much a text is
better, stays nearer to the LM than DPO at the same share. SPIN and FIGA approach what they are shown: SPIN the texts
that people wrote with the wanted label, FIGA the better samples. The rounds, samples and updates are those of the
world, so that they compare with the other methods at equal cost; in the yelp worlds with half the updates, since a row
is a pair.
"""

from configs import reward

ARMS = dict(
    dpo=dict(objective=dict(beta=0.1, most=1)),
    ipo=dict(objective=dict(kind="squared", beta=0.1, most=1)),
    irepo=dict(objective=dict(kind="squared", target="difference", beta=0.1), reference="last"),
    spin=dict(against="human", reference="last"),
    figa=dict(objective=dict(kind="edits")),
)


def arms(arg):
    halved = dict(training=dict(steps=75)) if arg in ("yelp", "yelp_down") else {}  # its rows are pairs
    found = {label: dict(method="preference", strengths=(0.5, 1.0), fit=fit | halved) for label, fit in ARMS.items()}
    learn = reward.of_world(reward.WORLDS, arg)()["learn"]
    data, spin = learn["data"], found["spin"]["fit"]
    # Human texts are cut where samples are.
    spin["training"] = spin.get("training", {}) | dict(tokens=learn["explore"]["max_new"])
    wanted = 0 if arg == "yelp_down" else 1
    if arg not in ("repetition", "toxicity", "gemma"):  # what people wrote there has no label
        found["spin"]["data"] = data | dict(where=data.get("where", {}) | dict(label=wanted))
    if arg == "tiny":
        found = {label: found[label] | dict(strengths=(1.0,)) for label in ("dpo", "irepo", "spin")}
    return found


def get_config(arg="bundled"):
    return reward.experiment(arg, "Preferences", dict(top_p=dict(), **arms(arg)))


def sweep():
    for beta in (0.03, 0.3):
        yield {"methods.dpo.fit.objective.beta": beta}
    yield {"methods.dpo.fit.objective.anchor": 0.2}
    for temperature in (0.3, 3.0):
        yield {"methods.irepo.fit.objective.temperature": temperature}
    yield {"methods.dpo.fit.rounds": 1}
