"""How far a compiled graph may be from the PyTorch model in float32: the one table.

Each figure bounds the worst sample. ``relative`` is ``||a - b|| / ||b||`` over a whole tensor
(a row of logits, the new cache rows of a layer); it grows with depth by rounding alone, about
``eps * sqrt(layers)``, and float32's bound leaves two orders of magnitude over that. ``kl`` is
the divergence of the next-token distribution in nats. A greedy token may differ only where the
reference itself is undecided: its own logits of the two tokens lie closer than ``tie``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bounds for one dtype; ``docs/parity.md`` explains each."""

    relative: float
    cosine: float
    kl: float
    top1: float
    tie: float


TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(relative=2e-4, cosine=0.999_999, kl=1e-6, top1=1.0, tie=1e-3),
    "float16": Tolerance(relative=2e-2, cosine=0.999_8, kl=5e-3, top1=0.99, tie=5e-2),
}
