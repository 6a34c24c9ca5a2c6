"""ONNX Runtime: the graphs of a bundle, with the KV cache bound by address.

The decoder's past is bound to the start of the cache's buffers and its new rows right behind,
so a step moves no cache row outside the graph. With CUDA the cache lies in GPU memory and only
ids, image rows and logits cross the bus.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import Bundle
from .errors import BundleError, EngineError, InputError
from .kv_cache import CacheShape, HostKvCache, KvCache, cache_names
from .manifest import ModelSpec
from .ort_api import LOG_FATAL_ONLY, import_onnxruntime, ort_errors
from .session import BackendOptions, Float32Array, FloatArray, IdArray

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}


@dataclass(frozen=True)
class _Provider:
    """An execution provider; ``device`` is ONNX Runtime's name of its memory."""

    name: str
    device: str
    extra: str


PROVIDERS = {
    "cpu": _Provider("CPUExecutionProvider", "cpu", "cpu"),
    "cuda": _Provider("CUDAExecutionProvider", "cuda", "gpu"),
}
"""Providers by the name that users give."""


class OrtBackend:
    """Opens a bundle's graphs in ONNX Runtime.

    Raises:
        InputError: there is no such provider.
        MissingPackageError: ONNX Runtime is not installed.
        EngineError: this ONNX Runtime does not have the provider, or the bundle is lowered to
            a form of cache that it does not run.
    """

    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        provider = PROVIDERS.get(options.provider)
        if provider is None:
            raise InputError(
                f"There is no ONNX Runtime provider {options.provider!r}; choose one of "
                f"{', '.join(PROVIDERS)}."
            )
        if bundle.manifest.kv_form != "append":
            raise EngineError(
                f"The bundle's decoder has the KV form {bundle.manifest.kv_form!r}, but the "
                "onnxruntime backend runs 'append'; compile it with `--target cpu`."
            )
        self._ort = import_onnxruntime(provider.extra)
        self._bundle = bundle
        self._provider = provider
        self._threads = options.threads
        available = self._ort.get_available_providers()
        if provider.name not in available:
            raise EngineError(
                f"The installed ONNX Runtime {self._ort.__version__} has no {provider.name} "
                f"(only {', '.join(available)}); uninstall onnxruntime and `pip install "
                f"mvlm-export[{provider.extra}]`, or run with provider 'cpu'."
            )

    def open_graph(self, name: str) -> OrtGraph:
        """Load the vision encoder or the projector."""
        return OrtGraph(self._ort, name, self._open(name, memory_patterns=True))

    def open_decoder(self) -> OrtDecoder:
        """Load the decoder.

        Raises:
            BundleError: its tensors are not those of the manifest's model.
        """
        # Every step has another past length, and a memory plan would be kept for each.
        session = self._open("decoder", memory_patterns=False)
        return OrtDecoder(
            self._ort, session, self._bundle.manifest.model, self._provider.device
        )

    def _open(self, name: str, memory_patterns: bool) -> Any:  # noqa: ANN401
        options = self._ort.SessionOptions()
        options.log_severity_level = LOG_FATAL_ONLY  # what goes wrong is raised, with its text
        options.enable_mem_pattern = memory_patterns
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        path: Path = self._bundle.graph_path(name)
        with ort_errors(self._ort, name, "load"):
            session = self._ort.InferenceSession(
                str(path), options, providers=[self._provider.name]
            )
        if session.get_providers()[0] != self._provider.name:
            raise EngineError(
                f"ONNX Runtime fell back to {session.get_providers()[0]} for the graph "
                f"{name!r}: {self._provider.name} cannot start here. Check the GPU's driver "
                "with `nvidia-smi` and that CUDA and cuDNN are of the versions ONNX Runtime "
                f"{self._ort.__version__} was built for, or run with provider 'cpu'."
            )
        return session


class OrtGraph:
    """A graph with one input and one output."""

    def __init__(self, ort: Any, name: str, session: Any) -> None:  # noqa: ANN401
        self.name = name
        self._ort = ort
        self._session = session
        (self._input,) = session.get_inputs()
        (self._output,) = session.get_outputs()
        self._dtype = _DTYPES[self._input.type]

    def run(self, array: FloatArray) -> FloatArray:
        """As :meth:`GraphSession.run`."""
        feed = {self._input.name: np.ascontiguousarray(array, self._dtype)}
        with ort_errors(self._ort, self.name, "run"):
            result: FloatArray = self._session.run([self._output.name], feed)[0]
        return result


