"""Prompts with instructions that code can verify, made by templates, in the layout of IFEval (Zhou et al. 2023), for
where its prompts are not at hand. `ctg_jax.rewards.instructions` checks them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ctg_jax.io import digest

SPLITS = {"train": 2000, "validation": 200, "test": 200}  # the number of records

_TASKS = (
    "Write a short text about {topic}.", "Tell a friend about {topic}.", "Describe {topic}.",
    "Write an advertisement for {topic}.", "Write a review of {topic}.",
)  # fmt: skip
_TOPICS = (
    "a small hotel", "an old train station", "the first day of spring", "a bakery", "a football match",
    "a lost umbrella",
    "the night sky", "a noisy neighbour", "a new bicycle", "a village market", "a long flight", "a good teacher",
    "a broken phone", "a walk by the river", "a surprise party", "a museum of toys", "a cup of tea", "a winter storm",
    "a busy kitchen", "an empty theatre",
)  # fmt: skip
_WORDS = ("light", "morning", "quiet", "open", "friend", "green", "always", "street", "music", "warm")
# What a text can be asked for, by what it concerns, of which a record has at most one each: (instruction, sentence that
# names its arguments, choices of these).
_REQUESTS = {
    "size": (
        ("length_constraints:number_words", "Use {relation} {num_words} words.",
         dict(relation=("less than", "at least"), num_words=(15, 25, 40))),
        ("length_constraints:number_sentences", "Use {relation} {num_sentences} sentences.",
         dict(relation=("less than", "at least"), num_sentences=(2, 3, 4))),
    ),
    "words": (
        ("keywords:existence", "Use the words {keywords}.", dict(keywords=2)),
        ("keywords:forbidden_words", "Do not use the words {forbidden_words}.", dict(forbidden_words=2)),
        ("keywords:frequency", "Use the word {keyword} {relation} {frequency} times.",
         dict(keyword=1, relation=("less than", "at least"), frequency=(2, 3))),
    ),
    "casing": (
        ("change_case:english_lowercase", "Use lower case only.", {}),
        ("change_case:english_capital", "Use capital letters only.", {}),
    ),
    "commas": (("punctuation:no_comma", "Use no commas.", {}),),
    "format": (
        ("detectable_format:number_bullet_lists", "Write exactly {num_bullets} bullet points.",
         dict(num_bullets=(2, 3, 4))),
        ("detectable_format:title", "Begin with a title in double angular brackets, as in <<title>>.", {}),
        ("detectable_format:json_format", "Write it as JSON.", {}),
        ("startend:quotation", "Put the whole text in double quotation marks.", {}),
    ),
}  # fmt: skip


def digest_of() -> str:
    """A fingerprint of the records of all splits."""
    return digest([records(split) for split in SPLITS])


def records(split: str) -> list[dict[str, Any]]:
    """The records of a split, each with `prompt`, `topic`, `instruction_id_list` and `kwargs`: one to three
    instructions of different concerns. They are the same on every machine."""
    generator = np.random.default_rng([2023, list(SPLITS).index(split)])
    return [_record(generator) for _ in range(SPLITS[split])]


def _record(generator: np.random.Generator) -> dict[str, Any]:
    topic = _TOPICS[generator.integers(len(_TOPICS))]
    sentences = [_TASKS[generator.integers(len(_TASKS))].format(topic=topic)]
    names, given = [], []
    for concern in generator.permutation(list(_REQUESTS))[: generator.integers(1, 4)]:
        name, sentence, choices = _REQUESTS[concern][generator.integers(len(_REQUESTS[concern]))]
        own = {key: _chosen(generator, values) for key, values in choices.items()}
        shown = {key: " and ".join(x) if isinstance(x, list) else x for key, x in own.items()}
        sentences.append(sentence.format(**shown))
        names.append(name)
        given.append(own)
    return {"prompt": " ".join(sentences), "topic": topic, "instruction_id_list": names, "kwargs": given}


def _chosen(generator: np.random.Generator, values: Any) -> Any:
    """One of several values; a number is how many words to choose, one alone as a string."""
    if not isinstance(values, int):
        found = values[generator.integers(len(values))]
        return found if isinstance(found, str) else int(found)
    words = [_WORDS[i] for i in generator.permutation(len(_WORDS))[:values]]
    return words[0] if values == 1 else words
