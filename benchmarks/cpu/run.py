"""All engines on this CPU, side by side in one interleaved run.

    python benchmarks/cpu/run.py --work DIR --json cpu.json --plot cpu.svg

The first run installs the peers and makes their files (an hour, 25 GB); later ones reuse it.
Every round goes through all engines in another order. An engine is started anew each time, so
that its load time and memory are its own and nothing else runs beside it; it is warmed up,
then answers once: the picture, a prompt of 200 tokens and 256 greedy tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from catalogue import PEERS, Engine, our_engine
from environments import HERE
from measurement import Measurement
from plot import svg
from preparation import SOURCE_BUNDLE, Preparation, only_run, say_to_stderr
from table import markdown, ratios

from mvlm_export.engines.atomic_write import write_whole


def parse_bundles(given: Sequence[str]) -> dict[str, str]:
    """``NAME=RECIPE`` to recipes by name."""
    recipes = {}
    for text in given:
        name, equals, recipe = text.partition("=")
        if not (name and equals and recipe):
            raise click.UsageError(f"--bundle {text!r} is not NAME=RECIPE.")
        recipes[name] = recipe
    return recipes


def choose(recipes: Mapping[str, str], names: str | None) -> list[Engine]:
    """Our bundles and the peers, or those of them that are named; partners come along."""
    every = [our_engine(name) for name in recipes] + list(PEERS)
    if names is None:
        return every
    known = {engine.name: engine for engine in every}
    wanted = [name.strip() for name in names.split(",")]
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise click.UsageError(
            f"There is no engine {', '.join(unknown)}; choose of {', '.join(known)}."
        )
    partners = {known[name].encoder for name in wanted}
    return [e for e in every if e.name in wanted or e.name in partners]


def report(measured: Measurement, plot: Path | None) -> None:
    """Print tables, draw the picture."""
    results = measured.results()
    bandwidth = results.bandwidth()
    if bandwidth is None:
        click.echo("Nothing was measured.")
        return
    click.echo(markdown(results))
    click.echo(
        f"\nRead bandwidth {bandwidth.median:.1f} GB/s "
        f"({bandwidth.low:.1f}-{bandwidth.high:.1f}).\n"
    )
    for name in results.subjects:
        if name.startswith("ours-"):
            click.echo(ratios(results, name) + "\n")
    for name, error in measured.failures.items():
        click.echo(f"{name} failed: {error}")
    if plot is not None:
        plot.write_text(svg(results, measured.heading()), encoding="utf-8")


def compare(
    measured: Measurement, chosen: Sequence[Engine], rounds: int, json_file: Path | None
) -> Measurement:
    """Prepare, then all rounds; what is there is saved after each engine, and at Ctrl-C."""

    def save() -> None:
        if json_file is not None:
            content = json.dumps(measured.to_json(), indent=1)
            write_whole(json_file, memoryview(content.encode()))

    try:
        measured.prepare(chosen, say_to_stderr)
        for round_ in range(rounds):
            order = list(measured.ready)
            random.Random(round_).shuffle(order)
            for place, engine in enumerate(order):
                at = f"round {round_ + 1} of {rounds}, {place + 1} of {len(order)}"
                say_to_stderr(f"{at}: {engine.name}")
                measured.measure(engine, round_)
                save()
    except KeyboardInterrupt:
        say_to_stderr("interrupted; what was measured follows")
    save()
    return measured


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Large files.")
@click.option("--geometry", default="v2-1.7b", show_default=True, help="Or mini, to try.")
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    metavar="NAME=RECIPE",
    help="A bundle of ours: a recipe, a JSON file, or a compiled bundle's folder. "
    f"Default: {SOURCE_BUNDLE}.",
)
@click.option("--engines", metavar="A,B", help="Only these.")
@click.option("--list", "only_list", is_flag=True, help="Print the engines' names and stop.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--tokens", default=256, show_default=True, type=click.IntRange(2))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="All figures.")
@click.option("--plot", type=click.Path(path_type=Path), help="An SVG picture.")
def main(
    work: Path,
    geometry: str,
    bundles: Sequence[str],
    engines: str | None,
    only_list: bool,
    rounds: int,
    tokens: int,
    threads: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Measure all engines side by side."""
    recipes = parse_bundles(bundles) or {SOURCE_BUNDLE: str(HERE / f"{SOURCE_BUNDLE}.json")}
    chosen = choose(recipes, engines)
    if only_list:
        click.echo("\n".join(f"{engine.name:28} {engine.title}" for engine in chosen))
        return
    try:
        with only_run(work.resolve()):
            measured = compare(
                Measurement(
                    Preparation(work.resolve(), geometry, recipes), geometry, tokens, threads
                ),
                chosen,
                rounds,
                json_file,
            )
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    report(measured, plot)


if __name__ == "__main__":
    main()
