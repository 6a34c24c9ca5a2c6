"""Options that ``mvlm run`` and ``mvlm chat`` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mvlm_export.engines.generation import Answer
    from mvlm_export.engines.timings import Timings

Command = TypeVar("Command", bound=Callable[..., Any])

_SAMPLING = (
    click.option(
        "--max-tokens", type=int, default=256, show_default=True, help="Longest answer."
    ),
    click.option(
        "--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."
    ),
    click.option("--top-k", type=int, default=0, show_default=True, help="0 keeps all."),
    click.option("--top-p", type=float, default=1.0, show_default=True, help="1 keeps all."),
    click.option("--min-p", type=float, default=0.0, show_default=True, help="0 keeps all."),
    click.option(
        "--repetition-penalty", type=float, default=1.0, show_default=True, help="1 is none."
    ),
    click.option("--seed", type=int, help="Repeats a sampled answer."),
    click.option(
        "--draft-tokens",
        type=int,
        help="Most tokens that a greedy step looks up in the text so far and checks at once; "
        "0 for none. Default: as many as pay.",
    ),
    click.option("--stop", multiple=True, help="Text that ends the answer. May repeat."),
)

_LOADING = (
    click.option("--threads", type=click.IntRange(min=1), help="Default: all cores."),
    click.option(
        "--provider", help="ONNX Runtime's: cpu or cuda. Default: as the bundle's target says."
    ),
    click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Check the bundle's hashes first.",
    ),
    click.option(
        "--prefix/--no-prefix",
        "use_prefix",
        default=True,
        show_default=True,
        help="Begin with the cache rows of the prompt's constant prefix, if it ships them.",
    ),
)


BACKEND_NAMES = ("onnxruntime", "tensorrt", "tensorrt_rtx")


def _backend_option(unless: str = "") -> Callable[[Command], Command]:
    return click.option(
        "--backend",
        type=click.Choice(BACKEND_NAMES),
        help="What runs the graphs. Default: TensorRT where there are a GPU and plans for it"
        f"{unless}; else ONNX Runtime.",
    )


backend_option = _backend_option(" and neither --provider nor --threads is given")
"""``backend`` of ``VLM.load``."""

parity_backend_option = _backend_option()
"""``backend`` of ``ParityCheck``, whose threads are PyTorch's too and decide nothing."""


def sampling_options(command: Command) -> Command:
    """Add the fields of ``SamplingParams`` as options."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def loading_options(command: Command) -> Command:
    """Add the keywords of ``VLM.load`` as options."""
    for option in reversed(_LOADING):
        command = option(command)
    return command


def timing_line(answer: Answer) -> str:
    """Seconds of each phase, and what did not have to be run, in one line."""
    t = answer.timings
    reused = ""
    if t.images_reused:
        reused = f" ({t.images_reused} of {t.images} image(s) known from before)"
    return (
        f"[{answer.finish_reason}] load {t.load:.2f} s, "
        f"preprocess {t.preprocess * 1e3:.1f} ms, vision {t.vision * 1e3:.1f} ms, "
        f"projector {t.projector * 1e3:.1f} ms{reused}, "
        f"prefill {t.prefill * 1e3:.1f} ms ({_prefill_counts(t)}), "
        f"first token {t.time_to_first_token * 1e3:.1f} ms, "
        f"decode {t.decode_tokens_per_second:.1f} tokens/s ({_decode_counts(t)})"
    )


def _decode_counts(t: Timings) -> str:
    """``30 tokens, 12 of 14 looked up``."""
    if not t.guessed_tokens:
        return f"{t.decode_tokens} tokens"
    return f"{t.decode_tokens} tokens, {t.kept_guesses} of {t.guessed_tokens} looked up"


def _prefill_counts(t: Timings) -> str:
    """``12 tokens, 38 saved: 35 by the shipped prompt prefix``."""
    text = f"{t.prefill_tokens} tokens"
    if t.cached_tokens:
        text += f", {t.cached_tokens} saved"
    if t.prefix_tokens:
        text += f": {t.prefix_tokens} by the shipped prompt prefix"
    return text