class OrtDecoder:
    """The decoder behind IO binding; caches are made by it and given to each call.

    A lock makes steps of different answers safe to run from different threads.
    """

    name = "decoder"

    def __init__(
        self,
        ort: Any,  # noqa: ANN401
        session: Any,  # noqa: ANN401
        model: ModelSpec,
        device: str,
    ) -> None:
        self._ort = ort
        self._session = session
        self._device = device
        inputs = {tensor.name: tensor for tensor in session.get_inputs()}
        outputs = {tensor.name: tensor for tensor in session.get_outputs()}
        self._past = cache_names("past_key_values", model.num_layers)
        self._present = cache_names("present", model.num_layers)
        _check_names(inputs, {"input_ids", "image_embeds", *self._past}, "inputs")
        _check_names(outputs, {"logits", *self._present}, "outputs")
        self._embeds_dtype = _DTYPES[inputs["image_embeds"].type]
        self._vocab_size = model.vocab_size
        self._last_row_only = outputs["logits"].shape[0] == 1
        self._shape = CacheShape(
            layers=model.num_layers,
            heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            capacity=model.max_positions,
            dtype=_DTYPES[inputs[self._past[0]].type],
        )
        _check_widths(inputs[self._past[0]], outputs["logits"], self._shape, model)
        self._binding = session.io_binding()
        self._lock = threading.Lock()
        self._step_logits = np.empty((1, model.vocab_size), np.float32)

    def new_cache(self) -> KvCache:
        """An empty cache of ``max_positions`` rows, in the provider's memory."""
        if self._device == "cpu":
            return HostKvCache(self._shape)
        with ort_errors(self._ort, self.name, "allocate the cache of"):
            return device_cache(self._ort, self._shape, self._device)

    def append(self, cache: KvCache, ids: IdArray, image_embeds: FloatArray) -> Float32Array:
        """As :meth:`DecoderSession.append`."""
        cache.require_room(len(ids))
        ids = np.ascontiguousarray(ids, np.int32)
        image_embeds = np.ascontiguousarray(image_embeds, self._embeds_dtype)
        with self._lock, ort_errors(self._ort, self.name, "run"):
            logits = self._logits_buffer(len(ids))
            self._bind(cache, ids, image_embeds, logits)
            self._session.run_with_iobinding(self._binding)
            last: Float32Array = logits[-1].copy()
        cache.advance(len(ids))
        return last

    def _logits_buffer(self, count: int) -> Float32Array:
        """The buffer of one row that every step uses, or one for this prefill alone."""
        if count == 1 or self._last_row_only:
            return self._step_logits
        return np.empty((count, self._vocab_size), np.float32)

    def _bind(
        self,
        cache: KvCache,
        ids: IdArray,
        image_embeds: FloatArray,
        logits: Float32Array,
    ) -> None:
        binding, device, shape = self._binding, self._device, self._shape
        dtype = np.dtype(shape.dtype).type
        past, new = shape.rows(cache.length), shape.rows(len(ids))
        for name, array in (("input_ids", ids), ("image_embeds", image_embeds)):
            binding.bind_input(
                name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
            )
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        for n, name in enumerate(self._past):
            binding.bind_input(name, device, 0, dtype, past, cache.past_address(n))
        for n, name in enumerate(self._present):
            binding.bind_output(name, device, 0, dtype, new, cache.new_address(n))


def device_cache(ort: Any, shape: CacheShape, device: str) -> KvCache:  # noqa: ANN401
    """A cache in memory that ONNX Runtime allocates on ``device``."""
    dtype = np.dtype(shape.dtype).type
    rows = list(shape.rows(shape.capacity))
    buffers = [
        ort.OrtValue.ortvalue_from_shape_and_type(rows, dtype, device, 0)
        for _ in range(shape.tensors)
    ]
    return KvCache(shape, [buffer.data_ptr() for buffer in buffers], buffers)


def _check_names(found: Mapping[str, Any], wanted: set[str], kind: str) -> None:
    different = sorted(wanted ^ set(found))
    if different:
        raise BundleError(
            f"The decoder's {kind} are not those of the manifest's model (different: "
            f"{', '.join(different[:4])}); compile the bundle again."
        )


def _check_widths(
    past: Any,  # noqa: ANN401
    logits: Any,  # noqa: ANN401
    shape: CacheShape,
    model: ModelSpec,
) -> None:
    found = (*past.shape[1:], logits.shape[-1], _DTYPES.get(logits.type))
    wanted = (shape.heads, shape.head_dim, model.vocab_size, "float32")
    if found != wanted:
        raise BundleError(
            "The decoder has KV heads, head size, vocabulary and logits of "
            f"{', '.join(map(str, found))}, but the manifest's model needs "
            f"{', '.join(map(str, wanted))}; compile the bundle again."
        )
