"""One layer as it is with other numbers: its weight on a grid, its inputs on one, or both.

A layer is rounded as the whole graph would be, but by float activations. Scales that AWQ moves
into the activations are exact, so for a layer alone they are no change of the graph:

    (x / s) Q(diag(s) W)  =  x (diag(1 / s) Q(diag(s) W))

and the matrix in brackets is what the layer is given. ``clip`` is the fast stand-in for every
method that sees activations: the best clip of each block by E[x^2], no scales, no GPTQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mvlm_export.engines.errors import InputError
from mvlm_export.passes.deferred import Array, values_of

from .activation_statistics import RowStatistics, row_statistics
from .graph_walker import rows_of
from .layers import Layer
from .observers import make_observer, scale_of
from .quantized_weight import QuantizedWeight
from .scale_search import search_weight_scales
from .weight_grids import FloatArray, WeightFormat
from .weight_rounding import clip_grid, round_by_gptq, round_clipped, round_to_nearest
from .write_quantization import weight_matrix

Rounding = Literal["clip", "rtn", "awq", "gptq", "awq+gptq"]
"""``clip``, or a method of a recipe."""


@dataclass(frozen=True)
class Candidate:
    """What a layer may become.

    Attributes:
        form: of its weight; None leaves it in float.
        inputs: whether its computed operands go on 8-bit grids, one for the whole tensor.
    """

    form: WeightFormat | None
    inputs: bool = False

    @property
    def is_float(self) -> bool:
        """Whether nothing changes."""
        return self.form is None and not self.inputs

    def __str__(self) -> str:
        if self.form is None:
            return "int8 inputs" if self.inputs else "float"
        return f"{self.form} + inputs" if self.inputs else str(self.form)


FLOAT = Candidate(None)


@dataclass(frozen=True, eq=False)
class RoundedMatrix:
    """A weight [K, N] as a layer alone is given it.

    Attributes:
        weight: what is stored.
        scales: s, float32 [K], that the activations are divided by; None for ones.
    """

    weight: QuantizedWeight
    scales: FloatArray | None = None

    def matrix(self) -> FloatArray:
        """float32 [K, N]: ``diag(1 / s) Q``."""
        values = self.weight.dequantize()
        return values if self.scales is None else values / self.scales[:, None]


def round_layer(
    layer: Layer,
    form: WeightFormat,
    pieces: Sequence[Array],
    rounding: Rounding = "clip",
    scalable: bool = False,
) -> RoundedMatrix:
    """A layer's weight on a grid.

    Args:
        pieces: its input on each sample, float32 [..., K]; not read for weights of 8 bits.
        scalable: whether the graph has a place for scales before it.

    Raises:
        InputError: no rows, or some that are not finite.
    """
    matrix = matrix_of(layer)
    if rounding == "rtn" or layer.kind != "linear" or form.bits == 8:
        return RoundedMatrix(round_to_nearest(matrix, form))
    rows = row_statistics(
        layer.inputs[0].name, [rows_of(piece) for piece in pieces], "gptq" in rounding
    )
    scales = None
    if "awq" in rounding and scalable:
        scales = search_weight_scales(rows, [matrix], [form]).scales
        matrix, rows = matrix * scales[:, None], _divided(rows, scales)
    return RoundedMatrix(round_by_rows(matrix, form, rounding, rows), scales)


def round_by_rows(
    matrix: FloatArray, form: WeightFormat, rounding: Rounding, rows: RowStatistics
) -> QuantizedWeight:
    """A matrix [K, N], behind its scales of channels, by a method that sees activations.

    Args:
        rows: with their ``hessian`` for GPTQ.
    """
    if "gptq" in rounding:
        return round_by_gptq(matrix, clip_grid(matrix, form, rows.square), rows)
    return round_clipped(matrix, form, rows.square)


def matrix_of(layer: Layer) -> FloatArray:
    """A layer's weight as a matrix, float32 [K, N], read now.

    Raises:
        InputError: it holds values that are not finite.
    """
    assert layer.weight is not None
    matrix = np.asarray(weight_matrix(layer, values_of(layer.weight)), np.float32)
    if not np.isfinite(matrix).all():
        raise InputError(
            f"The weight of {layer.name!r} holds values that are not finite. Check the "
            "checkpoint it was read from."
        )
    return matrix


def as_weight(layer: Layer, matrix: FloatArray) -> Array:
    """A matrix [K, N] in the shape of a layer's weight; undoes ``weight_matrix``."""
    assert layer.weight is not None
    if layer.kind == "linear":
        return matrix
    return np.ascontiguousarray(matrix.T.reshape(tuple(layer.weight.shape)))


def input_steps(pieces: Sequence[Sequence[Array]], names: Sequence[str]) -> list[float]:
    """The step of each operand's 8-bit grid, which reaches to its largest magnitude.

    Args:
        pieces: of each operand, its values on each sample.
        names: of the operands, for messages.

    Raises:
        InputError: values that are not finite.
    """
    steps = []
    for values, name in zip(pieces, names, strict=True):
        observer = make_observer("min-max", name)
        for piece in values:
            observer.update(piece)
        steps.append(float(scale_of(observer.amax())))
    return steps


def on_grid(values: Array, step: float) -> FloatArray:
    """Values on an 8-bit grid."""
    codes = np.rint(values / np.float32(step)).clip(-127, 127)
    rounded: FloatArray = (codes * np.float32(step)).astype(np.float32)
    return rounded


def _divided(rows: RowStatistics, scales: FloatArray) -> RowStatistics:
    """Figures of ``x / s`` from those of x."""
    hessian = rows.hessian
    if hessian is not None:
        hessian = hessian / np.outer(scales, scales)
    return replace(
        rows,
        hessian=hessian,
        square=rows.square / scales**2,
        mean=rows.mean / scales,
        largest=rows.largest / scales,
        sample=rows.sample / scales,
        extremes=rows.extremes / scales,
    )
