"""Loading learned latent vectors with their records, and decoding texts from them."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from ctg_jax import methods
from ctg_jax.controls import constraints
from ctg_jax.decode.loop import generate
from ctg_jax.methods.hidden.latent_steer import LatentSteer
from ctg_jax.run.stage import Artifact
from ctg_jax.stages.sampling import opened
from ctg_jax.types import InputError, Sampling


def decode_vectors(
    lm: Artifact, control: LatentSteer, z: np.ndarray, prompts: Sequence[str], max_new: int, batch: int = 64
) -> tuple[list[str], list[list[int]]]:
    """Greedy completions, each under a vector of its own.

    Args:
      control: gives the site of the vectors. z: float32 [N, d], the vector of each completion.
      prompts: N prompts, which may be empty. max_new: new tokens at most.
      batch: rows decoded at a time; every batch has the same shape.

    Returns:
      N texts, and the tokens of each.
    """
    from ctg_jax.data.tokenizer import to_prompts

    model, params, tokenizer = opened(lm)
    sampling = Sampling(max_new=max_new, eos=tokenizer.ends, pad=tokenizer.pad or 0, greedy=True)
    heads = tokenizer.encode_prompts(prompts)
    length = max(map(len, heads))
    batch, tokens = min(batch, len(z)), []
    for at in range(0, len(z), batch):
        rows = np.minimum(np.arange(at, at + batch), len(z) - 1)
        cond = {control.choice: jnp.arange(batch)}
        rows_prompts = to_prompts(tokenizer, [prompts[i] for i in rows], 0, ids=rows, length=length, cond=cond)
        limited = constraints.only(tokenizer.known(model.vocab), control.replace(z=jnp.asarray(z[rows])))
        out = generate(model, params, rows_prompts, limited, sampling)
        written = zip(np.asarray(out.tokens), np.asarray(out.mask), strict=True)
        tokens += [t[m].tolist() for t, m in written][: len(z) - at]
    return tokenizer.decode_after(heads, [tokenizer.before_end(row) for row in tokens]), tokens


def open_vectors(lm: Artifact, vectors: Artifact) -> tuple[LatentSteer, list[dict], list[int]]:
    """Opens what `latent_steer.fit` learned.

    Returns:
      The control, whose `z` holds one vector for each record; the metrics of each record; and the indices of the
      records that have a vector.

    Raises:
      InputError: `vectors` belongs to another language model or another method, or no record has a vector.
    """
    from ctg_jax.stages.sampling import same_lm

    same_lm(vectors, lm)
    control = methods.load(vectors, opened(lm)[0])
    if not isinstance(control, LatentSteer):
        raise InputError(
            f"{vectors.path.name} holds a control of {vectors.spec['method']}, expected latent vectors of latent_steer"
        )
    rows = vectors.metrics()
    index = [i for i, r in enumerate(rows) if not r.get("left_out")]
    if not index:
        raise InputError(
            f"{vectors.path.name} holds no vector, because every sentence has more tokens than the limit `tokens`: "
            "raise it"
        )
    return control, rows, index
