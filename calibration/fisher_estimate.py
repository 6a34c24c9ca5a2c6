"""Estimate the KL divergence that a changed weight brings, for all layers at once.

For a small change of the logits z of one row, to z + J delta by a change delta of a layer's
output, the divergence of next-token distributions is

    KL(p || q)  =  1/2 delta^T J^T (diag(p) - p p^T) J delta  +  O(delta^3)

(the Fisher information as the metric of KL). With e a vector of independent normal numbers,

    v  =  sqrt(p) * e  -  p (sqrt(p) . e)         has        E v v^T  =  diag(p) - p p^T,

so with v drawn for each row r of a sample and g the gradient of ``sum over r of v_r . z_r``,
``E (g . delta)^2`` is twice the sum of the rows' divergences: draws of different rows are
independent, so their products vanish. One backward pass so serves every row, every layer and
every candidate of it, with delta = x (Q - W). Each sample is drawn :data:`DRAWS` times.
(Drawing tokens from p instead, as the empirical Fisher does, has the same mean; where a model
is sure of itself all of it hangs on tokens that are hardly ever drawn.)

It holds for small changes: a candidate that costs tenths of a nat lies beyond them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import InputError
from mvlm_export.passes.deferred import Array

from .graph_walker import GraphWalker, Values
from .layer_rounding import Candidate, Rounding, as_weight, matrix_of, round_layer
from .layers import Layer, find_layers
from .smoothing import find_sites
from .torch_graph import TorchGraph
from .weight_grids import FloatArray

if TYPE_CHECKING:
    from torch import Generator, Tensor

DRAWS = 4
"""Backward passes for each sample."""

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is done)."""

Rows = Callable[[int, int], Sequence[int]]
"""Rows of the logits that count, by the index of the sample and the number of rows."""

_Key = tuple[str, Candidate]


