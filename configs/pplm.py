"""PPLM: a bag of positive words, and a classifier of mean states, move the past of the model at several strengths.

Source: Dathathri et al. 2020; steps, rate, power, kl, the fusion 0.9 and top-k 10 are the authors'.

    python experiments/main.py --config=configs/pplm.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/pplm.py[:yelp|:tiny]

A token costs four passes and three backward passes with the bag, eleven and ten with the classifier. With `paper` the
model is GPT-2 Medium. Expected: the weakest control of the methods on logits, at a high perplexity (PPLM has 52.7 % and
142 where DExperts has 94.5 % and 45.8 in Liu et al. 2021, GPT-2 50.0 % and 29.3).
"""

from configs import sentiment

GOOD = "good great delicious tasty fresh friendly helpful polite attentive clean cozy comfortable excellent wonderful"
TINY = dict(training=dict(steps=2, batch=4, tokens=16), control=dict(steps=1, options=dict(horizon=0)))
FILTER = dict(top_k=10)


def arms(arg):
    if arg == "tiny":
        return dict(pplm_classifier=dict(method="pplm", fit=TINY, strengths=(0.9,), filter=FILTER))
    both = dict(method="pplm", strengths=(0.5, 0.9), filter=FILTER)
    return dict(pplm_bag=both | dict(init=dict(words=(tuple(GOOD.split()),))), pplm_classifier=both | dict(fit={}))


def get_config(arg="bundled"):
    base = dict(top_k=dict(filter=FILTER))
    if arg == "paper":
        return sentiment.paper("gpt2-medium", "PPLM", base | arms("yelp"))
    return sentiment.experiment(arg, "PPLM", base | arms(arg))


def sweep():
    for rate in (0.02, 0.04):
        yield {"methods.pplm_classifier.fit.control.rate": rate}
