"""ONNX Runtime: the graphs of a bundle, with the KV cache bound by address.

The decoder's past is bound to the start of the cache's buffers and its new rows right behind
(or, in the fixed form, to the same address), so a step moves no cache row outside the graph.
With CUDA the cache lies in GPU memory and only ids, image rows and logits cross the bus; of a
greedy answer, the chosen id alone where the graph gives it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import Bundle
from .errors import BundleError, EngineError, InputError
from .huge_pages import current_spans, use_huge_pages
from .kv_cache import (
    KV_FORMS,
    CacheArray,
    CacheShape,
    HostKvCache,
    KvCache,
    KvForm,
    cache_names,
)
from .manifest import LAST_ROWS, NEXT_TOKEN, ModelSpec, graph_tensors
from .ort_api import import_onnxruntime, ort_errors, session_options
from .ort_releases import require_release_for
from .session import (
    BackendOptions,
    Float32Array,
    FloatArray,
    IdArray,
    PixelArray,
    not_finite,
)

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
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
        EngineError: this ONNX Runtime does not have the provider, or is too old for the
            bundle's cache or float16 activations in 8 bits; or the bundle is lowered to a
            form of cache that it does not run.
    """

    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        provider = PROVIDERS.get(options.provider)
        if provider is None:
            raise InputError(
                f"There is no ONNX Runtime provider {options.provider!r}; choose one of "
                f"{', '.join(PROVIDERS)}."
            )
        if bundle.manifest.kv_form not in KV_FORMS:
            raise EngineError(
                f"The bundle's decoder has the KV form {bundle.manifest.kv_form!r}, but the "
                f"onnxruntime backend runs {' and '.join(map(repr, KV_FORMS))}; compile it "
                "with `--target cpu`."
            )
        self._ort = import_onnxruntime(provider.extra)
        require_release_for(self._ort, bundle.manifest, options.provider)
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
        before = current_spans()
        # Every step has another past length, and a memory plan would be kept for each.
        session = self._open("decoder", memory_patterns=False)
        if self._provider.device == "cpu":
            use_huge_pages(before)  # a step reads all of it, and does little with it
        manifest = self._bundle.manifest
        device, rows = self._provider.device, manifest.logits_rows
        return OrtDecoder(self._ort, session, manifest.model, device, manifest.kv_form, rows)

    def _open(self, name: str, memory_patterns: bool) -> Any:  # noqa: ANN401
        may_saturate = self._bundle.manifest.graphs[name].may_saturate
        options = session_options(self._ort, self._threads, may_saturate)
        options.enable_mem_pattern = memory_patterns
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

    def run(self, array: FloatArray | PixelArray) -> FloatArray:
        """As :meth:`GraphSession.run`."""
        if (array.dtype == np.uint8) != (self._dtype == "uint8"):
            raise EngineError(
                f"The graph {self.name!r} takes {self._dtype}, but {array.dtype} was given: "
                "the manifest says another type than the graph has. Compile the bundle again."
            )
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
        kv_form: KvForm = "append",
        logits_rows: int = 1,
    ) -> None:
        self._ort = ort
        self._session = session
        self._device = device
        inputs = {tensor.name: tensor for tensor in session.get_inputs()}
        outputs = {tensor.name: tensor for tensor in session.get_outputs()}
        wanted_inputs, wanted_outputs = graph_tensors("decoder", model.num_layers, kv_form)
        _check_names(inputs, set(wanted_inputs), "inputs")
        _check_names(outputs, {*wanted_outputs, *(outputs.keys() & {NEXT_TOKEN})}, "outputs")
        self._past = cache_names("past_key_values", model.num_layers)
        self._present = cache_names("present", model.num_layers)
        self._embeds_dtype = _DTYPES[inputs["image_embeds"].type]
        self._vocab_size = model.vocab_size
        self._rows = _logits_rows(outputs["logits"].shape[0], logits_rows)
        self._shape = CacheShape(
            layers=model.num_layers,
            heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            capacity=model.max_positions,
            dtype=_DTYPES[inputs[self._past[0]].type],
            form=kv_form,
        )
        _check_widths(inputs[self._past[0]], outputs["logits"], self._shape, model)
        self._chooses_greedily = NEXT_TOKEN in outputs
        self._lock = threading.Lock()
        self._binding = session.io_binding()
        self._greedy_binding = session.io_binding()  # gives no logits
        rows = self._rows or 1
        self._step_logits = np.empty((rows, model.vocab_size), np.float32)
        self._next_tokens = np.empty(rows, np.int64)
        self._past_length = np.empty(1, np.int64)
        self._bound: dict[int, weakref.ref[KvCache]] = {}

    @property
    def chooses_greedily(self) -> bool:
        """As :attr:`DecoderSession.chooses_greedily`."""
        return self._chooses_greedily

    @property
    def most_choices(self) -> int:
        """As :attr:`DecoderSession.most_choices`."""
        return self._rows or 1 if self._chooses_greedily else 0

    def new_cache(self) -> KvCache:
        """An empty cache of ``max_positions`` rows, in the provider's memory."""
        if self._device == "cpu":
            return HostKvCache(self._shape)
        with ort_errors(self._ort, self.name, "allocate the cache of"):
            return OrtKvCache(self._ort, self._shape, self._device)

    def append(self, cache: KvCache, ids: IdArray, image_embeds: FloatArray) -> Float32Array:
        """As :meth:`DecoderSession.append`."""
        with self._lock:
            logits = self._logits_buffer(len(ids))
            self._run(self._binding, cache, ids, image_embeds, "logits", logits)
            last: Float32Array = logits[-1].copy()
        return last

    def append_greedy(self, cache: KvCache, ids: IdArray, image_embeds: FloatArray) -> int:
        """As :meth:`DecoderSession.append_greedy`."""
        return int(self._choose(cache, ids, image_embeds)[-1])

    def append_choices(
        self, cache: KvCache, ids: IdArray, image_embeds: FloatArray
    ) -> list[int]:
        """As :meth:`DecoderSession.append_choices`."""
        if len(ids) > self.most_choices:
            raise EngineError(
                f"{len(ids)} choices were asked for, but the decoder gives "
                f"{self.most_choices} at most; give fewer ids."
            )
        return self._choose(cache, ids, image_embeds)

    def _choose(self, cache: KvCache, ids: IdArray, image_embeds: FloatArray) -> list[int]:
        with self._lock:
            target = self._next_tokens[: len(ids)]
            self._run(self._greedy_binding, cache, ids, image_embeds, NEXT_TOKEN, target)
            chosen: list[int] = target.tolist()
        for id_ in chosen:
            if not 0 <= id_ < self._vocab_size:
                cache.truncate(cache.length - len(ids))
                raise not_finite(f"the token {id_} of {self._vocab_size}")
        return chosen

    def _logits_buffer(self, count: int) -> Float32Array:
        """The buffer that every step uses, or one for this prefill alone."""
        if self._rows is not None or count == 1:
            return self._step_logits[:count]
        return np.empty((count, self._vocab_size), np.float32)

    def _run(
        self,
        binding: Any,  # noqa: ANN401
        cache: KvCache,
        ids: IdArray,
        image_embeds: FloatArray,
        output: str,
        target: np.ndarray[Any, Any],
    ) -> None:
        """Run ``ids`` behind the cache, with ``output`` written to ``target``."""
        cache.require_room(len(ids))
        self._past_length[0] = cache.length
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "input_ids": np.ascontiguousarray(ids, np.int32),
            "image_embeds": np.ascontiguousarray(image_embeds, self._embeds_dtype),
        }
        if self._shape.form == "fixed":
            arrays["past_length"] = self._past_length
        with ort_errors(self._ort, self.name, "run"):
            for name, array in arrays.items():
                place = array.ctypes.data
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, place)
            place = target.ctypes.data
            binding.bind_output(output, "cpu", 0, target.dtype.type, target.shape, place)
            self._bind_cache(binding, cache, len(ids))
            self._session.run_with_iobinding(binding)
        cache.advance(len(ids))

    def _bind_cache(self, binding: Any, cache: KvCache, count: int) -> None:  # noqa: ANN401
        """Bind a cache; one of the fixed form stays bound, as nothing of it changes."""
        bound = self._bound.get(id(binding))
        if cache.shape.form == "fixed" and bound is not None and bound() is cache:
            return
        self._bound.pop(id(binding), None)  # until all is bound
        device, dtype = self._device, np.dtype(self._shape.dtype).type
        past, new = cache.past_shape, cache.new_shape(count)
        for n, name in enumerate(self._past):
            binding.bind_input(name, device, 0, dtype, past, cache.past_address(n))
        for n, name in enumerate(self._present):
            binding.bind_output(name, device, 0, dtype, new, cache.new_address(n))
        self._bound[id(binding)] = weakref.ref(cache)


