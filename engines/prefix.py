"""The prompt prefix: cache rows of the text that every prompt begins with.

A bundle may ship them in ``prefix.npz``: ``ids`` int32 [P] (the start token and the template's
constant text) and, for each layer n, ``key.{n}`` and ``value.{n}`` [P, H_kv, head_dim] in the
cache's dtype. What a row of the cache holds follows from its id and those before it alone, so
the rows serve every prompt as far as its ids agree with theirs.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .atomic_write import write_whole
from .errors import BundleError
from .kv_cache import CacheArray, KvCache
from .manifest import ModelSpec
from .session import IdArray


@dataclass(frozen=True, eq=False)
class PromptPrefix:
    """Ids and the cache rows they lead to.

    Attributes:
        ids: int32 [P], P >= 1.
        rows: [P, H_kv, head_dim] of each cache tensor: key 0, value 0, key 1, value 1, ...
    """

    ids: IdArray
    rows: tuple[CacheArray, ...]

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def write(self, cache: KvCache, start: int, stop: int) -> None:
        """Put rows ``start`` to ``stop`` into a cache whose rows before them agree.

        The cache holds ``stop`` rows afterwards.

        Raises:
            EngineError: the cache is of another model.
        """
        cache.truncate(start)
        for tensor, rows in enumerate(self.rows):
            cache.write_rows(tensor, start, rows[start:stop])
        cache.advance(stop - start)


def save_prefix(path: Path, prefix: PromptPrefix) -> None:
    """Write ``prefix.npz``, whole or not at all.

    Raises:
        EngineError: the disk is full or the folder cannot be written.
    """
    names = _names(len(prefix.rows) // 2)
    buffer = io.BytesIO()
    arrays = dict(zip(names, prefix.rows, strict=True))
    np.savez(buffer, ids=prefix.ids, **arrays)  # type: ignore[arg-type]
    write_whole(path, buffer.getbuffer())


def load_prefix(path: Path, model: ModelSpec, dtype: str) -> PromptPrefix:
    """Read what :func:`save_prefix` wrote.

    Args:
        model: of the bundle's manifest.
        dtype: of the decoder's cache, ``manifest.cache_dtype``.

    Raises:
        BundleError: the file cannot be read, or does not fit the model.
    """
    names = _names(model.num_layers)
    arrays = _read_arrays(path)
    if set(arrays) != {"ids", *names}:
        other = sorted(set(arrays) ^ {"ids", *names})
        raise _refused(path, f"its arrays are not the model's ({', '.join(other[:4])})")
    ids, *rows = (arrays[name] for name in ("ids", *names))
    _check_ids(path, ids, model)
    wanted = (len(ids), model.num_key_value_heads, model.head_dim)
    for name, array in zip(names, rows, strict=True):
        if array.shape != wanted or array.dtype != np.dtype(dtype):
            found = f"{array.dtype} {list(array.shape)}"
            raise _refused(path, f"{name} is {found}, not {dtype} {list(wanted)}")
        if not np.isfinite(array).all():
            raise _refused(path, f"{name} holds values that are not finite")
    return PromptPrefix(ids, tuple(rows))


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with path.open("rb") as file:
            data = np.load(file, allow_pickle=False)
            if isinstance(data, np.lib.npyio.NpzFile):
                return {name: _array(data[name]) for name in data.files}
    except Exception as error:  # numpy and zipfile raise any kind for damaged bytes
        raise _refused(path, f"it cannot be read ({error})") from error
    raise _refused(path, "it is no npz file")


def _array(member: Any) -> npt.NDArray[Any]:  # noqa: ANN401
    # numpy gives the bytes of a member that is no npy file.
    if not isinstance(member, np.ndarray):
        raise TypeError("a member is no npy file")
    return member


def _names(layers: int) -> list[str]:
    return [f"{part}.{n}" for n in range(layers) for part in ("key", "value")]


def _check_ids(path: Path, ids: IdArray, model: ModelSpec) -> None:
    if ids.dtype != np.int32 or ids.ndim != 1:
        raise _refused(path, f"ids is {ids.dtype} {list(ids.shape)}, not int32 [P]")
    if not 1 <= len(ids) < model.max_positions:
        most = model.max_positions - 1
        raise _refused(path, f"ids has {len(ids)} entries, not 1 to {most}")
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise _refused(path, f"ids holds others than 0 to {model.vocab_size - 1}")


def _refused(path: Path, what: str) -> BundleError:
    return BundleError(
        f"{path} does not fit the bundle: {what}. Compile the bundle again, or load it "
        "without the prompt prefix (`--no-prefix`, or use_prefix=False in Python)."
    )
