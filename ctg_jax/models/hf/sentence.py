"""The files that sentence-transformers (Reimers and Gurevych 2019) puts beside an encoder.

modules.json names a chain of folders; how texts are read is in files of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctg_jax.io import read_json
from ctg_jax.models.encoder import Encoder
from ctg_jax.models.hf.tensors import Table, dense
from ctg_jax.types import InputError

_ACTIVATIONS = {"Identity": "", "Tanh": "tanh", "GELU": "gelu", "ReLU": "relu"}
_TYPE = "sentence_transformers.models."
_DENSE = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding", "use_residual": False}
_TEXTS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


def read_sentence(folder: Path) -> tuple[dict[str, Any], Path | None]:
    """Fields of `Encoder` that a sentence-transformers folder sets, and the folder of its dense layer if any.

    Raises:
      InputError: a chain other than Transformer, Pooling (mean or cls), Dense?, Normalize?; a setting that is not
        supported.
    """
    modules = read_settings(folder / "modules.json") if (folder / "modules.json").is_file() else []
    kinds = [m["type"].rpartition(".")[2] for m in modules]
    if modules and kinds not in (
        ["Transformer", "Pooling", *d, *n] for d in ([], ["Dense"]) for n in ([], ["Normalize"])
    ):
        raise InputError(
            f"{folder / 'modules.json'}: the modules are {', '.join(kinds)}, "
            "expected Transformer, Pooling, and perhaps Dense and Normalize, in this order."
        )
    for key in ("config_args", "config_kwargs", "tokenizer_args", "processor_kwargs"):
        if modules and (given := _first(folder, _TEXTS).get(key)):
            raise InputError(f"{folder}: the sentence encoder's settings hold {key} {given}, which is not supported.")
    fields, project = {"unit": "Normalize" in kinds}, None
    for module, kind in zip(modules, kinds):
        file = folder / module["path"] / "config.json"
        if kind == "Pooling":
            fields["pooling"] = _pooling(file)
        elif kind == "Dense":
            project, c = file.parent, read_settings(file)
            act = c.get("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2]
            if act not in _ACTIVATIONS:
                raise InputError(f"{file}: activation_function is {act}, expected one of {', '.join(_ACTIVATIONS)}.")
            for key, value in _DENSE.items():
                if c.get(key) not in (None, value):
                    raise InputError(f"{file}: {key} is {c[key]!r}, only {value!r} is supported.")
            fields |= {"project": c["out_features"], "project_bias": c.get("bias", True)}
            fields["project_activation"] = _ACTIVATIONS[act]
    return fields, project


def _pooling(file: Path) -> str:
    """The one mode of a Pooling module, from `pooling_mode` or the older switches."""
    c = read_settings(file)
    switches = [k.removeprefix("pooling_mode_") for k, v in c.items() if k.startswith("pooling_mode_") and v]
    given = c.get("pooling_mode", switches) or "mean"  # the default of sentence-transformers
    modes = [given] if isinstance(given, str) else list(given)
    names = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise InputError(f"{file}: pooling is {' and '.join(modes)}, expected mean or cls (mean_tokens, cls_token).")
    return names[modes[0]]


def longest_input(folder: Path) -> int | None:
    """The longest input, in tokens, that the files beside the model allow, or None where they set no limit: what
    sentence-transformers was saved with, else the tokenizer's `model_max_length`."""
    given = _first(folder, _TEXTS).get("max_seq_length")
    given = given or _first(folder, ("tokenizer_config.json",)).get("model_max_length")
    return given if given and given < 10**20 else None  # what transformers writes for no limit is larger


def text_format(folder: Path) -> tuple[bool, str]:
    """(whether texts are lower-cased, what is put before every text) in a sentence-transformers model.

    Raises:
      InputError: a prompt that is not among those named, or one that pooling leaves out.
    """
    c = _first(folder, ("config_sentence_transformers.json",))
    name, prompts = c.get("default_prompt_name"), c.get("prompts") or {}
    if name is not None and name not in prompts:
        raise InputError(
            f"{folder / 'config_sentence_transformers.json'}: default_prompt_name is {name!r}, which is not among the "
            f"prompts {', '.join(prompts)}."
        )
    prompt = prompts[name] or "" if name is not None else ""
    if prompt and not _first(folder, ("1_Pooling/config.json",)).get("include_prompt", True):
        raise InputError(f"{folder / '1_Pooling/config.json'}: include_prompt is false, only true is supported.")
    return bool(_first(folder, _TEXTS).get("do_lower_case")), prompt


def _first(folder: Path, names: Sequence[str]) -> Mapping[str, Any]:
    """The content of the first of these JSON files that is there."""
    return next((read_settings(folder / n) for n in names if (folder / n).is_file()), {})


def projection(e: Encoder) -> Table:
    """The name table of the dense layer after pooling, which is in a file of its own."""
    return dense(e, "project", "linear", e.project, e.width, e.project_bias) if e.project else {}


def write_sentence(e: Encoder) -> dict[str, Any]:
    """The JSON files, by path, that make a folder a sentence-transformers model."""
    kinds = ["Transformer", "Pooling", *(["Dense"] if e.project else []), *(["Normalize"] if e.unit else [])]
    paths = [f"{i}_{k}" if i else "" for i, k in enumerate(kinds)]
    modules = [{"idx": i, "name": str(i), "path": p, "type": _TYPE + k} for i, (p, k) in enumerate(zip(paths, kinds))]
    modes = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "", "mean_sqrt_len_tokens": ""}
    pooling = {f"pooling_mode_{k}": e.pooling == v for k, v in modes.items()}
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": e.context, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": e.width, **pooling},
    }
    if e.project:
        module = {
            "": "linear.Identity",
            "tanh": "activation.Tanh",
            "gelu": "activation.GELU",
            "relu": "activation.ReLU",
        }
        files["2_Dense/config.json"] = {
            "in_features": e.width,
            "out_features": e.project,
            "bias": e.project_bias,
            "activation_function": f"torch.nn.modules.{module[e.project_activation]}",
        }
    return files


def read_settings(file: Path) -> Any:
    """The contents of a JSON file in a model's folder; InputError naming it where it is missing or is not JSON."""
    return read_json(file, "a model in Hugging Face layout has this file; fetch the model again")
