"""Models in Hugging Face's layout: `load`, `load_encoder` and `save`; safetensors only, no torch, no remote code.

A model is a local folder, or a hub id that huggingface_hub downloads: `config.json` and `model.safetensors`, or the
sharded files of `model.safetensors.index.json`. Another family is one `Family` in `hf.decoders` or `hf.encoders`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax import tree
from ctg_jax.io import write_json
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.encoder import Encoder
from ctg_jax.models.hf.decoders import DECODERS, has_experts
from ctg_jax.models.hf.encoders import ENCODERS
from ctg_jax.models.hf.family import Family
from ctg_jax.models.hf.sentence import longest_input, projection, read_sentence, read_settings, write_sentence
from ctg_jax.models.hf.tensors import Checkpoint, check_tree, place, write
from ctg_jax.types import InputError, Params

Shardings = Any | Callable[[Params], Any] | None


def load(
    path_or_id: str | os.PathLike, *, dtype: str = "float32", shardings: Shardings = None
) -> tuple[Transformer, Params]:
    """A decoder of one of the families in `hf.decoders.DECODERS`, and its parameters.

    Args:
      path_or_id: a folder, or a hub id.
      dtype: of parameters and computation ("float32", "bfloat16"), whatever the file's.
      shardings: a tree of `jax.sharding.Sharding` like the parameters, or a function that makes it from their
        shapes (`Plan.shardings`). Tensors go one by one straight onto their shards, and from the file only what
        they hold is read. None: on the default device.

    Raises:
      InputError: no such folder or hub id; a family that is not supported; a file that is missing, truncated or a
        pickle; quantised weights; a setting of config.json that the model cannot express; a tensor that is missing, of
        another shape, or read by nothing. The sentence names the file.

    Warns of settings in generation_config.json that change the distribution (temperature and the like): they are not
    applied, because rules of decoding are controls here.
    """
    folder = resolve(path_or_id)
    family, config = family_of(folder, DECODERS, "decoder")
    _warn_of_rules(folder)
    checkpoint = Checkpoint(folder, family.prefix, family.aliases)
    lm = _configure(folder, family, config, checkpoint, dtype)
    return lm, _params(lm, family.names(lm), checkpoint, family, dtype, shardings)


def check(path_or_id: str | os.PathLike) -> Transformer:
    """The decoder that `load` gives, after all of its checks of the files, without reading a weight onto a device.

    Raises and warns as `load`.
    """
    folder = resolve(path_or_id)
    family, config = family_of(folder, DECODERS, "decoder")
    _warn_of_rules(folder)
    checkpoint = Checkpoint(folder, family.prefix, family.aliases)
    lm = _configure(folder, family, config, checkpoint, "float32")
    checkpoint.check(family.names(lm), family.ignored)
    return lm


def shape(path_or_id: str | os.PathLike, *, dtype: str = "float32") -> Transformer:
    """The decoder that `load` gives, without its parameters: of the weights the headers alone are read."""
    folder = resolve(path_or_id)
    family, config = family_of(folder, DECODERS, "decoder")
    return _configure(folder, family, config, Checkpoint(folder, family.prefix, family.aliases), dtype)


def load_encoder(
    path_or_id: str | os.PathLike, *, dtype: str = "float32", shardings: Shardings = None
) -> tuple[Encoder, Params]:
    """An encoder or sequence classifier (BERT, RoBERTa, DistilBERT, T5 encoder) and its parameters.

    A sentence-transformers folder also sets pooling, projection and scaling of `Encoder.embed`; without one they are
    the mean over tokens. Arguments and errors as in `load`.
    """
    folder = resolve(path_or_id)
    family, config = family_of(folder, ENCODERS, "encoder")
    fields, project = read_sentence(folder)
    also = {"project.": project} if project else {}
    checkpoint = Checkpoint(folder, family.prefix, family.aliases, also)
    encoder = _configure(folder, family, config, checkpoint, dtype)
    limit = longest_input(folder) or encoder.context
    context = min(encoder.context, limit) if encoder.position_rows else limit  # T5's positions have no end
    encoder = dataclasses.replace(encoder, context=context, **fields)
    names = family.names(encoder) | _renamed(projection(encoder), "project.")
    return encoder, _params(encoder, names, checkpoint, family, dtype, shardings)


def save(
    path: str | os.PathLike,
    model: Transformer | Encoder,
    params: Params,
    *,
    tokens: Mapping[str, int] | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors`, which `transformers` loads, in the dtype of the parameters.

    An encoder without labels becomes a sentence-transformers folder. Each file is written atomically, config.json
    last; of the parameters one leaf at a time is in host memory.

    Args:
      path: the folder, made if need be.
      model, params: a decoder or encoder with stacked layers.
      tokens: entries of config.json such as {"eos_token_id": 0}.

    Raises:
      InputError: parameters that are not this model's; a configuration that its family cannot express; a folder that
        cannot be written.
    """
    families = ENCODERS if isinstance(model, Encoder) else DECODERS
    family = families.get(model.family)
    if family is None:
        raise InputError(f"family is {model.family!r}, expected one of {', '.join(families)}.")
    names = family.names(model)
    extra = projection(model) if isinstance(model, Encoder) else {}
    leaves = check_tree(params, names | extra)
    dtype = jnp.dtype(leaves["embed/tokens"].dtype).name
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | dict(tokens or {})
    config = {"model_type": model.family, "dtype": dtype, **ids, **family.write(model)}
    sentence = write_sentence(model) if isinstance(model, Encoder) and not model.labels else {}
    _check_expressible(family, model, config, names)

    folder = Path(path)
    try:
        for name in ("1_Pooling", "2_Dense") if extra else ("1_Pooling",) if sentence else (".",):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write(folder / "model.safetensors", names, leaves)
        if extra:
            write(folder / "2_Dense" / "model.safetensors", extra, leaves)
        for name, content in {**sentence, "config.json": config}.items():
            write_json(folder / name, content, indent=2)
    except OSError as e:
        raise InputError(f"{folder}: the model cannot be written there ({e.strerror}).") from e


