"""GDC: every text with the attribute (moment 1, pointwise), or such a share of them (distributional), and as close to
the LM as that allows.

Source: Khalifa et al. 2021.

    python experiments/main.py --config=configs/gdc.py[:yelp|:yelp_down|:tiny]

Expected: the share nears the moment that is asked for, in few rounds not all the way. Yelp: .71 positive, from .32.
"""

from configs import reward


def arms(arg):
    moments = [("gdc", 1.0)] if arg == "tiny" else [("gdc", 1.0), ("gdc_share", 0.8)]
    names = reward.of_world(reward.WORLDS, arg)()["learn"]["rewards"]
    return {
        label: dict(method="gdc", fit=dict(moments=dict.fromkeys(names, moment), limit=10.0), strengths=(0.5, 1.0))
        for label, moment in moments
    }


def get_config(arg="bundled"):
    return reward.experiment(arg, "GDC", dict(top_p=dict(), **arms(arg)))
