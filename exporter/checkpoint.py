"""Lazy, memory-mapped reading of the weights in a checkpoint folder.

Tensors are views of the mapped files; the mappings are dropped and made anew after
``mapped_limit`` bytes have been handed out, so that reading a whole checkpoint one tensor at a
time holds no more of it in memory than that and the largest tensor. No code in a pickle is
ever run (``weights_only``).
"""

from __future__ import annotations

import difflib
import math
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvlm_export.engines.errors import CheckpointError

from .weight_files import find_weight_files

MAPPED_LIMIT = 1 << 30

_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
)
"""What ``torch.load`` raises on a file that is cut short or overwritten."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _read_head(path: Path) -> bytes:
    """The first bytes of a weight file, after making sure that it can be one."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
    except PermissionError as error:
        raise CheckpointError(
            f"{path} cannot be read, permission denied: check its owner and mode "
            f"(chmod u+r {path})."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}): check the disk and the path."
        ) from error
    if head.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the weights themselves: run `git lfs pull` in "
            f"{path.parent}."
        )
    if not head:
        raise CheckpointError(f"{path} is empty: download it again.")
    return head


class _SafetensorsFile:
    """One ``.safetensors`` file."""

    mapped = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        handle = self._open()
        self.infos: dict[str, TensorInfo] = {}
        for name in handle.keys():  # noqa: SIM118 - a safe_open handle is not iterable
            view = handle.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{name} in {path} has the dtype {view.get_dtype()}, which is not "
                    "supported: give the bfloat16, float16 or float32 checkpoint."
                )
            self.infos[name] = TensorInfo(tuple(view.get_shape()), dtype, path)

    def _open(self) -> Any:  # noqa: ANN401 - safetensors ships no type for its handle
        if self._handle is None:
            _read_head(self.path)
            try:
                self._handle = safe_open(str(self.path), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.path} is cut short or damaged ({error}): download it again."
                ) from error
        return self._handle

    def load(self, name: str) -> Tensor:
        tensor: Tensor = self._open().get_tensor(name)
        return tensor

    def release(self) -> None:
        self._handle = None


