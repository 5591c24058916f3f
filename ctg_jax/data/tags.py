"""Parts of speech of tokens, by rule: closed classes from lists, adjectives and nouns from the grammar of the bundled
reviews, adverbs by their ending. Nothing is downloaded and context is not read, so every token has one tag."""

from __future__ import annotations

import numpy as np

from ctg_jax.data.reviews import TOPICS, _load, _vocabulary
from ctg_jax.data.tokenizer import Tokenizer

TAGS = ("end", "punct", "num", "det", "pron", "adp", "conj", "verb", "adv", "adj", "noun", "part", "other")

_CLOSED = {
    "det": "a an the this that these those every each any some no another",
    "pron": "i you he she it we they me him her us them my your his its our their who what which everything something "
    "anything nothing someone anyone everyone",
    "adp": "of in on at by for with from to near behind beside across close about into over after before during off up "
    "down out than as",
    "conj": "and or but because if so when while though although",
    "verb": "is was were are be been being am 's 're 've 'm had has have do does did will would can could should shall "
    "may might must cannot go went came ate tried had booked stopped ordered shared felt looked turned seemed thought "
    "stood listed get got make made say said",
    "adv": "not n't never very too super here there again just back always even still also more most all",
    "num": "one two three four five six seven eight nine ten eleven twelve",
}


def tag_table(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [V]: the number in `TAGS` of each token's tag.

    "end" is a token that ends a text or another special token; "part" is a piece of a word that does not begin one;
    "other" is a word of no list, of Yelp's for the most part verbs and nouns.
    """
    lexicon, topics = _load("lexicon.json"), _load("topics.json")
    listed = {word: tag for tag, words in _CLOSED.items() for word in words.split()}
    nouns = _vocabulary([[topics[t]["things"], topics[t]["aspects"], topics[t]["lists"]] for t in TOPICS])
    open_classes = {"noun": nouns, "adj": _vocabulary(list(lexicon["adjectives"].values()))}
    for tag, found in open_classes.items():
        listed = {word: tag for word in found} | listed
    special = {*tokenizer.ends, tokenizer.bos, tokenizer.pad}
    texts = tokenizer.token_texts(range(tokenizer.vocab))
    tags = ["end" if i in special else _tag(text, listed) for i, text in enumerate(texts)]
    return np.asarray([TAGS.index(t) for t in tags], np.int32)


def _tag(text: str, listed: dict[str, str]) -> str:
    word = text.strip().lower()
    if not any(c.isalnum() for c in word):
        return "punct"
    if word[0].isdigit():
        return "num"
    if not text[0].isspace() and not text[0].isupper() and word[0] != "'":
        return "part"
    return listed.get(word) or ("adv" if len(word) > 4 and word.endswith("ly") else "other")
