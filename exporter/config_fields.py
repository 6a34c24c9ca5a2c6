"""Typed, checked reading of the keys of a JSON config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm_export.engines.errors import CheckpointError

_LARGEST = 2**31 - 1


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        repeated = sorted({key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1})
        raise ValueError(f"it names {', '.join(repeated[:5])} more than once")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds.

    Raises:
        CheckpointError: when it cannot be read, is not JSON, repeats a key, or is no object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_refuse_repeats)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist: give the folder of a downloaded MobileVLM checkpoint, "
            "with its config.json and weights inside."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}): check its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be used as JSON ({error}): download it again (a git-lfs pointer "
            "or an error page in its place reads like this)."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(content).__name__}, not an object: download it again."
        )
    return content


@dataclass(frozen=True)
class Fields:
    """A JSON object whose keys are read with checks; a null counts as an absent key.

    Attributes:
        raw: the object.
        source: what to call it in messages, ``config.json`` for instance.
    """

    raw: Mapping[str, Any]
    source: str

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.raw.get(key) is not None

    def integer(self, key: str, default: int | None = None, minimum: int | None = 1) -> int:
        """A whole number of 32 bits, at least ``minimum`` unless that is None."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._bad(key, value, "a whole number")
        if minimum is not None and value < minimum:
            raise self._bad(key, value, f"a whole number of at least {minimum}")
        if abs(value) > _LARGEST:
            raise self._bad(key, value, f"a whole number of at most {_LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._bad(key, value, "a number")
        try:
            number = float(value)
        except OverflowError as error:
            raise self._bad(key, value, "a finite number above zero") from error
        if not (math.isfinite(number) and number > 0):
            raise self._bad(key, value, "a finite number above zero")
        return number

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._bad(key, value, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, value, "true or false")
        return value

    def block(self, key: str) -> Fields:
        """A nested object; empty when absent."""
        value = self._value(key, {})
        if not isinstance(value, Mapping):
            raise self._bad(key, value, "an object")
        return Fields(value, f"{key} of {self.source}")

    def token_ids(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        """One id or a list of ids, without repeats, in the order given."""
        value = self._value(key, list(default))
        listed = value if isinstance(value, list) else [value]
        ids = [i for i in listed if isinstance(i, int) and not isinstance(i, bool)]
        if not ids or len(ids) != len(listed):
            raise self._bad(key, value, "a token id or a list of token ids")
        return tuple(dict.fromkeys(ids))

    def refuse_unless(self, key: str, allowed: Sequence[object], why: str) -> None:
        """Raise when the key is there with a value outside ``allowed``."""
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{self.source} sets {key} to {value!r}: {why}.")

    def _value(self, key: str, default: object) -> object:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(
                f"{self.source} lacks {key!r}, which has no default: take the file as the "
                "model's authors publish it, or add the key."
            )
        return value

    def _bad(self, key: str, value: object, wanted: str) -> CheckpointError:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:197]}..."
        return CheckpointError(
            f"{self.source} gives {key} as {shown}, but {wanted} is needed there: take the "
            "file as the model's authors publish it, or mend the value."
        )
