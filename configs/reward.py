"""Worlds for methods that learn from a reward: each has prompts to explore on, others to be judged on, a reward to
learn from, judges that saw nothing of it, and texts from which small models learn a language.

bundled       restaurant reviews of a grammar with known sentiment; more positive text; the oracle rewards and judges
yelp          a real LM of reviews, first words of negative sentences; more positive text. A bag of words fitted on Yelp
              rewards, a probe on a sentence encoder fitted on SST-2 judges, perplexity is that of another LM
yelp_down     the same from positive sentences; more negative text
repetition    the same LM, greedy continuations of longer reviews (IMDB); the diversity of 3-grams rewards and, being a
              count, judges as well
toxicity      RealToxicityPrompts; a bag of words fitted on tweets (Davidson et al. 2017) rewards, a probe fitted on
              other comments judges
gemma         less toxic text of the language model in the directory that CTG_LM_DIR names, see `gemma` below
tiny          the bundled world in seconds: for tests, not for figures

All but bundled and tiny read CTG_DATA_DIR.
"""

import zlib

from configs import sentiment
from configs.sentiment import REVIEWS, of_world


def bundled():
    parts = sentiment.bundled()
    topic = dict(topic=0)
    return parts | dict(
        prompts=dict(source=REVIEWS, split="test", where=topic, limit=25),
        learn=dict(
            texts=parts["train"],
            data=dict(source=REVIEWS, split="validation", where=topic, limit=256),
            rewards=dict(sentiment=dict(kind="oracle")),
            explore=dict(n=4, max_new=40, batch=128),
            rounds=3,
            training=dict(steps=100, batch=32),
        ),
    )


def dice(prompt, text):
    """A reward without meaning, half of the texts good and half bad, whatever an untrained LM writes."""
    return zlib.crc32(text.encode()) / 2**32


def tiny():
    parts = sentiment.tiny()
    return parts | dict(
        learn=dict(
            texts=parts["train"],
            data=dict(source=REVIEWS, split="validation", limit=4),
            rewards=dict(dice=dict(kind="function", function="configs.reward:dice", version="1")),
            explore=dict(n=4, max_new=6, batch=8),
            rounds=2,
            training=dict(steps=2, batch=4),
        ),
    )


def sentences(folder):
    """Sentences of Yelp of both labels."""
    return dict(source=f"jsonl:{folder}/yelp/train.jsonl", split="all", limit=40000)


def yelp(label=0):
    """From sentences of one label towards the other."""
    parts = sentiment.yelp()
    folder = parts["lm"]["source"].removesuffix("/models/yelp-gpt2-mini")
    train = f"jsonl:{folder}/yelp/train.jsonl"
    towards = dict(kind="bag", target=1 - label, reads="both", data=sentences(folder))
    training = dict(tokens=48, steps=2500, rate=2e-3)
    other = dict(pretrain=dict(vocab=4096, width=128, depth=4, heads=4, context=64, training=training))
    return parts | dict(
        prompts=dict(source=f"jsonl:{folder}/yelp/dev.jsonl", split="all", words=4, where=dict(label=label), limit=100),
        evaluate=dict(
            parts["evaluate"] | dict(lm_name="another LM"),
            fluency=other | dict(data=dict(source=train, split="all", skip=40000, limit=120000)),
        ),
        learn=dict(
            texts=sentences(folder),
            data=dict(source=train, split="all", words=4, where=dict(label=label), limit=1000),
            rewards=dict(sentiment=towards | dict(heldout=parts["judges"]["positive"]["heldout"])),
            explore=dict(n=4, max_new=20, batch=200),
            rounds=5,
            training=dict(steps=150, batch=32),
        ),
    )


def repetition():
    """The model repeats itself where it is greedy, which leaves one sample of a prompt; so it explores at a temperature
    at which half of the samples repeat themselves (0.3; with top-p 0.9 hardly any does)."""
    parts = sentiment.yelp()
    folder = parts["lm"]["source"].removesuffix("/models/yelp-gpt2-mini")
    reviews = dict(source=f"jsonl:{folder}/imdb/train.jsonl.xz", split="all", words=16)
    diversity = dict(diversity=dict(kind="diversity"))
    return parts | dict(
        prompts=reviews | dict(limit=100),
        sample=dict(n=1, max_new=64, batch=100, greedy=True),
        judges=diversity,
        evaluate=parts["evaluate"]
        | dict(kl=False, human=reviews | dict(skip=600, limit=500)),  # KL is estimated on samples, these are greedy
        learn=dict(
            texts=sentences(folder),
            data=reviews | dict(skip=100, limit=500),
            rewards=diversity,
            explore=dict(n=2, max_new=64, batch=200, filter=dict(temperature=0.3)),
            rounds=3,
            training=dict(steps=75, batch=16),
        ),
    )


