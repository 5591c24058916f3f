"""Metrics of texts alone: diversity, repetition, self-BLEU, keyword coverage. Words are `text.split()`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from ctg_jax.types import InputError, optional


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n-grams in order; none where there are fewer than n words."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float:
    """dist-n of the samples of one prompt: distinct n-grams over the number of **words** of all of them, the
    convention of DExperts (Liu et al. 2021) and Quark (Lu et al. 2022); Li et al. 2016 for the idea. NaN where there
    are no words."""
    rows = [t.split() for t in texts]
    total = sum(map(len, rows))
    return len({g for r in rows for g in ngrams(r, n)}) / total if total else math.nan


def repetition(text: str, n: int) -> float:
    """seq-rep-n of one continuation: 1 - distinct n-grams / n-grams (Welleck et al. 2020, eq. 9). NaN below n words."""
    grams = ngrams(text.split(), n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def diversity(text: str) -> float:
    """Product over n = 2, 3, 4 of (1 - seq-rep-n) of one continuation (Su et al. 2022). NaN below four words."""
    return math.prod(1 - repetition(text, n) for n in (2, 3, 4))


def unique_words(texts: Sequence[str]) -> int:
    """Number of distinct words in all continuations (uniq-seq of Welleck et al. 2020, on words)."""
    return len({w for t in texts for w in t.split()})


def self_bleu(texts: Sequence[str], order: int = 4) -> float:
    """Mean over texts of its BLEU against all the others as references (Zhu et al. 2018, Texygen), 0 to 1; high means
    that the samples are alike. BLEU as in NLTK: uniform weights, clipped counts, closest reference length, zero counts
    replaced by 0.1 (smoothing method 1). NaN for fewer than two texts that have words."""
    rows = [r for r in (t.split() for t in texts) if r]
    if len(rows) < 2:
        return math.nan
    lengths = Counter(map(len, rows))
    logs = [0.0] * len(rows)
    zero = [False] * len(rows)
    for n in range(1, order + 1):
        counts = [Counter(ngrams(r, n)) for r in rows]
        # The largest and second largest count of each n-gram: all that is needed to leave one text out.
        top: dict[tuple[str, ...], list[int]] = {}
        for c in counts:
            for gram, k in c.items():
                first, second = top.get(gram, (0, 0))
                top[gram] = [max(first, k), max(second, min(first, k))]
        for i, c in enumerate(counts):
            hit = sum(min(k, top[g][1] if k == top[g][0] else top[g][0]) for g, k in c.items())
            zero[i] |= n == 1 and hit == 0
            logs[i] += math.log((hit or 0.1) / max(1, len(rows[i]) - n + 1)) / order
    scores = []
    for i, r in enumerate(rows):
        others = [k for k, times in lengths.items() if times > (k == len(r))]
        closest = min(others, key=lambda k: (abs(k - len(r)), k))
        brevity = 1.0 if len(r) > closest else math.exp(1 - closest / len(r))
        scores.append(0.0 if zero[i] else brevity * math.exp(logs[i]))
    return sum(scores) / len(scores)


def bleu_pair(text: str, reference: str, order: int = 4) -> float:
    """BLEU of a text against one reference, 0 to 1, with the conventions of `self_bleu`; 0 where one has no words."""
    words, other = text.split(), reference.split()
    if not words or not other:
        return 0.0
    log = 0.0
    for n in range(1, order + 1):
        hit = (Counter(ngrams(words, n)) & Counter(ngrams(other, n))).total()
        if n == 1 and not hit:
            return 0.0
        log += math.log((hit or 0.1) / max(1, len(words) - n + 1)) / order
    return math.exp(log + min(0.0, 1 - len(other) / len(words)))


def coverage(text: str, keywords: Sequence[str], *, stem: bool = True) -> float:
    """Share of the keywords that occur in the text as whole words, case ignored; with `stem`, after Porter's stemmer,
    so that "dogs" covers "dog". A keyword of several words must occur as that sequence. NaN without keywords."""
    if isinstance(keywords, str):
        raise InputError(f"keywords is the string {keywords!r}; give a list of strings")
    if not keywords:
        return math.nan
    words = _stems(text) if stem else _words(text)
    hits = 0
    for keyword in keywords:
        target = tuple(_stems(keyword) if stem else _words(keyword))
        hits += bool(target) and target in set(ngrams(words, len(target)))
    return hits / len(keywords)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def _stems(text: str) -> list[str]:
    stemmer = optional("nltk.stem.porter", "metrics").PorterStemmer()
    return [stemmer.stem(w) for w in _words(text)]
