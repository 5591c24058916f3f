"""Fine-tuning under a constraint: texts of people are learned from while texts without the attribute are held away.

Source: Meng et al. 2024. The paper's weight, rate and number of rounds are not known; weight 1, three rounds and a LoRA
are this library's.

    python experiments/main.py --config=configs/constrained.py[:yelp|:yelp_down|:tiny]
    python experiments/ablate.py --config=configs/constrained.py[:yelp|:tiny]

`plain` is the same fine-tuning with weight 0. Expected: a larger share of texts with the attribute than from `plain`,
at a perplexity of texts of people within a few per cent of it.
"""

from configs import reward, sentiment


def arms(arg):
    given = dict(threshold="median", adapter=dict(rank=2)) if arg == "tiny" else {}
    world = sentiment.of_world(reward.WORLDS, arg)()
    training = dict(tokens=16 if arg == "tiny" else 32)  # of texts of people; prompts come on top
    common = given | dict(training=training, guide=dict(training=world["learn"]["training"]))
    weights = dict(constrained=1.0) if arg == "tiny" else dict(constrained=1.0, strict=10.0, plain=0.0)
    return {
        label: dict(method="constrained", fit=common | dict(weight=weight), strengths=(1.0,))
        for label, weight in weights.items()
    }


def get_config(arg="bundled"):
    return reward.experiment(arg, "Constrained fine-tuning", dict(top_p=dict(), **arms(arg)))


def sweep():
    yield {"methods.constrained.fit.on": "corpus"}
    for rounds in (1, 5):
        yield {"methods.constrained.fit.rounds": rounds}
