"""Prompt tuning and control prefixes on sentiment.

Sources: Lester et al. 2021 (a prompt for each sentiment), Clive et al. 2022 (one prefix for all texts and one for each
sentiment, made by one network, learned together on all texts).

    python experiments/main.py --config=configs/prompt.py[:yelp|:gemma|:tiny|:paper]
    python experiments/ablate.py --config=configs/prompt.py[:yelp|:tiny]

Measured on Yelp with 150 updates (commit 88d60dd, docs/results/length_and_search.md): .58 positive without control, .52
and .62 by prompts of 20 vectors, .54 and .65 by prefixes, .46 and .70 at strength 2; more vectors change the model
more, and how they begin makes no visible difference. Strengths above 1 move further from the other class. With `paper`
the model is GPT-2 Large, with 100 vectors or with prefixes of 50 + 2 vectors and a network of width 800.
"""

from configs import sentiment

SIZES = {"tiny": (2, 1, 8), "paper": (100, 50, 800)}  # vectors of a prompt, shared vectors of a prefix, network
RATES = {"paper": (0.3, 7e-5)}


def arms(arg):
    tokens, shared, network = SIZES.get(arg, (20, 10, 128))
    training = sentiment.training("yelp" if arg == "paper" else arg)["training"]
    rates = RATES.get(arg, (0.1, 1e-3))
    prompt, prefix = (dict(training=training | dict(rate=rate)) for rate in rates)
    if arg == "paper":
        prompt = dict(training=prompt["training"] | dict(algorithm="adafactor"), z=1e-4)
    prefix["shape"] = dict(place="prefix", length=shared, attributes=dict(label=2), network=network)
    found = {}
    for name, label in (("negative", 0), ("positive", 1)):
        own = dict(shape=dict(length=tokens), where=dict(label=label))
        found[f"prompt_{name}"] = dict(method="prompt", fit=prompt | own)
        strengths = (1.0,) if arg == "tiny" else (1.0, 2.0)
        own = dict(chosen=dict(label=label))
        found[f"prefix_{name}"] = dict(method="prompt", fit=prefix | own, strengths=strengths)
    return found


def get_config(arg="bundled"):
    if arg == "paper":
        return sentiment.paper("gpt2-large", "Prompts and prefixes", dict(top_p=dict(), **arms(arg)))
    return sentiment.experiment(arg, "Prompts and prefixes", dict(top_p=dict(), **arms(arg)))


def sweep():
    for length in (1, 5, 20, 100):
        for kind in ("vocabulary", "uniform"):
            yield {"methods.prompt_positive.fit.shape.length": length, "methods.prompt_positive.fit.start.kind": kind}
