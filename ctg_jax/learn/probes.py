"""Linear probes of hidden states: held-out texts, a logistic regression for each site, and the sites to act at."""

from __future__ import annotations

import numpy as np

from ctg_jax.rewards.logistic import fit_logistic
from ctg_jax.types import InputError


def split(with_: np.ndarray, without: np.ndarray, heldout: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(states [N, L + 2, D], whether each has the concept bool [N], whether it is held out bool [N]): of each side,
    every text whose number is one less than a multiple of 1 / heldout."""
    if not 0 < heldout <= 0.5:
        raise InputError(f"heldout is {heldout}, expected a share above 0 and at most 0.5.")
    held = []
    for name, side in (("with", with_), ("without", without)):
        if len(side) < 2:
            raise InputError(
                f"there are {len(side)} texts {name} the concept: a probe needs at least two to be tested."
            )
        if not np.all(np.isfinite(side)):
            raise InputError(
                f"a state of the texts {name} the concept is not finite: the language model is damaged or overflows."
            )
        step = min(round(1 / heldout), len(side))
        held.append(np.arange(len(side)) % step == step - 1)
    y = np.repeat([True, False], [len(with_), len(without)])
    return np.concatenate([with_, without]), y, np.concatenate(held)


def fit_probe(x: np.ndarray, y: np.ndarray, inverse_l2: float) -> tuple[np.ndarray, np.float32]:
    """(w float32 [D], b) of a logistic regression of y bool [N] on standardised x [N, D], for x as it is."""
    mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    deviation = np.where(deviation > 1e-6, deviation, 1.0)
    coef, intercept, _ = fit_logistic((x - mean) / deviation, y.astype(int), inverse_l2, 0)
    w = coef[0] / deviation
    return w.astype(np.float32), np.float32(intercept[0] - w @ mean)


def fit_probes(x: np.ndarray, y: np.ndarray, held: np.ndarray, inverse_l2: float) -> tuple[np.ndarray, ...]:
    """(w float32 [S, D], b [S], the share [S] that each sorts correctly of the texts it was fitted on, and of the texts
    held out): `fit_probe` for each of S sites, of what `split` returns, states x [N, S, D], y and held bool [N]."""
    fitted = [fit_probe(x[~held, s], y[~held], inverse_l2) for s in range(x.shape[1])]
    w, b = (np.stack(part) for part in zip(*fitted))
    right = (np.einsum("nsd,sd->ns", x, w) + b[None] > 0) == y[:, None]
    return w, b, right[~held].mean(0), right[held].mean(0)


def choose_sites(accuracy: np.ndarray, gate: np.ndarray, top: int | None, threshold: float) -> np.ndarray:
    """The gate float32 [L + 2] with only the `top` sites of the best accuracy [L + 2] that is at least `threshold`.

    Raises:
      InputError: no site is left.
    """
    if top is not None and top < 1:
        raise InputError(f"top is {top}, expected at least 1 site, or None for all.")
    open_ = np.flatnonzero(gate)
    best = sorted((s for s in open_ if accuracy[s] >= threshold), key=lambda s: -accuracy[s])[:top]
    if not best:
        most = max(accuracy[open_], default=0.0)
        raise InputError(
            f"threshold is {threshold}, but the best held-out accuracy of a probe is {most:.3f}: lower it."
        )
    out = np.zeros_like(gate)
    out[best] = gate[best]
    return out
