"""Instructions that code can verify, by the names and arguments of IFEval (Zhou et al. 2023): numbers of words,
sentences and paragraphs, keywords, letters, casing, commas, titles, sections, bullet points, JSON, beginnings and ends.

The rules are those of the paper's appendix and of its published code, written again; words are runs of letters, digits
and underscores, and sentences end at ".", "!" or "?", where the authors use NLTK. Not here:
`language:response_language`, which needs a classifier of languages; the two casings in English are checked for their
casing alone.

A score is the share of a prompt's instructions that its text follows; it is 1 where all are followed, so that the share
of texts from the threshold on is the accuracy of prompts, and the mean that of instructions, each prompt counted once.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctg_jax.rewards.asked import Asked, by_prompt, wanted_in
from ctg_jax.run.identity import nearest
from ctg_jax.types import InputError

log = logging.getLogger(__name__)

_UNCHECKED = "language:response_language"
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"[^.!?\s][^.!?]*(?:[.!?]+|$)")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _holds(count: int, relation: str, number: float) -> bool:
    if relation not in ("less than", "at least"):
        raise InputError(f"relation is {relation!r}, expected 'less than' or 'at least'")
    return count < number if relation == "less than" else count >= number


def _parts(text: str, mark: str) -> list[str] | None:
    """The parts of a text between marks; None where one is empty that is neither the first nor the last."""
    parts = [part.strip() for part in re.split(mark, text)]
    return None if any(not part for part in parts[1:-1]) else [part for part in parts if part]


def _words(text: str, num_words: int, relation: str) -> bool:
    return _holds(len(_WORD.findall(text)), relation, num_words)


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(len(_SENTENCE.findall(text)), relation, num_sentences)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _parts(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == num_paragraphs


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    if nth_paragraph < 1:
        raise InputError(f"nth_paragraph is {nth_paragraph}, expected at least 1")
    parts = [part.strip() for part in re.split(r"\n\n", text) if part.strip()]
    if len(parts) != num_paragraphs or nth_paragraph > len(parts):
        return False
    found = re.match(r"[\"']*([^\s.,?!\"']*)", parts[nth_paragraph - 1])
    return found[1].lower() == first_word.lower()


def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(len(re.findall(re.escape(keyword), text, re.IGNORECASE)), relation, frequency)


def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


def _postscript(text: str, postscript_marker: str) -> bool:
    marks = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(marks.get(postscript_marker, re.escape(postscript_marker.lower())), text.lower()) is not None


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*].*|-.*)$", text, re.MULTILINE)) == num_bullets


def _constrained(text: str) -> bool:
    return any(answer in text for answer in _ANSWERS)


def _highlighted(text: str, num_highlights: int) -> bool:
    single = [m.strip("*").strip() for m in re.findall(r"\*[^\n*]*\*", text)]
    double = [m.strip("*").strip() for m in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(map(bool, single + double)) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:  # the spelling is that of the data
    return len(re.split(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) - 1 >= num_sections


def _json(text: str) -> bool:
    body = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


def _title(text: str) -> bool:
    return any(found.strip("<>").strip() for found in re.findall(r"<<[^\n]+>>", text))


def _two(text: str) -> bool:
    parts = _parts(text, r"\*\*\*\*\*\*")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _repeats(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(text: str) -> bool:
    body = text.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


def _capitals(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _holds(sum(word.isupper() for word in _WORD.findall(text)), capital_relation, capital_frequency)


CHECKS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_words": _words,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:postscript": _postscript,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlighted,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capitals,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda text: "," not in text,
}


def follows(text: str, instruction: str, arguments: Mapping[str, Any] | None = None, *, loose: bool = False) -> bool:
    """Whether a text follows one instruction.

    Args:
      instruction: a key of `CHECKS`. arguments: those of the record, by name; the ones that are None do not count.
      loose: whether it is enough that the text does so without its first line, its last line or both, or without
        asterisks, the paper's loose criterion.

    Raises:
      InputError: an unknown instruction or relation, arguments that are not those of the instruction, or one of the
        wrong type.
    """
    if not isinstance(instruction, str) or instruction not in CHECKS:
        raise InputError(f"the instruction {instruction!r:.60} is unknown{nearest(str(instruction), CHECKS)}")
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    check = CHECKS[instruction]
    parameters = [] if inspect.ismethoddescriptor(check) else list(inspect.signature(check).parameters.values())[1:]
    needed = {p.name: p.annotation for p in parameters}
    if sorted(given) != sorted(needed):
        raise InputError(
            f"the instruction {instruction!r} has the arguments {sorted(given)}, expected {sorted(needed)}"
        )
    given = {name: _argument(name, value, needed[name]) for name, value in given.items()}
    return any(bool(x.strip()) and check(x, **given) for x in (variants(text) if loose else [text]))


def _argument(name: str, value: Any, annotation: str) -> Any:
    """The value of an argument, whole numbers as int, since files of IFEval also hold them as 3.0."""
    if annotation == "int":
        right = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value % 1 == 0
        expected = "a whole number of at least 0"
    elif annotation == "str":
        right, expected = isinstance(value, str) and value, "a string that is not empty"
    else:
        right = isinstance(value, list | tuple) and value and all(isinstance(word, str) and word for word in value)
        expected = "a list of strings, none of them empty"
    if not right:
        raise InputError(f"{name} is {value!r:.60}, expected {expected}")
    return int(value) if annotation == "int" else value


def variants(text: str) -> list[str]:
    """The eight readings of a text under the loose criterion."""
    lines = text.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [reading for x in (text, *cut) for reading in (x, x.replace("*", ""))]


def asked_of(record: Mapping[str, Any], where: str) -> list[list[Any]] | None:
    """[[instruction, arguments], …] of a record in the layout of IFEval, `instruction_id_list` and `kwargs`, without
    the one that cannot be checked; None where none is left.

    Raises:
      InputError: no such fields, lists of different lengths, arguments that are not by name, and what `follows` raises.
    """
    names, given = record.get("instruction_id_list"), record.get("kwargs")
    if not isinstance(names, list) or not isinstance(given, list) or len(names) != len(given):
        raise InputError(
            f"{where} has instruction_id_list {names!r:.60} and kwargs {given!r:.60}: expected two lists of one length"
        )
    if wrong := [own for own in given if own is not None and not isinstance(own, Mapping)]:
        raise InputError(f"{where} has {wrong[0]!r:.60} in kwargs, expected the arguments of an instruction by name")
    found = [[name, {k: v for k, v in (own or {}).items() if v is not None}] for name, own in zip(names, given)]
    found = [pair for pair in found if pair[0] != _UNCHECKED]
    for name, own in found:
        try:
            follows("a", name, own)
        except InputError as e:
            raise InputError(f"{where}: {e}") from None
    return found or None


SETTINGS = ("data", "target")


def fit(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], where: str) -> Asked:
    """The judge of kind "instructions"; see `ctg_jax.rewards`. `target` is "loose" for that criterion, or left out."""
    left = sum(_UNCHECKED in (r.get("instruction_id_list") or ()) for r in records)
    if left:
        log.warning("%s: %d records ask for a language, which is not checked", where, left)
    return _judge(by_prompt(records, asked_of, where), settings)


def load(folder: Path, settings: Mapping[str, Any]) -> Asked:
    """The judge of kind "instructions" that was saved in a folder."""
    return _judge(wanted_in(folder), settings)


def _judge(wanted: Mapping[str, Any], settings: Mapping[str, Any]) -> Asked:
    if settings["target"] not in (1, "strict", "loose"):
        raise InputError(f"target is {settings['target']!r}, expected 'strict' or 'loose'")
    loose = settings["target"] == "loose"

    def score(text: str, asked: Sequence[Sequence[Any]]) -> float:
        return sum(follows(text, name, given, loose=loose) for name, given in asked) / len(asked)

    rules = "instructions[loose]@2" if loose else "instructions@2"
    return Asked(rules, wanted, score, name=settings["name"], threshold=1.0)
