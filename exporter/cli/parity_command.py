"""``mvlm parity``: compare a bundle with the PyTorch model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mvlm_export.engines.bundle import REPORT, Bundle, read_json, write_json
from mvlm_export.engines.errors import InputError, ParityError

from ..settings import default_samples, nano_checkpoint
from .console import StageProgress, print_json, print_settings
from .parity_table import print_accuracy, print_parity
from .sampling_options import parity_backend_option

if TYPE_CHECKING:
    from ..reference import ReferenceModel

EXAMPLES = """\b
Examples:
  mvlm parity bundle
  mvlm parity bundle --model MobileVLM_V2-1.7B --samples my-questions --limit 20
  mvlm parity bundle --backend tensorrt       its plans, on the device
  mvlm parity bundle --backend onnxruntime    its ONNX graphs, also where there are plans
"""


@click.command("parity", epilog=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Checkpoint folder. Default: the one the bundle was made from.",
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help="Folder with samples.jsonl, or LLaVA's conversation JSON, whose questions stand "
    "behind their earlier turns. Default: those of the package.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use the first N samples.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=40,
    show_default=True,
    help="Longest answer.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Of PyTorch, and of ONNX Runtime where that runs the graphs. Default: all cores.",
)
@parity_backend_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def parity(
    bundle: Path,
    model: Path | None,
    samples: Path | None,
    limit: int | None,
    max_tokens: int,
    threads: int | None,
    backend: str | None,
    as_json: bool,
) -> None:
    """Compare every graph, and whole answers, with PyTorch; exit code 1 if not equal."""
    from mvlm_export.calibration.data import read_samples
    from mvlm_export.engines.backends import choose_backend

    from ..parity import ParityCheck
    from ..reference import ReferenceModel

    loaded = Bundle.load(bundle)
    folder = model or source_checkpoint(loaded)
    backend = backend or choose_backend(loaded)
    print_settings(
        "mvlm parity",
        {
            "bundle": str(bundle),
            "backend": backend,
            "model": str(folder),
            "samples": str(samples or default_samples()),
            "limit": limit,
            "max_tokens": max_tokens,
        },
    )
    questions = read_samples(samples or default_samples(), limit)
    with StageProgress() as progress:
        reference = ReferenceModel.open(folder)
        _check_model(loaded, reference)
        check = ParityCheck(
            loaded, reference, questions, progress, max_tokens, threads, backend
        )
        report = check.run()
    figures = {"parity": report.to_json(), "accuracy": report.accuracy.to_json()}
    if as_json:
        print_json({**figures["parity"], "accuracy": figures["accuracy"]})
    else:
        print_parity(report)
        print_accuracy(report.accuracy)
    write_json(loaded.path / REPORT, {**_report(loaded), **figures})
    if not report.passed:
        raise ParityError(
            f"{bundle} does not agree with PyTorch: {'; '.join(report.failures[:5])}."
        )


def _check_model(bundle: Bundle, reference: ReferenceModel) -> None:
    """Refuse a checkpoint of another geometry than the bundle's."""
    spec, text = bundle.manifest.model, reference.config.text
    pairs = {
        "vocab_size": (spec.vocab_size, text.vocab_size),
        "hidden_size": (spec.hidden_size, text.hidden_size),
        "layers": (spec.num_layers, text.num_hidden_layers),
        "image tokens": (spec.image_tokens, reference.config.image_tokens),
    }
    differing = [f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise InputError(
            f"{bundle.path} was not made from {reference.folder}: {', '.join(differing)}. "
            "Name its checkpoint with --model."
        )


def source_checkpoint(bundle: Bundle) -> Path:
    """The checkpoint a bundle was made from.

    Raises:
        InputError: it is not where it was.
    """
    from ..assemble import checkpoint_source
    from ..checkpoint import Checkpoint

    source = bundle.manifest.source
    recorded = [Path(source["path"])] if "path" in source else []
    for folder in (*recorded, nano_checkpoint()):
        if (folder / "config.json").is_file():
            found = checkpoint_source(Checkpoint.open(folder))
            if found["fingerprint"] == source.get("fingerprint"):
                return folder
    raise InputError(
        f"The checkpoint of {bundle.path} is not at {source.get('path')} any more, or has "
        "changed. Name its folder with --model."
    )


def _report(bundle: Bundle) -> dict[str, Any]:
    path = bundle.path / REPORT
    return read_json(path) if path.is_file() else {}
