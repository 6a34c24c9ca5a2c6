"""A weight on its grid, and the folder that keeps finished ones.

A finished weight is written to disk at once: memory holds one at a time, the graph reads them
back when it is saved, and a run that was interrupted finds what it had done.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.atomic_write import write_whole
from mvlm_export.engines.errors import MvlmError

from .weight_grids import Codes, FloatArray, WeightFormat, WeightGrid

KEY = "key.json"
TYPE = "mvlm-weight-store"

_PARTIAL = ".partial"
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
)
"""What reading a damaged ``.npz`` file raises."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Codes int8 [K, N] (of 4-bit weights too) and their grid."""

    codes: Codes
    grid: WeightGrid

    def dequantize(self) -> FloatArray:
        """float32 [K, N]."""
        return self.grid.dequantize(self.codes)


@dataclass(frozen=True)
class StoredWeight:
    """A finished weight on disk.

    Attributes:
        path: its ``.npz`` file.
        shape: (K, N).
        error: ``||W - Q|| / ||W||`` of what was quantized.
    """

    path: Path
    shape: tuple[int, int]
    form: WeightFormat
    error: float

    def load(self) -> QuantizedWeight:
        """All of it.

        Raises:
            MvlmError: the file has been removed or damaged.
        """
        codes, scales = self.codes(), self.scales()
        offsets = None if self.form.symmetric else self.offsets()
        return QuantizedWeight(codes, WeightGrid(self.form, scales, offsets))

    def codes(self) -> Codes:
        """int8 [K, N]."""
        stored = self._read("codes")
        codes: Codes = stored if self.form.bits == 8 else unpack(stored, self.shape)
        return codes

    def scales(self) -> FloatArray:
        """float32 [G, N]."""
        scales: FloatArray = self._read("scales")
        return scales

    def offsets(self) -> FloatArray:
        """float32 [G, N]; of asymmetric forms only."""
        offsets: FloatArray = self._read("offsets")
        return offsets

    def _read(self, member: str) -> Any:  # noqa: ANN401
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return arrays[member]
        except _UNREADABLE as error:
            raise MvlmError(
                f"The quantized weight {self.path} cannot be read ({error}). Remove "
                f"{self.path.parent} and run the command again."
            ) from error


def pack(codes: Codes) -> npt.NDArray[np.uint8]:
    """Two 4-bit codes a byte, the earlier one in the low bits; an odd last one alone."""
    flat = codes.reshape(-1).astype(np.uint8) & np.uint8(0xF)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed: npt.NDArray[np.uint8] = flat[0::2] | (flat[1::2] << np.uint8(4))
    return packed


def unpack(packed: npt.NDArray[np.uint8], shape: tuple[int, int]) -> Codes:
    """What :func:`pack` took."""
    pairs = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1)
    codes = pairs[: shape[0] * shape[1]].astype(np.int8)
    return np.where(codes > 7, codes - 16, codes).astype(np.int8).reshape(shape)


class WeightStore:
    """A folder of finished weights, valid for one key.

    Args:
        folder: made if it is missing; what another key left there is removed.
        key: what the weights depend on; plain JSON values.

    Raises:
        MvlmError: the folder cannot be written, or holds what is no store.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        wanted = json.dumps({"_type": TYPE, **key}, sort_keys=True, indent=1)
        path = folder / KEY
        try:
            found = path.read_bytes() if path.is_file() else b""
            if found == wanted.encode():
                return
            if _is_store_key(found):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            others = [f.name for f in folder.iterdir() if not f.name.endswith(_PARTIAL)]
            if others:
                raise MvlmError(
                    f"{folder} is to keep quantized weights, but holds other files "
                    f"({', '.join(sorted(others)[:3])}). Remove it, or name another folder."
                )
            write_whole(path, memoryview(wanted.encode()))
        except OSError as error:
            raise _unwritable(folder, error) from error

    def find(self, name: str) -> StoredWeight | None:
        """A weight finished earlier; one that was damaged since is not found.

        Its checksums are compared, so that what is found can be read when it is needed.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged is not None:
                return None
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                members = set(arrays.files)
        except _UNREADABLE:
            return None
        form = WeightFormat(**about["form"])
        needed = {"codes", "scales"} | (set() if form.symmetric else {"offsets"})
        rows, columns = about["shape"]
        found = StoredWeight(path, (rows, columns), form, about["error"])
        return found if needed <= members else None

    def add(self, name: str, weight: QuantizedWeight, original: FloatArray) -> StoredWeight:
        """Write a finished weight.

        Raises:
            MvlmError: the disk is full or the folder is gone.
        """
        rows, columns = weight.codes.shape
        error = relative_error(weight, original)
        grid = weight.grid
        about = {
            "shape": [rows, columns],
            "form": asdict(grid.form),
            "error": error,
        }
        codes = weight.codes if grid.form.bits == 8 else pack(weight.codes)
        members: dict[str, Any] = {"codes": codes, "scales": grid.scales}
        if grid.offsets is not None:
            members["offsets"] = grid.offsets
        file = io.BytesIO()
        np.savez(file, about=np.array(json.dumps(about)), **members)
        path = self._path(name)
        write_whole(path, file.getbuffer())
        return StoredWeight(path, (rows, columns), grid.form, error)

    def read_json(self, name: str) -> Any:  # noqa: ANN401
        """Other results, kept as JSON; None if there are none."""
        path = self.folder / f"{quote(name, safe='')}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_json(self, name: str, values: Any) -> None:  # noqa: ANN401
        """Keep other results.

        Raises:
            MvlmError: they cannot be written.
        """
        path = self.folder / f"{quote(name, safe='')}.json"
        write_whole(path, memoryview(json.dumps(values).encode()))

    def _path(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.npz"


def relative_error(weight: QuantizedWeight, original: FloatArray) -> float:
    """``||W - Q|| / ||W||`` of W float32 [K, N]; 0 for a weight of zeros."""
    norm = float(np.linalg.norm(original))
    return float(np.linalg.norm(weight.dequantize() - original)) / norm if norm else 0.0


def _is_store_key(found: bytes) -> bool:
    """Whether a file's bytes are the key of a store, so that all beside it may be removed."""
    try:
        key = json.loads(found)
    except ValueError:
        return False
    return isinstance(key, dict) and key.get("_type") == TYPE


def _unwritable(folder: Path, error: OSError) -> MvlmError:
    return MvlmError(
        f"Quantized weights cannot be written to {folder} ({error}). Make room on the disk, "
        "or name another folder."
    )
