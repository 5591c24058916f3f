"""Diffusion-guided language model: a latent pushed by a linear classifier, put into words by the language model.

Source: Lovelace et al. 2024. `PAPER` has the sizes of the paper, for `dglm.init`: sentence-T5-xl, GPT-2
large fine-tuned, 250,000 updates of each network.

    python experiments/main.py --config=configs/dglm.py[:yelp|:gemma|:tiny]

    python experiments/main.py --config=configs/dglm.py:prefix         weights of the prefix, on fewer texts of Yelp
    python experiments/latents.py --config=configs/latents.py:prompter     what the latent makes the LM say
    python experiments/ablate.py --config=configs/dglm.py[:yelp]       samplers and their steps

`gemma` has the texts and the prompts of `yelp` and the language model and the judge of the gemma world: sentiment is
learned from reviews, so the prompts are beginnings of reviews. Sentences of Yelp are unlikely texts to a general
language model, so the prompter and the denoiser learn from what the model itself writes behind their beginnings
(`own`), and only the regression learns from the sentences. It needs a GPU, six minutes of one H200; after 200 updates
of 16 rows on 3,200 texts, an hour of one core, text is as fluent and does not follow the latent yet.

Expected by the paper: the share of positive text rises with the guidance while text stays as fluent. Yelp: from .55 at
scale 0 to .81, .85 and .88 at 70, 100 and 300, at 1.13, 1.22 and 1.32 times the perplexity of scale 0, which is 1.9
times that of the LM under top-p. Wall time: an hour and a quarter on one core, of which the prompter takes 55 minutes.
"""

import re

from configs import sentiment
from configs.sentiment import of_world

