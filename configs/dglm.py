"""Diffusion-guided language model: a latent pushed by a linear classifier, said by the language model.

Source: Lovelace et al. 2024. DGLM: 12 layers of 768, 32 pseudo-tokens, sentence-T5-xl, GPT-2 large fine-tuned, 250,000
updates (`:paper`, for the planner).

    python experiments/main.py --config=configs/dglm.py[:yelp|:tiny]

Expected: the share of positive text rises with the guidance.
"""

from configs import sentiment
from configs.sentiment import of_world

SETTINGS = {
    "bundled": dict(
        prompter=dict(net=dict(width=128, depth=2), steps=600, batch=32),
        denoiser=dict(net=dict(width=128, depth=4, tokens=8), steps=2000, batch=64),
    ),
    "yelp": dict(
        prompter=dict(net=dict(width=192, depth=3), steps=2000, batch=32),
        denoiser=dict(net=dict(width=192, depth=6, tokens=8), steps=5000, batch=128),
    ),
    "tiny": dict(
        encode=dict(new=8),
        prompter=dict(net=dict(width=16, depth=1, heads=2, tokens=4, length=2), steps=2, batch=4, new=8),
        denoiser=dict(net=dict(width=16, depth=2, heads=2, tokens=4), steps=2, batch=4),
        draw=dict(steps=3),
    ),
}
SCALES = {
    "bundled": (0.0, 1.0, 3.0, 10.0, 30.0),
    "yelp": (0.0, 1.0, 3.0, 10.0, 30.0),
    "tiny": (0.0, 10.0),
}


def data(arg):
    """Texts to learn latents of; None: those of the world."""
    if arg != "yelp":
        return {}
    folder = sentiment.yelp()["lm"]["source"].removesuffix("/models/yelp-gpt2-mini")
    return dict(data=dict(source=f"jsonl:{folder}/yelp/train.jsonl", split="all", balance="label", limit=20000))


def arms(arg):
    fit = dict(of_world(SETTINGS, arg))
    if arg == "yelp":
        fit["encode"] = dict(encoder=sentiment.yelp()["evaluate"]["embed"])
    return dict(dglm=dict(method="dglm", strengths=SCALES[arg], fit=fit, **data(arg)))


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "Diffusion-guided language model", arms(arg))


def sweep():
    for steps in (10, 50, 250):
        yield {"methods.dglm.fit.draw": {"steps": steps}}
