"""SoftSRV: texts like others, from prompts that are mixed by the embeddings of these.

Source: DeSalvo et al. 2024.

    python experiments/main.py --config=configs/softsrv.py[:yelp|:gemma|:tiny]
    python experiments/ablate.py --config=configs/softsrv.py[:yelp|:tiny]

Prompts are the first words of texts, and the embedding of the whole text says what follows them; `one` has one prompt
for all texts, which is prompt tuning. The figure `similarity` is that of the texts to those whose embeddings were read,
and `mauve`, in the yelp world, that to other texts of people. Expected, not measured yet: the mixture is nearer to its
examples than `one`, and `one` nearer to human text than the language model alone.
"""

from configs import sentiment

SIZES = {"tiny": (2, 2), "bundled": (8, 8)}  # prompts, and vectors of each


def arms(arg):
    training = sentiment.training(arg)["training"]
    prompts, length = SIZES.get(arg, (8, 20))
    encoder = sentiment.world(arg)["evaluate"].get("embed")
    fit = dict(length=length, encoder=encoder, training=training)
    strengths = (1.0,) if arg == "tiny" else (0.0, 1.0, 2.0)
    return dict(
        one=dict(method="softsrv", fit=fit | dict(prompts=1)),
        mixture=dict(method="softsrv", fit=fit | dict(prompts=prompts), strengths=strengths),
    )


def get_config(arg="bundled"):
    parts = sentiment.world(arg)
    if arg in ("bundled", "tiny"):
        parts["prompts"] |= dict(text=dict(prompt="prompt", text="text", source="text"))
    if arg == "yelp":
        parts["prompts"] |= dict(words=1, text=dict(text="text", source="text"))
        parts["evaluate"] |= dict(references=parts["prompts"] | dict(words=None, text="text", skip=1000, limit=250))
    return sentiment.composed("SoftSRV", parts, dict(top_p=dict(), **arms(arg)))


def sweep():
    for prompts in (2, 8, 32):
        yield {"methods.mixture.fit.prompts": prompts}
