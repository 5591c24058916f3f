"""DisCup: a soft prompt learns which of the model's likely tokens a discriminator prefers, on sentiment.

Source: Zhang & Song 2022; 50 candidates, temperature 0.01 and 12 vectors are the authors'.

    python experiments/main.py --config=configs/discup.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/discup.py[:yelp|:tiny]

Beside it is a soft prompt that learns from positive texts alone. Expected: a share of positive text above that of the
plain soft prompt, with texts that are nearer to the base model's. With `paper` the model is GPT-2 Large.
"""

from configs import sentiment

TINY = dict(training=dict(steps=2, batch=4, tokens=16))
PAPER = dict(steps=1000, batch=100, rate=1e-3, tokens=32)


def arms(arg):
    training = TINY if arg == "tiny" else {}
    discup = dict(method="discup", fit=dict(vectors=2 if arg == "tiny" else 12, discriminator=training, **training))
    if arg == "tiny":
        return dict(discup=discup)
    plain = dict(adapter=dict(kind="prompt"), length=12, where=dict(label=1))
    return dict(discup=discup, prompt=dict(method="finetune", fit=plain))


def get_config(arg="bundled"):
    if arg == "paper":
        made = dict(discup=dict(method="discup", fit=dict(training=PAPER)))
        return sentiment.paper("gpt2-large", "DisCup", dict(top_k=dict(), **made), filter=dict(top_k=10))
    return sentiment.experiment(arg, "DisCup", dict(top_p=dict(), **arms(arg)))


def sweep():
    for tau in (0.05, 0.2):
        yield {"methods.discup.fit.objective": dict(tau=tau)}
