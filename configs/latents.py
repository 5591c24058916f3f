"""Latent steering vectors and what they are for.

Source: Subramani, Suresh & Peters 2022, with its predecessors of 2019 and 2020; see `ctg_jax.methods.latent_steer`.

    python experiments/latents.py --config=configs/latents.py             bundled reviews
    python experiments/latents.py --config=configs/latents.py:yelp        real LM and sentences; CTG_DATA_DIR
    python experiments/latents.py --config=configs/latents.py:gemma       any LM, fewer of them; CTG_LM_DIR too
    python experiments/latents.py --config=configs/latents.py:best        1,000 of them at the best site
    python experiments/latents.py --config=configs/latents.py:domains     other texts, and vectors of other widths
    python experiments/latents.py --config=configs/latents.py:prompter        DGLM's prompter and sentences held out
    python experiments/latents.py --config=configs/latents.py:prefix          the same of the networks of dglm.py:prefix
    python experiments/latents.py --config=configs/latents.py:tiny        seconds, for tests

Expected in the yelp world: one vector in the attention's memory recovers every sentence, one that is added to a hidden
state a part of them; see RESULTS.md for the figures and for the wall time.
"""

import os

from ml_collections import ConfigDict

from configs import dglm, sentiment

REVIEWS = sentiment.REVIEWS


def tiny():
    world = sentiment.tiny()
    data = dict(source=REVIEWS, split="test", words=4, balance="label", limit=4)
    fit = dict(site="memory", search=dict(updates=12, batch=4))
    return dict(
        lm=world["lm"],
        recovery=dict(
            data=dict(reviews=data),
            fit=dict(site="memory", search=dict(updates=3, batch=4)),
            grid=dict(site=["memory", "middle"], positions=["all"]),
        ),
        analysis=dict(data=data, fit=fit, options=dict(pairs=2, between=3, draws=2)),
        reconstruction=dict(
            train=dglm.texts("tiny"),
            data=dict(source=REVIEWS, split="test", limit=4),
            fit=dglm.fit("tiny"),
            options=dict(max_new=6, batch=4),
        ),
    )


def bundled():
    world = sentiment.bundled()
    train = dict(source=REVIEWS, split="validation", words=12, balance="label", limit=100)
    test = dict(source=REVIEWS, split="test", words=12, balance="label", limit=50)
    fit = dict(site="memory", tokens=32)
    return dict(
        lm=world["lm"],
        recovery=dict(
            data=dict(reviews=test),
            fit=dict(tokens=32, search=dict(updates=200)),
            grid=dict(site=["middle", "memory"], positions=["all"]),
        ),
        analysis=dict(data=train, fit=fit, options={}),
    )


def yelp():
    world = sentiment.yelp()  # refuses to go on without CTG_DATA_DIR
    folder = os.environ["CTG_DATA_DIR"]
    dev = dict(source=f"jsonl:{folder}/yelp/dev.jsonl", split="all", balance="label")
    train = dict(source=f"jsonl:{folder}/yelp/train.jsonl", split="all", balance="label")
    fit = dict(site="memory", tokens=32)
    limited = dict(updates=150, rate=0.3)
    layers = range(1, 7)
    sites = [
        "embeddings",
        *(f"{kind}:{l}" for l in layers for kind in ("attention", "block")),
        "blocks",
        "final",
        "memory",
    ]
    judge = {k: v for k, v in world["judges"]["positive"].items() if k != "heldout"} | dict(reads="text")
    return dict(
        lm=world["lm"],
        recovery=dict(
            data=dict(yelp={**dev, "limit": 12}),
            fit=dict(tokens=32, search=limited),
            grid=dict(site=sites, positions=["all", "first"]),
        ),
        transfer=dict(
            train={**train, "limit": 1000},
            data={**dev, "limit": 250},
            fit=fit,
            judge=judge,
            counts=[10, 100, 1000],
            strengths=[0.0, 0.5, 1.0, 1.5, 2.0, 3.0],
        ),
        similarity=dict(
            pairs=dict(file=f"{folder}/stsb/stsb-en-dev.csv"),
            # A vector at a hidden site recovers few sentences of news: without a limit each takes all 500 updates.
            fits={
                "middle": fit | dict(site="middle", search=limited),
                "final": fit | dict(site="final", search=limited),
                "memory": fit,
            },
            encoder=f"{folder}/models/all-MiniLM-L6-v2",
        ),
        analysis=dict(data={**dev, "limit": 250}, fit=fit, options={}),
    )


