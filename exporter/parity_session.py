"""One graph of a bundle in a plain ONNX Runtime session that gives every output back.

The runtime's own sessions give the last row of logits and keep the cache to themselves; parity
looks at all rows of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.ort_api import import_onnxruntime, ort_errors, session_options

Array = npt.NDArray[Any]
Runner = TypeVar("Runner", bound="GraphRunner")


class GraphRunner:
    """Use as a context manager: the graph's memory is given back at the end of the block.

    Raises:
        MissingPackageError: ONNX Runtime is not installed.
        EngineError: the graph cannot be loaded.
    """

    def __init__(self, bundle: Bundle, name: str, threads: int | None) -> None:
        self.name = name
        self._ort = import_onnxruntime()
        options = session_options(self._ort, threads)
        options.enable_mem_pattern = False  # every step has another past length
        path, providers = str(bundle.graph_path(name)), ["CPUExecutionProvider"]
        with ort_errors(self._ort, name, "load"):
            self._session = self._ort.InferenceSession(path, options, providers=providers)
        self._inputs = {
            tensor.name: np.dtype(tensor.dtype)
            for tensor in bundle.manifest.graphs[name].inputs
        }

    @property
    def input_dtype(self) -> str:
        """Numpy's name of the first input's dtype."""
        return next(iter(self._inputs.values())).name

    def __enter__(self: Runner) -> Runner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = None

    def run(self, *values: Array) -> list[Array]:
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
            outputs: list[Array] = self._session.run(None, feeds)
        return outputs


class DecoderRunner(GraphRunner):
    """The decoder, whatever form its cache has: rows in, logits and new rows out."""

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        super().__init__(bundle, "decoder", threads)
        model = bundle.manifest.model
        self._capacity = model.max_positions
        self._tensors = 2 * model.num_layers
        self._is_fixed = bundle.manifest.kv_form == "fixed"

    def step(
        self, ids: Array, embeds: Array, past: Sequence[Array]
    ) -> tuple[Array, list[Array]]:
        """One call.

        Args:
            past: cache rows [T, H_kv, head_dim] of each tensor.

        Returns:
            Logits ([S, V], or [1, V] of the last row alone) and new rows [S, H_kv, head_dim].

        Raises:
            EngineError: the graph takes or gives other tensors, or failed.
        """
        length, count = len(past[0]), len(ids)
        if self._is_fixed:
            caches = [self._fill(rows) for rows in past]
            outputs = self.run(ids, embeds, np.array([length], np.int64), *caches)
        else:
            outputs = self.run(ids, embeds, *past)
        logits, rows = outputs[0], outputs[1 : self._tensors + 1]
        if len(rows) != len(past):
            raise EngineError(
                f"The graph {self.name!r} gives {len(rows)} cache tensors but takes "
                f"{len(past)}; compile the bundle again."
            )
        if self._is_fixed:
            new = slice(length, length + count)
            rows = [cache[0, :, new].transpose(1, 0, 2) for cache in rows]
        return logits, rows

    def _fill(self, rows: Array) -> Array:
        """Rows [T, H, D] in a cache [1, H, capacity, D]; what is not filled is zero."""
        length, heads, width = rows.shape
        cache = np.zeros((1, heads, self._capacity, width), rows.dtype)
        cache[0, :, :length] = rows.transpose(1, 0, 2)
        return cache
