"""What did tuning teach a model? Its own samples, and those of contrastive exploration, once and in three rounds.

Source: Isonuma & Titov 2024.

    python experiments/compare.py --config=configs/compare_novelty.py            reviews of eight kinds of things
    python experiments/compare.py --config=configs/compare_novelty.py:dbpedia    14 kinds of entities; CTG_DATA_DIR
    python experiments/compare.py --config=configs/compare_novelty.py:tiny       seconds, for tests

A small language model learns texts of some domains, and all its weights are then tuned on texts of all. Half of the
eight domains are new to it, or five of the 14. `novel` is the share of texts of new domains, and each of these has a
judge of its own. `top_p` is the model before it was tuned; at strength 0 `static` is the tuned one. In `round_1` the
contrast has learned 100 texts of `static`, in `round_2` also 100 of `round_1`, and so on, so that each should show what
the ones before it did not. Expected: the share of new domains rises from the tuned model to `static`, and all rounds
together find more domains than `static`. Measured (docs/results/decoding.md): the share rises in both worlds, and
`static` finds all domains by itself.
"""

from configs import explore_data, reward, sentiment
from ctg_jax.data import reviews

KNOWN = ("restaurant", "hotel", "phone", "airline")
ENTITIES = ("company", "school", "artist", "athlete", "politician", "transport", "building", "nature", "village")
ENTITIES += ("animal", "plant", "album", "film", "book")  # in the order of DBpedia's numbers
KNOWN_ENTITIES = ENTITIES[: ENTITIES.index("animal")]
STEPS = dict(bundled=600, dbpedia=600, tiny=2)


def of_reviews(parts, limit, prompts):
    """The prompt of a review leaves open what it is about, and the words of a thing tell it."""
    source = dict(source=sentiment.REVIEWS)
    known = sentiment.numbered("topic", reviews.TOPICS, lambda name: 0 if name in KNOWN else None)
    parts["lm"]["data"] = source | dict(limit=limit) | known
    words = {name: tuple(sorted(reviews.cue_words()[name])) for name in reviews.TOPICS if name not in KNOWN}
    words["novel"] = sum(words.values(), ())
    parts["judges"] = {name: dict(kind="lexicon", target=" ".join(found)) for name, found in words.items()}
    return parts | dict(train=source | dict(limit=limit), prompts=source | dict(split="test", limit=prompts))


def dbpedia():
    folder = sentiment.data_folder("dbpedia", "topics/, yelp/ and models/")
    parts, new = reward.yelp(), ENTITIES[len(KNOWN_ENTITIES) :]
    learned, judged, others = (
        dict(source=f"csv:class|text={folder}/topics/dbpedia/train.csv", split=f"all[{part}]")
        for part in (":10000", "10000:11000", "11000:")
    )
    known = sentiment.numbered("class", ENTITIES, lambda name: 0 if name in KNOWN_ENTITIES else None)
    other = parts["evaluate"].pop("fluency")["pretrain"]
    parts["lm"] = dict(source="", dtype="float32", pretrain=other, data=learned | known)
    parts["judges"] = {}
    for label, wanted in dict(novel=new, **{name: (name,) for name in new}).items():
        labels = sentiment.numbered("class", ENTITIES, lambda name, wanted=wanted: int(name in wanted))
        probe = dict(kind="probe", encoder=parts["evaluate"]["embed"], reads="both")
        parts["judges"][label] = probe | dict(data=judged | labels, heldout=others | labels | dict(limit=500))
    parts["evaluate"] |= dict(lm_name="before tuning")
    return parts | dict(train=learned, prompts=others | dict(words=1, limit=100))


WORLDS = {
    "bundled": lambda: of_reviews(sentiment.bundled(), 8000, 20),
    "dbpedia": dbpedia,
    "tiny": lambda: of_reviews(sentiment.tiny(), 64, 2),
}


def get_config(arg="bundled"):
    parts = sentiment.of_world(WORLDS, arg)()
    like = "yelp" if arg == "dbpedia" else arg
    all_weights, training = dict(adapter=dict(kind="full")), sentiment.training(like)["training"] | dict(rate=1e-3)
    fit = all_weights | dict(training=training | dict(steps=STEPS[arg]))
    contrast = all_weights | dict(training=training | dict(steps=max(2, STEPS[arg] // 6)))
    again = dict(explore=explore_data.EXPLORE[like], contrast=contrast)
    strengths = (1.0,) if arg == "tiny" else (0.0, 0.5, 1.0)
    static = dict(method="explore_data", fit=fit, strengths=strengths)
    rounds = {
        f"round_{n}": dict(method="explore_data", fit=fit | again | dict(rounds=n), strengths=(1.0,))
        for n in ((1,) if arg == "tiny" else (1, 2, 3))
    }
    return sentiment.composed("What tuning taught", parts, dict(top_p=dict(), static=static, **rounds))
