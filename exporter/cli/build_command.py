"""``mvlm build``: TensorRT plans of a bundle, on the device that will run them."""

from __future__ import annotations

from pathlib import Path

import click

from mvlm_export.engines.bundle import Bundle

from .console import StageProgress, human_bytes, print_json, print_settings, print_table

EXAMPLES = """\b
Examples:
  mvlm build bundle            on the Orin: needs this package and the system's tensorrt
"""


@click.command("build", epilog=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--workspace",
    type=click.FloatRange(min=0, min_open=True),
    help="Limit of TensorRT's scratch memory in GiB. Default: TensorRT's own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the build records as JSON.")
def build(bundle: Path, workspace: float | None, as_json: bool) -> None:
    """Build the bundle's engines with this machine's TensorRT."""
    from mvlm_export.engines.build import build_engines

    loaded = Bundle.load(bundle)
    manifest = loaded.manifest
    limit = None if workspace is None else int(workspace * (1 << 30))
    settings = {"bundle": str(bundle), "target": manifest.target, "jetpack": manifest.jetpack}
    print_settings("mvlm build", settings)
    with StageProgress() as progress:
        progress.stage(f"Building engines for {manifest.target}")
        record = build_engines(loaded, progress.advance, limit)
        progress.stage("Reading the plans back")
        loaded.verify_engines()
    if as_json:
        print_json(record)
        return
    rows = [
        (name, human_bytes(plan["plan_bytes"]), f"{plan['seconds']:.1f} s")
        for name, plan in record["plans"].items()
    ]
    title = f"Engines in {bundle / 'engines' / record['folder']}"
    print_table(title, ("graph", "size", "built in"), rows)
