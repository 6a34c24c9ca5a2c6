"""How far a graph's output goes when one layer alone is stored otherwise.

    loss(l, c)  =  mean over rows of  d(output, output with layer l as candidate c)

where d is the KL divergence of next-token distributions for a decoder, and the squared error
relative to the signal for other graphs. Both are of second order in a small change of a
weight, so where the errors of layers are uncorrelated, those of several layers add up:

    loss(c_1, ..., c_L)  ~  sum over l of  loss(l, c_l)

which :mod:`.budget` relies on and :meth:`SensitivityAnalysis.measure_mix` checks.

The float graph is run up to each layer, and from each changed layer only what lies behind it.
Weights are loaded by segments of :data:`SEGMENT_BYTES`; variants wait at a segment's end until
those of all its layers are there, or until they fill :data:`PENDING_BYTES`, and then go
through the later segments together: a deep graph is loaded as often as it has segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import InputError
from mvlm_export.passes.deferred import Array

from .graph_pieces import GraphPieces, Piece, State
from .layer_change import LayerChange, change_layer
from .layer_rounding import Candidate, Rounding
from .layers import Layer, find_layers
from .quantized_weight import WeightStore
from .smoothing import find_sites

SEGMENT_BYTES = 512 * 2**20
"""Weights that are loaded at a time."""

PENDING_BYTES = 2**30
"""Tensors of variants that wait at a segment's end."""

Progress = Callable[[int, int, str], None]
"""Called with (pieces run, pieces in all, what is run)."""

Candidates = Mapping[str, Sequence[Candidate]]
"""What each layer may become, by its name; layers that are not named stay in float."""

Losses = Mapping[str, Mapping[Candidate, float]]
"""Loss by layer and candidate."""


@dataclass(frozen=True)
class Effect:
    """How two outputs are compared.

    Attributes:
        keep: what is kept of a sample's output, by the sample's index: its rows that count.
        distance: of what was kept of the float output and of another, one figure a row.
    """

    keep: Callable[[int, Array], Array]
    distance: Callable[[Array, Array], Array]

    def mean(self, references: Sequence[Array], found: Sequence[Array]) -> float:
        """Mean over the rows of all samples."""
        pairs = zip(references, found, strict=True)
        return float(np.mean(np.concatenate([self.distance(a, b) for a, b in pairs])))


@dataclass(frozen=True)
class Limits:
    """Bytes of memory."""

    segment: int = SEGMENT_BYTES
    pending: int = PENDING_BYTES


@dataclass(eq=False)
class _Variant:
    """The samples with one layer changed, on their way."""

    layer: str
    candidate: Candidate
    states: list[dict[str, Array]] = field(default_factory=list)
    kept: dict[int, Array] = field(default_factory=dict)

    def own_bytes(self, states: Sequence[State]) -> int:
        """Bytes of tensors that it does not share with the float samples."""
        shared = {id(value) for state in states for value in state.values()}
        own = (v for state in self.states for v in state.values() if id(v) not in shared)
        return sum(value.nbytes for value in own)


