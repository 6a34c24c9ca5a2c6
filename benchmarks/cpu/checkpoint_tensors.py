"""Reading a checkpoint's tensors with numpy alone: the peers' environments hold no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

VISION = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."


class CheckpointTensors:
    """The bfloat16 tensors of a safetensors folder, mapped, as float32 when asked for.

    The format is a little-endian length of eight bytes, a JSON header with each tensor's
    dtype, shape and offsets, then the data.
    """

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._places: dict[str, tuple[Path, int, tuple[int, ...]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    raise ValueError(
                        f"{path.name} holds {name} as {entry['dtype']}, but the comparison's "
                        "checkpoints are bfloat16; let the setup write one."
                    )
                start = 8 + length + entry["data_offsets"][0]
                self._places[name] = (path, start, tuple(entry["shape"]))

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._places)

    def read(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One tensor, float32: a bfloat16 is a float32's upper half."""
        path, start, shape = self._places[name]
        halves = np.memmap(path, np.dtype("<u2"), "r", start, shape)
        return (halves.astype(np.uint32) << 16).view(np.float32)
