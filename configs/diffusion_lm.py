"""Diffusion-LM: a diffusion model over word vectors in place of the decode loop, steered to a sentiment, to a length,
to parts of speech, and to two of these at once.

Source: Li et al. 2022.

    python experiments/main.py --config=configs/diffusion_lm.py[:yelp|:tiny]

Measured with 100 steps, without clamping and with the network of before (docs/faults.md): each control holds several
times as often as unasked, length in seven samples of ten; texts are half grammatical, at a perplexity hundreds of times
that of the autoregressive LM beside it, in half an hour on one core after the LM. The present settings were not
measured. How often every control holds, alone and with others, is what `experiments/diffusion_controls.py`
measures.
"""

from configs import sentiment

SHORT = dict(topic=0, length=0)  # short reviews of restaurants

WORLD = {
    "bundled": dict(
        data=dict(source=sentiment.REVIEWS, split="train", where=SHORT),
        prompts=dict(source=sentiment.REVIEWS, split="test", where=SHORT, limit=25),
        fit=dict(dim=16, width=128, depth=3, length=64, training=dict(steps=10000, batch=32, rate=2e-3)),
        guide=dict(fields=dict(label=2, formal=2), training=dict(steps=400)),
        calls=200,
        length=32,
    ),
    "yelp": dict(
        data=None,
        prompts=None,
        fit=dict(dim=64, width=256, depth=6, length=32, training=dict(steps=20000, batch=64, rate=1e-3)),
        guide=dict(fields=dict(label=2), training=dict(steps=2000)),
        calls=200,
        length=12,
    ),
    "tiny": dict(
        data=None,
        prompts=None,
        fit=dict(dim=8, width=16, depth=2, heads=2, length=64, training=dict(steps=2, batch=4, warmup=1)),
        guide=dict(fields=dict(label=2), reader_width=8, reader_depth=1, training=dict(steps=2)),
        calls=3,
        length=4,
    ),
}


def targets(arg):
    """Name of an arm -> what it is steered to."""
    length = sentiment.of_world(WORLD, arg)["length"]
    if arg == "tiny":
        return {"free": {}, "positive_and_length": dict(label=1, length=length, tags=[None, "noun"])}
    return {
        "free": {},
        "positive": dict(label=1),
        "length": dict(length=length),
        "noun": dict(tags=[None, None, "det", "noun"]),
        "positive_and_length": dict(label=1, length=length),
    }


def arms(arg):
    world = sentiment.of_world(WORLD, arg)
    return {
        name: dict(
            method="diffusion_lm",
            fit=dict(
                guide=world["guide"], aim=dict(target=target, calls=world["calls"], rate=0.1, clamp=1.0), **world["fit"]
            ),
            strengths=(1.0,) if target else (0.0,),
            filter={},
            **({"data": world["data"]} if world["data"] else {}),
        )
        for name, target in targets(arg).items()
    }


def get_config(arg="bundled"):
    world = sentiment.of_world(WORLD, arg)
    config = sentiment.experiment(arg, "Diffusion-LM", dict(top_p=dict(), **arms(arg)))
    if world["prompts"]:
        config.prompts = world["prompts"]
    return config


def sweep():
    for rate in (0.05, 0.1, 0.2):
        yield {"methods.positive_and_length.fit.aim.rate": rate}
    for clamp in (0.0, 0.5):
        yield {"methods.positive_and_length.fit.aim.clamp": clamp}
