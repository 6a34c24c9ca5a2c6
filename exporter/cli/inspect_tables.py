"""Tables of ``mvlm inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mvlm_export.engines.targets import get_target

from .console import human_bytes, print_line, print_table

if TYPE_CHECKING:
    from mvlm_export.passes.comparison import Change, Comparison, TensorChange
    from mvlm_export.passes.statistics import TensorInfo

    from .inspect_report import BundleReport, ComparisonReport, GraphReport, Workload

SHOWN_TENSORS = 8
SHOWN_REFUSALS = 12
Row = tuple[object, ...]


def human_macs(count: int) -> str:
    """1234567890 -> ``1.23 G``."""
    size = float(count)
    for unit in ("", " k", " M", " G"):
        if size < 1000:
            return f"{size:.0f}" if not unit else f"{size:.3g}{unit}"
        size /= 1000
    return f"{size:.3g} T"


def tensor_text(tensor: TensorInfo | None) -> str:
    """``float32 [B, 64, 256]``; a dash for none."""
    if tensor is None:
        return "-"
    if tensor.shape is None:
        return f"{tensor.dtype} of unknown shape"
    axes = ", ".join("?" if axis is None else str(axis) for axis in tensor.shape)
    return f"{tensor.dtype} [{axes}]"


def print_graph(report: GraphReport) -> None:
    """One graph: facts, operators with their products, weights, inputs and outputs."""
    found = report.statistics
    print_table(str(report.path), ("", ""), list(_facts(report)))
    titles = [f"MACs {item.title}" for item in report.workloads]
    print_table("Operators", ("operator", "nodes", *titles), list(_operator_rows(report)))
    rows = [
        (dtype, total.count, f"{total.elements:,}", human_bytes(total.bytes))
        for dtype, total in found.weights.items()
    ]
    print_table("Weights by dtype", ("dtype", "tensors", "elements", "size"), rows)
    largest = [
        (weight.name, f"{weight.dtype} {list(weight.shape)}", human_bytes(weight.bytes))
        for weight in found.largest
    ]
    print_table("Largest weights", ("name", "", "size"), largest)
    tensors = [*_tensor_rows("input", found.inputs), *_tensor_rows("output", found.outputs)]
    print_table("Inputs and outputs", ("", "name", ""), tensors)
    for line in uncounted_lines(report):
        print_line(line)


def _facts(report: GraphReport) -> Iterator[Row]:
    found = report.statistics
    domains = "".join(f", {name} {version}" for name, version in found.domains.items())
    yield "graph", found.name
    yield "nodes", found.nodes
    yield "opset", f"{found.opset}{domains} (IR version {found.ir_version})"
    for item in report.workloads:
        yield f"MACs {item.title}", _macs(item)
    yield "weights", f"{human_bytes(found.weight_bytes)} in {found.weight_count} tensors"
    for name, size in report.file_bytes.items():
        yield "file", f"{name}, {'missing' if size is None else human_bytes(size)}"


def _macs(workload: Workload) -> str:
    missing = len(workload.macs.uncounted)
    note = f" and {missing} node{'s' if missing > 1 else ''} not counted" if missing else ""
    return human_macs(workload.macs.total) + note


def _operator_rows(report: GraphReport) -> Iterator[Row]:
    for operator, nodes in report.statistics.operators.items():
        counts = [_operator_macs(item, operator) for item in report.workloads]
        yield (operator, nodes, *counts)


def _operator_macs(workload: Workload, operator: str) -> str:
    missing = sum(item.operator == operator for item in workload.macs.uncounted)
    count = workload.macs.by_operator.get(operator)
    shown = [] if count is None else [human_macs(count)]
    if missing:
        shown.append(f"{missing} not counted")
    return " + ".join(shown)


def uncounted_lines(report: GraphReport) -> list[str]:
    """What the totals leave out, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for workload in report.workloads:
        for item in workload.macs.uncounted:
            text = f"{item.operator}: {item.reason}"
            names = reasons.setdefault(text, [])
            if item.node not in names:
                names.append(item.node)
    return [
        f"Not counted: {text} ({', '.join(names[:3])}"
        f"{f' and {len(names) - 3} more' if len(names) > 3 else ''})."
        for text, names in reasons.items()
    ]


def _tensor_rows(role: str, tensors: Sequence[TensorInfo]) -> Iterator[Row]:
    for tensor in tensors[:SHOWN_TENSORS]:
        yield role, tensor.name, tensor_text(tensor)
    if len(tensors) > SHOWN_TENSORS:
        rest = tensors[SHOWN_TENSORS:]
        yield role, f"and {len(rest)} more to {rest[-1].name}", tensor_text(rest[-1])


def print_bundle(report: BundleReport) -> None:
    """A bundle: facts, graphs, passes, engines."""
    print_table(str(report.bundle.path), ("", ""), list(_bundle_facts(report)))
    columns = ("graph", "dtype", "nodes", "MACs", "weights", "inputs and outputs")
    print_table("Graphs", columns, [_graph_row(report, name) for name in report.graphs])
    for name, records in report.passes.items():
        print_passes(name, records)
    for folder, record in report.engines.items():
        rows = [
            (graph, plan["plan_path"], _bytes_or_dash(plan.get("plan_bytes")))
            for graph, plan in record["plans"].items()
        ]
        print_table(f"Engines {folder}", ("graph", "plan", "size"), rows)
    for graph in report.graphs.values():
        for line in uncounted_lines(graph):
            print_line(line)


def _bytes_or_dash(count: object) -> str:
    return human_bytes(count) if isinstance(count, int) else "-"


