"""``mvlm-export``: compile a checkpoint into a bundle."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mvlm_export.engines.errors import ParityError
from mvlm_export.engines.targets import TARGETS

from ..settings import CompileSettings, ResolvedSettings, resolve_settings
from .console import (
    StageProgress,
    human_bytes,
    print_json,
    print_line,
    print_settings,
    print_table,
)
from .parity_table import print_accuracy, print_parity

if TYPE_CHECKING:
    from ..compile import CompileResult

EXAMPLES = """\b
Examples:
  mvlm-export --target cpu                          the nano model that comes along
  mvlm-export --target orin --model MobileVLM_V2-1.7B --output bundle
  mvlm-export --target orin --recipe int4 --calib-data photos --output bundle
  mvlm-export --target cpu --recipe int8-int4 --kv-cache-dtype int8
  mvlm-export --target orin --recipe int4 --budget 900MB --model MobileVLM_V2-1.7B
  mvlm-export --target rtx --recipe fp16 --json
  mvlm-export --verify-passes --dump-dir dumps      watch the graph passes work
"""


@click.command(
    "export", epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help=f"What to compile for: {', '.join(TARGETS)}.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Checkpoint folder as published. Default: the nano model that comes along.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Bundle folder. Default: MODEL-TARGET-RECIPE.bundle in the current folder.",
)
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="fp32, fp16, int8, int4, int8-int4, or a .json file. Default: the target's own.",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["int8"]),
    help="Keep keys and values in 8 bits: a quarter of float32's memory, and faster answers "
    "behind long prompts. For target cpu. Default: the recipe's, which is the graph's floats.",
)
@click.option(
    "--calib-data",
    type=click.Path(path_type=Path),
    help="Pictures, questions and answers that integers are chosen on: a folder with "
    "samples.jsonl, or LLaVA's conversation JSON. Default: those that come along.",
)
@click.option(
    "--calib-samples",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="How many of them.",
)
@click.option(
    "--budget",
    metavar="SIZE|NATS",
    help="Choose each decoder layer's bits within 350MB, or within 0.01nats of divergence, "
    "by estimates; `mvlm sensitivity` shows and measures them. With --recipe int4.",
)
@click.option("--jetpack", type=int, help="JetPack of a Jetson target: 6 (default) or 7.")
@click.option("--max-length", type=int, help="Longest sequence, prompt and answer together.")
@click.option(
    "--template", default="v1", show_default=True, help="Prompt template: v1 or plain."
)
@click.option("--overwrite", is_flag=True, help="Replace the bundle at --output.")
@click.option(
    "--allow-unknown", is_flag=True, help="Let tensors pass that the model has no place for."
)
@click.option(
    "--parity/--no-parity", default=True, show_default=True, help="Compare with PyTorch."
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help="Pictures and questions for the comparison: a folder with samples.jsonl.",
)
@click.option(
    "--stand-in/--no-stand-in",
    default=True,
    show_default=True,
    help="Also build with TensorRT-RTX, if installed, where the target's engines cannot be "
    "built here.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the comparison.")
@click.option(
    "--disable-pass",
    "disabled_passes",
    multiple=True,
    metavar="NAME",
    help="Leave a graph pass out; may be given again. docs/passes.md lists them.",
)
@click.option(
    "--enable-pass",
    "enabled_passes",
    multiple=True,
    metavar="NAME",
    help="Run an optional graph pass; may be given again.",
)
@click.option(
    "--dump-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write every graph after every pass that changed it, without weights.",
)
@click.option(
    "--verify-passes",
    is_flag=True,
    help="Run every graph before and after every pass in ONNX Runtime, and fail where the "
    "numbers change beyond rounding. Takes the memory of the largest graph in float32.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export(as_json: bool, **options: Any) -> None:
    """Compile a MobileVLM checkpoint into a bundle of graphs and engines."""
    resolved = resolve_settings(CompileSettings(**options))
    from ..compile import Compiler

    print_settings("mvlm-export", resolved.to_json())
    with StageProgress() as progress:
        result = Compiler(resolved, progress).run()
    if as_json:
        print_json({"bundle": str(resolved.output), **result.report})
    else:
        _print_result(resolved, result)
    _check_parity(result)


def _check_parity(result: CompileResult) -> None:
    """Raise ParityError if a bound was missed."""
    if result.parity is not None and not result.parity.passed:
        failures = "; ".join(result.parity.failures[:5])
        raise ParityError(
            f"the bundle is written, but does not agree with PyTorch: {failures}. "
            f"All figures: {result.bundle.path / 'report.json'}."
        )


def _print_result(resolved: ResolvedSettings, result: CompileResult) -> None:
    bundle = result.bundle
    rows = []
    for name, graph in bundle.manifest.graphs.items():
        folder = bundle.graph_path(name).parent
        size = sum(path.stat().st_size for path in folder.iterdir())
        rows.append((name, "onnx", graph.dtype, human_bytes(size)))
    for key, record in bundle.engines().items():
        rows += [
            (name, key, bundle.manifest.graphs[name].dtype, human_bytes(plan["plan_bytes"]))
            for name, plan in record["plans"].items()
        ]
    print_table(f"Bundle {resolved.output}", ("graph", "form", "dtype", "size"), rows)
    _print_passes(result.report["checks"]["passes"])
    _print_preflight(result.report["preflight"])
    if "budget" in result.report:
        _print_budget(result.report["budget"])
    _print_checks(resolved, result.report["checks"])
    if result.parity is not None:
        print_parity(result.parity)
        if result.parity.accuracy.is_quantized:
            print_accuracy(result.parity.accuracy)
    for line in next_steps(resolved):
        print_line(line)


def _print_passes(passes: dict[str, list[dict[str, Any]]]) -> None:
    """What the passes did to each graph; each of them is in ``mvlm inspect``'s table."""
    rows = []
    for name, records in passes.items():
        fired = [record for record in records if record["rewritten"]]
        changes = [record["change"] for record in fired if record["change"] is not None]
        refused = sum(len(record["refusals"]) for record in records)
        rows.append(
            (
                name,
                f"{records[0]['nodes'][0]} -> {records[-1]['nodes'][1]}",
                f"{sum(record['rewritten'] for record in fired)} by {len(fired)} passes",
                refused or "",
                f"{max(changes):.1e}" if changes else "",
            )
        )
    columns = ("graph", "nodes", "rewrites", "refused", "verified: largest change")
    shown = len(columns) if any(row[-1] for row in rows) else len(columns) - 1
    print_table("Passes", columns[:shown], [row[:shown] for row in rows])


