"""CorrSynth: the samples of a prompt are written together and contrasted with each other, at several strengths.

Source: Kowshik et al. 2024; the contrast of half the own distribution is recalled, not read.

    python experiments/main.py --config=configs/corrsynth.py[:yelp|:tiny]

A group is half of the samples of one prompt. The base is drawn under min-p 0.1, which is the plausibility that the
groups have. Expected: distinct n-grams rise with the strength at an equal share of positive text, and perplexity rises
with them.
"""

from configs import sentiment

INIT = dict(bundled=dict(group=5, plausible=0.1), yelp=dict(group=5, plausible=0.1), tiny=dict(group=2, plausible=0.1))


def arms(arg):
    init = sentiment.of_world(INIT, arg)
    strengths = (0.5,) if arg == "tiny" else (0.25, 0.5, 1.0)
    return dict(corrsynth=dict(method="corrsynth", init=init, strengths=strengths, filter={}))


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "CorrSynth", dict(min_p=dict(filter=dict(min_p=0.1)), **arms(arg)))


def sweep():
    for plausible in (0.0, 0.05, 0.2):
        yield {"methods.corrsynth.init.plausible": plausible}
