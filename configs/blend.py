"""CombLM: a small model that was trained on positive texts, mixed with the base by a gate on their entropies.

Source: Ormazabal et al. 2023; the network of the gate, its learning rate and its inputs are the authors'.

    python experiments/main.py --config=configs/blend.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/blend.py[:yelp|:tiny]

The domain is positive reviews. Expected: the share of positive text rises towards that of the small model; the
perplexity of human text is below that of both. With `paper` the models are OPT-30B and OPT-1.3B.
"""

from configs import sentiment

SMALL = dict(
    bundled=dict(width=64, depth=1, heads=2, training=dict(steps=600, tokens=96, batch=16, rate=5e-3)),
    yelp=dict(width=64, depth=2, heads=2, training=dict(steps=1000, tokens=32, rate=5e-3)),
    tiny=dict(width=8, depth=1, heads=1, training=dict(steps=2, batch=4, tokens=16, warmup=1)),
)
GATE = dict(bundled={}, yelp={}, tiny=dict(gate=dict(width=4, depth=1), observe=1, training=dict(steps=2, batch=4)))


def arms(arg):
    train = sentiment.world(arg)["train"]
    data = {name: value for name, value in train.items() if name != "balance"} | dict(where=dict(label=1))
    if "where" in train:
        data["where"] = train["where"] | dict(label=1)
    fit = dict(small=sentiment.of_world(SMALL, arg), **sentiment.of_world(GATE, arg))
    return dict(blend=dict(method="blend", fit=fit, data=data, strengths=(1.0,) if arg == "tiny" else (0.5, 1.0)))


def get_config(arg="bundled"):
    if arg == "paper":
        fit = dict(small=dict(source="facebook/opt-1.3b"), training=dict(batch=1, tokens=1024, steps=100))
        made = arms("yelp")["blend"] | dict(fit=fit)
        return sentiment.paper("facebook/opt-30b", "CombLM", dict(top_p=dict(), blend=made))
    return sentiment.experiment(arg, "CombLM", dict(top_p=dict(), **arms(arg)))


def sweep():
    for reads in ("none", "entropies"):
        yield {"methods.blend.fit.gate": dict(reads=reads)}