def _bundle_facts(report: BundleReport) -> Iterator[Row]:
    manifest = report.bundle.manifest
    jetpack = f" (JetPack {manifest.jetpack})" if manifest.jetpack else ""
    yield "model", manifest.model.name
    yield "target", f"{manifest.target}{jetpack}"
    yield "recipe", manifest.recipe
    yield "cache", f"{manifest.kv_form}, {manifest.model.max_positions} positions at most"
    prefix = report.prefix_tokens
    yield "prompt prefix", "none" if prefix is None else f"{prefix} tokens"
    has_engines = get_target(manifest.target, manifest.jetpack).has_engines
    absent = "none; `mvlm build` makes them" if has_engines else "none: it runs the graphs"
    yield "engines", ", ".join(report.engines) or absent
    yield "files", f"{len(report.files)}, {human_bytes(sum(report.files.values()))}"
    for name, size in sorted(report.files.items(), key=lambda item: -item[1])[:5]:
        yield "", f"{name}, {human_bytes(size)}"


def _graph_row(report: BundleReport, name: str) -> Row:
    graph = report.graphs[name]
    found = graph.statistics
    macs = "\n".join(f"{_macs(item)} ({item.title})" for item in graph.workloads)
    weights = "\n".join(f"{d} {human_bytes(t.bytes)}" for d, t in found.weights.items())
    dtype = report.bundle.manifest.graphs[name].dtype
    return name, dtype, found.nodes, macs, weights, _signature(graph)


def _signature(graph: GraphReport) -> str:
    """Inputs and outputs in a few lines."""
    lines = []
    found = graph.statistics
    for arrow, tensors in (("in", found.inputs), ("out", found.outputs)):
        for tensor in tensors[:3]:
            lines.append(f"{arrow} {tensor.name} {tensor_text(tensor)}")
        if len(tensors) > 3:
            lines.append(f"{arrow} and {len(tensors) - 3} more to {tensors[-1].name}")
    return "\n".join(lines)


def print_passes(graph: str, records: Sequence[Mapping[str, Any]]) -> None:
    """What the compiler's passes did to one graph."""
    busy = [record for record in records if record.get("matched")]
    rows = [
        (
            record.get("name"),
            f"{record.get('rewritten')} of {record.get('matched')}",
            _pair(record.get("nodes"), str),
            _pair(record.get("bytes"), human_bytes),
        )
        for record in busy
    ]
    if rows:
        columns = ("pass", "rewritten", "nodes", "weights")
        print_table(f"Passes on {graph}", columns, rows)
    used = {record.get("name") for record in busy}
    idle = dict.fromkeys(
        str(record["name"]) for record in records if record["name"] not in used
    )
    if idle:
        print_line(f"Passes that found nothing in {graph}: {', '.join(idle)}.")
    refusals = [
        f"Refused by {record.get('name')}: {refusal.get('node')}: {refusal.get('reason')}."
        for record in busy
        for refusal in record.get("refusals") or ()
    ]
    for line in refusals[:SHOWN_REFUSALS]:
        print_line(line)
    if len(refusals) > SHOWN_REFUSALS:
        print_line(f"And {len(refusals) - SHOWN_REFUSALS} more refusals; --json has them all.")


def _pair(value: object, show: Any) -> str:  # noqa: ANN401
    """``[3, 5]`` as ``3 → 5``; one figure if nothing changed."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return ""
    before, after = map(show, value)
    return f"{before} → {after}" if before != after else str(after)


def print_comparison(report: ComparisonReport) -> None:
    """What changed from one graph to another."""
    found = next(iter(report.comparisons.values()))
    title = f"{report.graph or report.before} → {report.graph or report.after}"
    columns = ("", "before", "after", "ratio")
    print_table(title, columns, list(_figure_rows(report, found)))
    changes = sorted(found.operators.items(), key=lambda item: item[1].difference)
    operators = [
        (name, change.before, change.after, f"{change.difference:+d}")
        for name, change in changes
    ]
    if operators:
        print_table("Nodes by operator", ("operator", "before", "after", ""), operators)
    tensors = [
        *_tensor_change_rows("input", found.inputs),
        *_tensor_change_rows("output", found.outputs),
    ]
    if tensors:
        print_table("Inputs and outputs", ("", "name", "before", "after"), tensors)
    elif not operators:
        print_line("The same operators, inputs and outputs.")


def _figure_rows(report: ComparisonReport, found: Comparison) -> Iterator[Row]:
    yield _change_row("nodes", found.nodes, str)
    for use, comparison in report.comparisons.items():
        yield _change_row(f"MACs {use}", comparison.macs, human_macs)
        missing = comparison.uncounted
        if missing.before or missing.after:
            yield _change_row("  nodes not counted", missing, str)
    yield _change_row("weights", found.bytes, human_bytes)
    for dtype, change in found.bytes_by_dtype.items():
        yield _change_row(f"  {dtype}", change, human_bytes)


def _change_row(title: str, change: Change, show: Any) -> Row:  # noqa: ANN401
    ratio = "" if change.ratio is None else f"{change.ratio:.3g}"
    return title, show(change.before), show(change.after), ratio


def _tensor_change_rows(role: str, changes: Sequence[TensorChange]) -> Iterator[Row]:
    for item in changes[:SHOWN_TENSORS]:
        yield role, item.name, tensor_text(item.before), tensor_text(item.after)
    if len(changes) > SHOWN_TENSORS:
        yield role, f"and {len(changes) - SHOWN_TENSORS} more; see --json", "", ""
