"""Texts of a given length: a countdown, the same as an upper bound, PPO with the length as reward, and the best of n.

Sources: Butcher et al. 2024 (the countdown and its upper bound), Jie et al. 2024 (a length reward for PPO, and
filtering samples by length), Retkowski & Waibel 2025 (filtering without training).

    python experiments/compare.py --config=configs/compare_length.py[:yelp|:gemma|:tiny]

The countdown counts tokens and the others words. Expected, not measured yet: the best of 16 comes near the countdown,
and PPO lies between the base and the best of 4.
"""

from configs import countdown, reward, sentiment
from configs.countdown import REQUEST


def arms(arg):
    learn = dict(beta=0.05, explore=dict(n=4, max_new=6 if arg == "tiny" else 40), rounds=1 if arg == "tiny" else 4)
    learn["training"] = dict(steps=2, batch=4) if arg == "tiny" else dict(steps=100, batch=32)
    own = sentiment.world(arg).get("learn")  # the gemma world of rewards is that of toxicity
    prompts = (own or reward.WORLDS[arg]()["learn"])["data"]
    return countdown.arms(arg) | dict(
        ppo=dict(method="ppo", fit=learn, rewards=REQUEST, data=prompts),
        best_of_n=dict(best_of=(2,) if arg == "tiny" else (4, 16), rewards=REQUEST),
    )


def get_config(arg="bundled"):
    return countdown.composed(sentiment.world(arg), "Length", arms(arg))
