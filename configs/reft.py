"""LoReFT on texts of one sentiment: a subspace of a few dimensions of one layer learns what to hold.

Source: Wu et al. 2024; rank 4 and a learning rate of 2e-3 are within the paper's grid, which has ranks from 1 to 32.

    python experiments/main.py --config=configs/reft.py[:yelp|:gemma|:tiny|:paper]
    python experiments/ablate.py --config=configs/reft.py[:yelp|:tiny]

Expected, not measured yet: more positive text than without control, with 1,028 learned numbers where LoRA has 32,768
(yelp: 2,052 and 196,608). `paper` is Llama 7B with rank 4 in every layer.
"""

from configs import sentiment

TINY = dict(rank=2, training=dict(steps=2, batch=4, tokens=16))


def arms(arg):
    training = sentiment.training(arg)["training"]
    fit = TINY if arg == "tiny" else dict(sites="middle", training={k: v for k, v in training.items() if k != "rate"})
    return dict(reft=dict(method="reft", fit=dict(where=dict(label=1), **fit), strengths=(1.0,)))


def get_config(arg="bundled"):
    if arg == "paper":
        fit = dict(where=dict(label=1), rank=4, sites="all", training=dict(steps=1000, batch=32, rate=9e-4, tokens=64))
        made = dict(reft=dict(method="reft", fit=fit, strengths=(1.0,)))
        return sentiment.paper("huggyllama/llama-7b", "LoReFT", dict(top_p=dict(), **made))
    return sentiment.experiment(arg, "LoReFT", dict(top_p=dict(), **arms(arg)))


def sweep():
    for rank in (1, 16):
        yield {"methods.reft.fit.rank": rank}
