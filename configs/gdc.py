"""GDC: every text with the attribute (moment 1, pointwise), or such a share of them (distributional), and as close to
the LM as that allows.

Source: Khalifa et al. 2021.

    python experiments/main.py --config=configs/gdc.py[:yelp|:yelp_down|:tiny]
    python experiments/main.py --config=configs/gdc.py:paper[_word|_list|_female|_science|_hybrid]

The tasks of the paper are unconditional: there is one empty prompt, for which GPT-2 reads its beginning token. Its
distributional tasks begin from a model fine-tuned on biographies, which is `--config.lm.source=FOLDER` here.

Expected: the share nears the moment that is asked for, in few rounds not all the way. Yelp: .71 positive, from .32.
"""

from configs import paper, reward


def arms(arg):
    moments = [("gdc", 1.0)] if arg == "tiny" else [("gdc", 1.0), ("gdc_share", 0.8)]
    names = reward.of_world(reward.WORLDS, arg)()["learn"]["rewards"]
    return {
        label: dict(
            method="gdc", fit=dict(moments=dict.fromkeys(names, moment), samples=dict(limit=10.0)), strengths=(0.5, 1.0)
        )
        for label, moment in moments
    }


# name -> the share of texts with each feature
TASKS = dict(
    word=dict(amazing=1.0),
    list=dict(politics=1.0),
    female=dict(female=0.5),
    science=dict(science=0.4, art=0.4),
    hybrid=dict(female=0.5, politics=1.0),
)
# q is tested against the policy after every round of 10 updates; λ comes from 20,480 samples.
PAPER = dict(
    rounds=500,
    base_samples=20_480,
    explore=dict(n=20_480, max_new=40, batch=512),
    per_prompt=False,
    samples=dict(passes=None),
    adapter=dict(kind="full"),
    training=dict(steps=10, batch=2048, rate=1.41e-5, warmup=0, accumulate=32, save_every=0),
)


def paper_arms(task):
    return dict(gdc=dict(method="gdc", strengths=(1.0,), fit=PAPER | dict(moments=TASKS[task])))


def get_config(arg="bundled"):
    if task := paper.task_of(arg, tuple(TASKS)):
        empty = dict(source=reward.REVIEWS, split="validation", words=0, limit=1)
        asked = paper.features(*TASKS[task])  # what the texts are judged by too
        given = dict(data=empty, prompts=empty, rewards=asked, judges=asked)
        return paper.experiment("sentiment", "GDC", paper.SMALL, paper_arms(task), **given, n=1000, max_new=40)
    return reward.experiment(arg, "GDC", dict(top_p=dict(), **arms(arg)))
