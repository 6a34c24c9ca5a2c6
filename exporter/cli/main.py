"""The command group ``mvlm`` and the entry points of both commands."""

from __future__ import annotations

from importlib import metadata

import click

from .bench_command import bench
from .build_command import build
from .chat_command import chat
from .doctor_command import doctor
from .errors import entry_point
from .estimate_command import estimate
from .export_command import export
from .inspect_command import inspect
from .parity_command import parity
from .run_command import run
from .sensitivity_command import sensitivity
from .triton_command import triton


def _version() -> str:
    try:
        return metadata.version("mvlm-export")
    except metadata.PackageNotFoundError:
        return "unknown"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="mvlm")
def mvlm() -> None:
    """MobileVLM V2 on Jetson Orin: compile, build, run, compare.

    \b
    Start here:
      mvlm-export --target cpu --output bundle
      mvlm run bundle --image PICTURE --prompt "What is in the picture?"
      mvlm doctor
    """


for command in (
    export,
    build,
    run,
    chat,
    bench,
    parity,
    inspect,
    sensitivity,
    estimate,
    triton,
    doctor,
):
    mvlm.add_command(command)

main = entry_point(mvlm, "mvlm")
export_main = entry_point(export, "mvlm-export")