SETTINGS = {
    "bundled": dict(
        prompter=dict(net=dict(width=128, depth=2), training=dict(steps=600, batch=32)),
        denoiser=dict(net=dict(width=128, depth=4, pseudo_tokens=8), training=dict(steps=2000, batch=64)),
    ),
    "yelp": dict(
        prompter=dict(
            net=dict(width=256, depth=3, pseudo_tokens=8, rank=16),
            prefix=13,
            new=14,
            training=dict(steps=4000, batch=32),
        ),
        denoiser=dict(net=dict(width=192, depth=4, pseudo_tokens=4), training=dict(steps=4000, batch=64)),
    ),
    "gemma": dict(
        own=dict(filter=dict(top_p=0.9), max_new=20, batch=256),
        prompter=dict(
            net=dict(width=256, depth=3, pseudo_tokens=8, rank=16),
            prefix=13,
            new=20,
            training=dict(steps=5000, batch=64, rate=5e-4, warmup=100, save_every=1000),
        ),
        denoiser=dict(net=dict(width=192, depth=4, pseudo_tokens=4), training=dict(steps=8000, batch=128)),
    ),
    "tiny": dict(
        encode=dict(words=4, new=8),
        prompter=dict(
            net=dict(width=16, depth=1, heads=2, pseudo_tokens=4, length=2), new=8, training=dict(steps=2, batch=4)
        ),
        denoiser=dict(net=dict(width=16, depth=2, heads=2, pseudo_tokens=4), training=dict(steps=2, batch=4)),
        draw=dict(steps=3),
    ),
}
PAPER = dict(
    latent=768,
    denoiser=dict(
        width=768, depth=12, heads=12, pseudo_tokens=32, spread=8, context_spread=4, join="features", time_width=384
    ),
    prompter=dict(
        width=768, depth=6, heads=12, pseudo_tokens=8, spread=4, length=8, slots=False, time_width=384, skips=False,
        kind="full",
    ),
    attributes=1,
    draw=dict(sampler="ddpm", steps=250, through=True, average=32, noise="ratio", mean="loss"),
)  # fmt: skip
# What a continuation about food says.
FOOD = r"\b(food|meal|dish|pizza|burger|sandwich|salad|sushi|tacos?|steak|chicken|beef|pork|soup|fries|bread|rice)\b"
# What a continuation says in which somebody speaks of themselves.
PERSONAL = r"\b(i|me|my|we|us|our)\b"
SCALES = {
    "bundled": (0.0, 1.0, 3.0, 10.0, 30.0),
    "yelp": (0.0, 10.0, 30.0, 70.0, 100.0, 300.0, 1000.0),
    "gemma": (0.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    "tiny": (0.0, 10.0),
}


def texts(arg):
    """Texts to learn latents of."""
    train = sentiment.world(arg)["train"]
    return train | {"yelp": dict(limit=30000), "gemma": dict(limit=10000)}.get(arg, {})


def fit(arg):
    """Settings of `dglm.fit`, with one attribute, sentiment."""
    settings = dict(of_world(SETTINGS, arg))
    if arg in ("yelp", "gemma"):  # the weight of the prefix is the best of the arms of `prefix`
        settings |= dict(encode=dict(encoder=sentiment.world(arg)["evaluate"]["embed"]), free=3.0)
    return settings


def arms(arg):
    """Guided to positive text; and, of real reviews, to negative text, to food, to both sides of food, and to three
    attributes at once."""
    one = dict(method="dglm", strengths=SCALES[arg], fit=fit(arg), data=texts(arg))
    found = dict(top_p=dict(), dglm=one)
    if arg == "yelp":
        wishes = dict(negative=dict(positive=-1.0), food=dict(food=1.0), good_food=dict(positive=1.0, food=1.0))
        wishes["bad_food"] = dict(positive=-1.0, food=1.0)
        wishes["three"] = dict(positive=1.0, food=1.0, personal=1.0)
        known = dict(positive={}, food=dict(pattern=FOOD), personal=dict(pattern=PERSONAL))
        for name, weights in wishes.items():
            asked = dict(attributes={k: known[k] for k in weights}, weights=weights)
            found[name] = one | dict(fit=one["fit"] | asked, strengths=(30.0, 100.0))
    return found


def about_food(prompt, text):
    """A judge: whether a continuation names food, which is what the probe of food learned from other texts."""
    return float(re.search(FOOD, text, re.IGNORECASE) is not None)


def personal(prompt, text):
    """A judge: whether somebody speaks of themselves in a continuation."""
    return float(re.search(PERSONAL, text, re.IGNORECASE) is not None)


# A third of the texts, a sixteenth of the prompter's rows and three eighths of the denoiser's updates.
SHORT = dict(limit=10000, prompter=dict(steps=500, batch=16, rate=2e-3), denoiser=dict(steps=1500))


def prefix():
    """One arm for each weight of the prefix in classifier-free guidance, on networks that train in a tenth of the time
    of those of `yelp`."""
    one = dict(method="dglm", data=texts("yelp") | dict(limit=SHORT["limit"]))
    found = dict(top_p=dict())
    for free in (1.0, 2.0, 3.0, 5.0):
        scales = SCALES["yelp"] if free == 3 else (0.0, 100.0)
        found[f"free_{free:g}"] = one | dict(fit=fit_short() | dict(free=free), strengths=scales)
    return found


def fit_short():
    """The settings of `fit` with the lengths of `SHORT`."""
    found = dict(fit("yelp"))
    for name in ("prompter", "denoiser"):
        found[name] = found[name] | dict(training=found[name]["training"] | SHORT[name])
    return found


def get_config(arg="bundled"):
    if arg == "prefix":
        return sentiment.experiment("yelp", "DGLM, weights of the prefix", prefix())
    config = sentiment.experiment(arg, "Diffusion-guided language model", arms(arg))
    if arg == "gemma":
        config.prompts = sentiment.yelp()["prompts"]
        config.sample.n, config.evaluate.kl = 2, True
    if arg == "yelp":
        config.judges.food = dict(kind="function", function="configs.dglm:about_food", version="1")
        config.judges.personal = dict(kind="function", function="configs.dglm:personal", version="1")
    return config


def sweep():
    """Samplers and their steps, with the gradient through the denoiser and without, and weights of the prefix, at one
    strength."""
    ways = [dict(sampler="dpm++", steps=n) for n in (10, 50)]
    ways += [dict(sampler="ddpm", steps=n) for n in (20, 50, 250)]
    ways += [dict(sampler="ddim", steps=20), dict(sampler="dpm++", steps=20, through=True)]
    ways += [dict(sampler="ddpm", steps=250, through=True), dict(average=8)]
    for draw in ways:
        yield {"methods.dglm.fit.draw": draw, "methods.dglm.strengths": (100.0,)}
    for free in (1.0, 2.0, 3.0, 4.0, 5.0):
        yield {"methods.dglm.fit.free": free, "methods.dglm.strengths": (0.0, 100.0)}
