"""Cross-model control: a tiny model learns beside the LM what makes texts positive, at several strengths.

Source: Wu et al. 2024 (CMC). `cross_model.carry` gives the control of another LM, also one with other tokens.

    python experiments/main.py --config=configs/cross_model.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/cross_model.py[:yelp|:tiny]

`paper` trains a model of 15M parameters beside Llama 2 7B with the authors' rate and schedule. Expected: the share of
positive text rises with the strength; what was carried to a second LM moves it less than what was trained beside it.
"""

from configs import sentiment

SHAPES = dict(
    bundled=dict(width=64, depth=2, heads=2),
    yelp=dict(width=128, depth=2, heads=4),
    gemma=dict(width=128, depth=2, heads=4),
    tiny=dict(width=8, depth=1, heads=2),
)
TRAINING = dict(
    bundled=dict(steps=400, batch=16, tokens=96),
    yelp=dict(steps=800, batch=32, tokens=32),
    gemma=dict(steps=300, batch=16, tokens=32),
    tiny=dict(steps=2, batch=4, tokens=16, warmup=1),
)
PAPER = dict(width=288, depth=6, heads=6)
PAPER_TRAINING = dict(batch=64, tokens=512, rate=2e-4, schedule="cosine", steps=2400, warmup=72)


def arms(arg):
    fit = dict(shape=sentiment.of_world(SHAPES, arg), where=dict(label=1), training=sentiment.of_world(TRAINING, arg))
    strengths = (1.0,) if arg == "tiny" else (0.5, 1.0, 2.0)
    return dict(cross_model=dict(method="cross_model", fit=fit, strengths=strengths))


def get_config(arg="bundled"):
    if arg == "paper":
        made = arms("yelp")
        made["cross_model"]["fit"] |= dict(shape=PAPER, training=PAPER_TRAINING)
        made = dict(base=dict(), **made)
        return sentiment.paper("meta-llama/Llama-2-7b-hf", "Cross-model control", made, greedy=True, n=1)
    return sentiment.experiment(arg, "Cross-model control", dict(top_p=dict(), **arms(arg)))


def sweep():
    for width in (32, 128):
        yield {"methods.cross_model.fit.shape.width": width}
