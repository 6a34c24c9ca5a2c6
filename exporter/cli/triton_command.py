"""``mvlm triton``: a bundle as a model repository of Triton Inference Server."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mvlm_export.engines.bundle import Bundle

from .console import (
    StageProgress,
    human_bytes,
    print_json,
    print_line,
    print_settings,
    print_table,
)
from .sampling_options import loading_options

if TYPE_CHECKING:
    from mvlm_export.exporter.triton_repository import WrittenRepository

EXAMPLES = """\b
Examples:
  mvlm triton bundle --output models
  mvlm triton bundle --output models --bundle-path /bundle     as a container will see it
"""


@click.command("triton", epilog=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="Repository folder."
)
@click.option(
    "--engines", metavar="NAME", help="Folder of plans in the bundle. Default: the only one."
)
@click.option(
    "--bundle-path",
    metavar="PATH",
    help="The bundle's path where the server runs; a relative one begins at the folder of the "
    "model mvlm. Default: its path here.",
)
@loading_options
@click.option("--overwrite", is_flag=True, help="Replace the repository at --output.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def triton(
    bundle: Path,
    output: Path,
    engines: str | None,
    bundle_path: str | None,
    threads: int | None,
    provider: str | None,
    verify: bool,
    use_prefix: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a Triton model repository that serves a bundle.

    The options of loading hold for the server, each time that it opens the bundle; --no-verify
    also for this command.
    """
    from mvlm_export.exporter.triton_repository import write_repository

    settings = {"bundle": str(bundle), "output": str(output), "engines": engines}
    print_settings("mvlm triton", settings)
    with StageProgress() as progress:
        progress.stage("Reading the bundle")
        loaded = Bundle.load(bundle, verify)
        if verify:
            loaded.verify_engines()
        progress.stage("Writing the repository")
        loading = loading_texts(threads, provider, verify, use_prefix)
        written = write_repository(loaded, output, overwrite, engines, bundle_path, loading)
    if as_json:
        print_json({**written.to_json(), "command": server_command(written)})
        return
    rows = [
        (model.name, model.runs_on, model.max_batch_size or "-", human_bytes(model.size))
        for model in written.models
    ]
    rows += [(name, f"left out: {why}", "", "") for name, why in written.left_out.items()]
    columns = ("model", "runs on", "batch", "size")
    print_table(f"Model repository {output}", columns, rows)
    print_line(f"It opens the bundle {written.bundle}. Start the model that answers with:")
    print_line(f"  {server_command(written)}")


def loading_texts(
    threads: int | None, provider: str | None, verify: bool, use_prefix: bool
) -> dict[str, str]:
    """Keywords of ``VLM.load`` that differ from its defaults, as config.pbtxt holds them."""
    found = {
        "threads": None if threads is None else str(threads),
        "provider": provider,
        "verify": None if verify else "false",
        "use_prefix": None if use_prefix else "false",
    }
    return {key: text for key, text in found.items() if text is not None}


def server_command(written: WrittenRepository) -> str:
    """What starts a server with the model that answers alone; the graphs take more memory."""
    folder = shlex.quote(str(written.path))
    return (
        f"tritonserver --model-repository={folder} --model-control-mode=explicit "
        "--load-model=mvlm"
    )
