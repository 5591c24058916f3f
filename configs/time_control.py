"""Time Control: texts written along a plan, a bridge between the latents of a first and of a last sentence.

Source: Wang et al. 2022. The documents are reviews, of the bundled grammar or of IMDB, of at least three sentences.

    python experiments/main.py --config=configs/time_control.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/time_control.py[:yelp|:tiny]

Strength 0 is the tuned language model without its plan. Expected, not measured yet: the loss of held-out documents is
lower with the latents of their own sentences than without. The paper's results, an order of sections nearer to that of
the data and lengths nearer to it, need documents with sections. `paper` has GPT-2, tuned whole, and latents of 16.
"""

from configs import sentiment

SETTINGS = {
    "bundled": dict(
        encoder=dict(training=dict(steps=2000, batch=32)), adapter=dict(rank=8), training=dict(steps=300, batch=16)
    ),
    "yelp": dict(
        encoder=dict(training=dict(steps=4000, batch=32)), adapter=dict(rank=16), training=dict(steps=1000, batch=16)
    ),
    "tiny": dict(
        encoder=dict(latent=4, width=8, others=3, training=dict(steps=2, batch=4)),
        adapter=dict(rank=2),
        training=dict(steps=2, batch=4, tokens=16),
    ),
}
# 100 passes over the documents for the encoder and 10 for the language model, at their batch of 32 and of 1.
PAPER = dict(
    encoder=dict(latent=16, width=128, training=dict(steps=80_000, batch=32, rate=1e-4)),
    variance="unit",
    adapter=dict(kind="full"),
    training=dict(steps=16_000, batch=16, tokens=512, rate=5e-5),
)


def arms(arg):
    fit = dict(sentiment.of_world(SETTINGS, arg))
    one = dict(method="time_control", fit=fit, strengths=(0.0, 1.0))
    if arg == "yelp":
        folder = sentiment.data_folder("yelp", "imdb/")
        fit["sentences"] = dict(encoder=sentiment.yelp()["evaluate"]["embed"])
        one["data"] = dict(source=f"jsonl:{folder}/imdb/train.jsonl.xz", split="all", limit=2000)
    return dict(time_control=one)


def get_config(arg="bundled"):
    if arg == "paper":
        made = arms("yelp")
        made["time_control"]["fit"] |= PAPER
        made["time_control"]["data"].pop("limit")
        return sentiment.paper("openai-community/gpt2", "Time Control", dict(top_p=dict(), **made), max_new=512)
    return sentiment.experiment(arg, "Time Control", dict(top_p=dict(), **arms(arg)))


def sweep():
    for latent in (8, 32):
        yield {"methods.time_control.fit.encoder": dict(latent=latent)}
    yield {"methods.time_control.fit.variance": "unit"}
