"""What PyTorch gave for each sample, on disk: a long check needs the memory of one sample.

A run of MobileVLM V2 1.7B is about 130 MB (logits of every prompt row, and the cache rows of
every layer), and all runs are made before the first is compared, since PyTorch's decoder and
ONNX Runtime's are not held at the same time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.errors import EngineError

from .reference import ForcedRun, Step

Array = npt.NDArray[Any]


class Spool:
    """Arrays and runs by sample, in files of ``folder``; made by :func:`open_spool`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, name: str, index: int) -> Path:
        return self.folder / f"{name}-{index}.npz"

    def _save(self, name: str, index: int, arrays: dict[str, Array]) -> None:
        try:
            np.savez(self._path(name, index), **arrays)  # type: ignore[arg-type]
        except OSError as error:
            raise EngineError(
                f"What PyTorch gave cannot be kept in {self.folder} until it is compared "
                f"({error}). Free space there, or compare fewer samples."
            ) from error

    def write(self, name: str, index: int, array: Array) -> None:
        """Keep an array of a sample.

        Raises:
            EngineError: it cannot be written.
        """
        self._save(name, index, {"array": array})

    def read(self, name: str, index: int) -> Array:
        """An array that :meth:`write` kept."""
        with np.load(self._path(name, index)) as data:
            array: Array = data["array"]
        return array

    def write_run(self, index: int, run: ForcedRun) -> None:
        """Keep a run of the decoder; its one-token steps are put together.

        Raises:
            EngineError: it cannot be written.
        """
        prefill, decode = run.prefill, run.decode
        joined = np.concatenate([prefill.logits[:0], *(step.logits for step in decode)])
        arrays = {"prefill": prefill.logits, "decode": joined}
        for n, rows in enumerate(prefill.rows):
            arrays[f"prefill.{n}"] = rows
            arrays[f"decode.{n}"] = np.concatenate(
                [rows[:0], *(step.rows[n] for step in decode)]
            )
        self._save("run", index, arrays)

    def read_run(self, index: int) -> ForcedRun:
        """A run that :meth:`write_run` kept."""
        with np.load(self._path("run", index)) as data:
            tensors = range(len(data.files) // 2 - 1)
            prefill = Step(data["prefill"], [data[f"prefill.{n}"] for n in tensors])
            logits, rows = data["decode"], [data[f"decode.{n}"] for n in tensors]
        steps = [slice(step, step + 1) for step in range(len(logits))]
        return ForcedRun(prefill, [Step(logits[s], [row[s] for row in rows]) for s in steps])

    def read_logits(self, index: int, place: int) -> Array:
        """Logits [V] that token ``place`` of the answer was chosen from.

        The prompt's last row gives token 0, and each later token the step that was fed the
        one before it.
        """
        with np.load(self._path("run", index)) as data:
            logits: Array = data["prefill"][-1] if place == 0 else data["decode"][place - 1]
        return logits


@contextmanager
def open_spool(bundle: Path) -> Iterator[Spool]:
    """A spool in a temporary folder, which is gone after the block, whatever ends it.

    It lies beside the bundle, so on a disk that holds large files (``/tmp`` may be memory), or
    where temporary files go if nothing can be written there.
    """
    name = bundle.resolve()
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{name.name}.parity.", dir=name.parent)
    except OSError:
        folder = tempfile.TemporaryDirectory(prefix="mvlm-parity-")
    with folder as path:
        yield Spool(Path(path))
