"""Click: bad samples of the LM itself are made less likely, as a whole, than good ones of the same prompt.

Source: Zheng et al. 2023.

    python experiments/main.py --config=configs/click.py[:yelp|:yelp_down|:repetition|:tiny]
    python experiments/main.py --config=configs/click.py:paper[_sentiment|_sentiment_down|_repetition|_toxicity]
    python experiments/ablate.py --config=configs/click.py[:yelp|:tiny]

The rounds, samples and updates are those of the world, so that it is compared with the other methods at equal cost; the
paper's tables have one round of 20 samples a prompt under top-p 0.9, and Adafactor, as `paper` has.

Expected on Yelp: from .32 positive to .73 at half the strength and .78 at all of it, at 1.3 and 1.7 times the
perplexity.
"""

from configs import paper, reward

SETTINGS = {
    "repetition": dict(gamma=0.3, margin=15.0),
    "tiny": dict(gamma=0.1, margin=15.0, threshold="median"),
}


def arms(arg):
    fit = SETTINGS.get(arg, dict(gamma=0.1, margin=15.0))
    if arg in ("yelp", "yelp_down"):
        fit = fit | dict(training=dict(steps=75))  # of pairs
    return dict(click=dict(method="click", strengths=(0.5, 1.0), fit=fit))


# gamma and margin of each task, from the authors' scripts
TASKS = dict(
    sentiment=dict(gamma=0.1, margin=15.0),
    sentiment_down=dict(gamma=0.1, margin=15.0),
    repetition=dict(gamma=0.3, margin=15.0),
    toxicity=dict(gamma=0.5, margin=20.0),
)
PAPER = dict(
    rounds=1,
    explore=dict(n=20, max_new=20, batch=512, filter=dict(top_p=0.9)),
    adapter=dict(kind="full"),
    training=dict(steps=2000, batch=64, rate=1e-5, algorithm="adafactor", warmup=0, clip=1.0, save_every=500),
)


def paper_arms(task):
    fit = PAPER | TASKS[task]
    if task == "repetition":
        fit = fit | dict(explore=fit["explore"] | dict(max_new=100))
    return dict(click=dict(method="click", strengths=(1.0,), fit=fit))


def get_config(arg="bundled"):
    if task := paper.task_of(arg, tuple(TASKS)):
        lm = paper.SMALL if task == "repetition" else paper.LARGE
        return paper.experiment(task, "Click", lm, paper_arms(task))
    return reward.experiment(arg, "Click", dict(top_p=dict(), **arms(arg)))


def sweep():
    yield {"methods.click.fit.pair": "above"}
    for margin in (5.0, 30.0):
        yield {"methods.click.fit.margin": margin}
    for gamma in (0.0, 0.5):  # 0 learns from the positives alone
        yield {"methods.click.fit.gamma": gamma}
    yield {"methods.click.fit.rounds": 1}
