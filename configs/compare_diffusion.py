"""Control against fluency and diversity: DGLM from no guidance to much, beside DExperts, steering and Quark.

Sources: Lovelace et al. 2024 (DGLM), Liu et al. 2021 (DExperts), Turner et al. 2023 (steering), Lu et al. 2022 (Quark).

    python experiments/compare.py --config=configs/compare_diffusion.py[:yelp|:tiny]
    python experiments/compare.py --config=configs/compare_diffusion.py:yelp_equal      at the KL of DGLM

In `yelp` steering and DExperts have their own strengths. A drawn latent alone moves the language model by about one nat
per token, so with `_equal` behind the world DExperts and steering have the strengths that move it by as much, besides a
third of it; Quark has what it learned in three rounds, on the best and on the middle quantile; and each of 500 prompts
is continued once.
"""

from configs import dexperts, dglm, quark, reward, sentiment, steer
from ctg_jax.types import InputError

LEVELS = {"tiny": (1e-3,)}  # nats per token; elsewhere:
KL = (0.3, 1.0)


def learned(arg):
    """Quark towards positive text, which explores the first words of texts of both labels."""
    learn = reward.of_world(reward.WORLDS, arg)()["learn"]
    if arg == "yelp":
        learn["data"] = learn["data"] | dict(where=None, balance="label", limit=250)
        learn["rounds"] = 3
    return reward.learning(learn, dict(quark=quark.arms(arg)["quark"] | dict(strengths=(0.5, 1.0))))


def get_config(arg="bundled"):
    arg, _, size = arg.partition("_")
    if size not in ("", "equal"):
        raise InputError(f"the size of the comparison is {size!r}: expected equal after the world and a _")
    parts = sentiment.world(arg)
    others = {**steer.arms(arg), **dexperts.arms(arg)}
    if size:
        for arm in others.values():
            arm.pop("strengths")
            arm |= dict(kl=LEVELS.get(arg, KL))
        others |= learned(arg)
        held = dict(skip=parts["train"]["limit"]) if "limit" in parts["train"] else dict(split="test")
        parts["calibrate"] = dict(data=parts["train"] | held | dict(limit=8 if arg == "tiny" else 64), tokens=24)
        parts["prompts"] |= dict(limit=2 if arg == "tiny" else 250)
        parts["sample"] |= dict(n=1)
    methods = dict(base=dict(filter={}), top_p=dict(), **others, dglm=dglm.arms(arg)["dglm"])
    title = "Diffusion beside steering and experts" + (", at equal KL, and Quark" if size else "")
    return sentiment.composed(title, parts, methods)
