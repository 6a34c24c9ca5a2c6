"""What a decoder's step reads and writes beside the cache, on the device and on the host."""

from __future__ import annotations

import numpy as np

from .device_memory import Buffer, DeviceMemory
from .engine_runner import Engine, EngineRunner
from .errors import EngineError
from .manifest import NEXT_TOKEN
from .session import Float32Array, FloatArray, IdArray

_LENGTH = "past_length"
_ID_BYTES = 4
"""Of ``next_token`` (int64, little-endian): those that hold an id or -1 as an int32 does."""


class DecoderBuffers:
    """Ids, image rows, length, logits and token, allocated once for the largest step.

    What ``send_*`` stages on the host is in use until the memory is synchronized.

    Args:
        engine: the decoder's plan.
        memory: where it runs.
        profile: the profile with the largest steps.
        logits_rows: rows of logits of the largest step.

    Attributes:
        most_ids: ids of a step at most.
        most_rows: image rows of a step at most.
        length_on_host: True if the engine reads ``past_length`` from the host's memory.
    """

    def __init__(
        self, engine: Engine, memory: DeviceMemory, profile: int, logits_rows: int
    ) -> None:
        self._memory = memory
        self._tensors = tensors = engine.tensors
        (self.most_ids,) = engine.limits("input_ids", profile).high
        self.most_rows, self._width = engine.limits("image_embeds", profile).high
        vocab_size = tensors["logits"].shape[-1]
        row_type = tensors["image_embeds"].dtype
        self._ids = memory.allocate_staging([self.most_ids], "int32")
        self._rows = memory.allocate_staging([self.most_rows, self._width], row_type)
        self._logits = memory.allocate_staging([vocab_size], "float32")
        self._token = memory.allocate_staging([1], "int32")
        self._length = memory.allocate_staging([1], "int64")
        self.length_on_host = _LENGTH in tensors and tensors[_LENGTH].on_host
        sizes = {
            "input_ids": self._ids.nbytes,
            "image_embeds": self._rows.nbytes,
            "logits": logits_rows * self._logits.nbytes,
            NEXT_TOKEN: np.dtype(np.int64).itemsize,
            _LENGTH: self._length.nbytes,
        }
        self._buffers: dict[str, Buffer] = {
            name: memory.allocate(size) for name, size in sizes.items() if name in tensors
        }
        memory.zero(self._address("image_embeds"), sizes["image_embeds"])
        memory.synchronize()

    def _address(self, name: str) -> int:
        if name == _LENGTH and self.length_on_host:
            return int(self._length.ctypes.data)
        return self._buffers[name].address

    def bind(self, runner: EngineRunner) -> None:
        """Tell a runner the addresses, which stay."""
        for name in self._buffers:
            runner.set_tensor_address(name, self._address(name))

    def set_shapes(self, runner: EngineRunner, ids: int, rows: int) -> None:
        """Tell a runner the sizes of a step; at least one image row is bound."""
        runner.set_input_shape("input_ids", (ids,))
        runner.set_input_shape("image_embeds", (max(rows, 1), self._width))

    def send_ids(self, ids: IdArray) -> None:
        """Queue the upload of ids, int32 [S]."""
        staged = self._ids[: len(ids)]
        staged[...] = ids
        self._memory.upload(self._address("input_ids"), staged)

    def send_rows(self, rows: FloatArray) -> None:
        """Queue the upload of image rows [I, D], cast to the graph's dtype.

        Raises:
            EngineError: they are of another width.
        """
        if rows.shape[1:] != (self._width,):
            raise EngineError(
                f"Image rows {list(rows.shape)} were given to a decoder of width "
                f"{self._width}; make them with the projector of the same bundle."
            )
        staged = self._rows[: len(rows)]
        np.copyto(staged, rows, casting="same_kind")
        self._memory.upload(self._address("image_embeds"), staged)

    def stage_length(self, length: int) -> None:
        """What ``send_length`` will send: the filled rows of the cache."""
        self._length[0] = length

    def send_length(self) -> None:
        """Queue the upload of the staged length, where the engine reads it on the device."""
        if _LENGTH in self._buffers and not self.length_on_host:
            self._memory.upload(self._address(_LENGTH), self._length)

    def keep_token(self) -> None:
        """Queue a copy of the chosen id to where the next step reads its first id."""
        if NEXT_TOKEN in self._buffers:
            target, source = self._address("input_ids"), self._address(NEXT_TOKEN)
            self._memory.copy(target, source, _ID_BYTES)

    def fetch_logits(self, row: int) -> Float32Array:
        """A copy [V] of a row of the logits, when all that was queued is done."""
        place = self._address("logits") + row * self._logits.nbytes
        self._memory.download(self._logits, place)
        self._memory.synchronize()
        logits: Float32Array = self._logits.copy()
        return logits

    def fetch_token(self) -> int:
        """The id that the graph chose, when all that was queued is done: 4 bytes."""
        self._memory.download(self._token, self._address(NEXT_TOKEN))
        self._memory.synchronize()
        return int(self._token[0])
