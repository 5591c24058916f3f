"""What did tuning teach a model? Its own samples, and those of contrastive exploration, once and in three rounds.

Source: Isonuma & Titov 2024.

    python experiments/compare.py --config=configs/compare_novelty.py            reviews of eight kinds of things
    python experiments/compare.py --config=configs/compare_novelty.py:dbpedia    14 kinds of entities; CTG_DATA_DIR
    python experiments/compare.py --config=configs/compare_novelty.py:tiny       seconds, for tests

A small language model learns texts of some domains and is then tuned on texts of all. Half of the eight domains are new
to it, or five of the 14. `novel` is the share of texts of new domains, and each of these has a judge of its own, whose
`any` is the share of prompts that led to it. `top_p` is the model before it was tuned, and at strength 0 the arms are
samples of the tuned one. Expected: the share rises from there to the static version, and rounds find more domains.
"""

from configs import explore_data, reward, sentiment
from ctg_jax.data import reviews

KNOWN = ("restaurant", "hotel", "phone", "airline")
ENTITIES = ("company", "school", "artist", "athlete", "politician", "transport", "building", "nature", "village")
ENTITIES += ("animal", "plant", "album", "film", "book")  # in the order of DBpedia's numbers
FIRST_NEW = ENTITIES.index("animal")


def told_apart(field, names, wanted):
    """The setting `labels` by which texts of the wanted domains have label 1 and all others 0."""
    return dict(labels={field: {str(i): int(name in wanted) for i, name in enumerate(names)}})


def world(parts, texts, field, names, known):
    """`parts` with a model of the known domains and judges of the new ones.

    texts: settings of `load_data` for texts to learn from, to fit judges on, and to start from.
    """
    learned, judged, started = texts
    labels = {field: {str(i): 0 for i, name in enumerate(names) if name in known}}  # leaves out all others
    parts["lm"]["data"] = learned | dict(labels=labels)
    kind = {k: v for k, v in parts["judges"]["positive"].items() if k in ("encoder", "reads")}
    kind |= dict(kind="probe" if "encoder" in kind else "bag")
    new = tuple(name for name in names if name not in known)
    parts["judges"] = {
        label: kind
        | dict(data=judged | told_apart(field, names, wanted), heldout=started | told_apart(field, names, wanted))
        for label, wanted in dict(novel=new, **{name: (name,) for name in new}).items()
    }
    return parts | dict(train=learned, prompts=started | dict(words=1, limit=100))


def of_reviews(parts, limit):
    """The prompt of a review leaves open what it is about."""
    parts["lm"]["data"].pop("where", None)
    source = dict(source=sentiment.REVIEWS)
    texts = [source | dict(split=split, limit=limit) for split in ("train", "validation", "test")]
    parts = world(parts, texts, "topic", reviews.TOPICS, KNOWN)
    return parts | dict(prompts=source | dict(split="test", limit=20 if limit > 100 else 2))


def dbpedia():
    folder = sentiment.data_folder("dbpedia", "topics/, yelp/ and models/")
    parts = reward.yelp()
    parts["lm"] = dict(source="", dtype="float32", pretrain=parts["evaluate"].pop("fluency")["pretrain"])
    source = f"csv:class|text={folder}/topics/dbpedia/train.csv"
    texts = [dict(source=source, split=f"all[{part}]") for part in (":10000", "10000:12000", "12000:")]
    parts["evaluate"] |= dict(lm_name="before tuning")
    return world(parts, texts, "class", ENTITIES, ENTITIES[:FIRST_NEW])


WORLDS = {
    "bundled": lambda: of_reviews(sentiment.bundled(), 4000),
    "dbpedia": dbpedia,
    "tiny": lambda: of_reviews(sentiment.tiny(), 64),
}


def get_config(arg="bundled"):
    parts = sentiment.of_world(WORLDS, arg)()
    arms = explore_data.arms("yelp" if arg == "dbpedia" else arg)
    for arm in arms.values():
        del arm["fit"]["where"]
    return sentiment.composed("What tuning taught", parts, dict(top_p=dict(), **arms))
