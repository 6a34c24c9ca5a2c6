"""Our 4-bit weights beside those of ONNX Runtime's quantizers, on a real language model.

SmolLM2-135M-Instruct (LLaMA architecture, not ours) goes through our decoder export; the float
graph is then quantized by our methods and by each peer, and every result is scored by ONNX
Runtime on the same windows of text, in one run. Bytes count codes, zero points or offsets,
and scales, tables in float16.

    python benchmarks/quant_quality.py --assets DIR --work DIR
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
from decoder_scores import decoder_feeds
from smollm2 import apply_exact_passes, calibration_ids, load_decoder
from smollm2_peers import METHODS, Bench, Row, print_rows

from mvlm_export.calibration.quantize_graph import quantize_graph
from mvlm_export.calibration.quantized_weight import WeightStore
from mvlm_export.calibration.recipe import GraphRecipe, Method, Rule
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.exporter.graphs import write_graph

OURS: tuple[tuple[Method, bool], ...] = (
    ("rtn", True),
    ("awq", True),
    ("gptq", True),
    ("awq+gptq", True),
    ("rtn", False),
    ("gptq", False),
    ("awq+gptq", False),
)
"""Methods, symmetric or not."""


def our_rows(
    bench: Bench, group_size: int, windows: int, only: tuple[str, ...]
) -> Iterator[Row]:
    """Our methods on the bench's graph."""
    config, graph = load_decoder(bench.assets)
    apply_exact_passes(config, graph)
    ids = calibration_ids(bench.assets)
    chosen = ids[np.linspace(0, len(ids) - 1, min(windows, len(ids))).astype(int)]
    feeds = [decoder_feeds(bench.session, one) for one in chosen]
    rules = () if bench.head else (Rule("lm_head", None),)
    for method, symmetric in OURS:
        label = f"{method}, {'sym' if symmetric else 'asym'}"
        if only and label not in only:
            continue
        started = time.perf_counter()
        recipe = GraphRecipe(WeightFormat(4, group_size, symmetric), method, rules=rules)
        folder = bench.work / "ours"
        shutil.rmtree(folder, ignore_errors=True)
        store = WeightStore(folder, {})
        found = quantize_graph(
            graph.copy(),
            recipe,
            store,
            lambda: feeds,
            bench.threads,
            whole_blocks=False,  # as the peers pad theirs
        )
        written = graph.copy()
        for step in found.steps():
            step.rewrite.apply(written)
        seconds = time.perf_counter() - started
        weights = [part.weight for part in found.plan.values() if part.weight is not None]
        size = sum(weight.form.stored_bytes(*weight.shape) for weight in weights)
        path = write_graph(written, bench.work / "ours-graph")
        name = f"ours: {label}, {group_size}"
        yield Row(name, size, seconds, bench.score(path))


@click.command()
@click.option("--assets", type=click.Path(path_type=Path), required=True, help="Downloads.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Graphs, 3 GB.")
@click.option("--group-size", type=click.Choice(["128", "64", "32"]), default="128")
@click.option("--calibration", default=24, show_default=True, help="Windows we calibrate on.")
@click.option("--ours", multiple=True, metavar="LABEL", help="These of ours. Default: all.")
@click.option("--peers/--no-peers", default=True, show_default=True)
@click.option("--head", is_flag=True, help="Quantize lm_head too.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    assets: Path,
    work: Path,
    group_size: str,
    calibration: int,
    ours: tuple[str, ...],
    peers: bool,
    head: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Quantize SmolLM2's decoder by our methods and the peers', and score all of them."""
    bench, rows = Bench(assets, work, threads, head), []

    def every() -> Iterator[Row]:
        yield from our_rows(bench, int(group_size), calibration, ours)
        if peers:
            yield from bench.rows(METHODS, int(group_size))

    for row in every():
        click.echo(f"{row.name}: {row.score.perplexity:.3f}", err=True)
        rows.append(row)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print_rows(rows, head)


if __name__ == "__main__":
    main()
