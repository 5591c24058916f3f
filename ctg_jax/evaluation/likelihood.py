"""How likely texts are under a language model: log-probabilities of completions, and a scorer of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import rng
from ctg_jax.control import IDENTITY, Control
from ctg_jax.controls import constraints
from ctg_jax.data.ids import check_sizes
from ctg_jax.data.messages import Messages
from ctg_jax.data.shapes import padded_length
from ctg_jax.data.tokenizer import Tokenizer, pad_rows
from ctg_jax.decode import loop
from ctg_jax.models.lengths import room
from ctg_jax.models.lm import LM
from ctg_jax.types import InputError, Params, Prompts

Keep = Callable[[int, np.ndarray], None]


def log_probabilities(
    lm: LM,
    params: Params,
    tokenizer: Tokenizer,
    heads: Sequence[Sequence[int]],
    tails: Sequence[Sequence[int]],
    control: Control = IDENTITY,
    *,
    batch: int = 32,
    cond: Mapping[str, np.ndarray] | None = None,
    keep: Keep | None = None,
) -> np.ndarray:
    """The log-probability of each completion after its prompt under a control, float64 [n].

    Rows of similar length share a batch, and batches have few shapes. Ids that are no token of the tokenizer have no
    probability, as in sampling. A control that draws random numbers draws them by the number of the row, so
    they do not depend on the batch.

    Args:
      heads: n prompts as token ids; one may be empty where the control puts vectors before the text.
      tails: n completions; an empty one has log-probability 0.
      batch: rows of a compiled batch.
      cond: entries of `prompts.cond`, name -> array with a row for each prompt.
      keep: called with the number of each row and the final states [N, D] that predict the N tokens of its completion.

    Raises:
      InputError: a prompt and its completion do not fit the context; an empty prompt.
    """
    if not all(map(len, heads)) and not control.added():
        raise InputError("a prompt is empty: give at least the token with which texts begin")
    control = constraints.only(tokenizer.known(lm.vocab), control)
    out = np.zeros(len(tails))
    order = sorted((i for i, tail in enumerate(tails) if len(tail)), key=lambda i: (len(tails[i]), len(heads[i])))
    for at in range(0, len(order), batch):
        indices = order[at : at + batch]
        rows = indices + indices[:1] * (batch - len(indices))  # a batch that is not full repeats its first row
        # The two widths may exceed the context together: each row fits, and its positions count real tokens only.
        head, head_mask = _padded([heads[i] for i in rows], left=True)
        tail, tail_mask = _padded([tails[i] for i in rows], left=False)
        own = {name: jnp.asarray(values[rows]) for name, values in cond.items()} if cond else None
        prompts = Prompts(jnp.asarray(head), jnp.asarray(head_mask), rng.per_example(jax.random.key(0), rows), own)
        given = (lm, params, prompts, jnp.asarray(tail), control, jnp.asarray(tail_mask))
        logp, states = loop.scored(*given, states=keep is not None)
        out[indices] = np.asarray(logp, np.float64).sum(axis=1)[: len(indices)]
        if keep is not None:
            for i, row in zip(indices, np.asarray(states)):
                keep(i, row[: len(tails[i])])
    return out


def _padded(rows: Sequence[Sequence[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    return pad_rows(rows, padded_length(max(1, *map(len, rows))), 0, left=left)


class LMScorer:
    """Negative log-probability of continuations under a chosen language model.

    The model may have another tokenizer than the one that the texts were written with: texts are encoded again, each as
    it continues its prompt (`Tokenizer.encode_after`).

    Args:
      lm, params, tokenizer: as `ctg_jax.run.stage.open_lm` returns them.
      name: the name of the model in reports.
      batch: rows of a compiled batch.
      control: the control that the model is under.

    Raises:
      InputError: the tokenizer has more ids than the LM has tokens.

    Attributes:
      version: name and digest of the weights. start: the token that takes the place of an empty prompt, or None.
    """

    def __init__(
        self, lm: LM, params: Params, tokenizer, *, name: str = "lm", batch: int = 32, control: Control = IDENTITY
    ):
        from ctg_jax.rewards.embed import params_digest

        self.lm, self.tokenizer, self.name, self.batch = lm, tokenizer, name, batch
        self.control = control
        self.version = f"{name}@{params_digest(params)}"
        self._params = params
        self.start = tokenizer.start
        check_sizes(tokenizer, lm, name)

    def __call__(self, prompts: Sequence[str | Messages], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(nats float64 [n], tokens int64 [n]) of each text given its prompt.

        An empty prompt becomes the BOS (or EOS) token. The beginning of a prompt is dropped where prompt and text do
        not fit the context.

        Raises:
          InputError: unequal lengths; a text longer than the context less what the control adds; an empty prompt where
            there is no BOS or EOS token.
        """
        if len(prompts) != len(texts):
            raise InputError(f"{len(prompts)} prompts were given for {len(texts)} texts; give one prompt for each text")
        return self.ids(self.tokenizer.encode_prompts(prompts), self.tokenizer.encode_after(prompts, texts))

    def ids(
        self,
        heads: Sequence[Sequence[int]],
        tails: Sequence[Sequence[int]],
        keep: Keep | None = None,
        cond: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same for token ids, such as those that this model drew, since encoding their text may give others.

        Args:
          heads: prompts, as `Tokenizer.encode_prompts` returns them. tails: continuations.
          keep, cond: see `log_probabilities`.
        """
        rows = [self._row(i, list(h), list(t)) for i, (h, t) in enumerate(zip(heads, tails, strict=True))]
        heads, tails = [head for head, _ in rows], [tail for _, tail in rows]
        given = (self.lm, self._params, self.tokenizer, heads, tails, self.control)
        logp = log_probabilities(*given, batch=self.batch, keep=keep, cond=cond)
        return -logp, np.asarray([len(tail) for tail in tails], np.int64)

    def _row(self, i, head, tail):
        if not head:
            if self.start is None:
                raise InputError(
                    f"prompt {i} is empty and the tokenizer of {self.name} has no BOS or EOS token; give a prompt"
                )
            head = [self.start]
        most = room(self.lm, self.control)[0]
        if len(tail) + 1 > most:
            raise InputError(f"text {i} has {len(tail)} tokens; {self.name} reads at most {most - 1} after a prompt")
        over = len(head) + len(tail) - most
        if over > 0:  # the beginning of the prompt is dropped, but a model that expects BOS still reads it first
            kept = self.tokenizer.begun([])
            head = kept + head[over + len(kept) :] if len(tail) + len(kept) < most else head[over:]
        return head, tail
