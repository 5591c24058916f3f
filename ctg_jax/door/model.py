"""`load` opens a language model, and `Model` writes text under controls and fits controls to lists of texts."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctg_jax import methods
from ctg_jax.data.messages import Messages
from ctg_jax.door import inputs
from ctg_jax.door.mix import Mix, Part
from ctg_jax.io import json_line, sha256_of, write_text
from ctg_jax.models.lm import LM
from ctg_jax.run.session import Session, keep_compiled
from ctg_jax.run.stage import Artifact, stage
from ctg_jax.stages import sampling, sources, streaming
from ctg_jax.types import InputError, Params

BREAKS = 4.0  # times the perplexity without control from which a text is called broken
log = logging.getLogger(__name__)
_LENGTH = 16  # tokens to which the shortest prompts are padded


@dataclasses.dataclass(frozen=True)
class Written:
    """One completion.

    Attributes:
      prompt: as text; of messages a line each. text: what follows it.
      tokens: the new tokens, up to the one that completes a stop text, or the end token.
      logps: the log-probability of each of them, in nats, under what drew it.
    """

    prompt: str
    text: str
    tokens: list[int]
    logps: list[float]


def load(source: str | os.PathLike, *, dtype: str | None = None, root: str | os.PathLike | None = None) -> Model:
    """Opens a language model. What is fitted on it is kept below `root` and found again; compiled programs are kept in
    ~/.cache/ctg_jax/jax unless JAX has another folder for them.

    Args:
      source: a folder in Hugging Face layout, a hub id, or the artifact of an experiment's language model.
      dtype: "float32" or "bfloat16"; None: float32 on a CPU, bfloat16 on an accelerator.
      root: where artifacts are kept, a folder or a `Session`; None: ~/.cache/ctg_jax/door.

    Raises:
      InputError: no such model, files that cannot be read, a family that is not supported, another dtype.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise InputError(f"source is {source!r:.60}, expected the folder of a language model or a hub id")
    home = Path.home() / ".cache" / "ctg_jax"
    keep_compiled(home / "jax")
    model = Model(sources.language_model(Session.of(home / "door" if root is None else root), os.fspath(source), dtype))
    sampling.opened(model.artifact)
    return model


