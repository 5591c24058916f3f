"""Texts of a given length: a countdown, the same as an upper bound, PPO with the length as reward, and the best of n.

Sources: Butcher et al. 2024 (the countdown and its upper bound), Jie et al. 2024 (a length reward for PPO, and
filtering samples by length), Retkowski & Waibel 2025 (filtering without training).

    python experiments/compare.py --config=configs/compare_length.py[:yelp|:gemma|:tiny|:requests|:requests=PATH]

The countdown counts tokens and the others words. Expected, not measured yet: the best of 16 comes near the countdown,
and PPO lies between the base and the best of 4.

With `requests` one countdown, fitted in the yelp world, is asked for 5 to 60 tokens, alone and in a chain with steering
at 2 and at -2. Sentences of Yelp have about 10 tokens, so texts of all these lengths are needed, with labels: JSON
lines whose PATH follows. Without it the sentences are used, and the long requests are beyond what was learned.
"""

from configs import countdown, reward, sentiment, steer
from configs.countdown import REQUEST

LENGTHS = (5, 10, 20, 30, 40, 60)


def arms(arg):
    learn = dict(beta=0.05, explore=dict(n=2, max_new=6 if arg == "tiny" else 40), rounds=1 if arg == "tiny" else 4)
    learn["training"] = dict(steps=2, batch=4) if arg == "tiny" else dict(steps=100, batch=32)
    own = sentiment.world(arg).get("learn")  # the gemma world of rewards is that of toxicity
    prompts = (own or reward.WORLDS[arg]()["learn"])["data"]
    return countdown.arms(arg) | dict(
        ppo=dict(method="ppo", fit=learn, rewards=REQUEST, data=prompts),
        best_of_n=dict(best_of=(2,) if arg == "tiny" else (4, 16), rewards=REQUEST),
    )


def requests(path):
    """The configuration of `requests`; `path` is that of the texts, or empty."""
    parts = sentiment.yelp()
    fit = dict(words=4, adapter=dict(rank=16), training=dict(steps=500, batch=16, tokens=64, schedule="linear"))
    data = parts["train"]
    if path:
        data = data | dict(source=f"jsonl:{path}", limit=20000)
    found = dict(top_p=dict(), steer=steer.arms("yelp")["steer"] | dict(strengths=(-2.0, 2.0)))
    for length in LENGTHS:
        asked = f"countdown_{length}"
        found[asked] = dict(method="countdown", fit=fit | dict(length=length), data=data)
        for name, strength in (("negative", -2.0), ("positive", 2.0)):
            found[f"{name}_{length}"] = dict(chain={asked: 1.0, "steer": strength})
    parts["sample"] |= dict(n=2, max_new=max(LENGTHS) + 8)
    parts["evaluate"] = dict(lm_name="yelp-gpt2-mini", resamples=1000)
    return sentiment.composed("Requests for a length", parts, found)


def get_config(arg="bundled"):
    kind, _, path = arg.partition("=")
    if kind == "requests":
        return requests(path)
    return countdown.composed(sentiment.world(arg), "Length", arms(arg))