class SensitivityAnalysis:
    """Measures the layers of one graph; each method walks it from its inputs.

    Args:
        graph: float32, behind the exact rewrites; it is not changed.
        output: name of the output that is compared.
        feeds: gives the graph's inputs for each sample; called when samples must be run.
        rounding: how weights are put on grids.
        threads: of ONNX Runtime.

    Raises:
        InputError: the graph has no such output.
    """

    def __init__(
        self,
        graph: gs.Graph,
        output: str,
        feeds: Callable[[], Sequence[State]],
        effect: Effect,
        rounding: Rounding = "clip",
        threads: int | None = None,
        progress: Progress | None = None,
        limits: Limits | None = None,
    ) -> None:
        found = [tensor for tensor in graph.outputs if tensor.name == output]
        if not found:
            names = ", ".join(tensor.name for tensor in graph.outputs)
            raise InputError(f"The graph has no output {output!r}. Choose one of {names}.")
        self.layers = find_layers(graph)
        self._feeds = feeds
        self._effect = effect
        self._rounding = rounding
        self._threads = threads
        self._progress = progress or _silent
        self._limits = limits or Limits()
        self._sites = {layer.name for site in find_sites(graph) for layer in site.layers}
        self._pieces = GraphPieces(graph, [la.node for la in self.layers], found[0], threads)

    def measure(self, candidates: Candidates, store: WeightStore) -> Losses:
        """The loss of each candidate, each layer alone.

        Args:
            store: keeps figures as they come; those found there are not measured again.

        Raises:
            InputError: there is no sample, or activations are not finite.
            MvlmError: figures cannot be kept, or the graph cannot be run.
        """
        names = [layer.name for layer in self.layers]
        unknown = sorted(set(candidates) - set(names))
        if unknown:
            raise InputError(f"The graph has no layers {', '.join(unknown[:5])}.")
        behind = {name: len(names) - place for place, name in enumerate(names)}
        task = _Task(candidates, store, behind, self._progress)
        if task.left:
            self._measure(task)
        return task.losses

    def measure_mix(self, chosen: Mapping[str, Candidate]) -> float:
        """The loss with all the chosen layers changed at once, each rounded as if alone.

        Raises:
            InputError: as :meth:`measure`.
            MvlmError: as :meth:`measure`.
        """
        references: dict[int, Array] = {}
        found: dict[int, Array] = {}
        states = self._states()
        mixed = [dict(state) for state in states]
        for index in range(len(self._pieces)):
            self._progress(index, len(self._pieces), "all layers together")
            piece = self._pieces.open(index)
            states = self._step(piece, states, references)
            mixed = self._step(piece, mixed, found)
            if index < len(self.layers):
                layer = self.layers[index]
                change = self._change(layer, chosen.get(layer.name), states)
                if change is not None:
                    for place, state in enumerate(mixed):
                        state[change.output] = change.run(state)
                        self._take(place, state, found)
            states = [piece.forget(state) for state in states]
            mixed = [piece.forget(state) for state in mixed]
        self._progress(len(self._pieces), len(self._pieces), "all layers together")
        return self._effect.mean(_in_order(references), _in_order(found))

    def compare(self, graph: gs.Graph) -> float:
        """The loss of another graph, such as this one quantized.

        Args:
            graph: float32 outside Q/DQ, with this graph's inputs, output and layers' nodes.

        Raises:
            InputError: as :meth:`measure`.
            MvlmError: as :meth:`measure`.
        """
        states = self._states()
        names = {layer.node.name for layer in self.layers}
        cuts = [node for node in graph.nodes if node.name in names]
        output = next(t for t in graph.outputs if t.name == self._pieces.output)
        pieces = GraphPieces(graph, cuts, output, self._threads)
        found = self._run(pieces, states, "the quantized graph")
        return self._effect.mean(self._references(states), found)

    # The walk

    def _measure(self, task: _Task) -> None:
        states = self._states()
        references = self._references(states)
        for start, stop in self._segments():
            if not task.left:
                return
            opened = _Opened(self._pieces)
            pending: list[_Variant] = []
            waiting = 0
            for index in range(start, stop):
                states = self._step(opened[index], states, {})
                for variant in self._variants(task, index, states, opened[index]):
                    self._advance(variant, (opened[i] for i in range(index + 1, stop)), task)
                    pending.append(variant)
                    waiting += variant.own_bytes(states)
                    if waiting > self._limits.pending:
                        self._finish(pending, stop, references, task)
                        waiting = 0
                states = [opened[index].forget(state) for state in states]
            opened.clear()
            self._finish(pending, stop, references, task)

    def _states(self) -> list[dict[str, Array]]:
        feeds = self._feeds()
        if not feeds:
            raise InputError("There are no samples to run the graph on. Give at least one.")
        return [dict(sample) for sample in feeds]

    def _references(self, states: Sequence[State]) -> list[Array]:
        """What is kept of the float graph's output on each sample."""
        return self._run(self._pieces, states, "the float graph")

    def _run(self, pieces: GraphPieces, states: Sequence[State], label: str) -> list[Array]:
        """What is kept of a whole graph's output on each sample."""
        kept: dict[int, Array] = {}
        reached = [dict(state) for state in states]
        for index in range(len(pieces)):
            self._progress(index, len(pieces), label)
            piece = pieces.open(index)
            for place, state in enumerate(reached):
                reached[place] = piece.run(state)
                self._take(place, reached[place], kept)
        return _in_order(kept)

    def _segments(self) -> list[tuple[int, int]]:
        segments: list[tuple[int, int]] = []
        start, filled = 0, 0
        for index in range(len(self._pieces)):
            size = self._pieces.weight_bytes(index)
            if index > start and filled + size > self._limits.segment:
                segments.append((start, index))
                start, filled = index, 0
            filled += size
        return [*segments, (start, len(self._pieces))]

    def _step(
        self, piece: Piece, states: Sequence[State], kept: dict[int, Array]
    ) -> list[dict[str, Array]]:
        """Each sample behind a piece, with the inputs of its last node; outputs are taken."""
        reached = []
        for place, state in enumerate(states):
            found = piece.run(state, extra=True)
            self._take(place, found, kept)
            reached.append(found)
        return reached

    def _take(self, place: int, state: dict[str, Array], kept: dict[int, Array]) -> None:
        """Keep of the graph's output what counts; the whole of it is large."""
        output = state.pop(self._pieces.output, None)
        if output is not None:
            kept[place] = self._effect.keep(place, output)

    # Variants

    def _variants(
        self, task: _Task, index: int, states: Sequence[State], piece: Piece
    ) -> Iterable[_Variant]:
        if index == len(self.layers):
            return
        layer = self.layers[index]
        for candidate in tuple(task.left.get(layer.name, ())):
            change = self._change(layer, candidate, states)
            assert change is not None
            variant = _Variant(layer.name, candidate)
            for place, state in enumerate(states):
                reached = {**piece.forget(state), change.output: change.run(state)}
                self._take(place, reached, variant.kept)
                variant.states.append(reached)
            yield variant

    def _change(
        self, layer: Layer, candidate: Candidate | None, states: Sequence[State]
    ) -> LayerChange | None:
        if candidate is None or candidate.is_float:
            return None
        scalable = layer.name in self._sites
        return change_layer(layer, candidate, states, self._rounding, scalable, self._pieces)

    def _advance(self, variant: _Variant, pieces: Iterable[Piece], task: _Task) -> None:
        for piece in pieces:
            for place, state in enumerate(variant.states):
                reached = piece.run(state)
                self._take(place, reached, variant.kept)
                variant.states[place] = reached
            task.ran(variant)

    def _finish(
        self, pending: list[_Variant], start: int, references: list[Array], task: _Task
    ) -> None:
        """Run what lies behind a segment, once for all that wait there."""
        for index in range(start, len(self._pieces) if pending else start):
            piece = self._pieces.open(index)
            for variant in pending:
                self._advance(variant, [piece], task)
        for variant in pending:
            loss = self._effect.mean(references, _in_order(variant.kept))
            task.record(variant.layer, variant.candidate, loss)
        pending.clear()


