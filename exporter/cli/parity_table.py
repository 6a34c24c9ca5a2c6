"""Figures of a comparison with PyTorch as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mvlm_export.engines.targets import RUNTIME_TITLES

from .console import human_bytes, print_line, print_table

if TYPE_CHECKING:
    from ..accuracy_report import AccuracyReport, TokenAccuracy
    from ..parity import EndToEndParity, GraphParity, ParityReport


WORTH_A_TABLE = 10
"""Questions of each kind from which shares by kind say something."""

DIFFERENCES_SHOWN = 5
"""Of answers that differ; report.json has all."""

LAYERS_SHOWN = 5


def _graph_row(graph: GraphParity) -> tuple[object, ...]:
    return (
        graph.graph,
        graph.precision,
        f"{graph.values.max_abs:.1e}",
        f"{graph.values.relative:.1e}",
        f"{graph.values.cosine:.6f}",
        None if graph.kl_mean is None else f"{graph.kl_mean:.1e}",
        None if graph.kl is None else f"{graph.kl:.1e}",
        None if graph.top1 is None else f"{graph.top1:.2%}",
        None if graph.cache is None else f"{graph.cache.relative:.1e}",
        "missed" if graph.failures else "ok",
    )


def print_parity(report: ParityReport) -> None:
    """The comparison with PyTorch: graphs, then answers."""
    columns = ("graph", "precision", "max abs", "relative", "cosine")
    tokens = ("KL mean", "worst", "top-1", "cache rel.", "")
    rows = [_graph_row(graph) for graph in report.graphs]
    title = f"Parity of {RUNTIME_TITLES[report.backend]} with PyTorch float32"
    print_table(title, (*columns, *tokens), rows)
    _print_end_to_end(report.end_to_end)


def _print_end_to_end(answers: EndToEndParity) -> None:
    ties = f", {answers.ties} part at a tie of PyTorch's own" if answers.ties else ""
    different = f", {len(answers.differences)} differ" if answers.differences else ""
    print_line(
        f"Greedy answers: {answers.equal} of {answers.samples} equal PyTorch's token by "
        f"token{ties}{different}."
    )
    for text in answers.differences[:DIFFERENCES_SHOWN]:
        print_line(f"  {text}")
    if len(answers.differences) > DIFFERENCES_SHOWN:
        print_line("  The others are in report.json.")
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


def print_accuracy(report: AccuracyReport) -> None:
    """What the bundle's numbers take, what each layer lost, what reaches the answers."""
    _print_weights(report)
    if report.layers:
        rows = [
            (noise.graph, noise.layer, noise.form, f"{noise.sqnr_db:.1f}")
            for noise in report.worst_layers(LAYERS_SHOWN)
        ]
        print_table(
            f"Lowest signal to quantization noise of {len(report.layers)} weights",
            ("graph", "layer", "form", "dB"),
            rows,
        )
    _print_tokens(report.tokens)


def _print_weights(report: AccuracyReport) -> None:
    held = ("int8", "int4", "scales", "float32", "float16", "other")
    shown = [name for name in held if any(name in v for v in report.weight_bytes.values())]
    rows = [
        (
            graph,
            report.precision[graph],
            *(human_bytes(sizes[name]) if name in sizes else None for name in shown),
            human_bytes(sum(sizes.values())),
        )
        for graph, sizes in report.weight_bytes.items()
    ]
    print_table("Weights", ("graph", "precision", *shown, "total"), rows)


def _print_tokens(tokens: TokenAccuracy) -> None:
    """Of teacher-forced answers, from picture to logits."""
    rows: list[tuple[str, str, str | None]] = [
        ("KL, mean", f"{tokens.kl_mean:.2e} nats", None),
        ("KL, 99th percentile", f"{tokens.kl_p99:.2e} nats", None),
        ("KL, largest", f"{tokens.kl_max:.2e} nats", None),
        ("top-1 agreement", f"{tokens.top1:.2%}", None),
    ]
    if tokens.perplexity is not None:
        reference = f"{tokens.reference_perplexity:.4f}"
        rows.append(("perplexity", f"{tokens.perplexity:.4f}", reference))
    print_table(
        f"Forced: {tokens.tokens} tokens of {tokens.answers} answers, "
        f"{tokens.true_answers} true",
        ("figure", "here", "PyTorch"),
        rows,
    )
