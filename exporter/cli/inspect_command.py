"""``mvlm inspect``: what a graph or a bundle is made of, what changed, and pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path

import click

from mvlm_export.engines.bundle import MANIFEST
from mvlm_export.engines.errors import InputError, MvlmError

from .console import print_json, print_line

Show = Callable[[bool], None]
"""Prints what was found; True for JSON."""

EXAMPLES = """\b
Examples:
  mvlm inspect bundle
  mvlm inspect bundle/decoder/model.onnx --set S=200,T=0
  mvlm inspect --diff before.onnx after.onnx
  mvlm inspect bundle/projector/model.onnx --svg projector.svg
  mvlm inspect bundle/decoder/model.onnx --svg layer.svg --around "model.layers.0.*"
  mvlm inspect bundle/decoder/model.onnx --svg part.svg --around logits --depth 5

\b
A GRAPH is an .onnx file; its data file is not read and may be missing. MACs are
multiply-accumulates of products, convolutions and attention for given values of
the dynamic axes: B images, S new tokens, T tokens in the cache. For a decoder
they are shown for a prefill (S=256, T=0) and a decode step (S=1, T=1024), or what
its cache holds. Of a cache of fixed size GroupQueryAttention reads the T filled rows
alone; Attention behind a TensorScatter computes all rows, and is counted so.
"""


@click.command("inspect", epilog=EXAMPLES)
@click.argument(
    "path", type=click.Path(path_type=Path), required=False, metavar="GRAPH|BUNDLE"
)
@click.option(
    "--diff",
    type=click.Path(path_type=Path),
    nargs=2,
    metavar="A B",
    help="Compare two graphs, or two bundles.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="AXIS=N",
    help="Value of a dynamic axis; may be given again, or as S=200,T=0.",
)
@click.option(
    "--svg",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the graph into this file; with --diff, both side by side.",
)
@click.option(
    "--around",
    metavar="NAME",
    help="Draw what is near a node or tensor, or what a pattern names: 'model.layers.0.*'.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    help="Steps around it that are drawn. Default: 3; 0 for a pattern.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(
    path: Path | None,
    diff: tuple[Path, Path] | None,
    settings: tuple[str, ...],
    svg: Path | None,
    around: str | None,
    depth: int | None,
    as_json: bool,
) -> None:
    """Say what a graph or a bundle is made of, compare two, draw a graph."""
    path = None if path is None else _without_manifest(path)
    diff = None if diff is None else (_without_manifest(diff[0]), _without_manifest(diff[1]))
    paths: tuple[Path, ...] = diff or ((path,) if path else ())
    _check_options(path, diff, svg, around, depth)
    from .inspect_report import parse_axes

    axes = parse_axes(settings)
    show = _compare(*diff, axes) if diff else _inspect(paths[0], axes)
    if svg is not None:
        _draw(paths, svg, around, depth)
    show(as_json)
    if svg is not None and not as_json:
        print_line(f"Drawn: {svg}")


def _without_manifest(path: Path) -> Path:
    """A bundle may be named by its manifest; from here on it is its folder."""
    return path.parent if path.name == MANIFEST and path.is_file() else path


def _check_options(
    path: Path | None,
    diff: tuple[Path, Path] | None,
    svg: Path | None,
    around: str | None,
    depth: int | None,
) -> None:
    """Refuse options that do not go together, and paths that are not there."""
    if (path is None) == (diff is None):
        raise InputError(
            "Name one GRAPH or BUNDLE, or two with --diff A B. `mvlm inspect --help` has "
            "examples."
        )
    if around is not None and svg is None:
        raise InputError("--around says what to draw: add --svg FILE.svg.")
    if depth is not None and around is None:
        raise InputError("--depth is counted from a node: add --around NODE_OR_TENSOR.")
    for item in diff or ([path] if path else []):
        if not item.exists():
            raise InputError(
                f"{item} does not exist. Give an .onnx file or a bundle's folder."
            )
        if svg is not None and item.is_dir():
            raise InputError(
                f"{item} is a bundle, and one graph is drawn at a time. Give "
                f"{item / 'decoder' / 'model.onnx'}, say."
            )
        if svg is not None and svg.exists() and svg.samefile(item):
            raise InputError(f"--svg {svg} would replace the graph. Choose another file.")


def _inspect(path: Path, axes: Mapping[str, int]) -> Show:
    from .inspect_report import inspect_bundle, inspect_graph, require_axes
    from .inspect_tables import print_bundle, print_graph

    if path.is_dir():
        bundle = inspect_bundle(path, axes)
        require_axes(axes, bundle.graphs.values())

        def show_bundle(as_json: bool) -> None:
            if as_json:
                print_json({"kind": "bundle", **bundle.to_json()})
            else:
                print_bundle(bundle)

        return show_bundle
    graph = inspect_graph(path, axes)
    require_axes(axes, [graph])

    def show_graph(as_json: bool) -> None:
        if as_json:
            print_json({"kind": "graph", **graph.to_json()})
        else:
            print_graph(graph)

    return show_graph


def _compare(before: Path, after: Path, axes: Mapping[str, int]) -> Show:
    from .inspect_report import compare_paths
    from .inspect_tables import print_comparison

    reports = compare_paths(before, after, axes)

    def show(as_json: bool) -> None:
        if as_json:
            graphs = [report.to_json() for report in reports]
            print_json({"kind": "comparison", "graphs": graphs})
            return
        for report in reports:
            print_comparison(report)

    return show


def _draw(paths: tuple[Path, ...], svg: Path, around: str | None, depth: int | None) -> None:
    from mvlm_export.passes.draw import draw_difference, draw_graph
    from mvlm_export.passes.graph_io import load_graph

    with redirect_stdout(io.StringIO()):  # gs prints its warnings, amid JSON as well
        graphs = [load_graph(path) for path in paths]
    titles = [str(path) for path in paths]
    if len(graphs) == 1:
        picture = draw_graph(graphs[0], None, around, depth)
    else:
        picture = draw_difference(graphs[0], graphs[1], (titles[0], titles[1]), around, depth)
    try:
        svg.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise MvlmError(
            f"{svg} cannot be written ({error.strerror or error}). Choose another --svg."
        ) from error
