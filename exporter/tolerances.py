"""How far a compiled graph may be from the PyTorch model in float32: the one table.

A graph has a precision: its dtype, or ``int8`` or ``int4`` where layers of it are quantized,
whatever the dtype of the rest. A float graph rounds, so each tensor, row and answer is held to
its bound. An integer graph is another model that should say the same: its errors have no
greatest size that means anything, so means and shares are held to theirs, and single rows and
answers are reported.

Of float precisions ``relative`` grows with depth by rounding alone, about ``eps *
sqrt(layers)``; float32's bound leaves two orders of magnitude over that. The integers' bounds
leave several times what both nano models reach, since a model of free text is less sure of its
sentences than nano is of its few; ``docs/parity.md`` says more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mvlm_export.engines.manifest import GRAPHS, Manifest


@dataclass(frozen=True)
class Tolerance:
    """Bounds for one precision; ``docs/parity.md`` explains each.

    Attributes:
        relative: largest ``||a - b|| / ||b||`` of a tensor; of a decoder's logits and cache
            rows in float precisions alone.
        cosine: smallest, of the same tensors.
        kl: nats between next-token distributions, worst row.
        kl_mean: nats, mean over the rows that give an answer.
        top1: smallest share of rows whose best token agrees.
        tie: logits closer than this in PyTorch itself count as undecided.
        drop: share of exact answers that may be lost; 0 holds every answer to PyTorch's.
    """

    relative: float
    cosine: float
    kl: float
    kl_mean: float
    top1: float
    tie: float
    drop: float

    @property
    def judges_each(self) -> bool:
        """Whether single rows and answers are held to a bound, or means and shares alone."""
        return self.drop == 0


TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(
        relative=2e-4,
        cosine=0.999_999,
        kl=1e-6,
        kl_mean=1e-6,
        top1=1.0,
        tie=1e-3,
        drop=0,
    ),
    "float16": Tolerance(
        relative=2e-2,
        cosine=0.999_8,
        kl=5e-3,
        kl_mean=5e-3,
        top1=0.99,
        tie=5e-2,
        drop=0,
    ),
    "int8": Tolerance(
        relative=0.2,
        cosine=0.98,
        kl=math.inf,
        kl_mean=0.05,
        top1=0.90,
        tie=5e-2,
        drop=0.05,
    ),
    "int4": Tolerance(
        relative=0.3,
        cosine=0.95,
        kl=math.inf,
        kl_mean=0.1,
        top1=0.85,
        tie=5e-2,
        drop=0.05,
    ),
}
"""By precision, from the finest to the coarsest."""

CHANCE = 0.01
"""How often a bundle that loses exactly ``Tolerance.drop`` may be failed by chance."""


def precision_of(manifest: Manifest, graph: str) -> str:
    """A key of ``TOLERANCES``: the graph's dtype, or its coarsest integers, layer or cache."""
    layers = quantized_layers(manifest, graph)
    if not layers:
        has_codes = graph == "decoder" and bool(manifest.cache_scales)
        return "int8" if has_codes else manifest.graphs[graph].dtype
    is_int4 = any(str(layer["form"]).startswith("int4") for layer in layers.values())
    return "int4" if is_int4 else "int8"


def coarsest_precision(manifest: Manifest) -> str:
    """Of the three graphs together, which is what an answer goes through."""
    order = list(TOLERANCES)
    return max((precision_of(manifest, graph) for graph in GRAPHS), key=order.index)


def quantized_layers(manifest: Manifest, graph: str) -> dict[str, dict[str, object]]:
    """What the compile noted of each quantized layer: ``form``, ``error``; by its name."""
    layers: dict[str, dict[str, object]] = (
        manifest.checks.get("quantization", {}).get(graph, {}).get("layers", {})
    )
    return layers
