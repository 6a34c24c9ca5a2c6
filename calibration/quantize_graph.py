"""Quantize one float32 graph: choose scales of channels, walk it, round each layer.

The graph is walked twice at most, with the weights of one layer in memory at a time: first as
it is, to choose scales of channels; then from layer to layer, each rounded by what reaches it
through those that are rounded already. Finished weights lie in a :class:`.WeightStore`; a run
that finds them there goes on where the last one ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import InputError
from mvlm_export.passes.base import Expect, Step
from mvlm_export.passes.deferred import Array, DeferredValues

from .activation_statistics import row_statistics
from .graph_walker import GraphWalker, Values, check_dtype, rows_of
from .layer_rounding import as_weight, matrix_of, round_by_rows
from .layers import Layer, find_layers
from .observers import make_observer, scale_of
from .product_clip import product_clip
from .quantized_weight import QuantizedWeight, StoredWeight, WeightStore
from .recipe import PRODUCT, GraphRecipe
from .scale_search import search_activation_scales, search_weight_scales
from .smoothing import MoveScales, Scales, SmoothingSite, find_sites
from .weight_grids import FloatArray, WeightFormat
from .weight_rounding import round_to_nearest
from .write_quantization import (
    LayerPlan,
    WriteQuantization,
    form_problem,
    matrix_shape,
)

Progress = Callable[[int, int, str], None]
"""Called with (layers done, layers in all, name)."""

_SCALES = "smoothing-scales"
_INPUTS = "activation-scales"
_CACHE = "cache-scales"


@dataclass(frozen=True)
class GraphQuantization:
    """What becomes of a graph; made by :func:`quantize_graph`.

    Attributes:
        scales: that move from activations into weights, by site.
        plan: weights and activation scales by layer.
        cache_scales: of keys and values of an 8-bit cache, by ``present.{n}.key`` and
            ``.value``; empty where the cache stays in float.
        exponents: a of each site's scales, for the report.
    """

    scales: Scales
    plan: Mapping[str, LayerPlan]
    cache_scales: Mapping[str, float] = field(default_factory=dict)
    exponents: Mapping[str, float] = field(default_factory=dict)

    def steps(self) -> list[Step]:
        """The passes that write layers into a graph like the one it was made from.

        An 8-bit cache is the lowering's: what holds it depends on the target.
        """
        moved, written = len(self.scales), len(self.plan)
        steps = []
        if moved:
            steps.append(Step(MoveScales(self.scales), Expect(moved, "one a site")))
        if written:
            steps.append(Step(WriteQuantization(self.plan), Expect(written, "one a layer")))
        return steps

    def to_json(self) -> dict[str, Any]:
        """For the report: form and error of each layer."""
        layers = {
            name: {
                "form": None if part.weight is None else str(part.weight.form),
                "error": None if part.weight is None else part.weight.error,
                "activation_scales": list(part.input_scales),
            }
            for name, part in self.plan.items()
        }
        return {"layers": layers, "exponents": dict(self.exponents)}


def quantize_graph(
    graph: gs.Graph,
    recipe: GraphRecipe,
    store: WeightStore,
    feeds: Callable[[], Sequence[Values]],
    threads: int | None = None,
    progress: Progress | None = None,
    whole_blocks: bool = True,
) -> GraphQuantization:
    """Choose what becomes of every layer.

    Args:
        graph: float32, behind the exact rewrites; changed on the way, so give a copy.
        feeds: gives the graph's inputs for each sample; called only if samples must be run.
        threads: of ONNX Runtime.
        whole_blocks: make groups smaller where a weight's rows are no multiple of them, as
            TensorRT needs; else the last block is shorter.

    Raises:
        InputError: activations or weights that are not finite, no sample, or a form that a
            layer cannot have.
        MvlmError: weights cannot be kept on disk; the graph cannot be run.
    """
    report = progress or _silent
    return _GraphQuantizer(recipe, store, feeds, threads, report, whole_blocks).run(graph)


def _silent(done: int, total: int, label: str) -> None:
    return


class _GraphQuantizer:
    def __init__(
        self,
        recipe: GraphRecipe,
        store: WeightStore,
        feeds: Callable[[], Sequence[Values]],
        threads: int | None,
        progress: Progress,
        whole_blocks: bool,
    ) -> None:
        self.whole_blocks = whole_blocks
        self.recipe = recipe
        self.store = store
        self.feeds = feeds
        self.threads = threads
        self.progress = progress
        self.exponents: dict[str, float] = {}

    def run(self, graph: gs.Graph) -> GraphQuantization:
        if self.recipe.is_float:
            return GraphQuantization({}, {})
        self._require_forms(graph)
        scales = self._scales(graph)
        if scales:
            MoveScales(scales).apply(graph)
        cache_scales = self._cache_scales(graph)
        plan = self._round_layers(graph)
        return GraphQuantization(scales, plan, cache_scales, self.exponents)

    def _cache_scales(self, graph: gs.Graph) -> dict[str, float]:
        """Of each cache output, before anything is rounded; nothing is clipped."""
        if self.recipe.kv_cache_dtype is None:
            return {}
        kept = self.store.read_json(_CACHE)
        if kept is not None:
            return dict(kept)
        rows = [tensor for tensor in graph.outputs if tensor.name.startswith("present.")]
        walker = GraphWalker(graph, self.feeds(), self.threads)
        scales: dict[str, float] = {}
        for index, tensor in enumerate(rows):
            self.progress(index, len(rows), f"range of {tensor.name}")
            check_dtype(tensor)
            observer = make_observer("min-max", tensor.name)
            for sample in walker.advance([tensor]):
                observer.update(sample[tensor.name])
            scales[tensor.name] = float(scale_of(observer.amax()))
        self.progress(len(rows), len(rows), "ranges of the KV cache")
        self.store.write_json(_CACHE, scales)
        return scales

    def _require_forms(self, graph: gs.Graph) -> None:
        """Refuse what the graph could not be written as, before it is computed."""
        for layer in find_layers(graph):
            form = self._form(layer)
            if form is None:
                continue
            problem = form_problem(layer, form)
            if problem is not None:
                raise InputError(
                    f"The layer {layer.name!r} cannot be stored as {form}: {problem}. Give it "
                    "another form by a rule of the recipe."
                )

    # Scales of channels

    def _scales(self, graph: gs.Graph) -> Scales:
        by_weight = "awq" in self.recipe.method
        if not (by_weight or self.recipe.smooth):
            return {}
        kept = self.store.read_json(_SCALES)
        if kept is not None:
            self.exponents = dict(kept["exponents"])
            return {
                name: np.array(values, np.float32) for name, values in kept["scales"].items()
            }
        sites = [site for site in find_sites(graph) if self._formats(site)]
        walker = GraphWalker(graph, self.feeds(), self.threads)
        scales: dict[str, Array] = {}
        for index, site in enumerate(sites):
            self.progress(index, len(sites), f"scales before {site.name}")
            search = search_weight_scales if by_weight else search_activation_scales
            rows = row_statistics(site.tensor.name, self._rows(walker, site.tensor))
            weights = [matrix_of(layer) for layer in site.layers]
            choice = search(rows, weights, self._formats(site))
            self.exponents[site.name] = choice.exponent
            if choice.exponent or (choice.scales != 1).any():
                scales[site.name] = choice.scales
        self.progress(len(sites), len(sites), "scales of channels")
        values = {name: array.tolist() for name, array in scales.items()}
        self.store.write_json(_SCALES, {"scales": values, "exponents": self.exponents})
        return scales

    def _formats(self, site: SmoothingSite) -> list[WeightFormat]:
        """Of a site's layers, all of them quantized; else none."""
        forms = [self._form(layer) for layer in site.layers]
        known = [form for form in forms if form is not None]
        return known if len(known) == len(forms) else []

    # Rounding

    def _round_layers(self, graph: gs.Graph) -> dict[str, LayerPlan]:
        layers = [layer for layer in find_layers(graph) if self._is_quantized(layer)]
        inputs: dict[str, list[float]] = self.store.read_json(_INPUTS) or {}
        walker = self._walker(graph, layers, inputs)
        plan: dict[str, LayerPlan] = {}
        for index, layer in enumerate(layers):
            self.progress(index, len(layers), layer.name)
            pieces = self._pieces(walker, layer)
            if layer.name not in inputs:
                inputs[layer.name] = self._input_scales(layer, pieces)
            weight = self._weight(layer, pieces)
            if weight is not None and walker is not None:
                _replace_weight(layer, weight)
            plan[layer.name] = LayerPlan(weight, tuple(inputs[layer.name]))
        if layers:
            self.progress(len(layers), len(layers), layers[-1].name)
        self.store.write_json(_INPUTS, inputs)
        return plan

    def _is_quantized(self, layer: Layer) -> bool:
        if layer.kind == "attention":
            return self.recipe.attention
        return self._form(layer) is not None

    def _form(self, layer: Layer) -> WeightFormat | None:
        """What a layer's weight is stored as; None for float, or where it has none."""
        form = self.recipe.form_of(layer.name, layer.kind)
        if form is None or layer.weight is None:
            return None
        if not self.whole_blocks:
            return form
        return form.for_rows(matrix_shape(layer)[0])

    def _walker(
        self, graph: gs.Graph, layers: Sequence[Layer], inputs: Mapping[str, list[float]]
    ) -> GraphWalker | None:
        """What runs the samples; None if nothing that is left to do needs them."""
        done = all(
            layer.name in inputs and (layer.weight is None or self.store.find(layer.name))
            for layer in layers
        )
        if done or not self.recipe.rounds_by_data:
            return None
        return GraphWalker(graph, self.feeds(), self.threads)

    def _pieces(self, walker: GraphWalker | None, layer: Layer) -> list[list[FloatArray]]:
        """Rows of each computed operand, a piece for each sample."""
        if walker is None:
            return []
        for tensor in layer.inputs:
            check_dtype(tensor)
        found = walker.advance(layer.inputs)
        return [[sample[tensor.name] for sample in found] for tensor in layer.inputs]

    def _input_scales(self, layer: Layer, pieces: list[list[FloatArray]]) -> list[float]:
        wanted = self.recipe.attention if layer.kind == "attention" else self._has_int8(layer)
        if not wanted:
            return []
        return [
            float(scale_of(self._reach(layer, tensor.name, values)))
            for tensor, values in zip(layer.inputs, pieces, strict=True)
        ]

    def _reach(self, layer: Layer, tensor: str, pieces: list[FloatArray]) -> float:
        """The magnitude that becomes code 127."""
        by_product = self.recipe.observer == PRODUCT
        if by_product and layer.kind == "linear":
            rows = row_statistics(tensor, [rows_of(piece) for piece in pieces])
            return product_clip(rows, matrix_of(layer))
        observer = make_observer("min-max" if by_product else self.recipe.observer, tensor)
        for piece in pieces:
            observer.update(piece)
        return observer.amax()

    def _has_int8(self, layer: Layer) -> bool:
        form = self._form(layer)
        return self.recipe.activations and form is not None and form.bits == 8

    def _weight(self, layer: Layer, pieces: list[list[FloatArray]]) -> StoredWeight | None:
        form = self._form(layer)
        if form is None:
            return None
        found = self.store.find(layer.name)
        if found is not None:
            return found
        matrix = matrix_of(layer)
        rounded = self._round(layer, matrix, form, pieces)
        return self.store.add(layer.name, rounded, matrix)

    def _round(
        self,
        layer: Layer,
        matrix: FloatArray,
        form: WeightFormat,
        pieces: list[list[FloatArray]],
    ) -> QuantizedWeight:
        method = self.recipe.method
        if method == "rtn" or layer.kind != "linear" or form.bits == 8:
            return round_to_nearest(matrix, form)
        seen = [rows_of(piece) for piece in pieces[0]]
        rows = row_statistics(layer.inputs[0].name, seen, hessian="gptq" in method)
        return round_by_rows(matrix, form, method, rows)

    def _rows(self, walker: GraphWalker, tensor: gs.Tensor) -> list[FloatArray]:
        check_dtype(tensor)
        return [rows_of(sample[tensor.name]) for sample in walker.advance([tensor])]


def _replace_weight(layer: Layer, weight: StoredWeight) -> None:
    """Let the walk go on with the rounded weight."""
    old = layer.weight
    assert old is not None
    values = DeferredValues(
        tuple(old.shape), np.float32, lambda: as_weight(layer, weight.load().dequantize())
    )
    rounded = gs.Constant(f"{old.name}.rounded", values)
    layer.node.inputs[0 if layer.kind == "embedding" else 1] = rounded
