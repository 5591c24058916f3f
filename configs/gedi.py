"""GeDi: a class-conditional language model guides the base by Bayes' rule, with its filter.

Source: Krause et al. 2020; alpha 30, cover 0.2 and tau 0.8 are the authors'.

    python experiments/main.py --config=configs/gedi.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/gedi.py[:yelp|:tiny]

The reader is a change of the base model. With `paper` it is GPT-2 Medium, trained at the authors' rate, beside GPT-2
XL, which decodes greedily with a repetition penalty. Expected: a share of positive text between those of PPLM and
DExperts, at the highest perplexity of the three.
"""

from configs import sentiment

PAPER = dict(
    small=dict(source="gpt2-medium"),
    adapter=dict(kind="full"),
    training=dict(batch=4, tokens=192, rate=2e-5, steps=2500, schedule="linear"),
)


def arms(arg):
    strengths = (30.0,) if arg == "tiny" else (1.0, 5.0, 30.0)
    # After two updates the classes are alike, and rounding would decide what the filter keeps.
    more = dict(control=dict(filter=dict(cover=1.0))) if arg == "tiny" else {}
    return dict(gedi=dict(method="gedi", fit=sentiment.training(arg) | more, strengths=strengths))


def get_config(arg="bundled"):
    if arg == "paper":
        made = dict(base=dict(), gedi=dict(method="gedi", fit=PAPER, strengths=(30.0,)))
        return sentiment.paper("gpt2-xl", "GeDi", made, greedy=True, n=1, filter=dict(repetition_penalty=1.2))
    return sentiment.experiment(arg, "GeDi", dict(top_p=dict(), **arms(arg)))


def sweep():
    for balance in (0.5, 1.0):
        yield {"methods.gedi.fit.balance": balance}
