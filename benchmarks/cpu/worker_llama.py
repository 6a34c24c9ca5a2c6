"""llama.cpp through llama-cpp-python's low-level calls: ``llama_decode`` and ``mtmd``."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from worker_protocol import IMAGE, POSITIONS, Worker, picture, serve

BATCH = 512


@llama_cpp.llama_log_callback
def _say_nothing(level: int, text: bytes, data: Any) -> None:  # noqa: ANN401
    """Its log of every tensor."""


class LlamaWorker(Worker):
    """A decoder and an mmproj file; encoder and projector are one call."""

    sees = True
    projects = False
    speaks = True

    def load(self) -> None:
        llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(0))
        mtmd_cpp.mtmd_helper_log_set(_say_nothing, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = self._open_model()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = POSITIONS
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self.threads
        self._context = _made(
            llama_cpp.llama_init_from_model(self._model, params), "the context"
        )
        self._width = llama_cpp.llama_model_n_embd(self._model)
        self._open_projector()
        self._logits = np.zeros(1, np.float32)

    def _open_model(self) -> Any:  # noqa: ANN401
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        path = self.options["decoder"]
        return _made(llama_cpp.llama_model_load_from_file(path.encode(), params), path)

    def _open_projector(self) -> None:
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = params.warmup = params.print_timings = False
        params.n_threads = self.threads
        path = self.options["mmproj"]
        self._mtmd = _made(
            mtmd_cpp.mtmd_init_from_file(path.encode(), self._model, params), path
        )
        pixels = np.ascontiguousarray(picture())
        address = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd_cpp.mtmd_bitmap_init(IMAGE, IMAGE, address)
        marker = mtmd_cpp.mtmd_default_marker()
        text = mtmd_cpp.mtmd_input_text(marker, len(marker), True, True)
        self._chunks = mtmd_cpp.mtmd_input_chunks_init()
        bitmaps = (ctypes.c_void_p * 1)(bitmap)
        failed = mtmd_cpp.mtmd_tokenize(
            self._mtmd, self._chunks, ctypes.byref(text), bitmaps, 1
        )
        if failed:
            raise RuntimeError(f"mtmd_tokenize gave {failed}.")
        self._chunk = next(
            chunk
            for index in range(mtmd_cpp.mtmd_input_chunks_size(self._chunks))
            if mtmd_cpp.mtmd_input_chunk_get_type(
                chunk := mtmd_cpp.mtmd_input_chunks_get(self._chunks, index)
            )
            == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE
        )

    def facts(self) -> dict[str, Any]:
        path = Path(self.options["decoder"])
        sizes = json.loads((path.parent / "sizes.json").read_text())
        layers = llama_cpp.llama_model_n_layer(self._model)
        heads = llama_cpp.llama_model_n_head(self._model)
        kv_heads = llama_cpp.llama_model_n_head_kv(self._model)
        return {
            "weights_read": sizes[path.stem.removeprefix("decoder-")],
            "kv_row_bytes": 2 * layers * self._width // heads * kv_heads * 2,  # float16
            "versions": {
                "llama-cpp-python": llama_cpp.__version__,
                "system": llama_cpp.llama_print_system_info().decode().strip(),
            },
        }

    def encode(self) -> None:
        failed = mtmd_cpp.mtmd_encode_chunk(self._mtmd, self._chunk)
        if failed:
            raise RuntimeError(f"mtmd_encode_chunk gave {failed}.")

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, True)
        token = self._decode(ids)
        self._logits = self._last_logits().copy()
        return token

    def step(self, token: int) -> int:
        return self._decode([token])

    def _decode(self, ids: Any) -> int:  # noqa: ANN401
        tokens = (llama_cpp.llama_token * len(ids))(*(int(value) for value in ids))
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        failed = llama_cpp.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}.")
        return int(self._last_logits().argmax())

    def _last_logits(self) -> np.ndarray[Any, Any]:
        found = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(found, (self.options["vocab_size"],))

    def outputs(self) -> dict[str, np.ndarray[Any, Any]]:
        rows = mtmd_cpp.mtmd_input_chunk_get_n_tokens(self._chunk)
        found = mtmd_cpp.mtmd_get_output_embd(self._mtmd)
        image_rows = np.ctypeslib.as_array(found, (rows, self._width)).copy()
        return {"image_rows": image_rows, "logits": self._logits}


def _made(pointer: Any, what: str) -> Any:  # noqa: ANN401
    if not pointer:
        raise RuntimeError(f"llama.cpp could not open {what}.")
    return pointer


if __name__ == "__main__":
    serve(LlamaWorker)