def _print_budget(choice: dict[str, Any]) -> None:
    """How many layers became what."""
    counts = Counter(choice["chosen"].values()).most_common()
    forms = ", ".join(f"{form} in {count} layers" for form, count in counts)
    print_line(
        f"Within the budget the decoder has {human_bytes(choice['bytes'])}, and its estimated "
        f"divergence is {choice['predicted_loss']:.2g} nats: {forms}."
    )


def _print_preflight(preflight: dict[str, Any]) -> None:
    used = sum(preflight["used"].values())
    print_line(f"Tensors: {used} used, {len(preflight['ignored'])} ignored (see report.json).")
    if preflight["unknown"]:
        names = ", ".join(preflight["unknown"][:5])
        print_line(f"Let pass, {len(preflight['unknown'])} unknown tensors: {names}.")
    for note in preflight["notes"]:
        print_line(f"Note: {note}")


def _print_checks(resolved: ResolvedSettings, checks: dict[str, Any]) -> None:
    print_line(f"Operators, opset and dtypes fit {resolved.target.title}.")
    stand_in = checks.get("stand_in")
    if stand_in is not None:
        if "skipped" in stand_in:
            print_line(f"Stand-in build skipped: {stand_in['skipped']}")
        else:
            sizes = ", ".join(
                f"{name} {human_bytes(plan['plan_bytes'])}" for name, plan in stand_in.items()
            )
            print_line(f"TensorRT-RTX parsed and built them as a stand-in ({sizes}).")
    estimate = checks["estimate"]
    if estimate["tokens_per_second"] is not None:
        print_line(
            f"Estimate, not measured: weights {human_bytes(estimate['weights'])} + cache "
            f"{human_bytes(estimate['cache'])} of {human_bytes(estimate['memory'])}; decode "
            f"{estimate['tokens_per_second']:.0f} tokens/s = {estimate['efficiency']:.0%} of "
            f"{estimate['bandwidth_gb_s']} GB/s over "
            f"{human_bytes(estimate['read_per_token'])} a token."
        )
    if estimate["plan"]["verdict"] in VERDICTS:
        print_line(memory_verdict(resolved.target.title, estimate["plan"]))


VERDICTS = {
    "fits": "It fits {title}, to build and to run",
    "runs only": "Warning: it fits {title} to run but not to build: add swap for the builder, "
    "or choose a smaller model, recipe or --max-length",
    "too small": "Warning: it does not fit {title}: choose a smaller model, recipe or "
    "--max-length, or a larger module",
}
"""What is said of a memory plan, by its verdict; nothing of one whose module is not known."""


def memory_verdict(title: str, plan: dict[str, Any]) -> str:
    """The verdict of ``MemoryPlan.to_json`` as a sentence, with the arithmetic's sums."""
    verdict = VERDICTS[plan["verdict"]].format(title=title)
    return (
        f"{verdict} ({human_bytes(plan['run_bytes'])} to run, "
        f"{human_bytes(plan['build_bytes'])} to build, of {human_bytes(plan['available'])} "
        "that the system leaves)."
    )


def next_steps(resolved: ResolvedSettings) -> list[str]:
    """The next commands to type."""
    path, name = shlex.quote(str(resolved.output)), shlex.quote(resolved.output.name)
    run = f"mvlm run {path} --image PICTURE --prompt 'QUESTION'"
    if not resolved.target.has_engines:
        return [f"Next: {run}"]
    steps = [f"Next, through ONNX Runtime on this machine's CPU: {run}"]
    if resolved.builds_here:
        backend = resolved.target.runtime
        compare = f"mvlm parity {path} --backend {backend}"
        steps.append(f"The plans too against PyTorch, where there is a GPU: {compare}")
    else:
        steps.insert(0, f"On the device, after copying {path} there: mvlm build {name}")
    return steps
