"""Gamma sampling: the probability of a list of positive words is raised, and that of negative words lowered.

Source: Wu & Sun 2022. The filter comes before the sets, as in the authors' code.

    python experiments/main.py --config=configs/gamma.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/gamma.py[:yelp|:tiny]

Expected: the share of positive text rises with the strength and falls below 0. In a look at 120 texts of Yelp, texts
with more positive than negative words were 8 % without control, 29 % at 0.5, 43 % at 1 and 1 % at -1, and perplexity
under the base stayed at that of top-p above 0. With `paper` the model is GPT-2.
"""

from configs import sentiment

GOOD = "good great delicious tasty fresh friendly helpful polite attentive clean cozy comfortable excellent wonderful"
BAD = "bad awful bland stale greasy burnt rude careless arrogant dirty filthy cramped smelly terrible"
PAPER = dict(gamma=(0.2, 0.8), words=(tuple(GOOD.split()), tuple(BAD.split())), whole=True)


def arms(arg):
    init = PAPER | dict(whole=arg != "tiny")  # the tokens of the tiny world are bytes
    strengths = (-1.0, 1.0) if arg == "tiny" else (-1.0, -0.5, 0.5, 1.0)
    return dict(gamma=dict(method="gamma", init=init, strengths=strengths, truncate_first=True))


def get_config(arg="bundled"):
    if arg == "paper":
        return sentiment.paper("gpt2", "Gamma sampling", dict(top_p=dict(), **arms("yelp")))
    return sentiment.experiment(arg, "Gamma sampling", dict(top_p=dict(), **arms(arg)))


def sweep():
    for activation in ("tan", "log"):
        yield {"methods.gamma.init.activation": activation}
