"""Self-debiasing: away from the words that a description of bad behaviour makes likelier (Schick et al. 2021).

    Δ(v) = p(v) - max_n p_n(v)
    z'(v) = z(v) + max(alpha · min(Δ(v), 0), log floor)

p is the next-token distribution after the text so far, and p_n the one after the n-th description and the text so far.
Words that no description makes likelier keep their logits. The N descriptions are copies of one stream, read in one
pass of N rows for each row of the batch; each row keeps a cache of its own.

    told = ["The following text contains a threat: "]
    control = self_debias.make(lm, key, descriptions=told, alpha=50.0)
    cond = {self_debias.own_entry(told): instructed(tokenizer, texts, told)}
    samples = generate(lm, params, to_prompts(tokenizer, texts, seed=0, cond=cond), control)

alpha is λ of the paper, whose default is 50, and 0 the base model; below 0 the described words are raised. Δ is a
difference of probabilities, so that rare words hardly move: from .001 to .01 the factor is .64 at alpha 50. The
authors' code processes texts one by one in Python; here the tokens of a description and of the prompt are those of one
text, padded on the left.

`diagnosis` is the self-diagnosis of the same paper: the probability that the model answers "Yes" to a question about a
text. A function that calls it can be a reward (`kind="function"`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax.control import Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.streams import Stream
from ctg_jax.controls.vectors import SoftPrompt, soft_prompt
from ctg_jax.data.instructions import instructed
from ctg_jax.data.tokenizer import Tokenizer, to_prompts
from ctg_jax.decode import loop
from ctg_jax.io import dumps, sha256_of
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, open_lm
from ctg_jax.types import InputError, Params

# The six attributes of the paper; their wording is recalled, not read.
DESCRIPTIONS = tuple(
    f"The following text contains {what}:\n"
    for what in (
        "rude, disrespectful or unreasonable language",
        "very hateful, aggressive or disrespectful language",
        "sexual references or lewd language",
        "a threat, an intention to inflict pain, injury or violence",
        "negative or hateful language that targets someone because of their identity",
        "swear words, curse words or other obscene language",
    )
)
QUESTION = '"{text}"\nQuestion: Does the above text contain {description}?\nAnswer:'


@struct.dataclass
class SelfDebias(Control):
    """z + max(alpha · min(p - max_n p_n, 0), log floor).

    Attributes:
      stream: the model after each description, in copies.
      alpha: float32 [] or, per row, [B]; 0 is the base model.
      floor: float32 [], the least factor of a probability.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    stream: Stream
    alpha: jax.Array
    floor: jax.Array
    cond: str | None = struct.field(pytree_node=False, default=None)

    def check(self, prompts):
        self.stream.check(prompts)

    def init(self, prompts, length):
        return per_row(self.alpha, prompts, self.cond), self.stream.init(prompts, length)

    def readers(self):
        return self.stream.readers("model that reads the descriptions")

    def logits(self, z, h, tokens, mask, state):
        strength, reading = state
        described, _, reading = self.stream.read(tokens, mask, z.shape[1], reading)
        worse = jax.nn.softmax(z, axis=-1) - jnp.max(jax.nn.softmax(described, axis=-1), axis=1)
        least = jnp.log(jnp.maximum(self.floor, 1e-30))
        return z + jnp.maximum(strength * jnp.minimum(worse, 0.0), least), (strength, reading)


def init(
    lm: LM,
    key: jax.Array,
    *,
    descriptions: Sequence[str] = DESCRIPTIONS,
    alpha: float = 50.0,
    floor: float = 0.01,
    cond: str | None = None,
) -> SelfDebias:
    """The control of some descriptions, which nothing has to be fitted for.

    Args:
      descriptions: texts that are put before the prompt, each with what separates it from the prompt.
      alpha, floor, cond: see `SelfDebias`.

    Raises:
      InputError: no description or an empty one, one string in place of a list, alpha that is not finite, a floor
        outside 0 … 1.
    """
    if isinstance(descriptions, str) or not descriptions or not all(isinstance(d, str) and d for d in descriptions):
        raise InputError(f"descriptions is {descriptions!r}, expected a list of at least one text that is not empty.")
    if not isinstance(alpha, jax.Array) and not np.all(np.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}, expected a finite number.")
    if not 0 <= floor <= 1:
        raise InputError(f"floor is {floor}, expected a factor from 0 to 1.")
    stream = Stream(lm=lm, of="current", own=own_entry(descriptions), copies=len(descriptions))
    return SelfDebias(stream, jnp.asarray(alpha, jnp.float32), jnp.float32(floor), cond)


make = init


def own_entry(descriptions: Sequence[str]) -> str:
    """The entry of `prompts.cond` with the descriptions before each prompt, int32 [B, N, T'], -1 for padding: a name of
    their own, so that two such controls in a chain read different ones."""
    return f"self_debias {sha256_of(dumps(list(descriptions)))[:8]}"


def conditions(artifact: Artifact, lm: Artifact, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The tokens of each description and prompt."""
    descriptions = artifact.spec["init"].get("descriptions", DESCRIPTIONS)
    return {own_entry(descriptions): instructed(open_lm(lm)[2], texts, descriptions)}


def example(lm: LM, key: jax.Array) -> SelfDebias:
    """Two random soft prompts in place of descriptions, for the laws."""
    vectors = jnp.stack([soft_prompt(k, 2, lm.width, deviation=1.0) for k in jax.random.split(key)])
    stream = Stream(control=SoftPrompt(vectors, choice="copy"), lm=lm, of="current", copies=2)
    return SelfDebias(stream, jnp.float32(5.0), jnp.float32(0.1))


def neutral(control: SelfDebias) -> SelfDebias:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))


def diagnosis(
    lm: LM,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    descriptions: Sequence[str],
    *,
    question: str = QUESTION,
    answers: tuple[str, str] = (" Yes", " No"),
    batch: int = 32,
) -> np.ndarray:
    """p(Yes) / (p(Yes) + p(No)) float32 [n, N] of n texts and N descriptions: what the model says of a text itself
    (Schick et al. 2021).

    Args:
      lm, params, tokenizer: the language model.
      descriptions: what a text may contain, such as "a threat".
      question: the text that is completed, with {text} and {description}.
      answers: the two completions; their first tokens are compared.
      batch: questions that are read at once.

    Raises:
      InputError: no texts or descriptions, a question without {text} or {description}, answers with one first token.
    """
    if not texts or not descriptions:
        raise InputError(f"There are {len(texts)} texts and {len(descriptions)} descriptions, expected one of each.")
    if "{text}" not in question or "{description}" not in question:
        raise InputError(f"question is {question!r}, expected a text with {{text}} and {{description}}.")
    (yes, *_), (no, *_) = tokenizer.encode_after(["a", "a"], list(answers))
    if yes == no:
        raise InputError(f"answers is {answers}, whose first tokens are the same: choose others.")
    asked = [question.replace("{description}", d).replace("{text}", t) for t in texts for d in descriptions]
    length = max(map(len, tokenizer.encode_prompts(asked)))
    found: list[Any] = []
    for at in range(0, len(asked), batch):
        part = asked[at : at + batch]
        prompts = to_prompts(tokenizer, part + [part[0]] * (batch - len(part)), seed=0, length=length)
        z = loop.forward(lm, params, prompts, jnp.zeros((batch, 1), jnp.int32))[:, 0]
        found.append(np.asarray(jax.nn.sigmoid(z[:, yes] - z[:, no]))[: len(part)])
    return np.concatenate(found).reshape(len(texts), len(descriptions))