class Model:
    """A language model that is ready to write. `load` makes one."""

    def __init__(self, artifact: Artifact):
        self.artifact = artifact

    def __repr__(self) -> str:
        return f"Model({self.artifact.given('source') or str(self.artifact.path)!r})"

    @property
    def session(self) -> Session:
        """What keeps the model in memory, and where what is fitted on it is kept."""
        return self.artifact.session

    @property
    def lm(self) -> LM:
        """The model without its parameters."""
        return sampling.opened(self.artifact)[0]

    @property
    def params(self) -> Params:
        """Its parameters, layers unstacked, for `generate` and `score`."""
        return sampling.opened(self.artifact)[1]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return sampling.opened(self.artifact)[2]

    def write(
        self,
        prompts: Sequence[str | Messages],
        control: Any = None,
        *,
        max_new: int = 20,
        stop: Sequence[str] = (),
        n: int | None = None,
        seed: int = 0,
        greedy: bool = False,
        system: str | None = None,
        batch: int = 32,
        details: bool = False,
        watch: bool = False,
        **rules: Any,
    ) -> list[Any]:
        """Completions of prompts.

        A completion depends on the seed, the place of its prompt in the list and its control, and on no other prompt.
        Prompts are padded to the next power of two, so that a prompt of another length seldom compiles a new program.

        Args:
          prompts: texts, or conversations (lists of messages), which the chat template of the model writes out.
          control: a mix, a `Control` or None for all prompts; or a list with one for each. A strength may be one number
            for each prompt: `np.array([1, 2]) * cheerful`.
          max_new: tokens of a completion, at most.
          stop: texts; a completion ends behind the first that occurs in it.
          n: completions of each prompt; None: one, which is not in a list of its own.
          seed: of the random numbers. greedy: take the likeliest token instead.
          system: a system prompt, for conversations.
          batch: prompts that are written at once, at most; no text depends on it.
          details: give a `Written` in place of each text, with tokens and log-probabilities.
          watch: write the same without the control too, and warn where the control makes the text much less fluent:
            where its perplexity under the model is more than four times as high. It takes twice the time.
          **rules: temperature, top_p, top_k and the other options of `ctg_jax.controls.truncate.rules`, which act
            after the controls.

        Returns:
          A text for each prompt, or with `n` a list of n texts.

        Raises:
          InputError: an argument that cannot be used; a prompt that does not fit in the context; a control that was
            fitted on another language model.
        """
        texts = inputs.prompts_of(prompts, system)
        options = inputs.options_of(max_new, stop, 1 if n is None else n, seed, greedy, batch)
        rules = inputs.rules_of(rules)
        plans = [(g, *self._chain(g.mix, rules)) for g in inputs.groups(inputs.mixes_of(control, len(texts)))]
        found: list[list[Any]] = [[] for _ in texts]
        for group, chain, artifacts in plans:
            mine = [texts[i] for i in group.numbers]
            shape = (inputs.bucket(min(batch, len(mine) * options.n), 1, batch), self._length(mine))
            cond = sampling.conditions(artifacts, self.artifact, mine) | group.cond
            asked = dict(cond=cond, numbers=group.numbers, shape=shape)
            for rows in sampling.complete(*sampling.opened(self.artifact), mine, chain, options, **asked):
                for row in rows:
                    made = Written(row["prompt"], row["text"], row["tokens"], row["logps"])
                    found[row["prompt_id"]].append(made if details else made.text)
        if watch and any(group.mix.parts for group, *_ in plans):
            asked = dict(max_new=max_new, stop=stop, n=options.n, seed=seed, greedy=greedy, batch=batch)
            plain = self.write(texts, None, **asked, **rules)
            mine, base = (self._fluency(texts, written) for written in (found, plain))
            if mine > BREAKS * base:
                text = (
                    "perplexity is %.0f, and %.0f without control: the text is likely broken; take a smaller strength"
                )
                log.warning(text, mine, base)
        return [texts[0] for texts in found] if n is None else found

    def infill(
        self,
        texts: Sequence[str],
        control: Any,
        *,
        blank: str = "___",
        tokens: int = 4,
        n: int | None = None,
        seed: int = 0,
        greedy: bool = False,
        batch: int = 32,
    ) -> list[Any]:
        """Given texts with their blanks filled, by a model that writes a whole row at once and reads what comes before
        and behind a blank: one that `mdlm` or `diffusion_lm` fitted.

        Args:
          texts: with at least one blank each.
          control: the model, as `load_control` opens it; a strength guides what is written.
          blank: the text that marks a blank. tokens: the tokens that are written in place of each.
          n, seed, greedy, batch: see `write`.

        Returns:
          A whole text for each, or with `n` a list of n texts.

        Raises:
          InputError: an argument that cannot be used, a text without a blank or too long for the rows of the model.
        """
        from ctg_jax.learn.infilling import Blanks, fill

        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise InputError(f"texts is {texts!r:.60}, expected a list of texts with blanks")
        options = inputs.options_of(1, (), 1 if n is None else n, seed, greedy, batch)
        (mix,) = inputs.mixes_of(control, 1)
        chain, _ = self._chain(mix, {})
        found: list[list[str]] = [[] for _ in texts]
        for rows in fill(*sampling.opened(self.artifact), texts, chain, options, Blanks(blank, tokens)):
            for row in rows:
                found[row["prompt_id"]].append(row["text"])
        return [one[0] for one in found] if n is None else found

    def _fluency(self, prompts: Sequence[str | Messages], written: Sequence[Sequence[Any]]) -> float:
        """The perplexity of texts under the model without control, over all their tokens."""
        from ctg_jax.evaluation.likelihood import log_probabilities

        rows = [(p, t if isinstance(t, str) else t.text) for p, texts in zip(prompts, written) for t in texts]
        heads = self.tokenizer.encode_prompts([p for p, _ in rows])
        tails = self.tokenizer.encode_after([p for p, _ in rows], [t for _, t in rows])
        logps = log_probabilities(self.lm, self.params, self.tokenizer, heads, tails)
        return math.exp(-float(sum(logps)) / max(sum(map(len, tails)), 1))

    def stream(
        self,
        prompt: str | Messages,
        control: Any = None,
        *,
        max_new: int = 20,
        stop: Sequence[str] = (),
        seed: int = 0,
        greedy: bool = False,
        system: str | None = None,
        **rules: Any,
    ) -> Iterator[str]:
        """One completion in pieces, as soon as each is decoded; joined they are the text of `write`. A character of
        which only some bytes are drawn waits for the others.

        Args and errors as of `write`, for one prompt.
        """
        if not isinstance(prompt, str) and not inputs.is_messages(prompt):
            raise InputError(f"prompt is {prompt!r:.60}, expected one text or one conversation")
        (text,) = inputs.prompts_of([prompt], system)
        options = inputs.options_of(max_new, stop, 1, seed, greedy)
        chain, artifacts = self._chain(*inputs.mixes_of(control, 1), inputs.rules_of(rules))
        model = sampling.opened(self.artifact)
        sampling.check_prompts(model[0], model[2], [text], options.max_new, chain)
        cond = sampling.conditions(artifacts, self.artifact, [text])
        return streaming.stream(*model, text, chain, options, cond=cond, length=self._length([text]))

    def fit(
        self, fit: Callable[..., Artifact], records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Mix:
        """What a method learns from records: its `fit`, on a file of them. The functions `from_pairs` and `from_texts`
        of the methods call this; the same records and settings are found again.

        Raises:
          InputError: what the `fit` raises.
        """
        lines = "".join(map(json_line, records))
        file = self.session.root / "texts" / f"{sha256_of(lines)[:16]}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, lines)
        data = stage(self.session, sources.load_data, {"source": f"jsonl:{file}"})
        artifact = fit(self.session, lm=self.artifact, data=data, **settings)
        return Mix((Part(methods.load(artifact, self.lm), artifact),))

    def _chain(self, mix: Mix, rules: Mapping[str, Any]) -> tuple[Any, list[Artifact]]:
        """The chain that decodes, and the artifacts in it."""
        for artifact in mix.artifacts:
            sampling.same_lm(artifact, self.artifact)
        return sampling.chained(self.artifact, [p.control for p in mix.parts], rules), mix.artifacts

    def _length(self, texts: Sequence[str | Messages]) -> int:
        lm, _, tokenizer = sampling.opened(self.artifact)
        return inputs.bucket(max(map(len, tokenizer.encode_prompts(texts))), _LENGTH, lm.context)


def check_model(lm: Any) -> None:
    """InputError unless this is what `load` returns."""
    if not isinstance(lm, Model):
        raise InputError(f"lm is {type(lm).__name__}, expected a language model that ctg_jax.load returned")
