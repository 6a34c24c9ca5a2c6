"""What the passes save: each graph as captured and as shipped for the CPU, in one run.

Both bundles come from the compiler, one with every pass disabled; latencies are taken through
the runtime's own sessions. Rounds alternate between the two, each opening its graph anew, so
that the memory is that of one graph and drift of the machine meets both.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from random_checkpoint import write_random_checkpoint

from mvlm_export.engines.backends import open_backend
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.session import BackendOptions
from mvlm_export.exporter.cli.console import StageProgress, human_bytes, print_table
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.settings import CompileSettings, nano_checkpoint
from mvlm_export.passes.pass_names import pass_names
from mvlm_export.passes.statistics import file_statistics

FORMS = ("captured", "shipped")
PROMPT, PAST = 200, 200
"""Rows of the prefill, and rows in the cache before a decode step."""


@dataclass(frozen=True)
class Row:
    """One graph in one phase; pairs are (captured, shipped)."""

    graph: str
    phase: str
    nodes: tuple[int, int]
    macs: tuple[int, int]
    weight_bytes: tuple[int, int]
    milliseconds: tuple[float, float]


PHASES: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("vision_encoder", "one image", {"B": 1}),
    ("projector", "one image", {"B": 1}),
    ("decoder", f"prefill of {PROMPT}", {"S": PROMPT, "T": 0, "I": 1}),
    ("decoder", f"decode after {PAST}", {"S": 1, "T": PAST, "I": 1}),
)


def compile_both(model: Path, folder: Path) -> tuple[Bundle, Bundle]:
    """The bundle without any pass, and the one that users get."""
    bundles = []
    for form in FORMS:
        disabled = tuple(pass_names()) if form == "captured" else ()
        settings = CompileSettings(
            output=folder / form, model=model, parity=False, disabled_passes=disabled
        )
        with StageProgress() as progress:
            bundles.append(compile_checkpoint(settings, progress).bundle)
    return bundles[0], bundles[1]


def step_of(
    bundle: Bundle, graph: str, axes: dict[str, int], threads: int
) -> Callable[[], None]:
    """Open a graph; what runs it once."""
    backend = open_backend(bundle, "onnxruntime", BackendOptions(threads=threads))
    generator = np.random.default_rng(0)
    if graph == "decoder":
        decoder, model = backend.open_decoder(), bundle.manifest.model
        cache = decoder.new_cache()
        embeds = np.zeros((1, model.hidden_size), np.float32)
        ids = generator.integers(0, model.vocab_size, PROMPT + PAST).astype(np.int32)
        if axes["T"]:
            decoder.append(cache, ids[: axes["T"]], embeds)

        def step() -> None:
            cache.truncate(axes["T"])
            decoder.append(cache, ids[: axes["S"]], embeds)

        return step
    session = backend.open_graph(graph)
    (spec,) = bundle.manifest.graphs[graph].inputs
    shape = [axes.get(str(axis), axis) for axis in spec.shape]
    values = generator.integers(0, 256, shape).astype(spec.dtype)

    def run() -> None:
        session.run(values)

    return run


def time_phase(
    bundles: tuple[Bundle, Bundle], graph: str, axes: dict[str, int], rounds: int, threads: int
) -> tuple[float, float]:
    """Median milliseconds of each form."""
    taken: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(rounds):
        for form, bundle in enumerate(bundles):
            step = step_of(bundle, graph, axes, threads)
            step()
            started = time.perf_counter()
            step()
            repeats = max(3, min(50, int(1 / (time.perf_counter() - started))))
            for _ in range(repeats):
                started = time.perf_counter()
                step()
                taken[form].append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken[0]), statistics.median(taken[1])


def measure(bundles: tuple[Bundle, Bundle], rounds: int, threads: int) -> list[Row]:
    """All phases."""
    rows = []
    for graph, phase, axes in PHASES:
        before, after = (file_statistics(b.graph_path(graph), axes) for b in bundles)
        rows.append(
            Row(
                graph,
                phase,
                (before.nodes, after.nodes),
                (before.macs.total, after.macs.total),
                (before.weight_bytes, after.weight_bytes),
                time_phase(bundles, graph, axes, rounds, threads),
            )
        )
    return rows


def print_rows(title: str, rows: list[Row]) -> None:
    """The table."""
    print_table(
        title,
        ("graph", "phase", "nodes", "MACs", "weights", "ms", "speed-up"),
        [
            (
                row.graph,
                row.phase,
                f"{row.nodes[0]} -> {row.nodes[1]}",
                f"{row.macs[0] / 1e9:.3f} -> {row.macs[1] / 1e9:.3f} G",
                " -> ".join(human_bytes(size) for size in row.weight_bytes),
                f"{row.milliseconds[0]:.2f} -> {row.milliseconds[1]:.2f}",
                f"{row.milliseconds[0] / row.milliseconds[1]:.2f}x",
            )
            for row in rows
        ],
    )


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Checkpoint. Default: nano.")
@click.option("--geometry", help="Random weights of v2-1.7b, v2-3b or v2-7b instead.")
@click.option("--rounds", default=3, show_default=True, help="Alternations of the two forms.")
@click.option("--threads", default=2, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Where large files go.")
@click.option("--json", "as_json", is_flag=True)
def main(
    model: Path | None,
    geometry: str | None,
    rounds: int,
    threads: int,
    work: Path | None,
    as_json: bool,
) -> None:
    """Measure each graph as captured and as shipped."""
    with tempfile.TemporaryDirectory(prefix="mvlm-bench-", dir=work) as folder:
        source = model or nano_checkpoint()
        if geometry is not None:
            source = Path(folder) / geometry
            write_random_checkpoint(source, geometry)
        rows = measure(compile_both(source, Path(folder)), rounds, threads)
    if as_json:
        machine = {"machine": platform.platform(), "threads": threads, "rounds": rounds}
        click.echo(json.dumps({**machine, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print_rows(f"{source.name}, float32, ONNX Runtime CPU, {threads} threads", rows)


if __name__ == "__main__":
    main()