class OrtKvCache(KvCache):
    """A cache in memory that ONNX Runtime allocates on a device.

    Rows are read and written by way of a copy of the whole tensor on the host.
    """

    writes_cheaply = False

    def __init__(self, ort: Any, shape: CacheShape, device: str) -> None:  # noqa: ANN401
        dtype = np.dtype(shape.dtype).type
        self._buffers = [
            ort.OrtValue.ortvalue_from_shape_and_type(list(shape.buffer), dtype, device, 0)
            for _ in range(shape.tensors)
        ]
        addresses = [buffer.data_ptr() for buffer in self._buffers]
        super().__init__(shape, addresses, self._buffers)
        if shape.form == "fixed":
            zeros = np.zeros(shape.buffer, dtype)
            for buffer in self._buffers:
                buffer.update_inplace(zeros)

    def read_rows(self, tensor: int, start: int, stop: int) -> CacheArray:
        """As :meth:`KvCache.read_rows`."""
        self._check_filled(start, stop)
        whole = self._buffers[tensor].numpy()
        rows: CacheArray = self.shape.as_rows(whole)[start:stop].copy()
        return rows

    def write_rows(self, tensor: int, start: int, rows: CacheArray) -> None:
        """As :meth:`KvCache.write_rows`."""
        self._check_rows(start, rows)
        whole = np.array(self._buffers[tensor].numpy())
        self.shape.as_rows(whole)[start : start + len(rows)] = rows
        self._buffers[tensor].update_inplace(whole)


def _logits_rows(axis: int | str, most: int) -> int | None:
    """Most rows of logits that the graph gives; None if it gives one for each id."""
    return axis if isinstance(axis, int) else most if axis == LAST_ROWS else None


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
    found = (past.shape[1], past.shape[-1], logits.shape[-1], _DTYPES.get(logits.type))
    wanted = (shape.heads, shape.head_dim, model.vocab_size, "float32")
    if found != wanted:
        raise BundleError(
            "The decoder has KV heads, head size, vocabulary and logits of "
            f"{', '.join(map(str, found))}, but the manifest's model needs "
            f"{', '.join(map(str, wanted))}; compile the bundle again."
        )
    if shape.form == "fixed" and tuple(past.shape) != shape.buffer:
        raise BundleError(
            f"The decoder's cache is {list(past.shape)}, but the manifest's model needs "
            f"{list(shape.buffer)}; compile the bundle again."
        )
