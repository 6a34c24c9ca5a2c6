"""Run a graph before and after a pass in ONNX Runtime, and bound the change.

The proof behind ``--verify-passes``: seeded inputs of several sizes, ONNX Runtime without
rewrites of its own, and ``||a - b|| / ||b||`` over each output and over each of its rows and
channels against a bound by dtype. A graph is in memory with its weights while it runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError
from mvlm_export.engines.ort_api import (
    LOG_FATAL_ONLY,
    import_onnxruntime,
    ort_errors,
)

from .base import GraphSize, Pass, Tensors, numpy_dtype
from .deferred import Array
from .graph_io import save_graph, to_model

BOUNDS = {"float32": 1e-5, "float16": 5e-3}
"""Largest relative change of an output that an exact pass may make, by the graph's dtype."""

CONVERSIONS = {"float16": 2e-2, "integers": 0.5}
"""The same for a pass that brings in another rounding. Integers are judged by the answers;
this bound finds what is plainly wrong, such as transposed scales."""

LOCAL = 10
"""A row or a channel may change by so many times the bound, relative to the average one."""

IN_MEMORY = 1 << 30
"""Weights of more bytes go to ONNX Runtime through a file."""

SIZES: tuple[dict[str, int], ...] = (
    {"B": 2, "S": 5, "T": 7, "I": 6},
    {"B": 1, "S": 1, "T": 4, "I": 6},
    {"B": 3, "S": 6, "T": 0, "I": 2},
)
"""Sizes of dynamic axes: a prompt behind others, a decode step, a first prompt."""

_RANGES = {"uint8": (0, 256), "int8": (-127, 128)}
"""Of integer inputs that are no ids, by dtype; others hold 0 and 1."""

PAST_LENGTH = "past_length"
"""The input that says how much of a fixed cache is filled; it is ``T``."""


@dataclass(frozen=True)
class IdRange:
    """What an integer input may hold; both parts occur in each run with room for two.

    Attributes:
        text: ids below this are tokens.
        rows: ``True`` if ids from ``text`` on name rows of ``image_embeds``.
    """

    text: int
    rows: bool = False


class OrtVerifier:
    """Compares each graph with the one before it; see :class:`~.base.Verifier`.

    Args:
        ids: of integer inputs by name; others hold small numbers.
        seed: of the inputs.
        threads: of ONNX Runtime; None means its default.

    Raises:
        MissingPackageError: ONNX Runtime is not installed.
    """

    def __init__(
        self, ids: Mapping[str, IdRange], seed: int = 0, threads: int | None = None
    ) -> None:
        self._ort = import_onnxruntime()
        self._ids = ids
        self._seed = seed
        self._threads = threads
        self._before: gs.Graph | None = None

    def begin(self, graph: gs.Graph) -> None:
        """Remember the graph; weights are not copied."""
        self._before = graph.copy()

    def check(self, rewrite: Pass, graph: gs.Graph) -> float:
        """Compare ``graph`` with the one remembered, and remember it.

        Raises:
            PassError: an output changed more than rounding allows, or is missing.
            EngineError: ONNX Runtime cannot run one of the two.
        """
        if self._before is None:
            raise PassError("begin() must be called with the first graph before check().")
        all_feeds = self.make_feeds(graph)
        before = self._run(self._before, [rewrite.feeds_before(feeds) for feeds in all_feeds])
        found = self._run(graph, all_feeds)
        self._before = graph.copy()
        rounding = rewrite.rounding
        bound = BOUNDS[dtype_of(graph)] if rounding is None else CONVERSIONS[rounding]
        if any(node.op == "QuantizeLinear" for node in graph.nodes):
            bound = CONVERSIONS["integers"]  # the least rounding may turn over a code
        changes = [
            _compare(outputs, rewrite.outputs_after(old, feeds), bound)
            for feeds, old, outputs in zip(all_feeds, before, found, strict=True)
        ]
        return max(changes)

    def make_feeds(self, graph: gs.Graph) -> list[dict[str, Array]]:
        """Seeded inputs for each of ``SIZES`` that makes a difference to this graph."""
        feeds = []
        seen: list[list[tuple[int, ...]]] = []
        for number, sizes in enumerate(SIZES):
            made = {t.name: self._values(t, sizes, number) for t in graph.inputs}
            filled = [(sizes["T"],)] if PAST_LENGTH in made else []
            shapes = [value.shape for value in made.values()] + filled
            if shapes not in seen:
                seen.append(shapes)
                feeds.append(made)
        return feeds

    def _values(self, tensor: gs.Variable, sizes: Mapping[str, int], number: int) -> Array:
        generator = np.random.default_rng([self._seed, number, *tensor.name.encode()])
        shape = [a if isinstance(a, int) else sizes.get(str(a), 3) for a in tensor.shape]
        dtype = np.dtype(numpy_dtype(tensor))
        if dtype.kind == "f":
            return generator.standard_normal(shape).astype(dtype)
        if tensor.name == PAST_LENGTH:
            return np.full(shape, sizes["T"], dtype)
        if tensor.name not in self._ids:
            low, high = _RANGES.get(dtype.name, (0, 2))
            return generator.integers(low, high, shape).astype(dtype)
        ids = self._ids[tensor.name]
        values = generator.integers(0, ids.text, shape)
        if ids.rows:
            rows = ids.text + generator.integers(0, sizes["I"], shape)
            odd = (np.arange(values.size).reshape(shape) + number) % 2 == 1
            values = np.where(odd, rows, values)
        return values.astype(dtype)

    def _run(self, graph: gs.Graph, all_feeds: Sequence[Tensors]) -> list[dict[str, Array]]:
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
                return [
                    dict(zip(names, session.run(names, dict(feeds)), strict=True))
                    for feeds in all_feeds
                ]


