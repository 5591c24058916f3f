"""Two targets for learning from a reward on a real LM, each with three seeds of the whole fit.

    python experiments/compare.py --config=configs/compare_seeds.py[:quark|:gdc|:prompted|:tiny]

quark     from the first words of positive sentences of Yelp towards negative text, exploring under top-p 0.9: the share
          should rise by 35 points at no more than 1.4 times the perplexity, with dist-2 within a tenth of the base's
gdc       a share of .8 of positive text without any prompt, as the paper generates: fresh samples without a filter
          should have it within .03. It is counted by the reward itself (`sentiment`); the judge `positive` saw nothing
          of it. The arm `plain` is one seed without the baseline
prompted  the same share after the first four words of sentences of both kinds. This asks for far more: in 16 samples of
          each prompt only .73 of the negative ones have a positive text, so that others must have hardly any negative

Quark has the settings of `quark.py:yelp_down` with a quarter of the prompts, half the rows of an update, two thirds of
the updates and 15 rounds in exchange, which learn from as many rows as its 5 rounds there. GDC has a baseline,
with which no sample becomes likelier than the target has it, and half a LoRA's usual rate. Seeds are rows of one table.

Sources: Lu et al. 2022, Khalifa et al. 2021, Korbak et al. 2022b (the baseline).
"""

from configs import gdc, quark, reward
from ctg_jax.types import InputError

ARGS = ("quark", "gdc", "prompted", "tiny")
SEEDS = (0, 1, 2)
PROMPTS = 250
ROUNDS = 10
# 4,000 samples a round, of which a quarter decides and the others are learned from twice. The rate falls over all
# rounds: at a constant one the noise of the updates, not the target, decides where the share stops rising.
FIT = dict(
    rounds=ROUNDS,
    adapter=dict(rank=2),
    training=dict(steps=200, batch=32, rate=1e-3, schedule="linear", rounds=ROUNDS),
    samples=dict(limit=10.0, baseline=10.0, passes=None),
)


def seeded(label, arm, **fit):
    """An arm for each seed, at full strength."""
    return {f"{label}_{seed}": arm | dict(strengths=(1.0,), fit=arm["fit"] | fit | dict(seed=seed)) for seed in SEEDS}


def get_config(arg="quark"):
    if arg not in ARGS:
        raise InputError(f"the argument of the configuration is {arg!r}: expected one of {', '.join(ARGS)}")
    world = dict(quark="yelp_down", gdc="yelp", prompted="yelp").get(arg, arg)
    learn = reward.WORLDS[world]()["learn"]
    data = learn["data"] | ({} if arg == "tiny" else dict(limit=PROMPTS))
    if arg == "quark":
        arm = quark.arms(world)["quark"] | dict(data=data)
        arms = dict(top_p=dict(), **seeded("quark", arm, rounds=15, training=dict(steps=200, batch=16)))
        return reward.experiment(world, "Quark towards negative text", arms)
    share = gdc.arms(world)["gdc" if arg == "tiny" else "gdc_share"]
    if arg == "gdc":
        judged = data | dict(where=None, words=0)  # rows of independent texts, so that there are intervals
        data, n, fit = judged | dict(limit=1), 8, FIT | dict(explore=learn["explore"] | dict(n=4000))
    elif arg == "prompted":
        data = judged = data | dict(where=None, balance="label", limit=PROMPTS // 2)
        n, fit = 4, FIT | dict(explore=learn["explore"] | dict(n=16))
    else:
        judged, n, fit = data, 2, {}
    arms = seeded("gdc", share | dict(data=data), **fit)
    if arg == "gdc":
        arms["plain"] = arms["gdc_0"] | dict(fit=arms["gdc_0"]["fit"] | dict(samples=FIT["samples"] | dict(baseline=None)))
    config = reward.experiment(world, "GDC with a share asked for", dict(base=dict(), **arms))
    config.prompts = judged
    config.sample.filter = dict()
    config.sample.n = n
    config.judges.update(learn["rewards"])
    if arg != "tiny":  # the perplexity of the base, whose distribution the policy should stay close to
        del config.evaluate["fluency"]
        config.evaluate.lm_name = "yelp-gpt2-mini"
    return config
