"""Texts of a given length: a countdown to it, and the same as an upper bound.

Source: Butcher et al. 2024.

    python experiments/main.py --config=configs/countdown.py[:yelp|:gemma|:tiny|:paper]
    python experiments/ablate.py --config=configs/countdown.py[:yelp|:tiny]

The countdown counts tokens, and the judge words, since a reward reads text: it says by how many words a text misses
WORDS, and the figures of a report give the mean number of tokens too. Expected, not measured yet: the countdown misses
its number of tokens by less than one on average where the base misses it by half of it, and the upper bound is never
exceeded. With `paper` the model is Llama 2 7B, asked for 100 tokens.
"""

from configs import sentiment

WORDS, TOKENS = 10, 12
REQUEST = dict(length=dict(kind="length", target=f"{WORDS} words"))


def arms(arg):
    training = sentiment.training("yelp" if arg == "paper" else arg)
    training = {key: training[key] for key in ("adapter", "training") if key in training}
    training["shape"] = dict(longest=64)
    tokens = 4 if arg == "tiny" else TOKENS
    data = dict(data=sentiment.SHORT) if arg == "tiny" else {}
    return dict(
        countdown=dict(method="countdown", fit=training | dict(length=tokens)) | data,
        at_most=dict(method="countdown", fit=training | dict(length=tokens, slack=1.0)) | data,
    )


def composed(parts, title, arms):
    """A configuration whose judge reads lengths, of samples that no rule cuts."""
    parts["judges"] = parts["judges"] | REQUEST
    parts["sample"] = parts["sample"] | dict(filter={})
    return sentiment.composed(title, parts, dict(base=dict(filter={})) | arms)


def get_config(arg="bundled"):
    if arg == "paper":
        counted = arms(arg)["countdown"]
        counted["fit"] |= dict(length=100, shape=dict(longest=256), training=dict(steps=3000, batch=32, tokens=256))
        found = dict(base=dict(filter={}), countdown=counted)
        return sentiment.paper("meta-llama/Llama-2-7b-hf", "Length", found, max_new=256)
    return composed(sentiment.world(arg), "Length", arms(arg))


def sweep():
    for length in (5, 10, 20, 40):
        yield {"methods.countdown.fit.length": length}
