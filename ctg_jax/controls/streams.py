"""Language models that read along with the one that decodes, each with a cache of its own, for controls on logits.

A stream is the base model under a control of its own, or another model under one: an expert is `Stream(control=Delta)`,
the unconditional side of guidance is the model that decodes with most of the prompt hidden, a proxy is a smaller model.
A stream of the base borrows its weights (`Control.bind`), so that a control holds only what it adds to them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax.control import IDENTITY, Control, columns, edit_logits, enter
from ctg_jax.controls.conditions import condition
from ctg_jax.models.lm import LM, Cache, write_prefix
from ctg_jax.support import REMOVED, removed
from ctg_jax.types import InputError, Params, Prompts

# Of a share, so that its logarithm is finite.
LEAST = 1e-30


@struct.dataclass
class Reading:
    """What a stream has read. With N copies, every leaf that has axes is [B, N, …].

    Attributes:
      cache: keys and values.
      state: of the stream's control.
      own: int32 [B or B · N, T'], the stream's own prompt until it is read; else None.
      started: whether the prompt is in the cache.
    """

    cache: Cache
    state: Any
    own: jax.Array | None = None
    started: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Stream:
    """A language model under a control, which reads the tokens of every row along with the base model.

    Attributes:
      params: parameters of `lm`; None: those of the base model.
      control: acts on this stream alone.
      lm: the model, with the base's vocabulary.
      of: whose weights are borrowed where `params` is None: those of the "frozen" model, on which an expert was fitted,
        or of the "current" one, which decodes under the whole chain.
      own: None, or the name of an entry of `prompts.cond`, int32 [B, T'] or (with copies) [B, N, T'] with −1 for
        padding on the left: tokens that this stream reads in place of the prompt, or before it.
      before: whether `own` is read before the prompt.
      copies: None, or the number N of copies, which read the same tokens in one pass of B · N rows. The control of the
        stream finds the copy's number in `prompts.cond["copy"]`, int32 [B · N]; other entries are repeated.
      ahead: whether `peek` is called. The stream then keeps a cache even where it reads a whole text at once.
      bound: whether `params` are ready to read with; see `bind`.
    """

    params: Params | None = None
    control: Control = IDENTITY
    lm: LM = struct.field(pytree_node=False, kw_only=True)
    of: str = struct.field(pytree_node=False, default="frozen", kw_only=True)
    own: str | None = struct.field(pytree_node=False, default=None, kw_only=True)
    before: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    copies: int | None = struct.field(pytree_node=False, default=None, kw_only=True)
    ahead: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    bound: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    def __post_init__(self):
        if self.of not in ("frozen", "current"):
            raise InputError(f"of is {self.of!r}, expected 'frozen' or 'current'.")
        if self.copies is not None and self.copies < 1:
            raise InputError(f"copies is {self.copies}, expected at least 1.")

    def bind(self, frozen: Params, params: Params) -> Stream:
        """The stream with the weights it reads with: its own or the base's, through `weights` of its control, and
        unstacked where those of the base are. See `Control.bind`."""
        if self.bound:
            return self
        base = self.params
        if base is None:
            base = frozen if self.of == "frozen" else params
        read = self.control.weights(base)
        if isinstance(params["layers"], tuple):
            read = self.lm.unstack(read)
        return self.replace(params=read, control=self.control.bind(base, read), bound=True)

    def check(self, prompts: Prompts) -> None:
        """See `Control.check`."""
        self.control.check(self._repeated(prompts))

    def readers(self, name: str) -> tuple[tuple[str, int, int], ...]:
        """What `Control.readers` of the control that holds this stream lists for it, under a name for messages."""
        alone = () if self.own is not None else ((name, self.lm.context, self.control.added()),)
        return (*alone, *self.control.readers())

    def init(self, prompts: Prompts, length: int) -> Reading:
        """An empty cache for prompts [B, T] and at most `length` tokens in all.

        Raises:
          InputError: the stream's own prompt is missing or does not fit its context.
        """
        given, more = self._repeated(prompts), self.control.added()
        own = None
        if self.own is not None:
            own = self._own(prompts)
            length += own.shape[1] - (0 if self.before else prompts.tokens.shape[1])
            if length - 1 + more > self.lm.context:
                raise InputError(
                    f"prompts.cond[{self.own!r}] has {own.shape[1]} tokens, with which a row takes "
                    f"{length - 1 + more} positions, but the stream's context is {self.lm.context}: shorten it."
                )
            tokens, mask = own, own >= 0
            if self.before:
                tokens = jnp.concatenate([own, given.tokens], axis=1)
                mask = jnp.concatenate([mask, given.mask], axis=1)
            given = given.replace(tokens=jnp.maximum(tokens, 0), mask=mask)
        state = self.control.init(given, length)
        prefix = self.control.prefix(state)
        p = 0 if prefix is None else prefix[0].shape[3]
        cache = self.lm.init_cache(self.params, len(given.keys), p + more + length)
        cache = cache if prefix is None else write_prefix(cache, prefix)
        return Reading(*self._apart((cache, state), len(given.keys)), own)

    def read(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        new: int,
        reading: Reading,
        everything: bool = False,
        extra: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Reading]:
        """Reads tokens int32 [B, T] with mask bool [B, T]: the prompt with the first new − 1 tokens of a completion, or
        later one token at a time.

        Args:
          new: M, after how many of the last tokens logits are wanted.
          reading: what `init` or the previous call returned.
          everything: logits after all T tokens, and on the first call also before the first, [B, T + 1, V]. Something
            must come before the prompt then: an own prompt, or vectors of the stream's control.
          extra: float [B, S, D], S ≥ T, added to the embeddings of the tokens from the right end.

        Returns:
          Logits float32 [B, M, V], final hidden states [B, S', D] of what was read, and the new `Reading`; [B, N, …]
          each with copies.

        Raises:
          InputError: the stream has no weights yet (`bind`); `everything` has nothing to start from; `extra` belongs to
            tokens that the stream does not read.
        """
        if not self.bound:
            raise InputError("A stream reads before it has weights: call Control.bind first, as decoding does.")
        tokens, mask, extra = (None if x is None else self._rows(x) for x in (tokens, mask, extra))
        cache, state = self._together((reading.cache, reading.state))
        x, ids, seen, columned = self.lm.embed(self.params, tokens), tokens, mask, tokens
        if extra is not None:
            x = x + extra[:, extra.shape[1] - x.shape[1] :].astype(x.dtype)
        last = tokens.shape[1] if everything else new
        if not reading.started:
            later = new - 1
            if reading.own is not None:
                if extra is not None and not self.before:
                    raise InputError("extra belongs to the tokens of a prompt that this stream replaces by its own.")
                start = 0 if self.before else tokens.shape[1] - later
                held = reading.own >= 0
                ids = jnp.concatenate([jnp.maximum(reading.own, 0), ids[:, start:]], axis=1)
                x = jnp.concatenate([self.lm.embed(self.params, ids[:, : held.shape[1]]), x[:, start:]], axis=1)
                mask = seen = jnp.concatenate([held, mask[:, start:]], axis=1)
            if everything:
                if not (self.before or self.control.added()):
                    raise InputError("everything needs something before the prompt: an own prompt or learned vectors.")
                last += 1
            t = x.shape[1] - later
            placed = columns(self.control, ids[:, :t], x[:, :t], state)
            columned = jnp.concatenate([placed, ids[:, t:]], axis=1)
            head, head_mask, state = enter(self.control, x[:, :t], seen[:, :t], state)
            x = jnp.concatenate([head.astype(x.dtype), x[:, t:]], axis=1)
            seen = jnp.concatenate([head_mask, mask[:, t:]], axis=1)
        # Where nothing follows (`init` was told of one token more than is read) no cache is needed: layers are scanned.
        prefix = self.control.prefix(state)
        slots = cache.k[0].shape[2] - (0 if prefix is None else prefix[0].shape[3])
        whole = not reading.started and new > 1 and x.shape[1] >= slots - 1 and not self.ahead
        told = self.control.seen(state, columned)
        params = self.control.row_weights(self.params, state)
        out = self.lm.apply(params, x, seen, None if whole else cache, self.control, told, last=last)
        z, state = edit_logits(self.control, out.logits, out.hidden, ids, mask, state)
        after = self._apart((cache if whole else out.cache, state), len(x))
        z, h = self._apart((z, out.hidden), len(x))
        return z, h, Reading(*after, None, True)

    def peek(self, tokens: jax.Array, reading: Reading, back: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
        """Looks ahead from one cache: what `read` would return after each of K candidates for the next token. A
        candidate follows what was read and none of the others, and nothing is read, so `reading` stays valid. All of
        them are one pass over the weights and share the cache, of which nothing is copied.

        Args:
          tokens: int32 [B, K].
          reading: what `read` returned.
          back: int32 [], how many of the tokens that were read last the candidates do not follow. A control that gets
            M positions at once looks ahead from position m with back = M − 1 − m. The control of the stream must not
            keep a state that depends on the text then, because only the last state is known.

        Returns:
          Logits float32 [B, K, V] and final hidden states [B, K, D]; [B, N, K, …] with copies.

        Raises:
          InputError: the stream was made without `ahead`, or it has read nothing yet.
        """
        if not (self.ahead and reading.started):
            raise InputError("peek needs a stream with ahead=True that has read the prompt: call read first.")
        cache, state = self._together((reading.cache, reading.state))
        seen = cache.length - back
        follows = cache.mask & (jnp.arange(cache.mask.shape[1]) < seen)[None, :]
        skipped = jnp.sum(cache.mask & ~follows, axis=1, dtype=jnp.int32)
        cache = cache.replace(mask=follows, offset=cache.offset - skipped)
        tokens = self._rows(tokens)
        x, real = self.lm.embed(self.params, tokens), jnp.ones(tokens.shape, bool)
        told, params = self.control.seen(state, tokens), self.control.row_weights(self.params, state)
        out = self.lm.apply(params, x, real, cache, self.control, told, beside=True)

        def edited(z, h, token):
            one = jnp.ones((len(token), 1), bool)
            return edit_logits(self.control, z[:, None], h[:, None], token[:, None], one, state)[0][:, 0]

        z = jax.vmap(edited, in_axes=1, out_axes=1)(out.logits, out.hidden, tokens)
        return self._apart((z, out.hidden), len(cache.mask))

    def _own(self, prompts: Prompts) -> jax.Array:
        """int32 [B, T'], or [B · N, T'] with copies."""
        found = condition(prompts, self.own)
        if self.copies is not None and found.ndim == 3:
            return found.reshape(-1, found.shape[2])
        return self._rows(found)

    def _repeated(self, prompts: Prompts) -> Prompts:
        if self.copies is None:
            return prompts
        cond = {k: self._rows(x) for k, x in (prompts.cond or {}).items() if k != self.own}
        copy = jnp.tile(jnp.arange(self.copies, dtype=jnp.int32), prompts.tokens.shape[0])
        rows = (self._rows(x) for x in (prompts.tokens, prompts.mask, prompts.keys))
        return Prompts(*rows, cond | {"copy": copy})

    def _rows(self, x: jax.Array) -> jax.Array:
        """[B, …] -> [B · N, …]; row b · N + n stays on the device of row b."""
        return x if self.copies is None else jnp.repeat(x, self.copies, axis=0)

    def _together(self, values: Any) -> Any:
        """[B, N, …] -> [B · N, …] of every leaf that has axes."""
        if self.copies is None:
            return values
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]) if x.ndim else x, values)

    def _apart(self, values: Any, rows: int) -> Any:
        """The inverse of `_together`; leaves that all rows shared are repeated."""
        if self.copies is None:
            return values
        n = self.copies

        def divided(x):
            if not x.ndim:
                return x
            return jnp.broadcast_to(x, (rows, *x.shape[1:])).reshape(rows // n, n, *x.shape[1:])

        return jax.tree.map(divided, values)


@struct.dataclass
class LastTokens(Control):
    """Hides all of the prompt but its last `keep` tokens (static): the unconditional side of guidance."""

    keep: int = struct.field(pytree_node=False, default=1)

    def prompt(self, x, mask, state):
        return x, mask & (jnp.arange(x.shape[1]) >= x.shape[1] - self.keep)[None, :]


def check_vocabulary(name: str, found: int, vocab: int, larger: bool = False) -> None:
    """InputError where what is called `name` predicts `found` tokens and the base model `vocab`; `larger`: whether it
    may have more, which are left out."""
    if found != vocab and not (larger and found > vocab):
        raise InputError(
            f"{name} has a vocabulary of {found} tokens and the base model one of {vocab}: use models that share one "
            "tokenizer."
        )


def log_probabilities(z: jax.Array) -> jax.Array:
    """Log-probabilities float32 [..., V] of the tokens that logits z leave; `REMOVED` for the others."""
    return jnp.where(removed(z), REMOVED, jax.nn.log_softmax(z, axis=-1))


def heard(z: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Log-probability float32 [B, T] of each token that a stream read; 0 for padding.

    Args:
      z: float32 [B, T + 1, V], the logits before the first token and after each (`Stream.read` with `everything`).
      tokens, mask: [B, T]. The first token of a row after padding on the left is predicted by z[:, 0].
    """
    before = jnp.concatenate([jnp.zeros_like(mask[:, :1]), mask[:, :-1]], axis=1)
    logp = log_probabilities(z)
    first, later = (jnp.take_along_axis(q, tokens[:, :, None], axis=2)[:, :, 0] for q in (logp[:, :1], logp[:, :-1]))
    return jnp.where(mask, jnp.where(before, later, first), 0.0)


def mixture(p: jax.Array, q: jax.Array, share: jax.Array) -> jax.Array:
    """log((1 − g) e^p + g e^q) of log-probabilities p and q [..., V], for shares g between 0 and 1; some of p is always
    kept, a millionth at least."""
    g = jnp.clip(share, 0, 1 - 1e-6)
    return jnp.logaddexp(jnp.log1p(-g) + p, jnp.log(jnp.maximum(g, LEAST)) + q)
