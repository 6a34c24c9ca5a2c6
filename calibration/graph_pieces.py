"""A graph cut behind chosen nodes, so that what lies behind a node is run without the rest.

A *state* is what a run knows of one sample between two pieces: the tensors by name that later
pieces read, and no others. It is small (in a decoder the residual stream, the mask and the
rotary rows), it can be copied, and a tensor in it can be replaced before it goes on. So one
run of the float graph serves many variants of it, each of which runs the pieces behind its
change alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError
from mvlm_export.engines.ort_api import LOG_FATAL_ONLY, import_onnxruntime, ort_errors
from mvlm_export.passes.base import numpy_dtype
from mvlm_export.passes.deferred import Array, stored_bytes
from mvlm_export.passes.editing import producer
from mvlm_export.passes.graph_io import to_model

State = Mapping[str, Array]


class Piece:
    """Consecutive nodes in one ONNX Runtime session; it holds their weights.

    Args:
        nodes: sorted; none for a piece that changes nothing.
        kept: tensors that later pieces read.
        extra: tensors of this piece that may be asked for as well.
    """

    def __init__(
        self,
        graph: gs.Graph,
        nodes: Sequence[gs.Node],
        kept: frozenset[str],
        extra: Iterable[str] = (),
        threads: int | None = None,
    ) -> None:
        self._kept = kept
        self._graph = graph.name
        made = {t.name: t for node in nodes for t in node.outputs if t.name}
        read = [t for node in nodes for t in node.inputs if isinstance(t, gs.Variable)]
        inputs = {t.name: t for t in read if not t.is_empty() and t.name not in made}
        self._inputs = list(inputs)
        self._outputs = [name for name in made if name in kept]
        self._extra = [name for name in extra if name in made and name not in kept]
        shown = [made[name] for name in (*self._outputs, *self._extra)]
        self._ort = import_onnxruntime()
        self._session = None
        if shown:
            part = gs.Graph(
                list(nodes),
                list(inputs.values()),
                shown,
                name=graph.name,
                opset=graph.opset,
                ir_version=graph.ir_version,
                import_domains=graph.import_domains,
            )
            self._session = self._open(part, threads)

    def run(self, state: State, extra: bool = False) -> dict[str, Array]:
        """One sample's state behind this piece, from its state before it.

        Args:
            extra: give the extra tensors too, and forget nothing; see :meth:`forget`.

        Raises:
            EngineError: ONNX Runtime cannot run it.
        """
        names = [*self._outputs, *self._extra] if extra else self._outputs
        found: dict[str, Array] = {}
        if self._session is not None and names:
            feeds = {name: state[name] for name in self._inputs}
            with ort_errors(self._ort, self._graph, "run"):
                found = dict(zip(names, self._session.run(names, feeds), strict=True))
        known = {**state, **found}
        return known if extra else self.forget(known)

    def forget(self, state: State) -> dict[str, Array]:
        """A state without what no later piece reads."""
        return {name: value for name, value in state.items() if name in self._kept}

    def _open(self, part: gs.Graph, threads: int | None) -> Any:  # noqa: ANN401
        options = self._ort.SessionOptions()
        options.log_severity_level = LOG_FATAL_ONLY
        # Fusions that depend on where a graph is cut would let equal nodes round differently.
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # Many small sessions are open at once: their threads must not wait by spinning.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        model = to_model(part).SerializeToString()
        with ort_errors(self._ort, self._graph, "load"):
            return self._ort.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )


class GraphPieces:
    """Pieces 0 to n of a graph with n cuts; piece i ends with the node of cut i.

    Args:
        graph: sorted, with known dtypes. Nodes that ``output`` does not need are left out.
        cuts: nodes, in the graph's order.
        output: what the last piece gives.
        threads: of ONNX Runtime; None means its default.

    Raises:
        PassError: ``output`` does not need a node of ``cuts``.
        MissingPackageError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        graph: gs.Graph,
        cuts: Sequence[gs.Node],
        output: gs.Tensor,
        threads: int | None = None,
    ) -> None:
        self._graph = graph
        self._threads = threads
        self.output = output.name
        self._pieces = _cut(_needed(graph, output), cuts)
        self._kept = _kept(self._pieces, output.name)
        self._extra = [[t.name for t in node.inputs if t.name] for node in cuts]

    def __len__(self) -> int:
        return len(self._pieces)

    def open(self, index: int) -> Piece:
        """Load a piece; its extra tensors are the inputs of the node it ends with.

        Raises:
            EngineError: ONNX Runtime cannot load it.
        """
        extra = self._extra[index] if index < len(self._extra) else ()
        nodes, kept = self._pieces[index], self._kept[index]
        return Piece(self._graph, nodes, kept, extra, self._threads)

    def open_node(self, node: gs.Node) -> Piece:
        """Load one node with constants of its own, as it would run in this graph.

        Raises:
            EngineError: ONNX Runtime cannot load it.
        """
        kept = frozenset(t.name for t in node.outputs)
        return Piece(self._graph, [node], kept, threads=self._threads)

    def weight_bytes(self, index: int) -> int:
        """Bytes of a piece's constants."""
        constants = {
            t.name: t
            for node in self._pieces[index]
            for t in node.inputs
            if isinstance(t, gs.Constant)
        }
        return sum(stored_bytes(t.shape, numpy_dtype(t)) for t in constants.values())


def _needed(graph: gs.Graph, output: gs.Tensor) -> list[gs.Node]:
    """Nodes that a tensor depends on, in the graph's order."""
    found: set[int] = set()
    pending = [output]
    while pending:
        node = producer(pending.pop())
        if node is not None and id(node) not in found:
            found.add(id(node))
            pending += node.inputs
    return [node for node in graph.nodes if id(node) in found]


def _cut(nodes: Sequence[gs.Node], cuts: Sequence[gs.Node]) -> list[list[gs.Node]]:
    pieces: list[list[gs.Node]] = [[]]
    expected = list(cuts)
    for node in nodes:
        pieces[-1].append(node)
        if expected and node is expected[0]:
            expected.pop(0)
            pieces.append([])
    if expected:
        raise PassError(
            f"The graph's output does not need the node {expected[0].name!r}, or the cuts are "
            "not in the graph's order."
        )
    return pieces


def _kept(pieces: Sequence[Sequence[gs.Node]], output: str) -> list[frozenset[str]]:
    """Tensors that are read behind each piece."""
    read = {output}
    kept = [frozenset(read)]
    for nodes in reversed(pieces[1:]):
        read |= {t.name for node in nodes for t in node.inputs if isinstance(t, gs.Variable)}
        kept.append(frozenset(read))
    return kept[::-1]
