"""The line that ``mvlm run`` and ``mvlm chat`` print says what was not run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mvlm_export.engines.generation import Answer
from mvlm_export.engines.timings import Timings
from mvlm_export.exporter.cli.sampling_options import timing_line

TIMINGS = Timings(
    load=1.5,
    preprocess=0.002,
    vision=0.25,
    projector=0.01,
    prefill=0.125,
    time_to_first_token=0.4,
    decode=2.0,
    total=2.4,
    prefill_tokens=182,
    cached_tokens=0,
    prefix_tokens=0,
    decode_tokens=20,
    images=1,
    images_reused=0,
)


def line(**changes: int) -> str:
    timings = replace(TIMINGS, **changes)  # type: ignore[arg-type]
    return timing_line(Answer("A cup", (5, 2), "stop", timings))


def test_a_first_question() -> None:
    assert line() == (
        "[stop] load 1.50 s, preprocess 2.0 ms, vision 250.0 ms, projector 10.0 ms, "
        "prefill 125.0 ms (182 tokens), first token 400.0 ms, "
        "decode 10.0 tokens/s (20 tokens)"
    )


@pytest.mark.parametrize(
    ("cached", "prefix", "text"),
    [
        (38, 35, "(12 tokens, 38 saved: 35 by the shipped prompt prefix)"),
        (38, 0, "(12 tokens, 38 saved)"),
    ],
)
def test_rows_that_were_saved(cached: int, prefix: int, text: str) -> None:
    assert text in line(prefill_tokens=12, cached_tokens=cached, prefix_tokens=prefix)


def test_images_that_were_known() -> None:
    found = line(images=2, images_reused=1)
    assert "projector 10.0 ms (1 of 2 image(s) known from before), prefill" in found
