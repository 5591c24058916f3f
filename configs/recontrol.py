"""RE-Control: a value function of the final state, climbed before every token.

Source: Kong et al. 2024; 30 steps at a rate of 1 and a hidden layer of 4096 are those of the authors' script.

    python experiments/main.py --config=configs/recontrol.py[:yelp|:gemma|:tiny|:paper]
    python experiments/ablate.py --config=configs/recontrol.py[:yelp|:tiny]

The value is learned from labelled texts here; in the paper from rewards of the model's own samples. Expected, not
measured yet: the share of positive text rises with the rate until perplexity breaks. `paper` is Llama 3 8B with the
authors' settings.
"""

from configs import sentiment

TINY = dict(value=dict(width=8, steps=2, rate=0.1), training=dict(steps=2, batch=4, tokens=16))
SMALL = dict(value=dict(width=128, steps=10, rate=0.1), training=dict(steps=300, batch=16, rate=1e-3, tokens=48))
PAPER = dict(value=dict(width=4096, steps=30, rate=1.0), training=dict(steps=3000, batch=512, rate=1e-3, tokens=128))


def arms(arg):
    strengths = (-1.0, 1.0) if arg == "tiny" else (-2.0, -1.0, 1.0, 2.0)
    return dict(recontrol=dict(method="recontrol", fit=TINY if arg == "tiny" else SMALL, strengths=strengths))


def get_config(arg="bundled"):
    if arg == "paper":
        made = dict(recontrol=dict(method="recontrol", fit=PAPER, strengths=(1.0,)))
        return sentiment.paper("meta-llama/Meta-Llama-3-8B", "RE-Control", dict(top_p=dict(), **made))
    return sentiment.experiment(arg, "RE-Control", dict(top_p=dict(), **arms(arg)))


def sweep():
    for rate in (0.03, 0.3):
        yield {"methods.recontrol.fit.value.rate": rate}
