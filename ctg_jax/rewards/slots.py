"""Coverage of the slots of a meaning representation of E2E (Novikova et al. 2017), which the prompt holds.

"name[The Vaults], familyFriendly[no] =" asks for two slots. A slot is realised where the text holds its value, the case
ignored, or a usual wording of it: "five star", "5 out of 5" for a rating of 5 out of 5, "not family-friendly" or
"adults only" for familyFriendly[no]. The wordings are this library's, in the spirit of the regular expressions by which
slot errors of E2E are counted (Dušek et al. 2019); a paraphrase that is none of them counts as missing. "High prices"
are no rating and "a low rating" no price; apart from that a value counts wherever it occurs. The syntax of
Diffusion-LM, "name : The Vaults | Type : pub", is read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctg_jax.rewards.check import checked, readable
from ctg_jax.types import InputError

_SLOT = re.compile(r"(\w+)\[([^\]]*)\]")
_PAIR = re.compile(r"(?:^|\|)\s*([\w ]+?)\s*:\s*([^|=]+?)\s*(?=\||=|$)")
_FAMILY = r"(?:famil(?:y|ies)|kids?|child(?:ren)?)"
_DENIALS = r"(?:no|not(?! only)|non|isn't|aren't|never|without|unsuitable)"
_NOT = (  # a denial with up to four words of the same phrase before families, or directly behind them
    rf"\b{_DENIALS}(?:[ -]+(?!and\b|but\b)[\w']+){{0,4}}[ -]+{_FAMILY}|\badults?\b"
    rf"|{_FAMILY}(?:[ -]friendly)? (?:(?:is|are|should|will) )?{_DENIALS}\b(?! far)"
)
_WORDINGS = {  # of a value -> what else says it
    ("rating", "5 out of 5"): r"\b(?:5|five)[ -]?(?:stars?\b|out of (?:5|five)|/ ?5)|\b(?:high(?:ly)?|top)[ -]rat",
    ("rating", "3 out of 5"): r"\b(?:3|three)[ -]?(?:stars?\b|out of (?:5|five)|/ ?5)|\baverage\b",
    ("rating", "1 out of 5"): r"\b(?:1|one)[ -]?(?:stars?\b|out of (?:5|five)|/ ?5)|\b(?:low|poor)\w*\b",
    ("rating", "high"): r"\bhigh(?:ly)?\b|\bexcellent\b|\bwell[ -]rated\b",
    ("rating", "average"): r"\baverage\b|\bdecent\b|\bmoderate(?:ly)?\b",
    ("rating", "low"): r"\blow(?:ly)?\b|\bpoor(?:ly)?\b|\bbad(?:ly)?\b",
    ("price", "cheap"): r"\bcheap\b|\binexpensive\b|\blow[ -](?:price|cost)",
    ("price", "less than £20"): r"\b(?:less than|under|below) £?20\b|\bcheap\b|\blow[ -](?:price|cost)",
    ("price", "£20-25"): r"20 ?(?:-|to|and) ?£?25\b",
    ("price", "more than £30"): r"\b(?:more than|over|above) £?30\b|\bexpensive\b|\bhigh[ -](?:price|cost)",
    ("price", "moderate"): r"\bmoderate(?:ly)?\b|\baverage[ -]\w*pric",
    ("price", "high"): r"\bhigh(?:er)?\b|\bexpensive\b|\bpricey\b",
    ("area", "city centre"): r"\b(?:city|town) cent(?:re|er)\b|\bcent(?:re|er) of (?:the )?(?:city|town)\b",
    ("area", "riverside"): r"\briverside\b|\bby the river\b|\briver ?(?:bank|front)\b|\bnear the river\b",
}  # fmt: skip
_LEVEL = r"(?:low|high|average|moderate|poor|decent)(?:er|ly)?"
_PRICE = r"(?:pric(?:e[sd]?|ey|ing)|costs?)"
_OTHER = {  # a slot -> phrases in which a word such as "high" is the value of another slot
    "rating": rf"\b{_LEVEL}[ -]{_PRICE}\b|\b{_PRICE}(?: range)?(?: (?:is|are|of))? {_LEVEL}\b",
    "price": rf"\b{_LEVEL}[ -](?:customer[ -])?rat(?:ed|ings?)\b|\brat(?:ed|ings?)(?: (?:is|are|of))? {_LEVEL}\b",
}


def slots(prompt: str) -> list[tuple[str, str]]:
    """(name, value) of every slot that a prompt holds, in either syntax, in order."""
    found = _SLOT.findall(prompt) or _PAIR.findall(prompt)
    return [(name.strip(), value.strip()) for name, value in found if value.strip()]


def realised(name: str, value: str, text: str) -> bool:
    """Whether a text says that a slot has this value."""
    text, kind = text.lower().replace("£ ", "£"), name.lower().replace(" ", "")
    value = value.lower().replace("£ ", "£")
    if kind == "familyfriendly":
        denied = re.search(_NOT, text) is not None
        return denied if value == "no" else re.search(_FAMILY, text) is not None and not denied
    kind = next((known for known in ("rating", "price", "area") if known in kind), kind)
    if kind in _OTHER:
        text = re.sub(_OTHER[kind], " ", text)
    if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text):
        return True
    wording = _WORDINGS.get((kind, value))
    return wording is not None and re.search(wording, text) is not None


class Slots:
    """The share of the slots of each prompt that its text realises; 1 from the threshold on.

    Args:
      name: what it measures.
    """

    threshold = 1.0
    version = "slots@2"

    def __init__(self, *, name: str = "slots"):
        self.name = name

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]):
        """Scores float32 [n].

        Raises:
          InputError: a prompt without slots.
        """
        rows = readable(self.name, prompts, texts, "text")
        return checked(self.name, [self._one(p, t) for p, t in zip(prompts, rows)], len(rows))

    def _one(self, prompt: str, text: str) -> float:
        wanted = slots(prompt)
        if not wanted:
            raise InputError(
                f"the prompt {prompt[-60:]!r} holds no slots for the judge {self.name!r}: expected 'name[value], …' or "
                "'name : value | …'"
            )
        return sum(realised(*slot, text) for slot in wanted) / len(wanted)


SETTINGS = ()


def load(folder: Path, settings: Mapping[str, Any]) -> Slots:
    """The judge of kind "slots"; see `ctg_jax.rewards`."""
    return Slots(name=settings["name"])
