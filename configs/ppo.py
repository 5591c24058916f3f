"""PPO with a KL penalty per token, from the samples of each round's own policy.

Source: Ziegler et al. 2019, Ouyang et al. 2022; `calibrate` for InfAlign (Balashankar et al. 2024).

    python experiments/main.py --config=configs/ppo.py[:yelp|:yelp_down|:tiny]
    python experiments/ablate.py --config=configs/ppo.py[:yelp|:tiny]

Expected: reward rises in every round at little KL. Yelp: from .32 positive to .50 at half the strength, .68 at all.
"""

from configs import reward


def arms(arg):
    fit = dict(beta=0.1, objective=dict(normalise=arg != "tiny"), training=dict(rate=5e-4))
    return dict(ppo=dict(method="ppo", fit=fit, strengths=(0.5, 1.0)))


def get_config(arg="bundled"):
    return reward.experiment(arg, "PPO", dict(top_p=dict(), **arms(arg)))


def sweep():
    for beta in (0.02, 0.5):
        yield {"methods.ppo.fit.beta": beta}
    for n in (0, 4):
        yield {"methods.ppo.fit.calibrate": n}
