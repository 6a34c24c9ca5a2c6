"""``mvlm bench``: how fast a bundle answers."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..settings import ASSETS
from .console import StageProgress, human_bytes, print_json, print_line, print_table
from .sampling_options import backend_option, loading_options

if TYPE_CHECKING:
    from mvlm_export.engines.bench import BenchReport, Spread
    from mvlm_export.engines.vlm import VLM

EXAMPLES = """\b
Examples:
  mvlm bench bundle                        as the papers: image, question, 256 tokens
  mvlm bench bundle --image photo.jpg --prompt "Describe it." --tokens 64 --runs 10
  mvlm bench bundle --protocol decode      the decoder by itself: no image, 128 tokens
  mvlm bench bundle --json --output orin.json    with the machine, versions and date

\b
Every run pays in full: image and prompt are run anew, but for the prompt's constant prefix
that the bundle ships (--no-prefix leaves that out too). "tokens/s, all in" is new tokens over
the whole time, which is how MobileVLM's papers count; "decode" is the speed behind the first
token.
"""

PROTOCOL_NAMES = ("paper", "decode")

QUESTIONS = {"paper": "Describe the picture.", "decode": "Tell a story."}
"""What is asked by each protocol where nothing is said."""


def default_image() -> Path:
    """A picture that comes along."""
    return sorted((ASSETS / "samples").glob("*.png"))[0]


@click.command("bench", epilog=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOL_NAMES),
    default="paper",
    show_default=True,
    help="paper: an image, a question and 256 new tokens, as MobileVLM's papers. decode: no "
    "image and 128 tokens.",
)
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    help="The picture, for the protocol paper. Default: one that comes along.",
)
@click.option("--prompt", help="The question. Default: a short one.")
@click.option(
    "--tokens",
    type=int,
    help="New tokens; the model's end is ignored. Default: the protocol's.",
)
@click.option("--runs", default=5, show_default=True, help="Runs that are measured.")
@click.option("--warmup", default=1, show_default=True, help="Runs before them.")
@loading_options
@backend_option
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the figures here as JSON too.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench(
    bundle: Path,
    protocol: str,
    image: Path | None,
    prompt: str | None,
    tokens: int | None,
    runs: int,
    warmup: int,
    threads: int | None,
    provider: str | None,
    backend: str | None,
    verify: bool,
    use_prefix: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure encode, projection, prefill and decode of a bundle."""
    from mvlm_export.engines import VLM
    from mvlm_export.engines import bench as measuring
    from mvlm_export.engines.bundle import write_json

    with StageProgress() as progress:
        progress.stage("Opening the bundle")
        vlm = VLM.load(
            bundle,
            backend=backend,
            provider=provider,
            threads=threads,
            verify=verify,
            use_prefix=use_prefix,
            reuse=False,
        )
        progress.stage("Answering")
        if image is None and measuring.PROTOCOLS[protocol].with_image:
            image = default_image()
        question = QUESTIONS[protocol] if prompt is None else prompt
        report = measuring.bench(
            vlm, image, question, tokens, runs, warmup, progress.advance, protocol
        )
    found = {**_circumstances(vlm, threads), **report.to_json()}
    if output is not None:
        write_json(output, found)
    if as_json:
        print_json(found)
        return
    _print_report(bundle, report)
    if output is not None:
        print_line(f"Figures: {output}")


def _circumstances(vlm: VLM, threads: int | None) -> dict[str, Any]:
    """When, where and with what."""
    from mvlm_export.engines.doctor import examine

    manifest = vlm.bundle.manifest
    machine = examine().to_json()["machine"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": manifest.model.name,
        "target": manifest.target,
        "recipe": manifest.recipe,
        "threads": threads,
        "machine": machine,
    }


def _print_report(bundle: Path, report: BenchReport) -> None:
    rows = [
        (name.replace("_", " "), *(f"{v * 1e3:.1f}" for v in _three(spread)))
        for name, spread in report.seconds.items()
        if spread.high > 0  # there is no vision encoder to wait for without an image
    ]
    print_table(
        f"{bundle}, {report.protocol}: {report.prompt_tokens} prompt tokens "
        f"({report.cached_tokens} shipped), {report.new_tokens} new ones, {report.runs} runs",
        ("ms", "median", "least", "most"),
        rows,
    )
    print_table(
        "Tokens a second",
        ("", "median", "least", "most"),
        [
            ("decode", *(f"{v:.1f}" for v in _three(report.decode_tokens_per_second))),
            ("all in", *(f"{v:.1f}" for v in _three(report.tokens_per_second))),
        ],
    )
    if report.bytes_per_token is not None:
        share = report.share_of_bandwidth
        bus = "" if share is None else f", {share:.0%} of the target's {report.bandwidth} GB/s"
        print_line(
            f"Decode reads {human_bytes(report.bytes_per_token)} a token: "
            f"{report.gigabytes_per_second:.2f} GB/s{bus}."
        )


def _three(spread: Spread) -> tuple[float, float, float]:
    return spread.median, spread.low, spread.high
