"""Diffusion-LM: a diffusion model over word vectors in place of the decode loop, steered to a sentiment, to a length,
to parts of speech, and to two of these at once.

Source: Li et al. 2022.

    python experiments/main.py --config=configs/diffusion_lm.py[:yelp|:e2e|:tiny]

Measured with 100 steps, without clamping and with the network of before (docs/faults.md): each control holds several
times as often as unasked, length in seven samples of ten; texts are half grammatical, at a perplexity hundreds of times
that of the autoregressive LM beside it, in half an hour on one core after the LM. The present settings were not
measured. How often every control holds, alone and with others, is what `experiments/diffusion_controls.py`
measures.

`e2e` has the paper's texts about restaurants, from the folder e2e/orig of CTG_DATA_DIR: it trains on devset.csv, since
the training set is not there, and takes prompts from testset_w_refs.csv. Its controls are semantic content (`food`,
`area`), parts of speech, a span of them, length, two of these together, and the most agreeing of ten samples. Spans of
a parse tree need a parser and are left out; infilling is `Model.infill` and `generate.py --blank`. The network learns
for an hour and a half of one core. Lengths and tags are pulled eight times as hard as contents: with one pull for all,
parts of speech held less often the longer the network had learned (docs/results/diffusion.md). Every text then has its
length and its parts of speech, a span holds in .98, food in .97, food and length together in 1.00, at a pooled
perplexity of 30 unguided and 46 to 196 with one target. The paper reports, of a model trained ten times as long on ten
times the texts, semantic content .812, parts of speech .900 and length .999.
"""

import re

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
    "e2e": dict(
        data=None,
        prompts=None,
        fit=dict(dim=16, width=192, depth=4, length=64, training=dict(steps=10000, batch=32, rate=1e-3)),
        guide=dict(
            # Each is in a third or a half of the texts of devset.csv, whose only other food is English.
            mentions=dict(food=("food[Chinese]",), area=("area[riverside]",)),
            training=dict(steps=2000),
        ),
        calls=200,
        places=0.8,  # the rate of updates towards lengths and tags; see the top of this file
        length=24,
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
    if arg == "e2e":
        span = [None] * 4 + ["adp", "det", "noun"]
        return {
            "free": {},
            "food": dict(food=1),
            "area": dict(area=1),
            "length": dict(length=length),
            "tags": dict(tags=[None, "verb", "det", "noun"]),
            "span": dict(tags=span),
            "food_and_length": dict(food=1, length=length),
            "food_and_area": dict(food=1, area=1),
        }
    return {
        "free": {},
        "positive": dict(label=1),
        "length": dict(length=length),
        "noun": dict(tags=[None, None, "det", "noun"]),
        "positive_and_length": dict(label=1, length=length),
    }


def arms(arg):
    world = sentiment.of_world(WORLD, arg)

    def aim(target):
        rate = world.get("places", 0.1) if {"length", "tags"} & set(target) else 0.1
        return dict(target=target, calls=world["calls"], rate=rate, clamp=1.0)

    return {
        name: dict(
            method="diffusion_lm",
            fit=dict(guide=world["guide"], aim=aim(target), **world["fit"]),
            strengths=(1.0,) if target else (0.0,),
            filter={},
            **({"data": world["data"]} if world["data"] else {}),
        )
        for name, target in targets(arg).items()
    }


def chinese(prompt, text):
    """A judge: whether a text says that the food is Chinese, however it says it."""
    return float(bool(re.search(r"\bchinese\b", prompt + text, re.IGNORECASE)))


def riverside(prompt, text):
    """A judge: whether a text says that the place is at the river."""
    return float(bool(re.search(r"\briver(side)?\b", prompt + text, re.IGNORECASE)))


def e2e(folder):
    """The world of E2E: prompts are the first words of held-out texts."""
    text = dict(text="{ref}")
    world = sentiment.bundled()
    train = dict(source=f"csv:{folder}/devset.csv", split="all", text=text)
    tests = dict(source=f"csv:{folder}/testset_w_refs.csv", split="all", text="ref", words=1)
    world["lm"]["data"] = dict(train)
    judge = dict(kind="function", version="1")
    return world | dict(
        prompts=tests | dict(limit=50),
        sample=dict(n=10, max_new=60, batch=100, filter=dict(top_p=0.9)),
        judges=dict(
            food=judge | dict(function="configs.diffusion_lm:chinese"),
            area=judge | dict(function="configs.diffusion_lm:riverside"),
        ),
        evaluate=dict(resamples=1000),
        train=train,
    )


def get_config(arg="bundled"):
    if arg == "e2e":
        methods = dict(top_p=dict(), **arms(arg))
        methods["agreeing"] = dict(consensus=(10,), chain=dict(food=1.0), filter={})
        parts = e2e(f"{sentiment.data_folder('e2e', 'e2e/')}/e2e/orig")
        parts["sample"]["n"] = 4
        return sentiment.composed("Diffusion-LM on E2E", parts, methods)
    world = sentiment.of_world(WORLD, arg)
    config = sentiment.experiment(arg, "Diffusion-LM", dict(top_p=dict(), **arms(arg)))
    if world["prompts"]:
        config.prompts = world["prompts"]
    return config


def sweep():
    for rate in (0.05, 0.2, 0.8):
        yield {"methods.positive_and_length.fit.aim.rate": rate}
    for clamp in (0.0, 0.5):
        yield {"methods.positive_and_length.fit.aim.clamp": clamp}
