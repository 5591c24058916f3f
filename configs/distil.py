"""Distillation: the experts of a decoding-time control, written into weights, so that decoding costs the model alone;
and Who's Harry Potter, which makes a model forget negative reviews.

Sources: Eldan & Russinovich 2023 (the arm `forget`: alpha 5, the likeliest tokens as labels).

    python experiments/main.py --config=configs/distil.py[:yelp|:tiny]

Expected, not measured yet: `distilled` writes about as much positive text as its teacher `dexperts`, faster; `forget`
writes less negative text than the base. By the number of trainings it takes about twice as long as
`configs/dexperts.py`.
"""

from configs import sentiment


def arms(arg):
    common = sentiment.training(arg)
    data = sentiment.world(arg)["train"]
    experts = dict(method="dexperts", fit=common | dict(alpha=1.0), data=data)
    forgotten = dict(method="dexperts", fit=common | dict(sides="forget", alpha=5.0), data=data)
    return dict(
        dexperts=dict(method="dexperts", fit=common | dict(alpha=1.0), strengths=(1.0,)),
        distilled=dict(method="distil", fit=dict(teacher=experts, **common), strengths=(1.0,)),
        forget=dict(method="distil", fit=dict(teacher=forgotten, hard=True, **common), strengths=(1.0,)),
    )


def get_config(arg="bundled"):
    found = arms(arg)
    if arg == "tiny":
        del found["dexperts"]
    return sentiment.experiment(arg, "Distillation", dict(top_p=dict(), **found))


def sweep():
    yield {"methods.distilled.fit.hard": True}
    for rank in (2, 32):
        yield {"methods.distilled.fit.adapter.rank": rank}