def gemma():
    """Any LM (CTG_LM_DIR), with fewer sentences and vectors, since each update runs through all of the model."""
    world, config = sentiment.gemma(), yelp()
    sentences, transfer = config["recovery"]["data"]["yelp"], config["transfer"]
    sites = dict(site=["middle", "final", "memory"], positions=["all"])
    fewer = dict(
        train=transfer["train"] | dict(limit=25),
        data=transfer["data"] | dict(limit=25),
        counts=[5, 25],
        strengths=[0.0, 1.0, 2.0, 3.0],
    )
    similarity = config["similarity"]
    fits = {site: fit | dict(search=dict(updates=40, rate=0.3)) for site, fit in similarity["fits"].items()}
    return dict(
        lm=world["lm"],
        recovery=config["recovery"] | dict(data=dict(yelp=sentences), grid=sites),
        transfer=transfer | fewer,
        similarity=similarity | dict(pairs=similarity["pairs"] | dict(limit=300), fits=fits),
    )


def best():
    """1,000 sentences at the site that recovers all of them."""
    config = yelp()
    dev = config["recovery"]["data"]["yelp"]
    grid = dict(site=["memory"], positions=["all"])
    return dict(lm=config["lm"], recovery=dict(data=dict(yelp={**dev, "limit": 500}), fit=dict(tokens=32), grid=grid))


def domains():
    """Which texts a vector can hold, and in how many numbers: sentences of the LM's own domain, of film reviews and of
    Wikipedia at two lengths, and random words. Novels as `--config.recovery.data.novels.source=text:FILE` and so on."""
    config = yelp()
    folder = os.environ["CTG_DATA_DIR"]
    sentences = config["recovery"]["data"]["yelp"]
    data = dict(yelp=sentences, random=sentences | dict(random_words=0))
    for words in (6, 14):
        data[f"imdb {words}"] = dict(source=f"jsonl:{folder}/imdb/train.jsonl.xz", split="all", words=words, limit=24)
        wiki = dict(source=f"text:{folder}/wikitext2/valid.txt", split="all", words=words, limit=24)
        data[f"wikipedia {words}"] = wiki
    fit = dict(tokens=48, site="memory")
    return dict(lm=config["lm"], recovery=dict(data=data, fit=fit, grid=dict(dim=[64, 256, 1024, 3072])))


def prompter(train=None, fit=None):
    """What the latent of a sentence encoder makes a language model say (DGLM)."""
    config = yelp()
    held = config["recovery"]["data"]["yelp"] | dict(limit=250)
    way = dict(train=train or dglm.texts("yelp"), fit=fit or dglm.fit("yelp"))
    # As in training, and behind four words, as the prompts of dglm.py have.
    cuts = {"anywhere": None, "4 words": 4}
    return dict(lm=config["lm"], reconstruction=dict(data=held, options={}, cuts=cuts, **way))


def prefix():
    """The same of the networks of configs/dglm.py:prefix, at the weight of the prefix that was best there."""
    return prompter(dglm.texts("yelp") | dict(limit=dglm.SHORT["limit"]), dglm.fit_short())


WORLDS = dict(
    prompter=prompter, prefix=prefix, bundled=bundled, yelp=yelp, gemma=gemma, best=best, domains=domains, tiny=tiny
)


def get_config(arg="bundled"):
    return ConfigDict({"title": "Latent steering vectors", **sentiment.of_world(WORLDS, arg)()})
