"""Proxy-tuning: a small model is tuned on positive texts, and a larger one that was not writes them.

Source: Liu et al. 2024; alpha is 1 and decoding greedy in the paper.

    python experiments/main.py --config=configs/proxy.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/proxy.py[:yelp|:tiny]

The small model is trained from random weights with the base's tokenizer. With `paper` it is Llama 2 70B with the 7B
chat model. Expected: proxy-tuned text lies between that of the base and that of the tuned base (`configs/finetune.py`),
most of the way.
"""

from configs import sentiment

SMALL = dict(
    bundled=dict(width=64, depth=1, heads=2, training=dict(steps=800, batch=16, tokens=96)),
    yelp=dict(width=128, depth=2, heads=4, training=dict(steps=1500, batch=32, tokens=32)),
    gemma=dict(width=128, depth=2, heads=4, training=dict(steps=300, batch=16, tokens=32)),
    tiny=dict(width=8, depth=1, heads=2, training=dict(steps=2, batch=4, tokens=16, warmup=1)),
)
PAPER = dict(
    expert="meta-llama/Llama-2-7b-chat-hf", anti="meta-llama/Llama-2-7b-hf", before="[INST] ", after=" [/INST]"
)


def arms(arg):
    fit = dict(small=sentiment.of_world(SMALL, arg), **sentiment.training(arg))
    strengths = (1.0,) if arg == "tiny" else (0.5, 1.0, 2.0)
    return dict(proxy=dict(method="proxy", fit=fit, strengths=strengths))


def get_config(arg="bundled"):
    if arg == "paper":
        made = dict(proxy=dict(method="proxy", init=PAPER, strengths=(1.0,)))
        return sentiment.paper("meta-llama/Llama-2-70b-hf", "Proxy-tuning", dict(base=dict(), **made), greedy=True, n=1)
    return sentiment.experiment(arg, "Proxy-tuning", dict(top_p=dict(), **arms(arg)))


def sweep():
    for width in (32, 128):
        yield {"methods.proxy.fit.small.width": width}
