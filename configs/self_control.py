"""Self-Control: the model judges its own text, and the states of the prompt climb its judgement.

Source: Cai et al. 2024; τ = 10 and three tries at factor 2 are those of the authors' code, η = 0.5 that of their
README.

    python experiments/main.py --config=configs/self_control.py[:yelp|:gemma|:tiny|:paper]
    python experiments/ablate.py --config=configs/self_control.py[:yelp|:tiny]

`suffix` searches for every prompt while it is decoded: each turn writes and judges up to three texts more, so it costs
about ten times the base. `prefix` learns what the search finds for a few hundred prompts. Both need a model that can
answer the question. The small models of reviews cannot, so there a word of praise and a word of complaint replace yes
and no. Expected, not measured yet: the share of positive text rises a little with `suffix`, less with `prefix`.
`paper` is Llama 2 7B Chat.
"""

from configs import sentiment

ASK = dict(
    bundled=dict(question=" overall it was", answers=(" great", " awful")),
    yelp=dict(question=" overall it was", answers=(" great", " awful")),
    gemma=dict(question="\nQuestion: Is this text positive?\nAnswer:", answers=(" Yes", " No")),
    tiny=dict(question=" was", answers=("a", "b")),
)
SEARCH = dict(bundled=dict(new=20, rate=4.0), yelp=dict(new=12, rate=4.0), gemma=dict(new=20, rate=4.0))
SEARCH |= dict(tiny=dict(new=2, turns=1, tries=3, rate=1000.0, temperature=1e-3))
LEARN = dict(vectors=16, limit=200, training=dict(steps=200, batch=16, rate=9e-3, warmup=80))
TINY = dict(vectors=2, limit=8, batch=4, tokens=40, training=dict(steps=2, batch=4, rate=1e-2, warmup=1))


def arms(arg):
    asked = sentiment.of_world(ASK, arg) | SEARCH[arg]
    learned = asked | (TINY if arg == "tiny" else LEARN) | dict(kind="prefix")
    suffix = dict(method="self_control", fit=asked, strengths=(1.0,) if arg == "tiny" else (0.5, 1.0, 2.0))
    return dict(suffix=suffix, prefix=dict(method="self_control", fit=learned))


def get_config(arg="bundled"):
    if arg == "paper":
        asked = dict(question="\nIs this review positive? Give answer as 'Yes' or 'No'. Answer:", answers=("Yes", "No"))
        asked |= dict(new=50, turns=3, tries=3, rate=0.5, temperature=10.0)
        training = dict(steps=50, batch=64, rate=9e-3, warmup=20)
        learned = asked | dict(kind="prefix", vectors=128, limit=2000, training=training)
        made = dict(
            suffix=dict(method="self_control", fit=asked, strengths=(1.0,)),
            prefix=dict(method="self_control", fit=learned),
        )
        return sentiment.paper("meta-llama/Llama-2-7b-chat-hf", "Self-Control", dict(top_p=dict(), **made))
    return sentiment.experiment(arg, "Self-Control", dict(top_p=dict(), **arms(arg)))


def sweep():
    for rate in (1.0, 10.0):
        yield {"methods.suffix.fit.rate": rate}