class _Opened(dict[int, Piece]):
    """Pieces of one segment, loaded when they are first run."""

    def __init__(self, pieces: GraphPieces) -> None:
        super().__init__()
        self._pieces = pieces

    def __missing__(self, index: int) -> Piece:
        self[index] = self._pieces.open(index)
        return self[index]


class _Task:
    """What is known, what is left to measure, and how far that has got.

    Args:
        behind: pieces that lie behind each layer.
    """

    def __init__(
        self,
        candidates: Candidates,
        store: WeightStore,
        behind: Mapping[str, int],
        progress: Progress,
    ) -> None:
        self._store = store
        self._progress = progress
        self.losses: dict[str, dict[Candidate, float]] = {}
        self.left: dict[str, list[Candidate]] = {}
        for name, wanted in candidates.items():
            kept = store.read_json(_file(name)) or {}
            known = {c: float(kept[str(c)]) for c in wanted if str(c) in kept}
            known |= dict.fromkeys([c for c in wanted if c.is_float], 0.0)
            self.losses[name] = known
            missing = [c for c in wanted if c not in known]
            if missing:
                self.left[name] = missing
        self._total = sum(len(found) * behind[name] for name, found in self.left.items())
        self._done = 0

    def ran(self, variant: _Variant) -> None:
        """A variant has run one more piece."""
        self._done += 1
        self._progress(self._done, self._total, f"{variant.layer} {variant.candidate}")

    def record(self, layer: str, candidate: Candidate, loss: float) -> None:
        """A figure is there; it is kept at once."""
        self.losses[layer][candidate] = loss
        kept = self._store.read_json(_file(layer)) or {}
        self._store.write_json(_file(layer), {**kept, str(candidate): loss})
        self.left[layer].remove(candidate)
        if not self.left[layer]:
            del self.left[layer]


def _file(layer: str) -> str:
    return f"loss-{layer}"


def _in_order(kept: Mapping[int, Array]) -> list[Array]:
    return [kept[place] for place in sorted(kept)]


def _silent(done: int, total: int, label: str) -> None:
    return
