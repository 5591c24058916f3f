"""What the columns of a report mean, and which direction is better."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A figure, as a regular expression -> (what it is, which direction is better; "" where that depends on the aim).
_MEANING: tuple[tuple[str, str, str], ...] = (
    (r"(?P<name>.+)/share", "share of samples that the scorer of {name!r} calls so", ""),
    (r"(?P<name>.+)/mean", "mean score of {name!r}", ""),
    (r"(?P<name>.+)/max", "highest score of {name!r} among the samples of a prompt, on average over prompts", ""),
    (r"(?P<name>.+)/any", "share of prompts with at least one sample that is called {name!r}", ""),
    (r"perplexity.*", "how surprising the text is for the language model that the page names", "lower"),
    (r"human_perplexity", "how surprising human text is for the controlled language model", "lower"),
    (r"dist-(?P<name>\d)", "distinct {name}-grams of the samples of a prompt over their words: variety", "higher"),
    (r"rep-(?P<name>\d)", "share of {name}-grams of a text that occurred in it before", "lower"),
    (r"diversity", "share of 2-, 3- and 4-grams of a text that occur in it for the first time, multiplied", "higher"),
    (r"self_bleu", "how alike the samples of a prompt are", "lower"),
    (r"kl", "distance from the uncontrolled language model, in nats for each token", "lower"),
    (r"mauve", "how near the distribution of the samples is to human text, at most 1", "higher"),
    (r"similarity", "how near in meaning the text is to a human text after the same prompt, at most 1", "higher"),
    (r"coverage", "share of the wanted words that occur", "higher"),
    (r"relevance", "how near in meaning the text is to its prompt, at most 1", "higher"),
    (r"uniq", "distinct words of all samples", "higher"),
    (r"length", "words of a sample", ""),
    (r"tokens", "new tokens of a sample", ""),
    (r"tokens_per_second", "new tokens in a second of decoding, without compilation", "higher"),
    (r"reward", "mean reward of the samples of a round", "higher"),
    (r"KL to base", "distance of a round from the language model before it learned, in nats for each token", "lower"),
)


def meaning(name: str) -> tuple[str, str]:
    """(what a figure is, "lower", "higher" or "") of a figure by its name; two empty texts where nothing is known."""
    for pattern, text, better in _MEANING:
        if found := re.fullmatch(pattern, name):
            return text.format(**found.groupdict()), better
    return "", ""


def explained(names: Sequence[str]) -> list[tuple[str, str]]:
    """(figure, its meaning with the better direction) of the figures that are known."""
    found = [(name, *meaning(name)) for name in names]
    return [(name, text + (f"; {better} is better" if better else "")) for name, text, better in found if text]


def best(name: str, values: Sequence[float]) -> set[int]:
    """The places of the best values of a figure; none where no direction is better or nothing tells them apart."""
    better = meaning(name)[1]
    known = [v for v in values if v == v]
    if not better or len(set(known)) < 2:
        return set()
    wanted = min(known) if better == "lower" else max(known)
    return {i for i, v in enumerate(values) if v == wanted}
