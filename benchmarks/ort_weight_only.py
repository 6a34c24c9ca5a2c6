"""ONNX Runtime's weight-only quantizers, made to run on decoders of any width.

Three things of release 1.31 stand in the way, none of which touches how it rounds:

- its GPTQ quantizes what it is told to leave out;
- its GPTQ runs the whole model again for the input of each layer, where one run gives all;
- it cannot pack zero points where the number of blocks down a column is odd (576 rows in
  blocks of 128 or 64): a byte would hold those of two columns. Here each column is filled up.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.neural_compressor import weight_only

NEUTRAL_ZERO_POINT = 8


def quantize_weights(
    path: Path,
    config: nbits.WeightOnlyQuantConfig,
    group_size: int,
    symmetric: bool,
    excluded: Sequence[str],
) -> Any:  # noqa: ANN401
    """Quantize the products of a model to 4 bits; ONNX Runtime's own ``ONNXModel``.

    Args:
        path: of the float model, less than 2 GB.
        config: of the method.
        group_size: rows that share a scale.
        symmetric: no zero points.
        excluded: names of products that stay as they are.
    """
    quantizer = _Quantizer(
        onnx.load(str(path)),
        block_size=group_size,
        is_symmetric=symmetric,
        nodes_to_exclude=list(excluded),
        algo_config=config,
    )
    with _repaired(), _quiet():
        quantizer.process()
    return quantizer.model


class FeedReader(CalibrationDataReader):
    """Samples, each the inputs of one run."""

    def __init__(self, feeds: Iterable[dict[str, Any]]) -> None:
        self._feeds = list(feeds)
        self._next = 0

    def get_next(self) -> dict[str, Any] | None:
        if self._next == len(self._feeds):
            return None
        self._next += 1
        return self._feeds[self._next - 1]


class _Quantizer(nbits.MatMulNBitsQuantizer):
    """The quantizer, whose GPTQ leaves out what it is told to leave out as well."""

    def _generate_q4_node_config(self) -> dict[str, Any]:
        config = super()._generate_q4_node_config()
        return config | dict.fromkeys(self.nodes_to_exclude, "fp32")


class _OneRunSession:
    """A session that keeps a sample's outputs for later calls, those of products by weights.

    Attention's operands, of more axes and many times their size, are not asked for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._session = ort.InferenceSession(*args, **kwargs)
        self._kept: dict[int, dict[str, Any]] = {}

    def get_inputs(self) -> list[Any]:
        return list(self._session.get_inputs())

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        kept = self._kept.setdefault(id(feeds), {})
        if not kept:
            outputs = [o.name for o in self._session.get_outputs() if len(o.shape) <= 2]
            kept.update(zip(outputs, self._session.run(outputs, feeds), strict=True))
        if not all(name in kept for name in names):
            return list(self._session.run(names, feeds))
        return [kept[name] for name in names]


class _OneRunRuntime:
    """ONNX Runtime with such sessions."""

    InferenceSession = _OneRunSession

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(ort, name)


_make_node = weight_only.make_matmul_weight_only_node


def _make_node_of_any_blocks(
    node: onnx.NodeProto,
    k_blocks: int,
    zero_point: Any = None,  # noqa: ANN401
    **others: Any,
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """ONNX Runtime's ``make_matmul_weight_only_node`` for odd numbers of blocks too."""
    if zero_point is None or k_blocks % 2 == 0:
        return _make_node(node=node, k_blocks=k_blocks, zero_point=zero_point, **others)
    made, tensors = _make_node(node=node, k_blocks=k_blocks, zero_point=None, **others)
    table = zero_point.reshape(-1, k_blocks).astype(np.uint8)
    table = np.pad(table, ((0, 0), (0, 1)), constant_values=NEUTRAL_ZERO_POINT)
    packed = table[:, 0::2] | (table[:, 1::2] << 4)
    tensors.append(onnx.numpy_helper.from_array(packed, f"{node.input[1]}_zp"))
    made.input.append(tensors[-1].name)
    return made, tensors


@contextlib.contextmanager
def _repaired() -> Iterator[None]:
    """Put the repairs into ONNX Runtime's module, and take them out again."""
    weight_only.ort = _OneRunRuntime()
    weight_only.make_matmul_weight_only_node = _make_node_of_any_blocks
    try:
        yield
    finally:
        weight_only.ort = ort
        weight_only.make_matmul_weight_only_node = _make_node


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its line for every node and its progress bar."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