def _session_source(graph: gs.Graph, folder: Path) -> Any:  # noqa: ANN401
    if GraphSize.of(graph).bytes < IN_MEMORY:
        return to_model(graph).SerializeToString()
    path = folder / "model.onnx"
    save_graph(graph, path)
    return str(path)


def dtype_of(graph: gs.Graph) -> str:
    """``float16`` if any tensor of the graph is, else ``float32``."""
    halves = (t for t in graph.tensors().values() if t.dtype is not None)
    is_half = any(np.dtype(numpy_dtype(t)) == np.float16 for t in halves)
    return "float16" if is_half else "float32"


def _compare(found: Tensors, expected: Tensors, bound: float) -> float:
    """Largest relative change of any output.

    Raises:
        PassError: outputs are missing or new, or one changed too much.
    """
    if set(found) != set(expected):
        names = ", ".join(sorted(set(found) ^ set(expected)))
        raise PassError(f"outputs are gone or new, and it says nothing of them: {names}")
    return max(_change(name, found[name], expected[name], bound) for name in expected)


def _change(name: str, values: Array, expected: Array, bound: float) -> float:
    if values.shape != expected.shape or values.dtype != expected.dtype:
        raise PassError(
            f"the output {name!r} is {values.dtype} {list(values.shape)} where "
            f"{expected.dtype} {list(expected.shape)} was expected"
        )
    if values.dtype.kind != "f" and values.dtype != np.int8:  # int8 is codes of numbers
        if not np.array_equal(values, expected):
            raise PassError(f"it changed the output {name!r}, which holds whole numbers")
        return 0.0
    wide, wanted = values.astype(np.float64), expected.astype(np.float64)
    same = (wide == wanted) | (np.isnan(wide) & np.isnan(wanted))
    difference = np.subtract(wide, wanted, out=np.zeros_like(wide), where=~same)
    kept = np.where(np.isfinite(wanted), wanted, 0.0)
    change = _relative(difference, kept)
    if not change <= bound:
        raise PassError(
            f"it changed the output {name!r} by {change:.3g} of its size, where rounding "
            f"allows {bound:g}"
        )
    for axis in range(wide.ndim):
        local = _largest_slice(difference, kept, axis)
        if local > LOCAL * bound:
            raise PassError(
                f"it changed a part of the output {name!r} along axis {axis} by {local:.3g} "
                f"of an average part, where rounding allows {LOCAL * bound:g}"
            )
    return change


def _relative(difference: Array, wanted: Array) -> float:
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(difference)) / (norm or 1.0)


def _largest_slice(difference: Array, wanted: Array, axis: int) -> float:
    """Largest change of one index of an axis, relative to the root mean square of all."""
    others = tuple(other for other in range(wanted.ndim) if other != axis)
    parts = np.sqrt((difference**2).sum(axis=others))
    average = np.sqrt((wanted**2).sum() / max(wanted.shape[axis], 1))
    return float(parts.max(initial=0.0) / (average or 1.0))
