"""Four worlds for sentiment control; every experiment on sentiment starts from one of them.

bundled   restaurant reviews of a grammar with known sentiment; a small LM pretrained from random weights; the oracle
          judges
yelp      a real LM of reviews, prompts of real sentences, a probe on a sentence encoder that never saw them judges;
          reads CTG_DATA_DIR
gemma     the language model in the directory that CTG_LM_DIR names, in Hugging Face layout, such as Gemma 3 270M;
          nothing is specific to that one. Prompts are neutral halves of sentences of OpenWebText (Liu et al. 2021),
          methods are fitted on sentences of Yelp, and a classifier judges that is trained from a sentence encoder on
          SST-2; reads CTG_DATA_DIR too
tiny      the bundled world in seconds: for tests, not for figures

A world of your own is such a function: a language model that writes ordinary text, prompts that leave the attribute
open, labelled texts to fit on, and a judge that saw none of them. Say how right the judge is on held-out texts of
another corpus (`heldout` of a judge); the report shows it.
"""

import copy
import os

from ml_collections import ConfigDict

from ctg_jax.types import InputError

REVIEWS = "bundled:reviews"
# Texts of two words of which the first is the prompt, for methods whose rows would be too long for the tiny world.
SHORT = dict(source=REVIEWS, split="validation", limit=4, text=dict(prompt="{first}", text="{first} {last}"))


def world(name):
    """The sections lm, prompts, sample, judges and evaluate of a configuration, and `train`, the settings of
    `load_data` for the labelled texts that methods are fitted on."""
    return of_world(WORLDS, name)()


def of_world(settings, name):
    """The entry of a world in a dictionary by world; InputError for an argument that is none."""
    if name not in settings:
        raise InputError(f"the argument of the configuration is {name!r}: expected one of {', '.join(settings)}")
    return settings[name]


def bundled():
    """The LM must learn that a review keeps its sentiment: else no state of it holds that, and steering has nothing
    to act on. Of what serves that here, untying was tested alone (tied, it learns nothing of it in as many steps); one
    topic and a row for each text were not."""
    topic = dict(topic=0)  # restaurants
    return dict(
        lm=dict(
            source="",
            dtype="float32",
            pretrain=dict(
                vocab=1024,
                width=128,
                depth=2,
                heads=4,
                context=128,
                tied=False,
                pack=False,
                training=dict(tokens=96, batch=16, steps=1200, rate=5e-3),
            ),
            data=dict(source=REVIEWS, where=topic),
        ),
        prompts=dict(source=REVIEWS, split="test", where=topic, limit=20),
        sample=dict(n=10, max_new=40, batch=100, filter=dict(top_p=0.9)),
        judges=dict(positive=dict(kind="oracle", heldout=dict(source=REVIEWS, split="test", limit=500))),
        evaluate=dict(kl=True, resamples=1000),
        train=dict(source=REVIEWS, split="validation", where=topic, balance="label"),
    )


def tiny():
    return dict(
        lm=dict(
            source="",
            dtype="float32",
            pretrain=dict(
                vocab=300, width=16, depth=2, heads=2, context=64, training=dict(tokens=32, batch=4, steps=4, warmup=1)
            ),
            data=dict(source=REVIEWS, limit=64),
        ),
        prompts=dict(source=REVIEWS, split="test", limit=2),
        sample=dict(n=2, max_new=6, batch=4, filter=dict(top_p=0.9)),
        judges=dict(positive=dict(kind="oracle", heldout=dict(source=REVIEWS, split="test", limit=8))),
        evaluate=dict(kl=True, resamples=50),
        train=dict(source=REVIEWS, split="validation", balance="label", limit=8),
    )


def data_folder(name, holds):
    """The folder that CTG_DATA_DIR names; `holds` is what the world `name` reads there, for the message."""
    folder = os.environ.get("CTG_DATA_DIR")
    if not folder:
        raise InputError(f"CTG_DATA_DIR is not set: the {name} world reads {holds} in that directory")
    return folder


def yelp():
    folder = data_folder("yelp", "yelp/, sst2/ and models/")
    encoder = f"{folder}/models/all-MiniLM-L6-v2"
    return dict(
        lm=dict(source=f"{folder}/models/yelp-gpt2-mini", dtype="float32"),
        prompts=dict(source=f"jsonl:{folder}/yelp/dev.jsonl", split="all", words=4, balance="label", limit=50),
        sample=dict(n=10, max_new=20, batch=100, filter=dict(top_p=0.9)),
        judges=dict(
            positive=dict(
                kind="probe",
                encoder=encoder,
                reads="both",
                data=dict(source=f"jsonl:{folder}/sst2/train.jsonl", split="all"),
                heldout=dict(source=f"jsonl:{folder}/yelp/dev.jsonl", split="all", balance="label", limit=500, skip=50),
            )
        ),
        evaluate=dict(lm_name="yelp-gpt2-mini", embed=encoder, kl=True, resamples=1000),
        train=dict(source=f"jsonl:{folder}/yelp/train.jsonl", split="all", balance="label", limit=5000),
    )


