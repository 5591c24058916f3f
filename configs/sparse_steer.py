"""Features of a sparse autoencoder: the code of every state moves towards the mean code of positive texts.

Source: steering by class prototypes of a sparse autoencoder; clamping one feature, Templeton et al. 2024. Ten steps at
a rate of 0.1 move a code by 65 % of the way. Eight features for each dimension are a choice of this project.

    python experiments/main.py --config=configs/sparse_steer.py[:yelp|:gemma|:tiny|:paper]
    python experiments/ablate.py --config=configs/sparse_steer.py[:yelp|:tiny]

Expected, not measured yet: the share of positive text moves with the strength, much as by the difference of means at
equal KL. `paper` is Gemma 2 2B, a model of the size that such autoencoders are published for.
"""

from configs import sentiment

TINY = dict(features=8, site=1, iterations=2, training=dict(steps=2, batch=4, tokens=16))
SMALL = dict(site="middle", training=dict(steps=500, batch=16, rate=1e-3, tokens=48))


def arms(arg):
    strengths = (-1.0, 1.0) if arg == "tiny" else (-2.0, -1.0, 1.0, 2.0)
    return dict(sparse_steer=dict(method="sparse_steer", fit=TINY if arg == "tiny" else SMALL, strengths=strengths))


def get_config(arg="bundled"):
    if arg == "paper":
        fit = dict(features=16384, site="middle", training=dict(steps=20000, batch=32, rate=1e-3, tokens=128))
        made = dict(sparse_steer=dict(method="sparse_steer", fit=fit, strengths=(1.0,)))
        return sentiment.paper("google/gemma-2-2b", "Sparse features", dict(top_p=dict(), **made))
    return sentiment.experiment(arg, "Sparse features", dict(top_p=dict(), **arms(arg)))


def sweep():
    for sparsity in (3e-4, 3e-3):
        yield {"methods.sparse_steer.fit.sparsity": sparsity}
