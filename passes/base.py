"""The contract of a pass, and the manager that runs an ordered list of them.

A pass is graph in, graph out: it says where it found its pattern, where it rewrote it, and why
it left the rest alone. A pipeline is a list of steps; a step may state how many rewrites it
must make, and the compile fails when it makes fewer or more. ``docs/writing-a-pass.md`` leads
through one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import MvlmError, PassError

from .deferred import Array, stored_bytes
from .graph_io import save_structure
from .matching import describe
from .type_inference import infer_types, require_sound
from .type_inference import numpy_dtype as numpy_dtype

Tensors = Mapping[str, Array]
"""Inputs or outputs of a graph by name."""


@dataclass(frozen=True)
class Refusal:
    """A place that looked right and was left alone.

    Attributes:
        node: the node it ends in.
        reason: a sentence with the culprit's name.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        matched: places that looked right.
        rewritten: those of them that were rewritten.
        refusals: the others, each with its reason.
    """

    matched: int
    rewritten: int
    refusals: tuple[Refusal, ...] = ()

    def __post_init__(self) -> None:
        if self.matched != self.rewritten + len(self.refusals):
            raise PassError(
                f"A pass matched {self.matched} places, rewrote {self.rewritten} and refused "
                f"{len(self.refusals)}: every place must be one or the other."
            )


class Tally:
    """Counts while a pass runs."""

    def __init__(self) -> None:
        self._rewritten = 0
        self._refusals: list[Refusal] = []

    def rewrote(self, count: int = 1) -> None:
        """So many places were rewritten."""
        self._rewritten += count

    def refuse(self, node: gs.Node, reason: str) -> None:
        """A place was left alone, because ``reason``."""
        self._refusals.append(Refusal(describe(node), reason))

    def result(self) -> PassResult:
        """All of it."""
        refused = tuple(self._refusals)
        return PassResult(self._rewritten + len(refused), self._rewritten, refused)


class Pass(ABC):
    """One rewrite. Subclasses hold settings only, no state between calls.

    Attributes:
        name: in kebab case, unique; what dumps and reports call it.
        summary: one line on what it does.
        opsets: standard opsets it is written for.
        rounding: None for a rewrite whose result differs by float rounding of the graph's own
            dtype; else what it brings in, ``float16`` or ``integers``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    opsets: ClassVar[range] = range(13, 25)
    rounding: str | None = None

    def requires(self, graph: gs.Graph) -> None:
        """Check what the pass needs; raise :class:`PassError` where the graph lacks it."""
        if graph.opset not in self.opsets:
            raise PassError(
                f"{self.name} is written for opset {self.opsets.start} to "
                f"{self.opsets.stop - 1}, and the graph has {graph.opset}. Export it with an "
                "opset of that range."
            )

    @abstractmethod
    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite ``graph`` in place.

        Nodes may be appended in any order and left without consumers: :meth:`apply` sorts and
        sweeps. Types of new tensors may be left open where inference gives them.
        """

    def ensures(self, graph: gs.Graph) -> None:
        """Check what must hold afterwards; raise :class:`PassError` where it does not."""
        return

    def feeds_before(self, feeds: Tensors) -> Tensors:
        """Inputs for the graph as it was, from inputs for the graph as it becomes.

        Overridden by a pass that changes the graph's inputs; used by ``--verify-passes``.
        """
        return feeds

    def outputs_after(self, outputs: Tensors, feeds: Tensors) -> Tensors:
        """What the graph must give now, from what it gave before.

        Overridden by a pass that changes the graph's outputs.

        Args:
            outputs: of the graph as it was, on ``feeds_before(feeds)``.
            feeds: inputs of the graph as it is now.
        """
        return outputs

    def apply(self, graph: gs.Graph) -> PassResult:
        """requires, run, sweep and sort, infer types, ensures.

        Left as it was, the graph is not touched otherwise.

        Raises:
            PassError: the pass cannot run on this graph, or left it invalid.
        """
        self.requires(graph)
        inputs, outputs = _border(graph.inputs), _border(graph.outputs)
        result = self.run(graph)
        if result.rewritten:
            require_sound(graph)
            graph.cleanup().toposort()
            infer_types(graph)
        if type(self).feeds_before is Pass.feeds_before:
            _require_same("inputs", inputs, _border(graph.inputs))
        if type(self).outputs_after is Pass.outputs_after:
            _require_same("outputs", outputs, _border(graph.outputs))
        self.ensures(graph)
        return result


def _border(tensors: Sequence[gs.Tensor]) -> list[str]:
    """Names, dtypes and axes, as the caller sees them."""
    return [f"{t.name} {numpy_dtype(t)} {list(t.shape or [])}" for t in tensors]


def _require_same(kind: str, before: list[str], after: list[str]) -> None:
    if before != after:
        lost = [text for text in before if text not in after] or before
        new = [text for text in after if text not in before] or after
        raise PassError(
            f"it changed the graph's {kind} from {', '.join(lost)} to {', '.join(new)}, and "
            "says nothing of it (feeds_before, outputs_after)"
        )


@dataclass(frozen=True)
class Expect:
    """How many rewrites a step must make.

    Attributes:
        count: exactly so many.
        why: what is counted, ``one a layer``.
    """

    count: int
    why: str


@dataclass(frozen=True)
class Step:
    """A pass in a pipeline, and what it must do there."""

    rewrite: Pass
    expect: Expect | None = None


@dataclass(frozen=True)
class GraphSize:
    """How large a graph is."""

    nodes: int
    initializers: int
    bytes: int

    @classmethod
    def of(cls, graph: gs.Graph) -> GraphSize:
        """Count a graph's nodes and constants."""
        constants = [t for t in graph.tensors().values() if isinstance(t, gs.Constant)]
        size = sum(stored_bytes(t.shape, numpy_dtype(t)) for t in constants)
        return cls(len(graph.nodes), len(constants), size)


