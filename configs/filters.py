"""Vocabulary filters: texts without the letter e (lipograms), and texts of short words.

Source: Roush et al. 2022 (Constrained Text Generation Studio). The filter comes before top-p.

    python experiments/main.py --config=configs/filters.py[:yelp|:tiny]
    python experiments/ablate.py --config=configs/filters.py[:yelp|:tiny]

Expected: no text breaks a rule at strength 1, and perplexity rises with the strength; the share of positive text may
move, since the lists of words that are left are not neutral.
"""

from configs import sentiment

RULES = dict(
    lipogram=dict(rules=(dict(without=("e",)),), transforms=("lower",)),
    short=dict(rules=(dict(shorter=5),), transforms=("letters",), whole_words=True),
)


def arms(arg):
    strengths = (1.0,) if arg == "tiny" else (0.9, 1.0)
    rules = {"lipogram": RULES["lipogram"]} if arg == "tiny" else RULES
    return {name: dict(method="filters", init=init, strengths=strengths) for name, init in rules.items()}


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "Vocabulary filters", dict(top_p=dict(), **arms(arg)))


def sweep():
    for letter in "aeo":
        yield {"methods.lipogram.init.rules": (dict(without=(letter,)),)}
