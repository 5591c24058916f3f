"""The rotary settings of a config.json, of transformers 5 (`rope_parameters`) and older ones (`rope_scaling`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ctg_jax.models.decoder import Transformer
from ctg_jax.models.hf.family import Config
from ctg_jax.types import InputError

_BASE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}


def read_rope(c: Config, partial: float = 1.0, context: int = 0) -> tuple[dict[str, Any], float]:
    """`rope_theta` and `rope_scaling`, and the share of a head's features that rotates (`partial` where the rotary
    settings do not say), from `rope_parameters` (transformers 5) or the older keys.

    In `transformers` a `rope_scaling` takes the place of all `rope_parameters`. Where that gives other numbers than the
    two together, the file is ambiguous and refused.

    Args:
      context: `max_position_embeddings`. With longrope the fields also hold the `context`, see `_longrope`.
    """
    old, new = c.get("rope_scaling") or {}, c.get("rope_parameters") or {}
    found = _rope(c, old or new, partial, context)
    if old and _rope(c, {**new, **old}, partial, context) != found:
        raise InputError(
            f"config.json: rope_scaling is {dict(old)} beside rope_parameters {dict(new)}, which disagree; "
            "keep the one that the weights were trained with."
        )
    return found


def _rope(c: Config, found: Config, partial: float, context: int) -> tuple[dict[str, Any], float]:
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "su" or (kind == "yarn" and "long_factor" in found):  # older names in files of Phi-3
        kind = "longrope"
    if kind not in _KEYS:
        raise InputError(f"config.json: rope type is {kind!r}, expected one of {', '.join(_KEYS)}.")
    if unknown := set(found) - _BASE - set(_KEYS[kind]):
        known = ", ".join(sorted({*_BASE, *_KEYS[kind]}))
        raise InputError(f"config.json: the rotary setting {min(unknown)!r} is not one of {known}.")
    bases = {c[k] for k in ("rope_theta", "rotary_emb_base") if c.get(k) is not None}
    if len(bases) > 1 and "rope_theta" not in found:
        raise InputError(f"config.json: rope_theta is {c['rope_theta']}, but rotary_emb_base {c['rotary_emb_base']}.")
    out = {"rope_theta": float(found.get("rope_theta", min(bases, default=10000.0))), "rope_scaling": None}
    if c.get("original_max_position_embeddings") is not None:  # outside it takes precedence, as in transformers
        found = {**found, "original_max_position_embeddings": c["original_max_position_embeddings"]}
    if kind in ("linear", "dynamic"):
        out["rope_scaling"] = (kind, float(found["factor"]))
    elif kind == "llama3":
        out["rope_scaling"] = (kind, *(float(found[k]) for k in _KEYS[kind]))
    elif kind == "yarn":
        out["rope_scaling"] = _yarn(found, context)
    elif kind == "longrope":
        out |= _longrope(found, context)
    return out, float(found.get("partial_rotary_factor") or partial)


def _yarn(found: Config, context: int) -> tuple:
    original = found.get("original_max_position_embeddings") or context
    factor = float(found.get("factor") or context / original)

    def magnitude(scale=1.0):
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = found.get("attention_factor")
    if given is None:
        scales = [found.get(k) for k in ("mscale", "mscale_all_dim")]
        given = magnitude(scales[0]) / magnitude(scales[1]) if all(scales) else magnitude()
    betas = (float(found.get("beta_fast") or 32), float(found.get("beta_slow") or 1))
    return ("yarn", factor, int(original), float(given), *betas, bool(found.get("truncate", True)))


def _longrope(found: Config, context: int) -> dict[str, Any]:
    """The scaling, and the `context` of the model, which is the original one.

    `transformers` takes the short factors until a sequence outgrows the original context and then the long ones for
    all of it, so that the same tokens have other states in a longer text. Here a row has one set of factors: the short
    ones in the original context, and the long ones in a model that is given a longer `context`.
    """
    original = int(found.get("original_max_position_embeddings") or context)
    factor = float(found.get("factor") or context / original)
    given = found.get("attention_factor")
    if given is None:
        given = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    sets = (tuple(float(x) for x in found[k]) for k in ("short_factor", "long_factor"))
    return {"rope_scaling": ("longrope", original, context, float(given), *sets), "context": min(context, original)}


def write_rope(lm: Transformer, **more: Any) -> dict[str, Any]:
    """`rope_parameters`, and `max_position_embeddings` where the context is not that number."""
    return {"rope_parameters": rope_parameters(lm) | more, **_longest(lm)}


def rope_parameters(lm: Transformer) -> dict[str, Any]:
    kind, *values = lm.rope_scaling or ("default",)
    keys = {
        "yarn": (*_KEYS["yarn"][:5], "truncate"),
        "longrope": ("original_max_position_embeddings", "", "attention_factor", "short_factor", "long_factor"),
    }.get(kind, _KEYS.get(kind, ()))
    scaling: Mapping[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in zip(keys, values) if k}
    if "original_max_position_embeddings" in scaling:
        whole = int(scaling["original_max_position_embeddings"])
        scaling = {**scaling, "original_max_position_embeddings": whole}
    return {"rope_type": kind, "rope_theta": lm.rope_theta, **scaling}


def _longest(lm: Transformer) -> dict[str, Any]:
    if lm.rope_scaling is None or lm.rope_scaling[0] != "longrope":
        return {}
    original, longest = lm.rope_scaling[1:3]
    return {"max_position_embeddings": longest, "original_max_position_embeddings": original}
