"""Selective token generation: a learned choice, token by token, between the base and an adapter, from a reward.

Source: Jo et al. 2022; the size of the context, the optimizer and top-p of `paper` are the authors'.

    python experiments/main.py --config=configs/selective.py[:yelp|:yelp_down|:tiny|:paper]
    python experiments/ablate.py --config=configs/selective.py[:yelp|:tiny]

The authors fine-tune the base on a few texts beforehand and reward the overlap with references of their tasks; here the
base is the world's language model and the reward that of the world. `paper` has GPT-2 Medium and the recurrent context.
Expected: reward rises in every round, and further than that of the adapter alone at the same number of texts. On Yelp
the first round overshoots, see docs/results/decoding.md.
"""

from configs import paper, reward

WIDTH = dict(bundled=64, yelp=128, tiny=8)
PAPER = dict(context="stream", width=512)
TRAINING = dict(rate=1e-5, decay=1e-5, batch=16)


def arms(arg):
    width = WIDTH.get(arg, WIDTH["yelp"])
    fit = dict(width=width, training=dict(rate=1e-3))
    made = dict(selective=dict(method="selective", fit=fit, strengths=(1.0,)))
    if arg == "tiny":
        return made
    return made | dict(selective_stream=dict(method="selective", fit=fit | dict(context="stream"), strengths=(1.0,)))


def get_config(arg="bundled"):
    if arg != "paper":
        return reward.experiment(arg, "Selective generation", dict(top_p=dict(), **arms(arg)))
    made = dict(selective=dict(method="selective", strengths=(1.0,), fit=PAPER | dict(training=TRAINING)))
    return paper.experiment("sentiment", "Selective generation", "openai-community/gpt2-medium", made)


def sweep():
    yield {"methods.selective.fit.objective": dict(kind="joint")}
    yield {"methods.selective.fit.objective": dict(clip=0.2)}
