"""Run a graph before and after a pass in ONNX Runtime, and bound the change.

The proof behind ``--verify-passes``: seeded inputs, ONNX Runtime without rewrites of its own,
and ``||a - b|| / ||b||`` over each output against a bound by dtype. Both graphs are in memory
with their weights, so a model needs twice its float32 size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError
from mvlm_export.engines.ort_api import LOG_FATAL_ONLY, import_onnxruntime, ort_errors

from .base import Pass, Tensors, numpy_dtype
from .deferred import Array
from .graph_io import save_graph, to_model

BOUNDS = {"float32": 1e-5, "float16": 2e-2}
"""Largest relative change of an output that one pass may make, by the graph's dtype."""

IN_MEMORY = 1 << 30
"""Weights of more bytes go to ONNX Runtime through a file."""

AXES = {"B": 2, "S": 5, "T": 7, "I": 6}
"""Sizes of dynamic axes in the seeded inputs."""


class OrtVerifier:
    """Compares each graph with the one before it; see :class:`~.base.Verifier`.

    Args:
        ranges: for integer inputs by name, one past the largest value.
        seed: of the inputs.
        threads: of ONNX Runtime; None means its default.

    Raises:
        MissingPackageError: ONNX Runtime is not installed.
    """

    def __init__(
        self, ranges: Mapping[str, int], seed: int = 0, threads: int | None = None
    ) -> None:
        self._ort = import_onnxruntime()
        self._ranges = ranges
        self._seed = seed
        self._threads = threads
        self._before: gs.Graph | None = None

    def begin(self, graph: gs.Graph) -> None:
        """Remember the graph; weights are not copied."""
        self._before = graph.copy()

    def check(self, rewrite: Pass, graph: gs.Graph) -> float:
        """Compare ``graph`` with the one remembered, and remember it.

        Raises:
            PassError: an output changed more than ``BOUNDS`` allows, or is missing.
            EngineError: ONNX Runtime cannot run one of the two.
        """
        if self._before is None:
            raise PassError("begin() must be called with the first graph before check().")
        feeds = self.make_feeds(graph)
        before = self._run(self._before, rewrite.feeds_before(feeds))
        expected = rewrite.outputs_after(before, feeds)
        found = self._run(graph, feeds)
        self._before = graph.copy()
        bound = BOUNDS[rewrite.rounding or dtype_of(graph)]
        return max(_change(name, found, expected[name], bound) for name in expected)

    def make_feeds(self, graph: gs.Graph) -> dict[str, Array]:
        """Seeded inputs: normal floats, integers in their range."""
        generator = np.random.default_rng(self._seed)
        feeds: dict[str, Array] = {}
        for tensor in graph.inputs:
            shape = [
                axis if isinstance(axis, int) else AXES.get(str(axis), 3)
                for axis in tensor.shape
            ]
            dtype = np.dtype(numpy_dtype(tensor))
            if dtype.kind == "f":
                feeds[tensor.name] = generator.standard_normal(shape).astype(dtype)
            elif tensor.name in self._ranges:
                high = self._ranges[tensor.name]
                feeds[tensor.name] = generator.integers(0, high, shape).astype(dtype)
            else:
                most = 256 if dtype == np.uint8 else AXES["T"] + 1
                feeds[tensor.name] = generator.integers(0, most, shape).astype(dtype)
        return feeds

    def _run(self, graph: gs.Graph, feeds: Tensors) -> dict[str, Array]:
        options = self._ort.SessionOptions()
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = LOG_FATAL_ONLY
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        with tempfile.TemporaryDirectory(prefix="mvlm-verify-") as folder:
            source = _session_source(graph, Path(folder))
            with ort_errors(self._ort, graph.name, "load"):
                session = self._ort.InferenceSession(
                    source, options, providers=["CPUExecutionProvider"]
                )
            names = [output.name for output in session.get_outputs()]
            with ort_errors(self._ort, graph.name, "run"):
                return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _session_source(graph: gs.Graph, folder: Path) -> Any:  # noqa: ANN401
    size = sum(
        t._values.nbytes for t in graph.tensors().values() if isinstance(t, gs.Constant)
    )
    if size < IN_MEMORY:
        return to_model(graph).SerializeToString()
    path = folder / "model.onnx"
    save_graph(graph, path)
    return str(path)


def dtype_of(graph: gs.Graph) -> str:
    """``float16`` if any tensor of the graph is, else ``float32``."""
    halves = (t for t in graph.tensors().values() if t.dtype is not None)
    is_half = any(np.dtype(numpy_dtype(t)) == np.float16 for t in halves)
    return "float16" if is_half else "float32"


def _change(name: str, found: Tensors, expected: Array, bound: float) -> float:
    if name not in found:
        raise PassError(f"the output {name!r} is gone")
    values = found[name]
    if values.shape != expected.shape or values.dtype != expected.dtype:
        raise PassError(
            f"the output {name!r} is {values.dtype} {list(values.shape)} where "
            f"{expected.dtype} {list(expected.shape)} was expected"
        )
    wide, wanted = values.astype(np.float64), expected.astype(np.float64)
    norm = float(np.linalg.norm(wanted))
    change = float(np.linalg.norm(wide - wanted)) / (norm or 1.0)
    if not change <= bound:
        raise PassError(
            f"it changed the output {name!r} by {change:.3g} of its size, where rounding "
            f"allows {bound:g}"
        )
    return change
