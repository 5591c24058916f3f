"""Texts of a given length: a countdown, the same as an upper bound, PPO with the length as reward, and the best of n.

Sources: Butcher et al. 2024 (the countdown and its upper bound), Jie et al. 2024 (a length reward for PPO, and
filtering samples by length), Retkowski & Waibel 2025 (filtering without training).

    python experiments/compare.py --config=configs/countdown.py[:yelp|:gemma|:tiny|:paper]
    python experiments/ablate.py --config=configs/countdown.py[:yelp|:tiny]

The countdown counts tokens and the others words, since a reward reads text: the judge says by how many words a text
misses WORDS, and the figures of a report give the mean number of tokens too. Expected: the countdown misses its number
of tokens by less than one on average where the base misses it by half of it, the upper bound is never exceeded, the
best of 16 comes near, PPO lies between the base and the best of 4. With `paper` the model is Llama 2 7B, with questions
of 10 to 200 tokens.
"""

from configs import reward, sentiment

WORDS, TOKENS = 10, 12
REQUEST = dict(length=dict(kind="length", target=f"{WORDS} words"))


def arms(arg):
    training = sentiment.training("yelp" if arg == "paper" else arg)
    training = {key: training[key] for key in ("adapter", "training") if key in training}
    training["shape"] = dict(longest=64)
    tokens = 4 if arg == "tiny" else TOKENS
    learn = dict(beta=0.05, explore=dict(n=4, max_new=6 if arg == "tiny" else 40), rounds=1 if arg == "tiny" else 4)
    learn["training"] = dict(steps=2, batch=4) if arg == "tiny" else dict(steps=100, batch=32)
    prompts = sentiment.of_world(reward.WORLDS, "yelp" if arg == "paper" else arg)()["learn"]["data"]
    data = dict(data=sentiment.SHORT) if arg == "tiny" else {}
    return dict(
        countdown=dict(method="countdown", fit=training | dict(length=tokens)) | data,
        at_most=dict(method="countdown", fit=training | dict(length=tokens, slack=1.0)) | data,
        ppo=dict(method="ppo", fit=learn, rewards=REQUEST, data=prompts),
        best_of_n=dict(best_of=(2,) if arg == "tiny" else (4, 16), rewards=REQUEST),
    )


def get_config(arg="bundled"):
    base = dict(base=dict(filter={}))
    if arg == "paper":
        counted = arms(arg)["countdown"]
        counted["fit"] |= dict(length=100, shape=dict(longest=256), training=dict(steps=3000, batch=32, tokens=256))
        return sentiment.paper("meta-llama/Llama-2-7b-hf", "Length", base | dict(countdown=counted), max_new=256)
    parts = sentiment.world(arg)
    parts["judges"] = parts["judges"] | REQUEST
    parts["sample"] = parts["sample"] | dict(filter={})
    return sentiment.composed("Length", parts, base | arms(arg))


def sweep():
    for length in (5, 10, 20, 40):
        yield {"methods.countdown.fit.length": length}