class _TorchFile:
    """One ``.bin`` file; the old (non-zip) format cannot be mapped and is read whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapped = _read_head(path).startswith(_ZIP)
        self._state: Mapping[str, Tensor] | None = None
        self.infos = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype, path)
            for name, tensor in self._open().items()
        }
        if not self.mapped:
            self.release()

    def _open(self) -> Mapping[str, Tensor]:
        if self._state is None:
            self._state = self._read_state()
        return self._state

    def _read_state(self) -> Mapping[str, Tensor]:
        head = _read_head(self.path)
        if not head.startswith((_ZIP, _PICKLE)):
            raise CheckpointError(
                f"{self.path} is not a PyTorch weight file (it starts with {head[:8]!r}): "
                "download it again."
            )
        try:
            state = torch.load(
                str(self.path), map_location="cpu", weights_only=True, mmap=self.mapped
            )
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                f"{self.path} was not loaded: it holds something else than plain tensors, "
                f"which may be code meant to run here, or it is damaged ({reason}). Get the "
                "weights from their authors, best as safetensors."
            ) from error
        except _DAMAGED as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{self.path} is cut short or damaged ({reason}): download it again."
            ) from error
        return self._check_state(state)

    def _check_state(self, state: object) -> Mapping[str, Tensor]:
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"{self.path} holds a {type(state).__name__}, not tensors by name: give the "
                "model's state dict."
            )
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{self.path} holds a {type(value).__name__} as {name!r}, not a tensor: "
                    "it looks like a training checkpoint; save the model's state dict alone."
                )
            if value.layout != torch.strided or value.is_quantized:
                raise CheckpointError(
                    f"{name} in {self.path} is a sparse or quantised tensor: give the "
                    "bfloat16, float16 or float32 checkpoint."
                )
        return state

    def load(self, name: str) -> Tensor:
        return self._open()[name].detach()

    def release(self) -> None:
        self._state = None


_WeightFile = _SafetensorsFile | _TorchFile


def _release(files: Iterable[_WeightFile]) -> None:
    """Drop mappings or memory; tensors that are still held elsewhere stay valid."""
    for file in files:
        file.release()


def _open_file(path: Path) -> _WeightFile:
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _TorchFile(path)


class Checkpoint:
    """The tensors of a checkpoint folder by name, read when asked for.

    Attributes:
        folder: where it was opened.
        mapped_limit: bytes handed out before the mappings are made anew.
    """

    def __init__(
        self, folder: Path, files: list[_WeightFile], mapped_limit: int = MAPPED_LIMIT
    ) -> None:
        self.folder = folder
        self.mapped_limit = mapped_limit
        self._files: dict[str, _WeightFile] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._handed_out = 0
        self._mapped = [file for file in files if file.mapped]
        self._unmapped = [file for file in files if not file.mapped]
        for file in files:
            for name, info in file.infos.items():
                if name in self._files:
                    raise CheckpointError(
                        f"{name} is in two files, {self._files[name].path.name} and "
                        f"{file.path.name} of {folder}: remove the file that does not belong "
                        "there, or download again."
                    )
                self._files[name], self._infos[name] = file, info

    @classmethod
    def open(cls, folder: Path, mapped_limit: int = MAPPED_LIMIT) -> Checkpoint:
        """Open ``folder``; reads names, shapes and dtypes, no weights.

        Raises:
            CheckpointError: when there are no weights, or they are incomplete or damaged.
        """
        if not folder.is_dir():
            kind = "is a file" if folder.exists() else "does not exist"
            raise CheckpointError(
                f"{folder} {kind}: give the folder of a downloaded MobileVLM checkpoint."
            )
        try:
            weight_map, paths = find_weight_files(folder)
        except PermissionError as error:
            raise CheckpointError(
                f"{folder} cannot be searched, permission denied: check its owner and mode "
                f"(chmod u+rx {folder})."
            ) from error
        checkpoint = cls(folder, [_open_file(path) for path in paths], mapped_limit)
        for name, shard in weight_map.items():
            if name not in checkpoint or checkpoint.info(name).file.name != shard:
                raise CheckpointError(
                    f"The index of {folder} puts {name} into {shard}, which does not hold it: "
                    "index and shards are of different downloads; fetch both again."
                )
        return checkpoint

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor, in file order."""
        return tuple(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and file of a tensor, without reading it.

        Raises:
            CheckpointError: when there is no such tensor.
        """
        if name not in self._infos:
            close = difflib.get_close_matches(name, self._infos, n=1, cutoff=0.5)
            nearest = f"; the nearest name is {close[0]}" if close else ""
            raise CheckpointError(
                f"{self.folder} holds no tensor {name} among its {len(self._infos)}{nearest}. "
                "Check that the download is complete and config.json is this checkpoint's own."
            )
        return self._infos[name]

    def load(self, name: str) -> Tensor:
        """A tensor as stored, a view of the mapped file: cast or copy it before changing it.

        Raises:
            CheckpointError: when there is no such tensor, or its file has become unreadable.
        """
        info, file = self.info(name), self._files[name]
        if not file.mapped:
            _release(other for other in self._unmapped if other is not file)
        elif self._handed_out + info.nbytes > self.mapped_limit:
            _release(self._mapped)
            self._handed_out = 0
        self._handed_out += info.nbytes
        return file.load(name)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self._infos.values())

    @property
    def unmapped_files(self) -> tuple[Path, ...]:
        """Files in PyTorch's old format, which are read whole into memory."""
        return tuple(file.path for file in self._unmapped)

    def dtype_counts(self) -> dict[torch.dtype, int]:
        """How many tensors there are of each dtype."""
        return dict(Counter(info.dtype for info in self._infos.values()))
