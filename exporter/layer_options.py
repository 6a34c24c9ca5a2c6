"""What a graph's layers may become on a target, and the bytes of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.calibration.layer_rounding import FLOAT, Candidate
from mvlm_export.calibration.layers import Layer, LayerKind
from mvlm_export.calibration.recipe import INT4, INT8
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.engines.targets import Target
from mvlm_export.passes.base import numpy_dtype
from mvlm_export.passes.deferred import stored_bytes

DECODER = "decoder"

_FEW_BITS = (Candidate(INT4), Candidate(WeightFormat(4, 32)))
WEIGHT_CANDIDATES: Mapping[bool, tuple[Candidate, ...]] = {
    # Beside float activations TensorRT turns 8-bit weights into floats anew in every step.
    True: (*_FEW_BITS, FLOAT),
    False: (*_FEW_BITS, Candidate(INT8), FLOAT),
}
"""What the decoder's layers may become, by whether TensorRT multiplies by them.

It reads a token table of 8 bits row by row, and multiplies by none of it.
"""

FULL_CANDIDATES: Mapping[LayerKind, tuple[Candidate, ...]] = {
    "linear": (Candidate(INT8, inputs=True), FLOAT),
    "conv": (Candidate(INT8, inputs=True), FLOAT),
    "attention": (Candidate(None, inputs=True), FLOAT),
    "embedding": (FLOAT,),
}
"""What layers of the other graphs may become: 8-bit weights with 8-bit activations."""


def candidates_of(
    graph: str, layer: Layer, target: Target, keep_float: Sequence[str] = ()
) -> tuple[Candidate, ...]:
    """What one layer may become; ``float`` alone where nothing can be chosen.

    Args:
        graph: its graph's name.
        keep_float: patterns of layers that are not to be quantized.
    """
    if any(fnmatchcase(layer.name, pattern) for pattern in keep_float):
        return (FLOAT,)
    if graph != DECODER:
        return FULL_CANDIDATES[layer.kind]
    if layer.kind not in ("linear", "embedding"):
        return (FLOAT,)
    found = WEIGHT_CANDIDATES[target.has_engines and layer.kind == "linear"]
    return tuple(c for c in found if c.form is None or _has_whole_blocks(layer, c.form))


def option_bytes(layer: Layer, candidate: Candidate, dtype: str) -> int:
    """Bytes of a layer's weight with its scales.

    Args:
        dtype: of floats and of scales, in the finished graph.
    """
    weight = layer.weight
    if weight is None:
        return 0
    if candidate.form is None:
        return _float_bytes(weight, dtype)
    rows, columns = _matrix_shape(layer)
    return candidate.form.stored_bytes(rows, columns, np.dtype(dtype).itemsize)


def constant_bytes(graph: gs.Graph, dtype: str) -> int:
    """Bytes of a graph's constants, floats as ``dtype``."""
    constants = (t for t in graph.tensors().values() if isinstance(t, gs.Constant))
    return sum(_float_bytes(constant, dtype) for constant in constants)


def _float_bytes(constant: gs.Constant, dtype: str) -> int:
    own = np.dtype(numpy_dtype(constant))
    return stored_bytes(constant.shape, dtype if own.kind == "f" else own)


def _has_whole_blocks(layer: Layer, form: WeightFormat) -> bool:
    """Whether a weight's rows make whole blocks, as fast kernels need."""
    return form.group_size is None or _matrix_shape(layer)[0] % form.group_size == 0


def _matrix_shape(layer: Layer) -> tuple[int, int]:
    """(K, N) of ``weight_matrix``."""
    assert layer.weight is not None
    shape = tuple(layer.weight.shape)
    if layer.kind == "linear":
        return shape[0], shape[1]
    return int(np.prod(shape[1:])), shape[0]