def resolve(path_or_id: str | os.PathLike) -> Path:
    """The folder of a model: itself if it exists, else the snapshot of a hub id (weights, configuration, tokenizer).

    Raises:
      InputError: neither; or the hub cannot be reached and holds no earlier snapshot of it here.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_id)
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise InputError(
            f"{name}: there is no such folder, give one with config.json and model.safetensors, or a hub id."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (OSError, ValueError, HfHubHTTPError) as e:
        raise InputError(
            f"{name}: there is no such folder, and the Hugging Face hub did not give a model of this id "
            f"({type(e).__name__}); give a local folder, or check the id and the network."
        ) from e


def family_of(folder: Path, families: Mapping[str, Any], kind: str) -> tuple[Any, Mapping[str, Any]]:
    """The entry of `families` for the `model_type` of a model's folder, and its config.json.

    Raises:
      InputError: another type, which is no supported `kind`; quantised weights, or an adapter beside them.
    """
    config = read_settings(folder / "config.json")
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in families and isinstance(config, dict) and has_experts(config):
        raise InputError(
            f"{folder / 'config.json'}: model_type is {found!r}, a mixture of experts, which is not supported; take a "
            f"dense model, of one of {', '.join(families)}."
        )
    if found not in families:
        raise InputError(
            f"{folder / 'config.json'}: model_type is {found!r}, no {kind} that is supported; "
            f"expected one of {', '.join(families)}."
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise InputError(
            f"{folder / 'config.json'}: quantization_config says that the weights are quantised ({method}), which is "
            "not supported; take the model's unquantised files."
        )
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder / 'adapter_config.json'}: the weights are to be changed by an adapter, which is not supported; "
            "merge it into them first (peft: merge_and_unload), and leave that file out."
        )
    return families[found], config


# What shapes the distribution in generation_config.json, and the values that change nothing.
_RULES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "guidance_scale", "num_beams"), (1,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "min_length", "min_p"), (0,)),
    "top_k": (0, 50),  # 50 is the default of transformers, not of the model
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "stop_strings", "min_new_tokens"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "penalty_alpha"), ()),
}


def _warn_of_rules(folder: Path) -> None:
    file = folder / "generation_config.json"
    given = read_settings(file) if file.is_file() else {}
    rules = {k: given[k] for k, no in _RULES.items() if given.get(k) is not None and given[k] not in no}
    if rules:
        listed = ", ".join(f"{k} {v}" for k, v in rules.items())
        warnings.warn(
            f"{file} recommends {listed}. This is not applied: the distribution is the model's own until a control "
            "(ctg_jax.controls.truncate, or `filter` of a configuration) changes it.",
            stacklevel=3,
        )


def _configure(folder, family, config, checkpoint, dtype):
    try:
        model = family.read(config, checkpoint)
    except KeyError as e:
        raise InputError(f"{folder / 'config.json'}: the entry {e.args[0]!r} is missing, the model needs it.") from e
    except InputError as e:
        raise InputError(f"{folder}: {e}") from e
    if isinstance(model, Transformer) and model.tied and checkpoint.lacks(family.embedding, but_has=family.head):
        checkpoint.rename(family.head, family.embedding)  # tied weights are stored once, under either name
    try:
        name = jnp.dtype(dtype).name
    except TypeError as e:
        raise InputError(f"dtype is {dtype!r}, expected a floating type such as 'float32' or 'bfloat16'.") from e
    return dataclasses.replace(model, dtype=name, param_dtype=name)


def _params(model, names, checkpoint, family, dtype, shardings) -> Params:
    checkpoint.check(names, family.ignored)
    if callable(shardings):
        shardings = shardings(
            nested({p: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)) for p, leaf in names.items()})
        )
    where = tree.flatten(shardings) if shardings is not None else dict.fromkeys(names)
    if set(where) != set(names):
        odd = sorted(set(where) ^ set(names))[0]
        raise InputError(f"shardings: leaf {odd} is on one side only, expected a tree like the parameters.")
    return nested({p: place(checkpoint, leaf, dtype, where[p]) for p, leaf in names.items()})


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of the leaves by path."""
    out: dict[str, Any] = {}
    for path, leaf in flat.items():
        *heads, last = path.split("/")
        at = out
        for head in heads:
            at = at.setdefault(head, {})
        at[last] = leaf
    return out


def _renamed(names, prefix):
    return {
        path: dataclasses.replace(leaf, parts=tuple(dataclasses.replace(p, name=prefix + p.name) for p in leaf.parts))
        for path, leaf in names.items()
    }


def _check_expressible(family: Family, model: Any, config: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """A configuration that would come back as another one is refused: it would be a different model."""
    stored = {p.name for leaf in names.values() for p in leaf.parts}
    back = family.read(config, stored)
    skip = {"dtype", "param_dtype", "remat"}
    if isinstance(model, Encoder):  # these lie in the sentence-transformers files
        skip |= {"context", "pooling", "unit", "project", "project_bias", "project_activation"}
    for field in dataclasses.fields(model):
        old, new = getattr(model, field.name), getattr(back, field.name)
        if field.name not in skip and old != new:
            raise InputError(
                f"model: {field.name} is {old!r}, which the family {model.family!r} cannot express (it means {new!r})."
            )
