"""Run a graph step by step over several samples, with one step's weights in memory at a time.

``advance`` computes the tensors that it is asked for and no more than they need; what later
nodes read is kept, and given up when the last of them has run. So a decoder of any depth is
walked from linear layer to linear layer, each time with the weights of one, and a weight that
is replaced before its node runs is seen by everything behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import InputError, PassError
from mvlm_export.engines.ort_api import LOG_FATAL_ONLY, import_onnxruntime, ort_errors
from mvlm_export.passes.base import numpy_dtype
from mvlm_export.passes.deferred import Array
from mvlm_export.passes.editing import producer
from mvlm_export.passes.graph_io import to_model

Values = Mapping[str, Array]


class GraphWalker:
    """One graph on its way from inputs to outputs.

    Args:
        graph: sorted, with known dtypes. Constants may be replaced until their node has run.
        feeds: the graph's inputs, for each sample; more than those is ignored.
        threads: of ONNX Runtime; None means its default.

    Raises:
        InputError: there is no sample, or one lacks an input.
        MissingPackageError: ONNX Runtime is not installed.
    """

    def __init__(
        self, graph: gs.Graph, feeds: Sequence[Values], threads: int | None = None
    ) -> None:
        if not feeds:
            raise InputError("There are no samples to run the graph on. Give at least one.")
        names = [tensor.name for tensor in graph.inputs]
        for number, sample in enumerate(feeds, 1):
            missing = [name for name in names if name not in sample]
            if missing:
                raise InputError(
                    f"Sample {number} of {len(feeds)} does not give {', '.join(missing)}, "
                    f"which the graph {graph.name!r} reads. Give every input."
                )
        self._ort = import_onnxruntime()
        self._graph = graph
        self._threads = threads
        self._done: set[int] = set()
        self._values: list[dict[str, Array]] = [
            {name: sample[name] for name in names} for sample in feeds
        ]
        self._computed = set(names)

    @property
    def held(self) -> frozenset[str]:
        """Names of the tensors whose values are kept now, since later nodes read them."""
        return frozenset(self._computed)

    def advance(self, tensors: Iterable[gs.Tensor]) -> list[dict[str, Array]]:
        """Compute tensors; each sample's values by name. Constants are left out.

        Raises:
            PassError: a tensor was given up (ask for tensors in the graph's order), or is none
                of this graph.
            EngineError: ONNX Runtime cannot run a node.
        """
        wanted = [t for t in tensors if isinstance(t, gs.Variable)]
        nodes = self._missing(wanted)
        if nodes:
            self._run(nodes, [t.name for t in wanted if t.name not in self._computed])
        found = [{t.name: sample[t.name] for t in wanted} for sample in self._values]
        self._give_up()
        return found

    def _missing(self, wanted: Sequence[gs.Tensor]) -> list[gs.Node]:
        """Nodes that must run to make tensors, in the graph's order."""
        needed: set[int] = set()
        pending = [tensor for tensor in wanted if tensor.name not in self._computed]
        while pending:
            tensor = pending.pop()
            node = producer(tensor)
            if node is not None and id(node) in needed:
                continue
            if node is None or id(node) in self._done:
                raise PassError(
                    f"{tensor.name!r} has been given up, or is no tensor of this graph. A "
                    "walk goes forward only: ask for tensors in the graph's order."
                )
            needed.add(id(node))
            pending += [
                t
                for t in node.inputs
                if isinstance(t, gs.Variable) and not t.is_empty() and not self._has(t)
            ]
        return [node for node in self._graph.nodes if id(node) in needed]

    def _has(self, tensor: gs.Tensor) -> bool:
        return tensor.name in self._computed

    def _run(self, nodes: list[gs.Node], wanted: list[str]) -> None:
        running = {id(node) for node in nodes}
        made = [t for node in nodes for t in node.outputs if t.name]
        names = {t.name for t in made}
        inputs = {
            t.name: t
            for node in nodes
            for t in node.inputs
            if isinstance(t, gs.Variable) and not t.is_empty() and t.name not in names
        }
        outputs = [t for t in made if t.name in wanted or self._read_later(t, running)]
        part = gs.Graph(
            nodes,
            list(inputs.values()),
            outputs,
            name=self._graph.name,
            opset=self._graph.opset,
            ir_version=self._graph.ir_version,
            import_domains=self._graph.import_domains,
        )
        session = self._session(part)
        results = [t.name for t in outputs]
        with ort_errors(self._ort, self._graph.name, "run"):
            for sample in self._values:
                feeds = {name: sample[name] for name in inputs}
                sample.update(zip(results, session.run(results, feeds), strict=True))
        self._done |= running
        self._computed |= set(results)

    def _session(self, part: gs.Graph) -> Any:  # noqa: ANN401
        options = self._ort.SessionOptions()
        options.log_severity_level = LOG_FATAL_ONLY
        # Fusions pay for large graphs that run often; here each part runs once a sample.
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # Threads that wait in a loop take the cores from NumPy between two runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        model = to_model(part).SerializeToString()
        with ort_errors(self._ort, self._graph.name, "load"):
            return self._ort.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )

    def _read_later(self, tensor: gs.Tensor, running: set[int]) -> bool:
        return any(id(n) not in self._done and id(n) not in running for n in tensor.outputs)

    def _give_up(self) -> None:
        """Forget tensors that no node reads any more."""
        known = self._graph.tensors()
        dead = {
            name
            for name in self._computed
            if name in known and not self._read_later(known[name], set())
        }
        self._computed -= dead
        for sample in self._values:
            for name in dead:
                sample.pop(name, None)


def rows_of(values: Array) -> Array:
    """A tensor [..., K] as rows [M, K], of the same dtype."""
    return np.ascontiguousarray(values.reshape(-1, values.shape[-1]))


def check_dtype(tensor: gs.Tensor) -> None:
    """Raise :class:`PassError` for a tensor that is not float32."""
    if np.dtype(numpy_dtype(tensor)) != np.float32:
        raise PassError(
            f"{tensor.name!r} is {tensor.dtype}; quantize the float32 graph, before it is "
            "converted."
        )
