"""Two targets for learning from a reward on a real LM, each with three seeds of the whole fit.

    python experiments/compare.py --config=configs/compare_seeds.py[:quark|:gdc|:tiny]

quark   from the first words of positive sentences of Yelp towards negative text, exploring under top-p 0.9: the share
        should rise by 35 points at no more than 1.4 times the perplexity, with dist-2 within a tenth of the base's
gdc     a share of .8 of positive text without any prompt, as the paper generates: fresh samples without a filter should
        have it within .03. It is counted by the reward itself (`sentiment`); the judge `positive` saw nothing of it.
        The arm `plain` is one seed without the baseline; strengths above 1 go further than what was learned

Quark has the settings of `quark.py:yelp_down` with a quarter of the prompts, half the rows of an update, two thirds of
the updates and 15 rounds in exchange, which learn from as many rows as its 5 rounds there. GDC has one round of 32,000
samples, eight times as many as a round of `gdc.py:yelp`, and a baseline, with which no sample becomes likelier than
the target has it. Seeds are rows of one table.

Sources: Lu et al. 2022, Khalifa et al. 2021, Korbak et al. 2022b (the baseline).
"""

from configs import gdc, quark, reward
from ctg_jax.types import InputError

SEEDS = (0, 1, 2)
PROMPTS = 250
# One pass over nine tenths of the samples.
GDC = dict(
    rounds=1,
    adapter=dict(rank=8),
    training=dict(steps=900, batch=32, rate=1e-3, schedule="linear"),
    samples=dict(limit=10.0, baseline=10.0, passes=1.0, held=0.1),
)


def seeded(label, arm, strengths=(1.0,), **fit):
    """An arm for each seed."""
    return {
        f"{label}_{seed}": arm | dict(strengths=strengths, fit=arm["fit"] | fit | dict(seed=seed)) for seed in SEEDS
    }


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
    judged, fit = data, {}
    if arg == "gdc":
        judged = data | dict(where=None, words=0)  # rows of independent texts, so that there are intervals
        data, fit = judged | dict(limit=1), GDC | dict(explore=learn["explore"] | dict(n=32_000))
    share = gdc.arms(world)["gdc" if arg == "tiny" else "gdc_share"]
    # 1.75: where the first seed's log-odds, those at 0 and 1 continued, have the share that was asked for.
    arms = seeded("gdc", share | dict(data=data), (1.0, 1.75) if arg == "gdc" else (1.0,), **fit)
    if arg == "gdc":
        plain = GDC["samples"] | dict(baseline=None)
        arms["plain"] = arms["gdc_0"] | dict(strengths=(1.0,), fit=arms["gdc_0"]["fit"] | dict(samples=plain))
    config = reward.experiment(world, "GDC with a share asked for", dict(base=dict(), **arms))
    config.prompts = judged
    config.sample.filter = dict()
    config.sample.n = 2 if arg == "tiny" else 8
    config.judges.update(learn["rewards"])
    if arg == "gdc":  # the perplexity of the base, whose distribution the policy should stay close to
        del config.evaluate["fluency"]
        config.evaluate.lm_name = "yelp-gpt2-mini"
    return config
