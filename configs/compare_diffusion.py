"""Control against fluency and diversity: DGLM from no guidance to much, beside DExperts and steering.

Sources: Lovelace et al. 2024 (DGLM), Liu et al. 2021 (DExperts), Turner et al. 2023 (steering).

    python experiments/compare.py --config=configs/compare_diffusion.py[:yelp|:tiny]
"""

from configs import dexperts, dglm, sentiment, steer


def get_config(arg="bundled"):
    methods = dict(
        base=dict(filter={}),
        top_p=dict(),
        **steer.arms(arg),
        **dexperts.arms(arg),
        dglm=dglm.arms(arg)["dglm"],
    )
    return sentiment.experiment(arg, "Diffusion beside steering and experts", methods)