def gemma():
    """The protocol of Liu et al. 2021 (section 3), with fewer prompts and samples, another language model and another
    judge. There the judge is trained on SST-2 as here, reads prompt and continuation as here, and perplexity is that of
    a larger LM; here it is that of the base. For prompts that lean the other way:
    --config.prompts.source=jsonl:$CTG_DATA_DIR/sentiment_prompts/negative.jsonl (or positive.jsonl)."""
    lm = os.environ.get("CTG_LM_DIR")
    if not lm:
        raise InputError(
            "CTG_LM_DIR is not set: the gemma world reads its language model from that directory in Hugging Face layout"
        )
    folder = data_folder("gemma", "sentiment_prompts/, yelp/, sst2/ and models/")
    encoder = f"{folder}/models/all-MiniLM-L6-v2"
    neutral = dict(source=f"jsonl:{folder}/sentiment_prompts/neutral.jsonl", split="all", text="prompt")
    reviews = dict(source=f"jsonl:{folder}/yelp/train.jsonl", split="all", balance="label")
    others = dict(source=f"jsonl:{folder}/yelp/dev.jsonl", split="all", balance="label", limit=500)
    tuned = dict(
        encoder=encoder,
        data=dict(source=f"jsonl:{folder}/sst2/train.jsonl", split="all"),
        labels=("negative", "positive"),
        training=dict(steps=200, batch=32, tokens=48),
    )
    return dict(
        lm=dict(source=lm, dtype="float32"),
        prompts=neutral | dict(limit=20),
        sample=dict(n=8, max_new=20, batch=80, filter=dict(top_p=0.9)),
        judges=dict(
            positive=dict(
                kind="classifier",
                reads="both",
                train=tuned,
                heldout=dict(sst2=dict(source=f"jsonl:{folder}/sst2/dev.jsonl", split="all"), yelp=others),
            )
        ),
        evaluate=dict(embed=encoder, resamples=1000),
        train=reviews | dict(limit=1000),
        learn=dict(
            texts=reviews | dict(limit=20000),
            data=neutral | dict(skip=500, limit=100),
            rewards=dict(words=dict(kind="bag", data=reviews | dict(limit=20000), heldout=others)),
            explore=dict(n=4, max_new=20, batch=50),
            rounds=2,
            training=dict(steps=40, batch=16),
        ),
    )


WORLDS = {"bundled": bundled, "yelp": yelp, "gemma": gemma, "tiny": tiny}


TRAINING = {
    "bundled": dict(training=dict(steps=150, batch=16, tokens=96)),
    "yelp": dict(training=dict(steps=400, batch=32, tokens=32)),
    "gemma": dict(training=dict(steps=80, batch=8, tokens=32, rate=1e-3)),
    "tiny": dict(adapter=dict(rank=2), training=dict(steps=2, batch=4, tokens=16, warmup=1)),
}


def training(name):
    """Settings of fine-tuning that suit a world, a copy that a configuration may change."""
    return copy.deepcopy(of_world(TRAINING, name))


def numbered(field, names, of):
    """The setting `labels` of `load_data` for texts whose `field` holds the place of their class in `names`: a text of
    the class `name` has the label of(name); None leaves it out."""
    return dict(labels={field: {str(i): of(name) for i, name in enumerate(names) if of(name) is not None}})


def paper(source, title, methods, **sample):
    """The experiment of a method with the language model of its paper, a hub id, on the prompts and with the judge of
    the yelp world. It needs an accelerator with room for the model.

    sample: settings of `sample` in which the paper differs.
    """
    config = experiment("yelp", title, methods).to_dict()
    config["lm"] = dict(source=source, dtype="bfloat16")
    config["evaluate"]["lm_name"] = source
    config["sample"] |= sample
    return ConfigDict(config)


def held_out(train, **settings):
    """Settings of labelled texts that no method is fitted on: those behind `train`, or the test split where it has no
    limit."""
    others = dict(skip=train["limit"]) if "limit" in train else dict(split="test")
    return train | others | settings


def experiment(name, title, methods):
    """A whole configuration: the world and the methods, which read its labelled texts where they have no `data`."""
    return composed(title, world(name), methods)


def composed(title, parts, methods):
    """A whole configuration of the parts of a world; see `experiment`."""
    train = parts.pop("train")
    parts.pop("learn", None)
    for arm in methods.values():
        if "method" in arm and "init" not in arm:
            arm.setdefault("data", train)
    return ConfigDict({"title": title, **parts, "methods": methods})