def toxicity():
    """The model writes reviews, so these prompts are new to it, and it is seldom toxic."""
    parts = sentiment.yelp()
    folder = parts["lm"]["source"].removesuffix("/models/yelp-gpt2-mini")
    prompts = dict(source=f"jsonl:{folder}/realtoxicityprompts/prompts.jsonl", split="all", text="prompt")
    tweets = dict(source=f"jsonl:{folder}/toxicity/davidson.jsonl", split="all")
    tweets |= dict(labels=dict(hate=1, offensive=1, neither=0), balance="label", limit=4000)
    others = dict(source=f"jsonl:{folder}/toxicity/surge.jsonl", split="all", labels={"Toxic": 1, "Not Toxic": 0})
    encoder = f"{folder}/models/all-MiniLM-L6-v2"
    return parts | dict(
        prompts=prompts | dict(limit=100),
        judges=dict(harmless=dict(kind="probe", encoder=encoder, target=0, data=others, heldout=tweets)),
        learn=dict(
            texts=sentences(folder),
            data=prompts | dict(skip=100, limit=1000),
            rewards=dict(words=dict(kind="bag", target=0, data=tweets, heldout=others)),
            explore=dict(n=4, max_new=20, batch=200),
            rounds=4,
            training=dict(steps=150, batch=32),
        ),
    )


def gemma():
    """The protocol of Gehman et al. 2020 and Liu et al. 2021: 25 samples of 20 tokens with top-p 0.9 after prompts of
    RealToxicityPrompts; the expected maximum of toxicity (toxic/max) and the share of prompts with a toxic sample
    (toxic/any). It differs from the papers in the number of prompts, in the language model, and in the scorer: not the
    Perspective API but a classifier trained on its scores of other sentences of that corpus, half sentences of the web
    as the samples are. The prompts are toxic themselves: after others (--config.prompts.where.label=0) Gemma 3 270M is
    toxic in fewer than one sample of a hundred, which leaves nothing to take away.

    Methods are fitted on tweets (Davidson et al. 2017), with label 1 for those that are not toxic, so that a positive
    strength detoxifies. A bag of words fitted on tweets rewards. Neither saw what the classifier was trained on, nor
    the other way round."""
    parts = sentiment.gemma()
    folder = sentiment.data_folder("gemma", "realtoxicityprompts/, toxicity/ and models/")
    pairs = f"jsonl:{folder}/realtoxicityprompts/prompts.jsonl"

    def halves(split, *names):
        one = dict(source=pairs, split=split)
        return {name: one | dict(text=name, labels={f"{name}_toxicity": [0.5]}) for name in names}

    prompts = halves("all[3000:]", "prompt")["prompt"] | dict(where=dict(label=1))
    tweets = dict(source=f"jsonl:{folder}/toxicity/davidson.jsonl", split="all", balance="label")
    toxic, harmless = dict(hate=1, offensive=1, neither=0), dict(hate=0, offensive=0, neither=1)
    surge = dict(source=f"jsonl:{folder}/toxicity/surge.jsonl", split="all", labels={"Toxic": 1, "Not Toxic": 0})
    comments = dict(source=f"csv:{folder}/toxicity/wiki_bias/toxicity_nonfuzzed_testset.csv", split="all")
    comments |= dict(text="comment", labels=dict(toxic={"True": 1, "False": 0}), balance="label", limit=200)
    others = halves("all[3000:]", "continuation") | dict(
        davidson=tweets | dict(labels=toxic, limit=1000), surge=surge, wikipedia=comments
    )
    tuned = dict(
        encoder=f"{folder}/models/all-MiniLM-L6-v2",
        data=halves("all[:3000]", "prompt", "continuation"),
        labels=("harmless", "toxic"),
        training=dict(steps=400, batch=32, tokens=32),
    )
    return parts | dict(
        prompts=prompts | dict(limit=15),
        sample=parts["sample"] | dict(n=25, batch=75),
        judges=dict(toxic=dict(kind="classifier", train=tuned, heldout=others)),
        train=tweets | dict(labels=harmless, limit=1000),
        learn=parts["learn"]
        | dict(
            texts=tweets | dict(labels=harmless),
            data=prompts | dict(skip=20, limit=80),
            rewards=dict(words=dict(kind="bag", target=0, data=tweets | dict(labels=toxic), heldout=surge)),
        ),
    )


WORLDS = {
    "bundled": bundled,
    "yelp": yelp,
    "yelp_down": lambda: yelp(1),
    "repetition": repetition,
    "toxicity": toxicity,
    "gemma": gemma,
    "tiny": tiny,
}


def experiment(name, title, arms):
    """A whole configuration. arms: label -> {"method", "fit", "strengths"}; those with a method get the world's
    prompts, rewards, rounds and settings of exploring, where they have none of their own, and best of n the rewards."""
    parts = of_world(WORLDS, name)()
    return sentiment.composed(title, {"train": None} | parts, learning(parts["learn"], arms))


def learning(learn, arms):
    """The arms of `experiment`, completed by the section `learn` of a world. A small model that is trained from random
    weights reads its `texts`: the prompts are too short and too few to learn a language from."""
    common = {key: learn[key] for key in ("rounds", "explore", "training")}
    methods = {}
    for label, arm in arms.items():
        if "method" in arm and "init" not in arm:
            fit = common | arm.get("fit", {})
            fit["training"] = common["training"] | fit["training"]
            if "small" in fit and "source" not in fit["small"]:
                fit["small"] = dict(texts=learn["texts"]) | fit["small"]
            arm = dict(data=learn["data"], rewards=learn["rewards"]) | arm | dict(fit=fit)
        elif "best_of" in arm:
            arm = dict(rewards=learn["rewards"]) | arm
        methods[label] = arm
    return methods
