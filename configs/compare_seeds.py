"""Two targets for learning from a reward on a real LM, each with three seeds of the whole fit.

    python experiments/compare.py --config=configs/compare_seeds.py[:quark|:gdc|:tiny]

quark   from the first words of positive sentences of Yelp towards negative text, exploring under top-p 0.9: the share
        should rise by 35 points at no more than 1.4 times the perplexity, with dist-2 within a tenth of the base's
gdc     a share of .8 of positive text after the first words of sentences of both kinds: fresh samples without a filter,
        after the prompts of training, where the share was asked for, should have it within .03. It is counted by the
        reward itself (`sentiment`); the judge `positive` saw nothing of it. After negative first words alone no weights
        reach .8: in 16 samples of each prompt only .73 of the prompts have a positive one

The settings are those of `quark.py:yelp_down` and `gdc.py:yelp` with a quarter of the prompts. Quark has half the rows
of an update, two thirds of the updates and 15 rounds in exchange, which learn from as many rows as its 5 rounds there;
GDC has four times the samples of a prompt and a gentler rate. Seeds are rows of one table.

Sources: Lu et al. 2022, Khalifa et al. 2021.
"""

from configs import gdc, quark, reward
from ctg_jax.types import InputError

SEEDS = (0, 1, 2)
PROMPTS = 250


def seeded(label, arm, **fit):
    """An arm for each seed, at full strength."""
    return {f"{label}_{seed}": arm | dict(strengths=(1.0,), fit=arm["fit"] | fit | dict(seed=seed)) for seed in SEEDS}


def get_config(arg="quark"):
    if arg not in ("quark", "gdc", "tiny"):
        raise InputError(f"the argument of the configuration is {arg!r}: expected one of quark, gdc, tiny")
    world = dict(quark="yelp_down", gdc="yelp").get(arg, arg)
    learn = reward.WORLDS[world]()["learn"]
    data = learn["data"] | ({} if arg == "tiny" else dict(limit=PROMPTS))
    if arg == "quark":
        arm = quark.arms(world)["quark"] | dict(data=data)
        arms = dict(top_p=dict(), **seeded("quark", arm, rounds=15, training=dict(steps=200, batch=16)))
        return reward.experiment(world, "Quark towards negative text", arms)
    if arg == "gdc":
        data = data | dict(where=None, balance="label", limit=PROMPTS // 2)
    share = gdc.arms(world)["gdc" if arg == "tiny" else "gdc_share"] | dict(data=data)
    more = {}
    if arg == "gdc":  # at a LoRA's usual rate of 2e-3 a round is farther from the target on samples of other prompts
        explore = learn["explore"] | dict(n=16)
        more = dict(rounds=10, explore=explore, training=dict(steps=200, batch=32, rate=3e-4))
    config = reward.experiment(world, "GDC with a share asked for", dict(base=dict(), **seeded("gdc", share, **more)))
    config.prompts = data
    config.sample.filter = dict()
    config.sample.n = 2 if arg == "tiny" else 4
    config.judges.update(learn["rewards"])
    if arg == "gdc":  # the perplexity of the base, whose distribution the policy should stay close to
        del config.evaluate["fluency"]
        config.evaluate.lm_name = "yelp-gpt2-mini"
    return config
