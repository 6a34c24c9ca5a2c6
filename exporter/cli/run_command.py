"""``mvlm run``: answer a question about pictures with a bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .console import print_json, print_line
from .sampling_options import backend_option, loading_options, sampling_options, timing_line

EXAMPLES = """\b
Examples:
  mvlm run bundle --image photo.jpg --prompt "What is on the table?"
  mvlm run bundle --image a.png --image b.png --prompt "What differs?" --max-tokens 64
  mvlm run bundle --image photo.jpg --prompt "Describe it." --temperature 0.7 --seed 1
"""


@click.command("run", epilog=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A picture. May repeat.",
)
@click.option("--prompt", required=True, help="The question.")
@sampling_options
@loading_options
@backend_option
@click.option(
    "--stream/--no-stream",
    default=True,
    show_default=True,
    help="Print words as they come.",
)
@click.option("--json", "as_json", is_flag=True, help="Print text, ids and timings as JSON.")
def run(
    bundle: Path,
    images: tuple[Path, ...],
    prompt: str,
    threads: int | None,
    provider: str | None,
    backend: str | None,
    verify: bool,
    use_prefix: bool,
    stream: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer one question about pictures."""
    from mvlm_export.engines import VLM, SamplingParams

    params = SamplingParams(**sampling)
    vlm = VLM.load(
        bundle,
        backend=backend,
        provider=provider,
        threads=threads,
        verify=verify,
        use_prefix=use_prefix,
    )
    running = vlm.stream(list(images), prompt, params)
    for delta in running:
        if stream and not as_json:
            sys.stdout.write(delta)
            sys.stdout.flush()
    answer = running.answer
    if as_json:
        print_json(answer.to_json())
        return
    print_line("" if stream else answer.text)
    click.echo(timing_line(answer), err=True)
