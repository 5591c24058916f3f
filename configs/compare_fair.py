"""Learning from a rare reward, at equal samples and at equal updates: which method moves a feature that few texts have,
and at what distance from the LM?

Quark in quantiles (`quark`) and in two classes, with and without the feature (`judged`), fine-tuning on its best
quantile, PPO, GRPO, RLOO, DPO, GDC and Click, from the same LM, prompts and reward. All have as many rounds and
samples. With `yelp` and `tiny` they also make as many updates of as many texts, so that methods whose rows are pairs
have half the rows; with `yelp_own` each makes the updates of its own configuration, and `yelp_small` is `yelp` at a
twelfth of its samples and a tenth of its rows. The reward is whether a text mentions drinks, as 20 of 1,000 samples of
the LM under top-p 0.9 do; being a count, it judges as well.

    python experiments/ablate.py  --config=configs/compare_fair.py[:yelp|:yelp_small|:yelp_own]      three seeds
    python experiments/compare.py --config=configs/compare_fair.py[:yelp|:yelp_small|:yelp_own|:tiny]      one

Reports draw every figure over the KL to the LM, which is how methods are compared here: at equal KL. Both commands
continue where they were interrupted.

Sources: Lu et al. 2022, whose tables have Quark before PPO on a reward that is rare for the LM; the methods' own
configurations name theirs. With `yelp_small` Quark is before PPO in two classes and learns nothing in quantiles.
"""

from configs import click, ppo, preference, quark, reward
from ctg_jax.types import InputError

DRINKS = {"drink", "drinks", "beer", "beers", "wine", "coffee", "tea", "cocktail", "cocktails", "margarita", "bar"}
PAIRED = ("click", "dpo")
# A fifth of the samples is ten times those with the feature, so quantiles cannot tell it; both classes in each batch.
JUDGED = dict(thresholds="judge", strata=True)


def rare(prompt, text):
    """1 where a text mentions drinks."""
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    return float(bool(DRINKS & set(words)))


def arms(world):
    """The arms, each with the strengths and the settings of its own configuration."""
    best = quark.arms(world)["quark"]
    rewards = dict(drinks=dict(kind="function", function="configs.compare_fair:rare", version="1"))
    found = dict(
        quark=best,
        judged=best | dict(fit=best["fit"] | dict(tokens=2, sorting=JUDGED), strengths=(0.0, 1.0)),
        best_only=best | dict(fit=best["fit"] | dict(sorting=dict(best_only=True)), strengths=(1.0,)),
        **ppo.arms(world),
        **ppo.value_free(world),
        dpo=preference.arms(world)["dpo"],
        gdc=dict(method="gdc", strengths=(0.5, 1.0), fit=dict(moments=dict(drinks=1.0), samples=dict(limit=10.0))),
        click=click.arms(world)["click"],
    )
    return {label: arm | dict(rewards=rewards) for label, arm in found.items()}


def equal(found, steps, batch):
    """The arms with as many updates, each of as many texts; GDC too, where few of its samples count."""
    for label, arm in found.items():
        rows = batch // 2 if label in PAIRED else batch
        own = {k: v for k, v in arm["fit"].get("training", {}).items() if k not in ("steps", "batch")}
        more = dict(samples=dict(limit=10.0, passes=None)) if label == "gdc" else {}
        arm["fit"] = arm["fit"] | dict(training=own | dict(steps=steps, batch=rows)) | more
    return found


def get_config(arg="yelp"):
    world, _, size = arg.partition("_")
    if arg not in ("yelp", "yelp_own", "yelp_small", "tiny"):
        known = "yelp, yelp_own, yelp_small, tiny"
        raise InputError(f"the argument of the configuration is {arg!r}: expected one of {known}")
    learn = reward.WORLDS[world]()["learn"]
    found = arms(world)
    for arm in found.values():  # a rare reward needs more samples of a prompt
        own = arm["fit"].get("explore", {})  # such as the filter of Quark
        arm["fit"] = arm["fit"] | dict(explore=learn["explore"] | own | dict(n=4 if world == "tiny" else 8))
    if size == "small":
        found = equal(found, 100, 16)
        for arm in found.values():
            arm |= dict(data=learn["data"] | dict(limit=140))
            arm["fit"] |= dict(rounds=3)
    elif not size:
        found = equal(found, learn["training"]["steps"] * (1 if world == "tiny" else 2), learn["training"]["batch"])
    if world == "tiny":  # no text of its untrained LM mentions drinks
        found = {label: arm | dict(rewards=learn["rewards"]) for label, arm in found.items()}
        (name,) = learn["rewards"]
        found["gdc"]["fit"] |= dict(moments={name: 0.6})
    config = reward.experiment(world, "A rare reward", dict(base=dict(filter={}), top_p=dict(), **found))
    config.judges.update(found["quark"]["rewards"])
    return config


def sweep():
    names = ("quark", "judged", "best_only", "ppo", "grpo", "rloo", "dpo", "gdc", "click")
    for seed in range(3):
        yield {f"methods.{name}.fit.seed": seed for name in names}
