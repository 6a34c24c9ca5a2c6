"""``mvlm estimate``: memory and speed of a model on a device, before anything is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mvlm_export.engines.errors import EngineError

from .console import human_bytes, print_json, print_line, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mvlm_export.engines.memory_plan import MemoryPlan, Part

    from ..estimate import ModelEstimate
    from ..estimate_proposals import Proposal, Request
    from ..estimate_speed import Phase

EXAMPLES = """\b
Examples:
  mvlm estimate --model v2-1.7b --target orin-nano --recipe int4
  mvlm estimate --model v2-7b --target orin-nano-4gb      refused, with what fits instead
  mvlm estimate --model MobileVLM_V2-3B --target orin-nx --max-length 1024
  mvlm estimate --model v2-3b --all

\b
Nothing is exported and nothing is measured: docs/estimate.md has the formulas. The exit
code is 2 where the model does not fit to run. Where it fits to run but not to build, that
is said, and the exit code is 0.
"""
RECIPES_SHOWN = ("fp16", "int8", "int4")
"""What ``--all`` compares."""


@click.command("estimate", epilog=EXAMPLES)
@click.option(
    "--model",
    metavar="NAME|FOLDER",
    help="v2-1.7b, v2-3b, v2-7b, or a checkpoint folder, of which config.json alone is read. "
    "Default: the nano model that comes along.",
)
@click.option("--target", default="orin", show_default=True, metavar="NAME", help="Device.")
@click.option(
    "--recipe", metavar="NAME|FILE", help="As of mvlm-export. Default: the target's own."
)
@click.option("--max-length", type=int, help="Longest sequence, prompt and answer together.")
@click.option("--jetpack", type=int, help="JetPack of a Jetson target: 6 (default) or 7.")
@click.option(
    "--all", "everything", is_flag=True, help="Every Jetson module with fp16, int8 and int4."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def estimate(
    model: str | None,
    target: str,
    recipe: str | None,
    max_length: int | None,
    jetpack: int | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Say what a model takes of a device's memory and how fast it can answer there."""
    request = make_request(model, target, recipe, max_length, jetpack)
    if everything:
        _print_all(request, jetpack, as_json)
        return
    from ..estimate_proposals import propose

    found, proposals = request.estimate(), propose(request)
    if as_json:
        offered = [proposal.to_json() for proposal in proposals]
        print_json({**found.to_json(), "proposals": offered})
    else:
        _print_estimate(found)
    _judge(found, proposals, as_json)


def make_request(
    model: str | None,
    target: str,
    recipe: str | None,
    max_length: int | None,
    jetpack: int | None,
) -> Request:
    """What was asked for, every default filled in.

    Raises:
        InputError: an unknown target, JetPack or recipe.
        CheckpointError: a folder without a config.json that can be used.
    """
    from mvlm_export.calibration.recipe import find_recipe
    from mvlm_export.engines.targets import get_target

    from ..config import PRESETS, read_config
    from ..estimate_proposals import Request
    from ..settings import nano_checkpoint

    device = get_target(target, jetpack)
    chosen = find_recipe(recipe or device.default_recipe)
    if model in PRESETS:
        return Request(model, PRESETS[model], chosen, device, max_length)
    folder = nano_checkpoint() if model is None else Path(model)
    return Request(folder.resolve().name, read_config(folder), chosen, device, max_length)


def _print_estimate(found: ModelEstimate) -> None:
    title = f"{found.model}, {found.recipe}, {found.max_length} positions"
    rows = [
        (graph, form, human_bytes(count))
        for graph, forms in found.weights.items()
        for form, count in forms.items()
    ]
    rows.append(("all", "", human_bytes(found.weight_bytes)))
    print_table(f"Weights: {title}", ("graph", "form", "size"), rows)
    _print_plan(found.plan, found.target.title)
    _print_speed(found)


def _print_plan(plan: MemoryPlan, title: str) -> None:
    sections = (
        ("to run", plan.run, plan.run_bytes),
        ("to build", plan.build, plan.build_bytes),
        ("taken before", plan.system, sum(part.bytes for part in plan.system)),
    )
    rows: list[tuple[str, str, str]] = []
    for name, parts, total in sections:
        rows += _part_rows(name, parts, total)
    if plan.module is not None and plan.available is not None:
        left = f"{human_bytes(plan.module)} less what is taken before"
        rows.append(("left for the model", human_bytes(plan.available), left))
    print_table(f"Memory: {title}", ("", "size", "how"), rows)


