"""Reviews from a grammar: sentiment, topic, insults, length and formality are known and can be read back exactly.

`generate(index)` is random access, so a corpus of any size needs no storage; `oracle(text)` reads the attributes of a
review from its words alone and gives a sensible answer on imperfect samples of a language model too. Every review
opens with when and who, which say nothing about any attribute: those words are its `prompt`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ctg_jax.data.grammar import Draws, Table, count, draw, enumerate_all, ordered
from ctg_jax.io import dumps, read_json, sha256_of
from ctg_jax.types import InputError

LABELS = ("negative", "positive")
TOPICS = ("restaurant", "hotel", "film", "book", "phone", "airline", "gym", "museum")
LENGTHS = ("short", "medium", "long")  # up to 3, 4 to 5, at least 6 sentences
TOXIC_SHARE = 5  # one review in five holds an insult

_FILES = ("lexicon.json", "sentences.json", "topics.json")
_TOKEN = re.compile(r"[a-z]+(?:['-][a-z]+)*|[.,!?;:]")
_WINDOW = 4  # how many words a negator reaches over


class _Grammar:
    """The word lists that come with the package, and what is computed from them once."""

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        return {name: read_json(Path(__file__).parent / name, "install the package again") for name in _FILES}

    @cached_property
    def cells(self) -> dict[tuple[int, int, int], _Cell]:
        places = itertools.product(range(len(LABELS)), range(len(TOPICS)), range(2))
        return {place: _Cell(*place) for place in places}

    @cached_property
    def digest(self) -> str:
        parts = [(Path(__file__).parent / name).read_bytes() for name in _FILES]
        parts += [dumps(generate(i), sort_keys=True, ensure_ascii=True).encode() for i in range(256)]
        return sha256_of(b"\0".join(parts))

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        sentences = {k: v for k, v in _load("sentences.json").items() if k not in ("skeletons", "cues")}
        agreement = [_agree("{was} {wasnt}", aspect) for aspect in ("one", "many+")]
        found = _vocabulary([_load("lexicon.json"), _load("topics.json"), sentences, agreement])
        return frozenset(w for w in found if w[0].isalpha())

    @cached_property
    def cues(self) -> dict[str, frozenset[str]]:
        lexicon, sentences, topics = _load("lexicon.json"), _load("sentences.json"), _load("topics.json")
        cues = {name: set(listed) for name, listed in sentences["cues"].items()}
        for mood in LABELS:
            cues[mood] |= _vocabulary([g[mood] for g in lexicon["adjectives"].values()]) | _vocabulary(lexicon[mood])
        for style in ("formal", "informal"):
            cues[style] |= _vocabulary([w for w in lexicon[style]["very"] + lexicon[style]["lead"] if " " not in w])
        cues["insult"] = set(lexicon["shared"]["insulting"] + lexicon["shared"]["insult"])
        common = _vocabulary([lexicon, {k: v for k, v in sentences.items() if k not in ("skeletons", "cues")}])
        for topic in TOPICS:
            others = _vocabulary([t for name, t in topics.items() if name != topic])
            cues[topic] = _vocabulary([topics[topic]["things"], topics[topic]["aspects"]]) - others - common - {"+"}
        return {name: frozenset(found) for name, found in cues.items()}


_GRAMMAR = _Grammar()


def _load(name: str) -> dict[str, Any]:
    return _GRAMMAR.files[name]


class _Cell:
    """The sentences open to one (label, topic, formal): a list of (template, table) for each kind of sentence."""

    def __init__(self, label: int, topic: int, formal: int):
        lexicon, sentences, subject = (
            _load("lexicon.json"),
            _load("sentences.json"),
            _load("topics.json")[TOPICS[topic]],
        )
        mood, style = LABELS[label], ("informal", "formal")[formal]
        table = {**lexicon["shared"], **lexicon[mood], **lexicon[style], **subject["lists"], "thing": subject["things"]}
        self.opening = [(sentences["opening"].replace("{visit}", v), table) for v in subject["visits"]]
        self.detail = [(t, table) for t in subject["details"]]
        self.closing = [(t, table) for t in sentences["closing"][mood][style]]
        self.insult = [(t, table) for t in sentences["insult"][mood]]
        self.first: list[list[tuple[str, Table]]] = []  # per aspect: sentences that show the style
        self.body: list[list[tuple[str, Table]]] = []  # per aspect: those and the plain ones
        for group, aspects in subject["aspects"].items():
            words = {w: lexicon["adjectives"][group][w] for w in LABELS}
            own = {**table, "adj": words[mood], "opp": words[LABELS[1 - label]]}
            for aspect in aspects:
                fit = lambda t, a=aspect: _agree(t, a)  # noqa: E731
                self.first.append([(fit(t), own) for t in sentences["body"][style]])
                self.body.append(self.first[-1] + [(fit(t), own) for t in sentences["body"]["plain"]])

    def write(self, skeleton: str, draws: Draws) -> list[str]:
        aspects, details, text, first = list(range(len(self.body))), list(self.detail), [], True
        for kind in skeleton:
            if kind == "B":
                choices = (self.first if first else self.body)[aspects.pop(draws.below(len(aspects)))]
                chosen, first = draws.choice(choices), False
            elif kind == "D":
                chosen = details.pop(draws.below(len(details)))
            else:
                chosen = draws.choice({"O": self.opening, "C": self.closing, "I": self.insult}[kind])
            text.append(draw(*chosen, draws))
        return text

    def count(self, skeleton: str) -> int:
        sizes = {kind: sum(count(*s) for s in group) for kind, group in
                 (("O", self.opening), ("C", self.closing), ("I", self.insult))}  # fmt: skip
        total = ordered([count(*s) for s in self.detail], skeleton.count("D"))
        for kind in skeleton:
            total *= sizes.get(kind, 1)
        first, body = ([sum(count(*s) for s in a) for a in group] for group in (self.first, self.body))
        rest = skeleton.count("B") - 1
        return total * sum(n * ordered(body[:i] + body[i + 1 :], rest) for i, n in enumerate(first))

    def sentences(self, kind: str) -> list[str]:
        """All sentences of one kind (`opening`, `detail`, `closing`, `insult`, `body`), repeated if ambiguous."""
        group = itertools.chain(*self.body) if kind == "body" else getattr(self, kind)
        return [text for template, table in group for text in enumerate_all(template, table)]


def _agree(template: str, aspect: str) -> str:
    plural = aspect.endswith("+")
    forms = {
        "aspect": aspect.rstrip("+"),
        "was": "were" if plural else "was",
        "wasnt": "weren't" if plural else "wasn't",
    }
    for slot, form in forms.items():
        template = template.replace("{" + slot + "}", form)
    return template


def cell(label: int, topic: int, formal: int) -> _Cell:
    """The sentences open to one label, topic and formality."""
    return _GRAMMAR.cells[label, topic, formal]


def _skeletons(length: int, toxic: int) -> list[str]:
    return _load("sentences.json")["skeletons"][LENGTHS[length]][("clean", "toxic")[toxic]]


def generate(index: int, seed: int = 0, **attributes: int) -> dict[str, Any]:
    """Review number `index` of the corpus `seed`, the same on every machine.

    Args:
      index: any integer >= 0. seed: which corpus.
      **attributes: fixes any of label, topic, toxic, length, formal; the others are drawn: topics, labels, lengths
        and formality evenly, an insult in one review of five, all independent of one another.

    Returns:
      {"text", "prompt": its first words, which say nothing about the attributes, "label": 0 or 1 (see `LABELS`),
      "topic": see `TOPICS`, "toxic": 0 or 1, "length": see `LENGTHS`, "formal": 0 or 1}.

    Raises:
      InputError: an attribute that does not exist or is out of range.
    """
    sizes = {"label": 2, "topic": len(TOPICS), "toxic": 2, "length": len(LENGTHS), "formal": 2}
    for name, value in attributes.items():
        if name not in sizes:
            raise InputError(f"generate: unknown attribute {name!r}; the attributes are {', '.join(sizes)}")
        if value not in range(sizes[name]):
            raise InputError(f"generate: {name}={value!r} is not one of 0 … {sizes[name] - 1}")
    draws = Draws(f"reviews/{seed}/{index}")
    drawn = {name: draws.below(n) for name, n in sizes.items()}
    drawn["toxic"] = int(draws.below(TOXIC_SHARE) == 0)
    a = {**drawn, **{name: int(value) for name, value in attributes.items()}}
    skeleton = draws.choice(_skeletons(a["length"], a["toxic"]))
    text = cell(a["label"], a["topic"], a["formal"]).write(skeleton, draws)
    who = sorted(_load("lexicon.json")["shared"]["who"], key=len, reverse=True)
    when, rest = text[0].split(", ", 1)
    prompt = next(f"{when}, {w}" for w in who if rest.startswith(w + " "))
    return {"text": " ".join(text), "prompt": prompt, **a}


def digest() -> str:
    """A fingerprint of the grammar: its word lists and the first reviews it writes."""
    return _GRAMMAR.digest


def count_reviews() -> int:
    """The number of distinct reviews, counted from the grammar (an exact sum, no enumeration)."""
    return sum(
        cell(label, topic, formal).count(skeleton)
        for label in range(2)
        for topic in range(len(TOPICS))
        for formal in range(2)
        for length in range(len(LENGTHS))
        for toxic in range(2)
        for skeleton in _skeletons(length, toxic)
    )


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return _TOKEN.findall(text.lower().replace("’", "'").replace(" n't", "n't"))


def _vocabulary(tree: Any) -> set[str]:
    """All words of nested lists and dicts of templates."""
    if isinstance(tree, str):
        return set(words(re.sub(r"\{\w+\}", " ", tree).replace("a(n)", "a an")))
    return set().union(*map(_vocabulary, tree.values() if isinstance(tree, Mapping) else tree))


def in_vocabulary(text: str) -> bool:
    """Whether a text has words and all of them are words that the grammar can write."""
    found = [w for w in words(text) if w[0].isalpha()]
    return bool(found) and vocabulary().issuperset(found)


def vocabulary() -> frozenset[str]:
    """Every word that the grammar can write."""
    return _GRAMMAR.vocabulary


def cue_words() -> dict[str, frozenset[str]]:
    """The words the oracle looks for: `positive`, `negative`, `insult`, `formal`, `informal` and one set per topic
    (names of its things and aspects that no other topic and no common sentence uses)."""
    return _GRAMMAR.cues


def count_cues(text: str) -> dict[str, int]:
    """How often each kind of cue occurs. A negator turns the next few words of its clause over: `not bland` counts as
    positive."""
    cues = cue_words()
    found = dict.fromkeys(("positive", "negative", "insult", "formal", "informal", *TOPICS), 0)
    reach = 0
    for word in words(text):
        if word in ".,!?;:" or word in cues["breaks"]:
            reach = 0
        for name in found:
            if word in cues[name]:
                if reach > 0 and name in LABELS:
                    name = LABELS[name == "negative"]
                found[name] += 1
        reach = _WINDOW if word in cues["negators"] else reach - 1
    return found


def oracle(text: str) -> dict[str, int | None]:
    """The attributes of a review, read from its words: exact for reviews of the grammar.

    On other text each attribute is the side with more cues: label and formal are None where the cues balance (or are
    absent), topic is None where no topic word occurs (the first of `TOPICS` wins a tie).
    """
    n = count_cues(text)
    topic = max(range(len(TOPICS)), key=lambda i: n[TOPICS[i]])
    sentences = len(re.findall(r"[.!?]+(?=\s|$)", text.strip())) + (not text.strip().endswith((".", "!", "?")))
    return {
        "label": None if n["positive"] == n["negative"] else int(n["positive"] > n["negative"]),
        "topic": topic if n[TOPICS[topic]] else None,
        "toxic": int(n["insult"] > 0),
        "length": 0 if sentences <= 3 else 1 if sentences <= 5 else 2,
        "formal": None if n["formal"] == n["informal"] else int(n["formal"] > n["informal"]),
    }


def sentiment_score(text: str) -> float:
    """How positive a text is, in [0, 1]: (p + ½) / (p + n + 1) for p positive and n negative cues, so 0.5 without any
    cue, above 0.5 exactly where `oracle` says positive."""
    n = count_cues(text)
    return (n["positive"] + 0.5) / (n["positive"] + n["negative"] + 1)
