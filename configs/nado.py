"""NADO: an oracle about whole texts, divided among their tokens by what was learned from the model's own samples.

Source: Meng et al. 2022.

    python experiments/main.py --config=configs/nado.py[:yelp|:yelp_down|:tiny|:paper]
    python experiments/ablate.py --config=configs/nado.py[:yelp|:tiny]

The oracle is the reward of the world with its threshold. `paper` has the small model of the lexical experiments, four
layers of GPT-2 small's width that read the states of GPT-2 Large, and their optimizer. Expected: the share of positive
text rises with the rounds, at a lower KL to the base than fine-tuning has at the same share.
"""

from ml_collections import ConfigDict

from configs import reward

SMALL = dict(
    bundled=dict(width=64, depth=1, heads=2),
    yelp=dict(width=128, depth=2, heads=4),
    tiny=dict(width=8, depth=1, heads=2),
)
PAPER = dict(kind="mixed", shape=dict(width=768, depth=4, heads=12))
TRAINING = dict(batch=256, rate=2e-5, decay=0.02, steps=2000)


def arms(arg):
    strengths = (1.0,) if arg == "tiny" else (0.5, 1.0, 2.0)
    given = dict(threshold="median") if arg == "tiny" else {}
    shape = SMALL.get(arg, SMALL["yelp"])
    return dict(
        nado=dict(method="nado", strengths=strengths, fit=dict(weight=1.0, **given)),
        nado_mixed=dict(method="nado", strengths=strengths, fit=dict(kind="mixed", shape=shape, **given)),
    )


def get_config(arg="bundled"):
    if arg != "paper":
        return reward.experiment(arg, "NADO", dict(top_p=dict(), **arms(arg)))
    made = dict(nado=dict(method="nado", strengths=(1.0,), fit=PAPER | dict(training=TRAINING)))
    config = reward.experiment("yelp", "NADO", dict(top_p=dict(), **made)).to_dict()
    config["lm"] = dict(source="gpt2-large", dtype="float32")
    return ConfigDict(config)


def sweep():
    for weight in (0.0, 0.5):
        yield {"methods.nado.fit.weight": weight}
    yield {"methods.nado.fit.divergence": "backward"}
    yield {"methods.nado.fit.rounds": 1}
