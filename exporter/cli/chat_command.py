"""``mvlm chat``: a conversation about pictures that keeps its KV cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mvlm_export.engines.errors import MvlmError
from mvlm_export.engines.load_image import load_image

from .sampling_options import backend_option, loading_options, sampling_options, timing_line

if TYPE_CHECKING:
    from mvlm_export.engines import ChatSession, SamplingParams

EXAMPLES = """\b
Examples:
  mvlm chat bundle --image photo.jpg
  echo "What is on the table?" | mvlm chat bundle --image photo.jpg
"""

HELP = "/image FILE adds a picture to the next question, /reset forgets all, /quit ends."


@click.command("chat", epilog=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A picture for the first question. May repeat.",
)
@sampling_options
@loading_options
@backend_option
def chat(
    bundle: Path,
    images: tuple[Path, ...],
    threads: int | None,
    provider: str | None,
    backend: str | None,
    verify: bool,
    use_prefix: bool,
    **sampling: Any,
) -> None:
    """Talk about pictures; the past is kept and never computed twice."""
    from mvlm_export.engines import VLM, SamplingParams

    params = SamplingParams(**sampling)
    for path in images:
        load_image(path)
    vlm = VLM.load(
        bundle,
        backend=backend,
        provider=provider,
        threads=threads,
        verify=verify,
        use_prefix=use_prefix,
    )
    click.echo(HELP, err=True)
    talk(vlm.chat(), list(images), params)


def talk(session: ChatSession, images: list[Path], params: SamplingParams) -> None:
    """Read lines until the end of the input; a failed question leaves the session usable."""
    while (line := _read_line()) is not None:
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            session.reset()
            images = []
        elif command == "/image":
            images = _with_picture(images, Path(argument.strip()))
        elif line:
            try:
                _answer(session, line, images, params)
                images = []
            except MvlmError as error:
                click.echo(f"Error: {error}", err=True)


def _with_picture(images: list[Path], path: Path) -> list[Path]:
    """The pictures of the next question with one more, if it can be read."""
    try:
        load_image(path)
    except MvlmError as error:
        click.echo(f"Error: {error}", err=True)
        return images
    return [*images, path]


def _read_line() -> str | None:
    """One line without its end, None at the end of the input."""
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(
    session: ChatSession, question: str, images: list[Path], params: SamplingParams
) -> None:
    """Stream one answer; Ctrl-C ends the answer, not the conversation."""
    stream = session.stream(question, list(images) or None, params)
    try:
        for delta in stream:
            click.echo(delta, nl=False)
    except KeyboardInterrupt:
        stream.close()
        click.echo()
        return
    click.echo()
    click.echo(timing_line(stream.answer), err=True)
