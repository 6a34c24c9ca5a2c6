"""``mvlm build``: TensorRT plans of a bundle, on the device that will run them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.jetson import read_jetson
from mvlm_export.engines.targets import get_target

from .console import (
    StageProgress,
    human_bytes,
    print_json,
    print_line,
    print_settings,
    print_table,
)

if TYPE_CHECKING:
    from mvlm_export.engines.plan_key import PlanState

EXAMPLES = """\b
Examples:
  mvlm build bundle            on the Orin: needs this package and the system's tensorrt
  mvlm build bundle --force    build what is there already over again

A plan that is there, of the same graph, TensorRT, GPU, profiles and options, is kept. Without
--workspace-mb, a quarter of the module's memory is the limit.
"""
_MIB = 1 << 20


@click.command("build", epilog=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--workspace-mb",
    type=click.IntRange(min=1),
    help="Limit of TensorRT's scratch memory in MiB. Default: by the module's memory.",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="How long TensorRT searches for kernels. Default: TensorRT's own, 3.",
)
@click.option(
    "--force",
    "--rebuild",
    "force",
    is_flag=True,
    help="Build every plan, also those that are fresh.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the build records as JSON.")
def build(
    bundle: Path,
    workspace_mb: int | None,
    optimization_level: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build the bundle's engines with this machine's TensorRT."""
    from mvlm_export.engines.build import BuildOptions, build_engines, examine_plans

    loaded = Bundle.load(bundle)
    manifest = loaded.manifest
    options = BuildOptions(
        None if workspace_mb is None else workspace_mb * _MIB, optimization_level
    )
    target = get_target(manifest.target, manifest.jetpack)
    limit = options.for_target(target, read_jetson()).workspace_bytes
    settings = {
        "bundle": str(bundle),
        "target": manifest.target,
        "jetpack": manifest.jetpack,
        "workspace": limit and human_bytes(limit),
        "optimization_level": optimization_level,
        "force": force or None,
    }
    print_settings("mvlm build", settings)
    with StageProgress() as progress:
        progress.stage("Looking at the plans that are there")
        states = examine_plans(loaded, options)
        fresh = {name for name, state in states.items() if state.status == "fresh"}
        keep = set() if force else fresh
        _print_states(states, keep)
        if keep < set(states):
            progress.stage(f"Building engines for {manifest.target}")
        record = build_engines(loaded, progress.advance, options, keep)
        if keep < set(states):
            progress.stage("Reading the plans back")
            loaded.verify_engines()
    if as_json:
        plans = {name: {"status": s.status, "reason": s.reason} for name, s in states.items()}
        print_json({**record, "before": plans, "built": sorted(set(states) - keep)})
        return
    _print_record(loaded, record, keep)


def _print_states(states: Mapping[str, PlanState], keep: set[str]) -> None:
    """Why each plan is built or not, on stderr."""
    for name, state in states.items():
        deed = "kept" if name in keep else "building"
        click.echo(f"  {name}: {deed} ({state.status}: {state.reason})", err=True)


def _print_record(bundle: Bundle, record: Mapping[str, Any], keep: set[str]) -> None:
    from mvlm_export.engines.build import plan_trtexec
    from mvlm_export.engines.trt_warnings import notable_warnings

    plans = record["plans"]
    rows = [
        (
            name,
            human_bytes(plan["plan_bytes"]),
            "already built" if name in keep else f"{plan['seconds']:.1f} s",
            human_bytes(plan["peak_memory"]),
        )
        for name, plan in plans.items()
    ]
    title = f"Engines in {bundle.path / 'engines' / record['folder']}"
    print_table(title, ("graph", "size", "built in", "peak memory"), rows)
    for name, plan in plans.items():
        for warning in notable_warnings(plan["warnings"]):
            print_line(f"{name}: TensorRT warns: {warning}")
    print_line("The same by NVIDIA's trtexec:")
    for name in plans:
        print_line(plan_trtexec(bundle, record, name))
