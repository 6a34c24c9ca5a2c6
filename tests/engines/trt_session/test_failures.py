"""The TensorRT decoder against ONNX Runtime's: what fails leaves no trace.

It runs in full over stand-ins for the functions of CUDA and the classes of TensorRT, which
compute with ONNX Runtime on host memory and refuse what the real ones refuse.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvlm_export.engines.errors import BundleError, EngineError
from mvlm_export.engines.trt_decoder import TrtDecoderSession

from ..fake_cuda import cudaError_t
from ..plans import Device, with_plans
from .both_sessions import (
    EMBEDS,
    IDS,
    PREFILL,
    assert_same_rows,
    contexts_of,
    open_both,
    short_profiles,
)


def fail_to_start(device: Device, decoder: TrtDecoderSession) -> None:
    contexts_of(device)[PREFILL]._failing = True


def fail_in_the_queue(device: Device, decoder: TrtDecoderSession) -> None:
    device.cuda._fail("cudaStreamSynchronize", cudaError_t.cudaErrorIllegalAddress)


def fail_to_copy(device: Device, decoder: TrtDecoderSession) -> None:
    device.cuda._fail("cudaMemcpyAsync", cudaError_t.cudaErrorInvalidValue)


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (fail_to_start, "cannot run the engine 'decoder': the kernel cannot be launched"),
        (fail_in_the_queue, "cudaStreamSynchronize failed with cudaErrorIllegalAddress"),
        (fail_to_copy, "cudaMemcpyAsync failed with cudaErrorInvalidValue"),
    ],
)
@pytest.mark.parametrize("form", ["append-token", "fixed"])
def test_a_failed_run_leaves_the_cache(
    device: Device, plans: dict[str, Path], form: str, fail, message: str
) -> None:
    decoder, reference = open_both(device, plans[form])
    cache, expected = decoder.new_cache(), reference.new_cache()
    decoder.append_greedy(cache, IDS[:3], EMBEDS)
    reference.append(expected, IDS[:3], EMBEDS)
    fail(device, decoder)
    with pytest.raises(EngineError, match=message):
        decoder.append_greedy(cache, IDS[3:6], EMBEDS)
    contexts_of(device)[PREFILL]._failing = False
    assert_same_rows(cache, expected)
    found = decoder.append_greedy(cache, IDS[3:6], EMBEDS)
    assert found == reference.append(expected, IDS[3:6], EMBEDS).argmax()
    assert_same_rows(cache, expected)


@pytest.mark.parametrize("error", [EngineError, KeyboardInterrupt])
def test_a_failed_second_chunk_takes_the_first_back(
    device: Device,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    limits = short_profiles(3, 4, "append")
    path = with_plans(sources["append"], tmp_path / "bundle", profiles=limits)
    decoder, reference = open_both(device, path)
    cache, expected = decoder.new_cache(), reference.new_cache()
    decoder.append(cache, IDS[:2], EMBEDS)
    reference.append(expected, IDS[:2], EMBEDS)
    execute, calls = decoder._prefill.execute, []

    def interrupt() -> None:
        calls.append(1)
        execute()
        if len(calls) == 2:
            raise error("stop")

    monkeypatch.setattr(decoder._prefill, "execute", interrupt)
    with pytest.raises(error):
        decoder.append(cache, IDS[2:], EMBEDS)
    assert_same_rows(cache, expected)
    found = decoder.append(cache, IDS[2:], EMBEDS)
    np.testing.assert_allclose(found, reference.append(expected, IDS[2:], EMBEDS), atol=2e-5)


@pytest.mark.parametrize("form", ["append-token", "fixed"])
def test_a_nan_is_an_error_and_the_row_is_taken_back(
    device: Device, plans: dict[str, Path], form: str
) -> None:
    decoder = device.open(plans[form]).open_decoder()
    cache = decoder.new_cache()
    first = decoder.append_greedy(cache, IDS[:5], EMBEDS)
    good = cache.read_rows(1, 2, 3)
    cache.write_rows(1, 2, np.full_like(good, np.nan))
    with pytest.raises(EngineError, match=r"gave the token -1 of 512, .* not finite"):
        decoder.append_greedy(cache, np.array([first], np.int32), EMBEDS)
    assert cache.length == 5
    cache.write_rows(1, 2, good)
    cache.clear_behind()
    again = decoder.append_greedy(cache, np.array([first], np.int32), EMBEDS)
    assert 0 <= again < 512


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_layers": 3}, "has not the tensors of the manifest's model"),
        ({"num_key_value_heads": 4}, "of 2, 16, 512, float32, but .* needs 4, 16, 512"),
        ({"vocab_size": 500}, "but the manifest's model needs 2, 16, 500"),
        ({"max_positions": 600}, r"Profile 0 .* does not take \[599, 2, 16\]"),
    ],
)
def test_a_plan_of_another_model(
    device: Device, plans: dict[str, Path], model: dict, message: str
) -> None:
    backend = device.open(plans["append"])
    backend._model = replace(backend._model, **model)
    with pytest.raises(BundleError, match=f"{message}.*mvlm build"):
        backend.open_decoder()


def test_a_plan_for_prompts_alone_is_refused(
    device: Device, sources: dict[str, Path], tmp_path: Path
) -> None:
    profiles = {"decoder": [{"S": (2, 4, 8), "T": (0, 0, 511), "I": (1, 4, 4)}]}
    path = with_plans(sources["append"], tmp_path / "bundle", profiles=profiles)
    with pytest.raises(BundleError, match=r"does not take \[1\] as 'input_ids'"):
        device.open(path).open_decoder()


def test_no_memory_for_a_cache(device: Device, plans: dict[str, Path]) -> None:
    decoder = device.open(plans["append"]).open_decoder()
    device.cuda._limit = 1
    with pytest.raises(EngineError, match="The GPU has no memory left"):
        decoder.new_cache()