def _part_rows(name: str, parts: Sequence[Part], total: int) -> list[tuple[str, str, str]]:
    if not parts:
        return []
    rows = [(f"  {part.name}", human_bytes(part.bytes), part.how) for part in parts]
    return [(name, human_bytes(total), ""), *rows]


def _print_speed(found: ModelEstimate) -> None:
    from ..estimate_speed import COMPUTE_SHARE, EFFICIENCY, PAPER_SETUP

    speed = found.speed
    columns = ("phase", "MACs", "read", "time", "bound by")
    title = f"Speed: {speed.prompt} tokens of prompt with a picture, {speed.answer} of answer"
    print_table(title, columns, [_phase_row(phase) for phase in speed.phases])
    target = found.target
    if speed.first_token is None or target.fp16_tflops is None:
        print_line("No times: this target's bandwidth and peaks depend on the machine.")
    else:
        print_line(
            f"Estimate, not measured: first token after {speed.first_token * 1e3:.0f} ms, "
            f"then {speed.decode_per_second:.1f} tokens/s; {speed.tokens_per_second:.1f} "
            f"tokens/s over the whole time, from {EFFICIENCY:.0%} of {target.bandwidth_gb_s} "
            f"GB/s and {COMPUTE_SHARE:.0%} of {target.fp16_tflops:.1f} dense FP16 TFLOPS."
        )
    if found.paper is not None:
        print_line(f"The paper's, measured: {found.paper} tokens/s, {PAPER_SETUP}.")


def _phase_row(phase: Phase) -> tuple[str, str, str, str, str]:
    name = "decode, a token" if phase.name == "decode" else phase.name
    time = "-" if phase.seconds is None else f"{phase.seconds * 1e3:.2f} ms"
    giga = f"{phase.macs / 1e9:.2f} G"
    return name, giga, human_bytes(phase.bytes), time, phase.bound or "-"


def _judge(found: ModelEstimate, proposals: tuple[Proposal, ...], as_json: bool) -> None:
    """Say whether it fits; raise EngineError where it does not run."""
    plan = found.plan
    offers = "".join(f"\n  {proposal.text}" for proposal in proposals)
    title = found.target.title
    if plan.verdict == "too small":
        assert plan.available is not None
        instead = f"What fits instead:{offers}" if offers else "Nothing smaller fits."
        raise EngineError(
            f"{found.model} does not fit {title}: it takes {human_bytes(plan.run_bytes)} to "
            f"run, and {human_bytes(plan.available)} are left for it. {instead}"
        )
    if as_json or plan.verdict == "unknown":
        return
    if plan.verdict == "runs only":
        print_line(
            f"It fits {title} to run but not to build: building takes "
            f"{human_bytes(plan.build_bytes)}, more than is left. Engines are built on the "
            f"device, so add swap for the builder's part of it, or choose:{offers}"
        )
    else:
        print_line(f"It fits {title}, to build and to run.")


def _print_all(request: Request, jetpack: int | None, as_json: bool) -> None:
    from dataclasses import replace

    from mvlm_export.calibration.recipe import RECIPES
    from mvlm_export.engines.targets import TARGETS, get_target

    found = [
        replace(request, target=get_target(name, jetpack), recipe=RECIPES[recipe]).estimate()
        for name, target in TARGETS.items()
        if target.jetpack is not None
        for recipe in RECIPES_SHOWN
    ]
    if as_json:
        print_json([entry.to_json() for entry in found])
        return
    columns = (
        "target",
        "recipe",
        "weights",
        "run",
        "build",
        "verdict",
        "first",
        "decode",
        "overall",
    )
    title = (
        f"{request.name}, {found[0].max_length} positions: memory, time to the first token, "
        "tokens/s (estimates, not measured)"
    )
    print_table(title, columns, [_all_row(entry) for entry in found])
    if found[0].paper is not None:
        from ..estimate_speed import PAPER_SETUP

        print_line(f"The paper's overall, measured: {found[0].paper}, {PAPER_SETUP}.")


def _all_row(entry: ModelEstimate) -> tuple[str, ...]:
    plan, speed = entry.plan, entry.speed
    runs = plan.verdict != "too small"
    assert speed.first_token is not None
    return (
        entry.target.name,
        entry.recipe,
        human_bytes(entry.weight_bytes),
        human_bytes(plan.run_bytes),
        human_bytes(plan.build_bytes),
        plan.verdict,
        f"{speed.first_token * 1e3:.0f} ms" if runs else "-",
        f"{speed.decode_per_second:.1f}" if runs else "-",
        f"{speed.tokens_per_second:.1f}" if runs else "-",
    )
