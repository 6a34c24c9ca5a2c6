"""Parity figures as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import print_line, print_table

if TYPE_CHECKING:
    from ..parity import EndToEndParity, GraphParity, ParityReport


WORTH_A_TABLE = 10
"""Questions of each kind from which shares by kind say something."""


def _graph_row(graph: GraphParity) -> tuple[object, ...]:
    return (
        graph.graph,
        graph.dtype,
        f"{graph.values.max_abs:.1e}",
        f"{graph.values.relative:.1e}",
        f"{graph.values.cosine:.6f}",
        None if graph.kl is None else f"{graph.kl:.1e}",
        None if graph.top1 is None else f"{graph.top1:.2%}",
        None if graph.cache is None else f"{graph.cache.relative:.1e}",
        "missed" if graph.failures else "ok",
    )


def print_parity(report: ParityReport) -> None:
    """The comparison with PyTorch: graphs, then answers."""
    columns = ("graph", "dtype", "max abs", "relative", "cosine", "KL nats", "top-1")
    rows = [_graph_row(graph) for graph in report.graphs]
    print_table("Parity with PyTorch float32", (*columns, "cache rel.", ""), rows)
    _print_end_to_end(report.end_to_end)


def _print_end_to_end(answers: EndToEndParity) -> None:
    ties = f", {answers.ties} part at a tie of PyTorch's own" if answers.ties else ""
    print_line(
        f"Greedy answers: {answers.equal} of {answers.samples} equal PyTorch's token by "
        f"token{ties}."
    )
    if answers.accuracy is not None and answers.reference_accuracy is not None:
        print_line(
            f"Exact answers: {answers.accuracy:.1%} here, "
            f"{answers.reference_accuracy:.1%} in PyTorch."
        )
    fewest = min((kind["samples"] for kind in answers.by_kind.values()), default=0)
    if fewest >= WORTH_A_TABLE:
        rows = [
            (kind, v["samples"], f"{v['accuracy']:.1%}", f"{v['reference_accuracy']:.1%}")
            for kind, v in answers.by_kind.items()
        ]
        print_table("By kind of question", ("kind", "questions", "here", "PyTorch"), rows)
