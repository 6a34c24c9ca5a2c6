"""Graphs of a bundle in plain ONNX Runtime sessions that give every output back.

The runtime's own session gives the last row of logits; here all rows are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.kv_cache import CacheShape
from mvlm_export.engines.ort_api import import_onnxruntime, ort_errors, session_options
from mvlm_export.passes.lowering.quantize_kv_cache import dequantize_rows

from .parity_closing import Closing
from .reference import Step

Array = npt.NDArray[Any]


class OrtGraphs:
    """Opens a bundle's graphs on the CPU; see :class:`.parity_session.ParityGraphs`."""

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._bundle = bundle
        self._threads = threads

    def open_graph(self, name: str) -> OrtImageGraph:
        """As :meth:`.ParityGraphs.open_graph`."""
        return OrtImageGraph(self._bundle, name, self._threads)

    def open_decoder(self) -> OrtForcedDecoder:
        """As :meth:`.ParityGraphs.open_decoder`."""
        return OrtForcedDecoder(self._bundle, self._threads)


class _OrtSession(Closing[Any]):
    """Use as a context manager: the graph's memory is given back at the end of the block.

    Raises:
        MissingPackageError: ONNX Runtime is not installed.
        EngineError: the graph cannot be loaded.
    """

    def __init__(self, bundle: Bundle, name: str, threads: int | None) -> None:
        self.name = name
        self._ort = import_onnxruntime()
        may_saturate = bundle.manifest.graphs[name].may_saturate
        options = session_options(self._ort, threads, may_saturate)
        options.enable_mem_pattern = False  # every step has another past length
        path, providers = str(bundle.graph_path(name)), ["CPUExecutionProvider"]
        with ort_errors(self._ort, name, "load"):
            session = self._ort.InferenceSession(path, options, providers=providers)
        super().__init__(session)
        self._inputs = {
            tensor.name: np.dtype(tensor.dtype)
            for tensor in bundle.manifest.graphs[name].inputs
        }

    def _run(self, *values: Array) -> list[Array]:
        """Every output for the inputs in order; each is cast to the dtype the graph takes.

        Raises:
            EngineError: the graph takes other inputs, or failed.
        """
        if len(values) != len(self._inputs):
            raise EngineError(
                f"The graph {self.name!r} takes {len(self._inputs)} inputs, but PyTorch's "
                f"component takes {len(values)}; compile the bundle again, or name the "
                "checkpoint it was made from."
            )
        feeds = {
            name: value.astype(dtype, copy=False)
            for (name, dtype), value in zip(self._inputs.items(), values, strict=True)
        }
        with ort_errors(self._ort, self.name, "run"):
            outputs: list[Array] = self._opened.run(None, feeds)
        return outputs


class OrtImageGraph(_OrtSession):
    """The vision encoder or the projector."""

    def run(self, array: Array) -> Array:
        """As :meth:`.ImageGraph.run`."""
        return self._run(array)[0]


class OrtForcedDecoder(_OrtSession):
    """The decoder, whatever form its cache has; its rows are kept here."""

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        super().__init__(bundle, "decoder", threads)
        model = bundle.manifest.model
        self._shape = CacheShape(
            layers=model.num_layers,
            heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            capacity=model.max_positions,
            dtype=np.dtype(bundle.manifest.cache_dtype).name,
            form=bundle.manifest.kv_form,
        )
        self._scales = bundle.manifest.cache_scales
        self._past: list[Array] = []
        self._embeds: Array | None = None

    def begin(self, embeds: Array) -> None:
        """As :meth:`.ForcedDecoder.begin`."""
        shape = self._shape
        self._embeds = embeds
        self._past = [np.zeros(shape.rows(0), shape.dtype)] * shape.tensors

    def step(self, ids: Array) -> Step:
        """As :meth:`.ForcedDecoder.step`."""
        assert self._embeds is not None, "begin comes first"
        length, count, tensors = len(self._past[0]), len(ids), self._shape.tensors
        if self._shape.form == "fixed":
            caches = [self._fill(rows) for rows in self._past]
            outputs = self._run(ids, self._embeds, np.array([length], np.int64), *caches)
        else:
            outputs = self._run(ids, self._embeds, *self._past)
        logits, rows = outputs[0], outputs[1 : tensors + 1]
        if len(rows) != tensors:
            raise EngineError(
                f"The graph {self.name!r} gives {len(rows)} cache tensors but takes "
                f"{tensors}; compile the bundle again."
            )
        if self._shape.form == "fixed":
            rows = [self._shape.as_rows(cache)[length : length + count] for cache in rows]
        self._past = [
            np.concatenate([old, new]) for old, new in zip(self._past, rows, strict=True)
        ]
        return Step(logits, _float_rows(rows, self._scales))

    def _fill(self, rows: Array) -> Array:
        """A whole buffer that holds ``rows``; what is not filled is zero."""
        buffer = np.zeros(self._shape.buffer, rows.dtype)
        self._shape.as_rows(buffer)[: len(rows)] = rows
        return buffer


def _float_rows(rows: list[Array], scales: Sequence[float]) -> list[Array]:
    """Rows of each cache tensor as floats; ``scales`` are those of the manifest."""
    return list(map(dequantize_rows, rows, scales)) if scales else rows
