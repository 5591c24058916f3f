"""MDLM: a masked diffusion language model beside an autoregressive one of the same size, on the same texts.

Sources: Sahoo et al. 2024; guidance: Nisonoff et al. 2024, Schiff et al. 2024; blocks: Arriola et al. 2025.

    python experiments/main.py --config=configs/mdlm.py[:yelp|:tiny]
    python experiments/main.py --config=configs/mdlm.py:blocks       block diffusion on the texts of yelp
    python experiments/ablate.py --config=configs/mdlm.py[:yelp|:tiny]

The stage `bound` leaves nats per token of held-out texts in runs/bound-…/metrics.jsonl: an upper bound for MDLM, exact
for the LM. In the yelp world an update of MDLM costs about 0.4 s of one core, one of blocks not quite twice as much.

Expected by Arriola et al. 2025: the smaller the blocks, the nearer the bound is to the exact value of the LM. Measured
in `blocks`: .72, .83 and .91 nats above it with blocks of 4, of 16, and without.
"""

from ml_collections import ConfigDict

from configs import reward, sentiment

REVIEWS = sentiment.REVIEWS
TINY = dict(width=16, depth=1, heads=2, length=64, objective=dict(draws=2), training=dict(steps=2, batch=4, warmup=1))
SETTINGS = dict(
    bundled=dict(
        data=dict(source=REVIEWS, where=dict(topic=0)),
        fit=dict(
            width=128,
            depth=2,
            length=104,
            training=dict(batch=16, steps=1200),
            heldout=dict(source=REVIEWS, split="test", limit=200),
        ),
        strengths=(0.0, 1.0, 4.0, 8.0),
    ),
    tiny=dict(
        data=dict(source=REVIEWS, limit=64),
        fit=dict(
            # A network of two updates knows nothing, so its classifier may know nothing either.
            TINY,
            heldout=dict(source=REVIEWS, split="test", limit=4),
            guide=dict(regression=dict(views=1, margin=-1.0, batch=4)),
        ),
        strengths=(0.0, 1.0),
    ),
)


def yelp():
    """The texts that the LM was trained on, as many positive as negative prompts, and the larger LM of reviews to
    measure perplexity."""
    parts = sentiment.yelp()
    folder = parts["lm"]["source"].removesuffix("/models/yelp-gpt2-mini")
    lm = reward.yelp()["evaluate"]["fluency"]
    larger = dict(parts["evaluate"], lm_name="yelp-gpt2-mini", fluency=parts["lm"])
    arm = dict(
        data=lm["data"],
        fit=dict(
            width=128, depth=4, length=32, objective=dict(draws=1, schedule="loglinear"),
            training=dict(batch=64, steps=5000, ema=0.999),
            heldout=dict(source=f"jsonl:{folder}/yelp/dev.jsonl", split="all"),
            # Each text is read four times, so all 120,000 take more than ten minutes of one core.
            guide=dict(regression=dict(limit=20_000)),
        ),
        strengths=(0.0, 1.0, 4.0, 8.0, 16.0),
    )  # fmt: skip
    prompts = dict(parts["prompts"], limit=25)
    return parts | dict(lm=dict(lm, source=""), prompts=prompts, evaluate=larger), arm


def of_blocks(arm, size):
    """The arm as block diffusion in blocks of `size` tokens."""
    return arm | dict(fit=arm["fit"] | dict(objective=arm["fit"]["objective"] | dict(block=size)))


def get_config(arg="bundled"):
    settings = sentiment.of_world(SETTINGS | dict(yelp=None, blocks=None), arg)
    parts, arm = (sentiment.world(arg), settings) if settings else yelp()
    del parts["train"]
    # A diffusion model has no next-token distribution that top-p could cut, so the base has none either.
    arm = dict(method="mdlm", filter={}, **arm)
    methods = dict(base=dict(filter={}), mdlm=arm)
    if arg in ("blocks", "tiny"):
        methods |= {f"blocks_{size}": of_blocks(arm, size) for size in (4, 16)}
    return ConfigDict({"title": "MDLM", **parts, "methods": methods})


def sweep():
    for reveal in (8, 32):
        yield {"methods.mdlm.fit.guide.order.reveal": reveal}
    for block in (1, 8):
        yield {"methods.mdlm.fit.guide.order.block": block}
    yield {"methods.mdlm.fit.objective.kind": "film", "methods.mdlm.fit.guide.order.by": "certain"}
    for reveal in (4, 8, 16):
        yield {"methods.mdlm.fit.guide.order.by": "confidence", "methods.mdlm.fit.guide.order.reveal": reveal}
