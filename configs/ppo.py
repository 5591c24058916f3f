"""PPO with a KL penalty per token, from the samples of each round's own policy.

Source: Ziegler et al. 2019, Ouyang et al. 2022; `calibrate` for InfAlign (Balashankar et al. 2024).

    python experiments/main.py --config=configs/ppo.py[:yelp|:yelp_down|:tiny|:paper[_toxicity|_sentiment]]
    python experiments/ablate.py --config=configs/ppo.py[:yelp|:tiny]

`grpo` and `rloo` are the same loop without values (Shao et al. 2024, Ahmadian et al. 2024). Yelp and bundled have them
as arms. With `paper` the settings are those of PPO in the paper of Quark, whose tables have it, and of InfAlign, whose
reward is the calibrated one for the best of four.

Expected: reward rises in every round at little KL. Yelp: from .32 positive to .50 at half the strength, .68 at all.
"""

from configs import paper, reward


def arms(arg):
    fit = dict(beta=0.1, objective=dict(normalise=arg != "tiny"), training=dict(rate=5e-4))
    return dict(ppo=dict(method="ppo", fit=fit, strengths=(0.5, 1.0)))


def value_free(arg):
    """GRPO and RLOO at the settings of `arms`."""
    fit = arms(arg)["ppo"]["fit"]
    one = dict(method="ppo", strengths=(0.5, 1.0))
    kinds = dict(grpo="group", rloo="leave_one_out")
    return {k: one | dict(fit=fit | dict(objective=fit["objective"] | dict(advantage=v))) for k, v in kinds.items()}


PAPER = dict(
    rounds=100,
    explore=dict(n=1, max_new=20, batch=512),
    beta=0.05,
    adapter=dict(kind="full"),
    objective=dict(whiten=True, value_clip=0.2, value=1.0),
    training=dict(steps=400, batch=128, rate=1e-5, eps=1e-5, warmup=0, save_every=400),
)
TASKS = ("toxicity", "sentiment")


def paper_arms(task):
    aligned = PAPER | dict(calibrate=10.0, explore=PAPER["explore"] | dict(n=4))
    fits = dict(ppo=PAPER) if task == "toxicity" else dict(ppo=PAPER, infalign=aligned)
    return {label: dict(method="ppo", strengths=(1.0,), fit=fit) for label, fit in fits.items()}


def get_config(arg="bundled"):
    if task := paper.task_of(arg, TASKS):
        data = reward.WORLDS[paper.WORLDS[task]]()["learn"]["data"] | dict(limit=85_000)
        return paper.experiment(task, "PPO", paper.LARGE, paper_arms(task), data=data)
    found = arms(arg) if arg == "tiny" else arms(arg) | value_free(arg)
    return reward.experiment(arg, "PPO", dict(top_p=dict(), **found))


def sweep():
    for beta in (0.02, 0.5):
        yield {"methods.ppo.fit.beta": beta}
    for n in (0, 4):
        yield {"methods.ppo.fit.calibrate": n}