class FisherEstimate:
    """Estimates losses of the candidates of one decoder graph.

    Args:
        graph: float32, behind the exact rewrites; it is not changed.
        output: name of the logits, float32 [S, V].
        rows: which of their rows count.
        rounding: how weights are put on grids.
        threads: of ONNX Runtime; None means its default.

    Raises:
        PassError: an operator whose gradient is not known here.
    """

    def __init__(
        self,
        graph: gs.Graph,
        output: str,
        rows: Rows,
        rounding: Rounding = "clip",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._graph = graph
        self._place = [tensor.name for tensor in graph.outputs].index(output)
        self._rows = rows
        self._rounding = rounding
        self._threads = threads
        self._progress = progress or _silent
        self._sites = {layer.name for site in find_sites(graph) for layer in site.layers}

    def run(
        self,
        candidates: Mapping[str, Sequence[Candidate]],
        feeds: Sequence[Values],
        folder: Path,
    ) -> dict[str, dict[Candidate, float]]:
        """Estimated loss by layer and candidate, in nats a row.

        Args:
            candidates: of the layers that count; ``float`` costs nothing.
            folder: gets the changes of weights, two bytes a weight and candidate, for as long
                as this runs.

        Raises:
            InputError: no sample, activations that are not finite, or a candidate with
                quantized inputs.
            EngineError: the graph cannot be run.
        """
        _require_weights_alone(candidates)
        layers = [la for la in find_layers(self._graph) if candidates.get(la.name)]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as name:
            changes = self._changes(layers, candidates, feeds, Path(name))
            squares = self._squares(layers, changes, feeds)
        losses: dict[str, dict[Candidate, float]] = {}
        for layer in layers:
            wanted = candidates[layer.name]
            losses[layer.name] = {c: squares.get((layer.name, c), 0.0) for c in wanted}
        return losses

    def _changes(
        self,
        layers: Sequence[Layer],
        candidates: Mapping[str, Sequence[Candidate]],
        feeds: Sequence[Values],
        folder: Path,
    ) -> dict[_Key, _Change]:
        """Q - W of each candidate, on disk."""
        walker = GraphWalker(self._graph, feeds, self._threads)
        changes: dict[_Key, _Change] = {}
        for index, layer in enumerate(layers):
            self._progress(index, len(layers), f"rounding {layer.name}")
            found = walker.advance(layer.inputs)
            pieces = [sample[t.name] for t in layer.inputs for sample in found]
            for candidate in candidates[layer.name]:
                if candidate.form is None:
                    continue
                scalable = layer.name in self._sites
                rounded = round_layer(
                    layer, candidate.form, pieces, self._rounding, scalable
                ).matrix()
                path = folder / f"{len(changes)}.npy"
                changes[layer.name, candidate] = _Change.save(
                    path, as_weight(layer, rounded - matrix_of(layer))
                )
        return changes

    def _squares(
        self,
        layers: Sequence[Layer],
        changes: Mapping[_Key, _Change],
        feeds: Sequence[Values],
    ) -> dict[_Key, float]:
        """Half the mean of ``(g . delta)^2`` over rows."""
        import torch

        graph, generator = TorchGraph(self._graph), torch.Generator().manual_seed(0)
        total, count = dict.fromkeys(changes, 0.0), 0
        for place, feed in enumerate(feeds):
            self._progress(place, len(feeds), "gradients")
            watch = _Watch(layers)
            logits = graph.run(feed, watch)[self._place]
            rows = torch.tensor(list(self._rows(place, len(logits))))
            count += len(rows)
            gradients = _draw(logits[rows], watch.outputs, generator)
            for index, layer in enumerate(watch.layers):
                for key in (key for key in changes if key[0] == layer.name):
                    change = torch.from_numpy(changes[key].load())
                    moved = _moved(layer, watch.inputs[index], change)
                    total[key] += sum(float((g[index] * moved).sum()) ** 2 for g in gradients)
        self._progress(len(feeds), len(feeds), "gradients")
        return {key: value / (2 * DRAWS * count) for key, value in total.items()}


class _Change:
    """A weight's change on disk, in float16 relative to its largest value."""

    def __init__(self, path: Path, largest: float) -> None:
        self._path = path
        self._largest = largest

    @classmethod
    def save(cls, path: Path, change: Array) -> _Change:
        largest = float(np.abs(change).max(initial=0)) or 1.0
        np.save(path, (change / largest).astype(np.float16))
        return cls(path, largest)

    def load(self) -> FloatArray:
        values: FloatArray = np.load(self._path).astype(np.float32) * np.float32(self._largest)
        return values


class _Watch:
    """Makes layers' outputs such that gradients with respect to them can be had."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._wanted = {id(layer.node): layer for layer in layers}
        self.layers: list[Layer] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, node: gs.Node, inputs: list[Tensor], output: Tensor) -> Tensor:
        layer = self._wanted.get(id(node))
        if layer is not None:
            if not output.requires_grad:
                output.requires_grad_(True)
            self.layers.append(layer)
            self.inputs.append(inputs[1 if layer.kind == "embedding" else 0].detach())
            self.outputs.append(output)
        return output


def _draw(
    logits: Tensor, outputs: list[Tensor], generator: Generator
) -> list[tuple[Tensor, ...]]:
    """Gradients of the logits' rows along ``v``, once for each draw."""
    import torch

    p = logits.detach().softmax(dim=-1)
    root = p.sqrt()
    gradients = []
    for draw in range(DRAWS):
        normal = torch.randn(p.shape, generator=generator)
        direction = root * normal - p * (root * normal).sum(dim=-1, keepdim=True)
        last = draw == DRAWS - 1
        objective = (direction * logits).sum()
        gradients.append(torch.autograd.grad(objective, outputs, retain_graph=not last))
    return gradients


def _moved(layer: Layer, inputs: Tensor, change: Tensor) -> Tensor:
    """How a layer's output moves with its weight, float32 [..., N]."""
    return change[inputs.long()] if layer.kind == "embedding" else inputs @ change


def _require_weights_alone(candidates: Mapping[str, Sequence[Candidate]]) -> None:
    for name, wanted in candidates.items():
        if any(candidate.inputs for candidate in wanted):
            raise InputError(
                f"Losses of quantized inputs, as of {name!r}, cannot be estimated. Measure "
                "them."
            )


def _silent(done: int, total: int, label: str) -> None:
    return
