"""Control against fluency and diversity: DGLM from no guidance to much, beside DExperts, steering and Quark.

Sources: Lovelace et al. 2024 (DGLM), Liu et al. 2021 (DExperts), Turner et al. 2023 (steering), Lu et al. 2022 (Quark).

    python experiments/compare.py --config=configs/compare_diffusion.py[:yelp|:gemma|:tiny]
    python experiments/compare.py --config=configs/compare_diffusion.py:yelp_equal      around the KL of DGLM

In `yelp` steering and DExperts have their own strengths. A drawn latent alone moves the language model by about one nat
per token, so with `_equal` behind the world DExperts and steering have the strengths that move it by as much, besides a
third of it; Quark has what it learned in three rounds, on the best and on the middle quantile; and each of 500 prompts
is continued once.
"""

from configs import dexperts, dglm, quark, reward, sentiment, steer
from ctg_jax.types import InputError

# Nats per token, texts to solve for the strengths on, prompts of each label.
EQUAL = dict(kl=(0.3, 1.0), held=64, prompts=250)
TINY = dict(kl=(1e-3,), held=8, prompts=2)


def learned(arg, parts):
    """Quark towards positive text, which explores the first words of texts of both labels."""
    learn = parts.get("learn") or sentiment.of_world(reward.WORLDS, arg)()["learn"]
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
        equal = TINY if arg == "tiny" else EQUAL
        for arm in others.values():
            arm.pop("strengths")
            arm |= dict(kl=equal["kl"])
        others |= learned(arg, parts)
        parts["calibrate"] = dict(data=sentiment.held_out(parts["train"], limit=equal["held"]), tokens=24)
        parts["prompts"] |= dict(limit=equal["prompts"])
        parts["sample"] |= dict(n=1)
        parts["evaluate"] |= dict(kl=True)
    methods = dict(base=dict(filter={}), top_p=dict(), **others, dglm=dglm.arms(arg)["dglm"])
    title = "Diffusion beside steering and experts" + (", at equal KL, and Quark" if size else "")
    return sentiment.composed(title, parts, methods)
