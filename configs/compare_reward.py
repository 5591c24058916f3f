"""Learning from a reward: every method from the same base, with as many samples, by the same scorer.

In the bundled world they make as many updates too. Elsewhere Quark and `best_only` make twice as many as PPO and GDC,
for Quark splits them over its quantiles, and Click and DPO, whose rows are pairs, half as many.

Measured on Yelp, from .32 of the samples positive: Click .78, `best_only` .73 at by far the highest perplexity, GDC
.71, Quark .69 and PPO .68 at the lowest, best of four .48; two hours on one core. Quark and `best_only` explored
without a filter then, and do so under top-p 0.9 now, which has not been measured.

Sources: Lu et al. 2022 (Quark), Ouyang et al. 2022 (PPO), Khalifa et al. 2021 (GDC), Zheng et al. 2023 (Click),
Rafailov et al. 2023 (DPO, of which there are no figures yet), Stiennon et al. 2020 (best of n). Fine-tuning on the best
samples alone is Quark with `best_only`.

    python experiments/compare.py --config=configs/compare_reward.py[:yelp|:yelp_down|:tiny]
"""

from configs import click, gdc, ppo, preference, quark, reward


def get_config(arg="bundled"):
    best = quark.arms(arg)["quark"]
    best = best | dict(fit=best["fit"] | dict(sorting=dict(best_only=True)), strengths=(1.0,))
    pointwise = gdc.arms(arg) if arg == "bundled" else dict(gdc=gdc.arms(arg)["gdc"])
    methods = dict(
        base=dict(filter={}),
        top_p=dict(),
        best_of_n=dict(best_of=(2, 4) if arg == "tiny" else (4,)),
        **quark.arms(arg),
        best_only=best,
        **ppo.arms(arg),
        **pointwise,
        **click.arms(arg),
        dpo=preference.arms(arg)["dpo"],
    )
    return reward.experiment(arg, "Learning from a reward", methods)
