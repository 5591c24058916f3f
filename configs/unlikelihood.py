"""Unlikelihood training: less repetition, by tokens, by sequences, and with a policy gradient beside them.

Sources: Welleck et al. 2020; Lagutin et al. 2021, of which the arm `implicit` has the mix (half of it likelihood, a
quarter each of sequence-level unlikelihood and policy gradient; the authors draw one of them for every update, with
these as probabilities).

    python experiments/main.py --config=configs/unlikelihood.py[:repetition|:yelp|:tiny]
    python experiments/ablate.py --config=configs/unlikelihood.py:repetition

`repetition` is the world to look at: the figures are rep-3, the share of diverse continuations and the perplexity of
human text. In the others it is an arm to compare with; there the reward is diversity, whatever the world's is.

Expected there: rep-3 of greedy continuations from .34 to .14 with `sequence`; `token` alone does not lower it. Human
text becomes likelier, since these reviews are new to the LM.
"""

from configs import reward

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


def get_config(arg="bundled"):
    return reward.experiment(arg, "Unlikelihood", dict(base=dict(filter={}), **arms(arg)))


def sweep():
    for token in (0.5, 2.0):
        yield {"methods.token.fit.objective.token": token}
    for policy in (0.0, 1.0):
        yield {"methods.implicit.fit.objective.policy": policy}
    for ngram in (3, 6):
        yield {"methods.sequence.fit.objective.ngram": ngram}
