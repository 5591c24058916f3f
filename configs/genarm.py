"""GenARM: a reward model that scores every next token, learned from pairs of the model's own samples.

Source: Xu et al. 2025.

    python experiments/main.py --config=configs/genarm.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/genarm.py[:yelp|:tiny]

The samples and rewards are those of the world of `configs/reward.py`. `paper` has the settings of the authors' code for
the pairs of HH (a LoRA, a rate of 5e-4 after 100 updates of warm-up, decay 0.05) with a base of 7B parameters, and the
world's pairs. Expected: more positive text with the strength, at a KL to the base like that of PPO.
"""

from ml_collections import ConfigDict

from configs import reward

PAPER = dict(batch=32, steps=1000, rate=5e-4, warmup=100, schedule="cosine", decay=0.05)
ADAPTER = {"tiny": dict(rank=2)}


def arms(arg):
    fit = dict(rounds=1, beta=0.05, adapter=ADAPTER.get(arg, dict(rank=8)))
    return dict(genarm=dict(method="genarm", strengths=(1.0,) if arg == "tiny" else (0.5, 1.0, 2.0), fit=fit))


def get_config(arg="bundled"):
    if arg != "paper":
        return reward.experiment(arg, "GenARM", dict(top_p=dict(), **arms(arg)))
    made = arms(arg)
    made["genarm"]["fit"] |= dict(training=PAPER)
    config = reward.experiment("yelp", "GenARM", dict(top_p=dict(), **made)).to_dict()
    config["lm"] = dict(source="huggyllama/llama-7b", dtype="bfloat16")
    return ConfigDict(config)


def sweep():
    for beta in (0.01, 0.5):
        yield {"methods.genarm.fit.beta": beta}