@dataclass(frozen=True)
class PassRecord:
    """What one step did to one graph."""

    name: str
    summary: str
    result: PassResult
    before: GraphSize
    after: GraphSize
    seconds: float
    verified: float | None = None
    """Largest relative change that running both graphs showed; None if they were not run."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Verifier(Protocol):
    """Runs a graph before and after a pass; see :mod:`.verify`."""

    def begin(self, graph: gs.Graph) -> None:
        """Remember the graph as it is before the first pass."""

    def check(self, rewrite: Pass, graph: gs.Graph) -> float:
        """Compare with what was remembered, and remember this; the largest relative change.

        Raises:
            PassError: the change is beyond what the dtype allows.
        """


@dataclass(frozen=True)
class PassManager:
    """Runs steps in order.

    Attributes:
        steps: the pipeline.
        dump_dir: gets ``NN-pass.onnx`` after each pass that changed something (structure and
            small constants; weights are left out). Dumps of an earlier run are removed.
        verifier: runs each graph before and after each pass.
        listener: called with (passes done, passes in all, name).
    """

    steps: Sequence[Step]
    dump_dir: Path | None = None
    verifier: Verifier | None = None
    listener: Callable[[int, int, str], None] | None = None

    def run(self, graph: gs.Graph) -> list[PassRecord]:
        """Apply every step to ``graph``, in place.

        Raises:
            PassError: a pass failed, changed the numbers, or did not do what its step expects;
                the message names it and those that ran before it.
        """
        records: list[PassRecord] = []
        if self.verifier is not None:
            self.verifier.begin(graph)
        if self.dump_dir is not None:
            for old in self.dump_dir.glob("[0-9][0-9]-*.onnx"):
                old.unlink()
        self._dump(graph, 0, "captured")
        for index, step in enumerate(self.steps, 1):
            records.append(self._run_step(graph, index, step, records))
            if self.listener is not None:
                self.listener(index, len(self.steps), step.rewrite.name)
        return records

    def _run_step(
        self, graph: gs.Graph, index: int, step: Step, earlier: Sequence[PassRecord]
    ) -> PassRecord:
        rewrite, before, started = step.rewrite, GraphSize.of(graph), time.perf_counter()
        try:
            result = rewrite.apply(graph)
            seconds = time.perf_counter() - started
            if result.rewritten:
                self._dump(graph, index, rewrite.name)
            _require_expected(step, result)
            verified = None
            if self.verifier is not None and result.rewritten:
                verified = self.verifier.check(rewrite, graph)
        except MvlmError as error:
            raise PassError(_failure(graph, index, rewrite, earlier, str(error))) from error
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            raise PassError(_failure(graph, index, rewrite, earlier, detail)) from error
        after = GraphSize.of(graph)
        return PassRecord(
            rewrite.name, rewrite.summary, result, before, after, round(seconds, 4), verified
        )

    def _dump(self, graph: gs.Graph, index: int, name: str) -> None:
        if self.dump_dir is not None:
            save_structure(graph, self.dump_dir / f"{index:02d}-{name}.onnx")


def _require_expected(step: Step, result: PassResult) -> None:
    expect = step.expect
    if expect is None or result.rewritten == expect.count:
        return
    refused = [f"{r.node}: {r.reason}" for r in result.refusals[:5]]
    reasons = f" Refused: {'; '.join(refused)}." if refused else " Nothing was refused."
    raise PassError(
        f"it must make {expect.count} rewrites ({expect.why}), but made {result.rewritten} of "
        f"{result.matched} matched.{reasons} Run with --dump-dir to see the graph, or leave "
        f"the pass out with --disable-pass {step.rewrite.name}"
    )


def _failure(
    graph: gs.Graph, index: int, rewrite: Pass, earlier: Sequence[PassRecord], detail: str
) -> str:
    before = ", ".join(record.name for record in earlier) or "none"
    return (
        f"Pass {index}, {rewrite.name}, failed on {graph.name or 'the graph'}: {detail}. "
        f"Passes before it: {before}."
    )
