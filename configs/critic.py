"""Critics that look ahead: CriticControl, and with other settings FUDGE, RAD, ARGS, controlled decoding and VAS.

Sources: Kim et al. 2023, Yang & Klein 2021, Deng & Raffel 2023, Khanov et al. 2024, Mudgal et al. 2024, Han et al.
2024.

    python experiments/compare.py --config=configs/critic.py[:yelp|:yelp_down|:tiny|:paper]
    python experiments/ablate.py --config=configs/critic.py[:yelp|:tiny]

All learn from samples of the language model and the reward of the world, FUDGE from the world's labelled texts. RAD and
value-augmented sampling have a small model of their own. `controlled_blocks` is controlled decoding by blocks: the
critic of another arm chooses the best of several blocks of tokens, one block after another, and moves no logits.
Strengths, candidates and discounts are those of the authors' code; that FUDGE samples (it is greedy there for
formality) and the learning rates are not. `paper` is CriticControl on GPT-2 Large with rollouts of 25 tokens at
temperature 2 and the authors' rate, and RAD with GPT-2 small. Expected: more positive text from CriticControl than from
FUDGE at equal perplexity.
"""

from ml_collections import ConfigDict

from configs import reward, sentiment

SMALL = dict(
    bundled=dict(width=64, depth=2, heads=2),
    yelp=dict(width=128, depth=2, heads=4),
    gemma=dict(
        width=128,
        depth=2,
        heads=4,
        training=dict(steps=500, batch=32, tokens=32, rate=5e-3, warmup=50, schedule="cosine", final=0.1, decay=0.01),
    ),
    tiny=dict(width=8, depth=1, heads=2, training=dict(steps=2, batch=4, tokens=16, warmup=1)),
)
GAE = dict(kind="gae", goal="logit", gamma=0.99, lam=0.95)
RETURNS = dict(kind="gae", goal="reward", gamma=1.0, lam=0.95)
FUDGE = dict(top=200, link="log", rest="drop")
LABELS = dict(bundled=1, yelp=1, yelp_down=0, gemma=1)
RAD = dict(top=20, link="clip", rest="drop", alpha=30.0)


def arms(arg):
    small = SMALL.get(arg, SMALL["yelp"])

    def arm(strengths, control, objective, **more):
        fit = dict(rounds=1, control=control, objective=objective, **more)
        return dict(method="critic", strengths=strengths[:1] if arg == "tiny" else strengths, fit=fit)

    made = dict(
        critic=arm((1.0, 4.0), dict(top=10, link="ratio"), GAE),
        rad=arm((30.0, 10.0), RAD, dict(kind="weighted", goal="label"), small=small),
    )
    if arg == "tiny":
        return made | dict(critic_blocks=dict(search=dict(n=2, segment=4), critic="critic"))
    made["args"] = arm((1.0, 4.0), dict(top=10, link="value", rest="drop"), dict(kind="last"))
    made["controlled"] = arm((1.0, 4.0), dict(top=20, link="value"), dict(kind="mse"))
    made["vas"] = arm((1.0, 4.0), dict(top=20, link="centred"), RETURNS, small=small)
    made["controlled_blocks"] = dict(search=dict(n=8, segment=5), critic="controlled")
    return made


def labelled(arg):
    """FUDGE, which learns from the labelled texts of a world, where its labels are of the attribute."""
    if arg not in LABELS:
        return {}
    training = sentiment.training(arg.removesuffix("_down"))["training"]
    fit = dict(label=LABELS[arg], control=FUDGE, objective=dict(kind="bce"), training=training)
    return dict(fudge=dict(method="critic", strengths=(1.0, 4.0), fit=fit))


def get_config(arg="bundled"):
    if arg != "paper":
        parts = sentiment.of_world(reward.WORLDS, arg)()
        methods = dict(top_p=dict(), **reward.learning(parts["learn"], arms(arg)), **labelled(arg))
        return sentiment.composed("critics", {"train": None} | parts, methods)
    fit = dict(rounds=1, control=dict(top=10, link="ratio"), objective=GAE, training=dict(rate=1.41e-5))
    fit["explore"] = dict(n=4, max_new=25, batch=200, filter=dict(temperature=2.0))
    rad = dict(rounds=1, small=dict(source="gpt2"), control=RAD, objective=dict(kind="weighted", goal="label"))
    made = dict(
        critic=dict(method="critic", strengths=(1.0,), fit=fit), rad=dict(method="critic", strengths=(30.0,), fit=rad)
    )
    config = reward.experiment("yelp", "critics", dict(top_p=dict(), **made)).to_dict()
    config["lm"] = dict(source="gpt2-large", dtype="float32")
    return ConfigDict(config)


def sweep():
    for top in (5, 20):
        yield {"methods.critic.fit.control.top": top}
    yield {"methods.critic.fit.objective.lam": 1.0}
