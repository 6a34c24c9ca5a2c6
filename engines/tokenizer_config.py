"""The JSON files beside ``tokenizer.model``, read with checks: null means the default."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class AddedToken:
    """A text that is one token wherever it stands.

    Attributes:
        content: the text itself.
        id: its id.
        special: left out of decoded text on demand.
        lstrip: swallows white space on its left.
        rstrip: swallows white space on its right.
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


def text_of(record: object) -> str:
    """A token is written as its text or as ``{"content": text, ...}``."""
    text = record.get("content") if isinstance(record, Mapping) else record
    if not isinstance(text, str) or not text:
        raise CheckpointError(
            f"A special token is written as {record!r} instead of a text or a record with "
            "'content'; mend the JSON files beside tokenizer.model."
        )
    return text


def read_id(value: object) -> int:
    """The id of an added token, written as a number or (as a key) as its digits."""
    if isinstance(value, (int, str)) and str(value).isdecimal() and len(str(value)) < 10:
        return int(value)
    raise CheckpointError(
        f"The id of an added token is written as {value!r} instead of a number; mend the JSON "
        "files beside tokenizer.model."
    )


def named_texts(data: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the named tokens (``bos_token`` and so on) that a file gives."""
    return {key: text_of(data[key]) for key in _NAMED if data.get(key) is not None}


def extra_texts(*files: Mapping[str, Any]) -> list[str]:
    """Texts of the other special tokens, in the order of files and keys."""
    keys = ("additional_special_tokens", "extra_special_tokens")
    return [
        text_of(record) for data in files for key in keys for record in _records(data, key)
    ]


def _records(data: Mapping[str, Any], key: str) -> Iterable[object]:
    """A list of tokens; transformers also writes them as an object with a name for each."""
    value = data.get(key) or []
    if isinstance(value, Mapping):
        return value.values()
    if not isinstance(value, list):
        raise _miswritten(key, value, "a list of tokens")
    return value


def added_from_record(id_: int, record: object) -> AddedToken:
    """A token from its record in ``added_tokens_decoder``."""
    if not isinstance(record, Mapping):
        raise _miswritten(f"added_tokens_decoder.{id_}", record, "a record with 'content'")
    content = text_of(record)
    if read_flag(record, "single_word", default=False):
        raise CheckpointError(
            f"The added token {content!r} is for single words only, which this tokenizer does "
            "not do; set its single_word to false."
        )
    flags = {
        key: read_flag(record, key, default=False) for key in ("special", "lstrip", "rstrip")
    }
    return AddedToken(content, id_, **flags)


def read_flag(data: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; a null means the default, as an absent key does."""
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _miswritten(key, value, "true or false")
    return value


def read_object(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object; empty where the key is absent or null."""
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _miswritten(key, value, "an object")
    return value


def _miswritten(key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"tokenizer_config.json or special_tokens_map.json gives {key} as {value!r} instead "
        f"of {wanted}; mend the file, or download it again."
    )


def refuse_settings(config: Mapping[str, Any]) -> None:
    """Raise for what would change ids and is not done here."""
    if read_flag(config, "add_eos_token", default=False):
        raise CheckpointError(
            "tokenizer_config.json sets add_eos_token, which would end every prompt before "
            "the answer; set it to false."
        )
    if config.get("sp_model_kwargs"):
        raise CheckpointError(
            f"tokenizer_config.json sets sp_model_kwargs to {config['sp_model_kwargs']}, and "
            "ids would no longer be the same each time; set it to {}."
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """The object a JSON file holds; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read as JSON: {error}; download the file again."
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"'{path}' holds a {type(data).__name__} instead of an object; download it again."
        )
    return data
