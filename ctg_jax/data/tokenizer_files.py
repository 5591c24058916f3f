"""Special tokens, ends, settings and the chat template of a tokenizer, from the files beside tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctg_jax.io import loads, read_json
from ctg_jax.types import InputError

if TYPE_CHECKING:
    import tokenizers

_MODEL_FILES = ("generation_config.json", "config.json")
_BYTE_LEVEL = ("GPT2Tokenizer", "GPTNeoXTokenizer", "RobertaTokenizer")  # they apply add_prefix_space themselves


def special_tokens(folder: Path, core: tokenizers.Tokenizer) -> dict[str, str | None]:
    """Names of the special tokens: from the tokenizer's own files, else (GPT-2's give none) by the ids in
    generation_config.json or config.json. The first file that names one counts."""
    found: dict[str, str] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json", *_MODEL_FILES):
        entries = _entries(folder / file)
        for name in ("bos", "eos", "pad"):
            token = entries.get(f"{name}_token")
            token = token["content"] if isinstance(token, dict) else token
            tokens = [token] if token is not None else [core.id_to_token(i) for i in _ids(folder / file, name)]
            known = [t for t in tokens if t is not None and core.token_to_id(t) is not None]
            if known:
                found.setdefault(name, known[0])
    return found


def end_ids(folder: Path, core: tokenizers.Tokenizer) -> list[int]:
    """The ids that end a text by generation_config.json or, where that names none, by config.json: the precedence of
    `transformers`. Ids that are no token are left out, since text never holds them."""
    given = next((ids for file in _MODEL_FILES if (ids := _ids(folder / file, "eos"))), [])
    return [i for i in given if core.id_to_token(i) is not None]


def chat_template(folder: Path) -> str | None:
    """The chat template: chat_template.jinja, or else `chat_template` of tokenizer_config.json, which is a text or a
    list of named ones, of which "default" counts; None where there is none. The precedence is that of `transformers`.

    Raises:
      InputError: a file that is not UTF-8, a list without "default", anything else.
    """
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{file} cannot be read ({e}): expected a chat template in UTF-8") from e
    given = _entries(config).get("chat_template")
    if isinstance(given, list) and all(isinstance(t, dict) and {"name", "template"} <= set(t) for t in given):
        named = {t["name"]: t["template"] for t in given}
        if "default" not in named:
            raise InputError(
                f"{config}: chat_template names {', '.join(named) or 'nothing'}, expected one named 'default'"
            )
        given = named["default"]
    if given is not None and not isinstance(given, str):
        raise InputError(f"{config}: chat_template is {given!r:.60}, expected a text or a list of named texts")
    return given


def check_settings(folder: Path, core: tokenizers.Tokenizer) -> None:
    """Raises InputError where tokenizer_config.json would make `transformers` read texts in another way than
    tokenizer.json: by tokens that the latter lacks, or by a space before every text."""
    file = folder / "tokenizer_config.json"
    config = _entries(file)
    for id, token in (config.get("added_tokens_decoder") or {}).items():
        if core.token_to_id(token["content"]) != int(id):
            raise InputError(
                f"{file}: added_tokens_decoder says that token {id} is {token['content']!r}, but tokenizer.json does "
                "not; load the tokenizer with transformers and save it again, which joins the two."
            )
    wanted, kind = config.get("add_prefix_space"), config.get("tokenizer_class") or ""
    if wanted is None or kind.removesuffix("Fast") not in _BYTE_LEVEL:
        return  # other classes leave it to tokenizer.json
    first = loads(core.to_str())["pre_tokenizer"] or {}
    for part in first.get("pretokenizers", [first]):
        if part.get("type") == "ByteLevel" and part["add_prefix_space"] != wanted:
            raise InputError(
                f"{file}: add_prefix_space is {wanted}, but in tokenizer.json {part['add_prefix_space']}; "
                "load the tokenizer with transformers and save it again, which joins the two."
            )


def model_rows(folder: Path) -> int | None:
    """`vocab_size` in the config.json beside the tokenizer: the ids its model can read, or None where it is missing."""
    size = _entries(folder / "config.json").get("vocab_size")
    return size if isinstance(size, int) else None


def _ids(file: Path, name: str) -> list[int]:
    """The token ids of a special token in a file of the model: one, several (Llama 3 lists several ends) or none."""
    given = _entries(file).get(f"{name}_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(i) is int for i in ids):
        raise InputError(f"{file}: {name}_token_id is {given!r}, expected a token id or a list of them.")
    return [i for i in ids if i >= 0]  # -1 is how some files write "none"


def _entries(file: Path) -> dict[str, Any]:
    return read_json(file, "expected a file of a Hugging Face model") if file.is_file() else {}
