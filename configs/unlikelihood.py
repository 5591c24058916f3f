"""Unlikelihood training: less repetition, by tokens, by sequences, and with a policy gradient beside them.

Sources: Welleck et al. 2020; Lagutin et al. 2021, of which the arm `implicit` has the mix (half of it likelihood, a
quarter each of sequence-level unlikelihood and policy gradient; the authors draw one of them for every update, with
these as probabilities).

`paper` has the mixture that the authors' code draws: a policy-gradient update with probability .25, otherwise
sequence-level unlikelihood with probability .25, otherwise likelihood, which is .25, .1875 and .5625 of all. The policy
gradient has the coefficient 3.0 and learns from greedy samples, as their default top-k of 1 makes them.

    python experiments/main.py --config=configs/unlikelihood.py[:repetition|:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/unlikelihood.py:repetition

`repetition` is the world to look at: the figures are rep-3, the share of diverse continuations and the perplexity of
human text. In the others it is an arm to compare with; there the reward is diversity, whatever the world's is.

Expected there: rep-3 of greedy continuations from .34 to .14 with `sequence`; `token` alone does not lower it. Human
text becomes likelier, since these reviews are new to the LM.
"""

from configs import paper, reward

DIVERSITY = dict(diversity=dict(kind="diversity"))
ARMS = dict(
    token=dict(likelihood=1.0, token=1.0),
    sequence=dict(likelihood=0.5, token=0.0, sequence=0.5),
    implicit=dict(likelihood=0.5, token=0.0, sequence=0.25, policy=0.25),
)


def arms(arg):
    common = dict(method="unlikelihood", rewards=DIVERSITY, strengths=(1.0,))
    length = dict(length=16) if arg == "tiny" else {}  # its LM has a context of 64 tokens, and prompts of up to 28
    found = {label: common | dict(fit=dict(objective=weights, **length)) for label, weights in ARMS.items()}
    found["token"]["rewards"] = {}  # it learns from texts alone, nothing is sampled
    if arg == "repetition":  # greedy samples, as in the paper: there the model repeats itself
        greedy = dict(n=1, max_new=64, batch=100, greedy=True)
        found["sequence"] = common | dict(fit=dict(objective=ARMS["sequence"] | dict(sequence=2.0), explore=greedy))
    return found


# Prompts are 16 words where the paper has 50 tokens; the mean of the terms stands for a draw of one of them at each
# update.
PAPER = dict(
    rounds=100,
    explore=dict(n=1, max_new=100, batch=256, greedy=True),
    length=100,
    adapter=dict(kind="full"),
    training=dict(
        steps=50, batch=6, rate=6.25e-5, warmup=0, schedule="linear", rounds=100, decay=0.01, clip=1.0, save_every=0
    ),
)
MIXED = dict(likelihood=0.5625, token=0.0, sequence=0.1875, policy=0.25 * 3.0, greedy=True)


def paper_arms():
    sequence = dict(likelihood=0.5, token=0.0, sequence=0.5)  # Welleck et al. 2020
    common = dict(method="unlikelihood", rewards=DIVERSITY, strengths=(1.0,))
    weights = dict(sequence=sequence, implicit=MIXED)
    return {label: common | dict(fit=PAPER | dict(objective=objective)) for label, objective in weights.items()}


def get_config(arg="bundled"):
    if paper.task_of(arg, ("repetition",)):
        return paper.experiment("repetition", "Unlikelihood", paper.SMALL, paper_arms(), n=1, max_new=100)
    return reward.experiment(arg, "Unlikelihood", dict(base=dict(filter={}), **arms(arg)))


def sweep():
    for token in (0.5, 2.0):
        yield {"methods.token.fit.objective.token": token}
    for policy in (0.0, 1.0):
        yield {"methods.implicit.fit.objective.policy": policy}
    for ngram in (3, 6):
        yield {"methods.sequence.fit.objective.ngram": ngram}
