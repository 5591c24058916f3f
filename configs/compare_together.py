"""Controls at three sites alone and together: a latent vector in the attention's memory, LM-Steer on the output
embeddings, DExperts on the logits, and all of them in one chain.

Sources: Subramani et al. 2022, Han et al. 2024, Liu et al. 2021.

    python experiments/compare.py --config=configs/compare_together.py[:yelp|:tiny]

Expected: the chain moves the share of positive text further than each control does at the same strength, both ways.
"""

from configs import dexperts, lm_steer, sentiment

LATENT = {
    "bundled": dict(
        fit=dict(site="memory", tokens=96, search=dict(updates=300, rate=0.3)), count=None, data=dict(limit=150)
    ),
    "yelp": dict(fit=dict(site="memory", tokens=32), count=950, data=dict(limit=1000)),
    "tiny": dict(fit=dict(site="memory", tokens=63, search=dict(updates=2)), count=None, data=dict(limit=8, words=6)),
}
CHAIN = dict(latent=2.0, lm_steer=3.0, dexperts=1.0)


def get_config(arg="bundled"):
    latent = sentiment.of_world(LATENT, arg)
    train = sentiment.of_world(sentiment.WORLDS, arg)()["train"]
    parts = {"lm_steer": lm_steer.arms(arg)["lm_steer"], "dexperts": dexperts.arms(arg)["dexperts"]}
    alone = {label: parts[label] | dict(strengths=(-CHAIN[label], CHAIN[label])) for label in parts}
    methods = dict(
        top_p=dict(),
        latent=dict(
            method="latent_steer",
            fit=latent["fit"],
            data=train | latent["data"],
            direction=dict(count=latent["count"]),
            strengths=(-CHAIN["latent"], CHAIN["latent"]),
        ),
        **alone,
        together=dict(chain=CHAIN, strengths=(-1.0, -0.5, 0.5, 1.0)),
    )
    return sentiment.experiment(arg, "Controls together", methods)
