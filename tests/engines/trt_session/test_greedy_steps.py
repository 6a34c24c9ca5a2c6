"""The TensorRT decoder against ONNX Runtime's: greedy tokens, and steps that are replayed.

It runs in full over stand-ins for the functions of CUDA and the classes of TensorRT, which
compute with ONNX Runtime on host memory and refuse what the real ones refuse.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.kv_cache import KvCache
from mvlm_export.engines.ort_session import OrtDecoder
from mvlm_export.engines.trt_decoder import TrtDecoderSession

from ..fake_cuda import cudaError_t
from ..plans import Device, with_plans
from .both_sessions import (
    DECODE,
    EMBEDS,
    IDS,
    assert_same_rows,
    contexts_of,
    open_both,
    short_profiles,
)


def greedy(decoder: TrtDecoderSession | OrtDecoder, cache: KvCache, count: int) -> list[int]:
    found = [decoder.append_greedy(cache, IDS[:5], EMBEDS)]
    while len(found) < count:
        found.append(decoder.append_greedy(cache, np.array(found[-1:], np.int32), EMBEDS[:1]))
    return found


@pytest.mark.parametrize("form", ["append", "append-token", "fixed"])
def test_a_plan_gives_one_choice_at_most(
    device: Device, plans: dict[str, Path], form: str
) -> None:
    decoder, reference = open_both(device, plans[form])
    most = int(form != "append")  # its graph gives logits alone
    assert decoder.most_choices == reference.most_choices == most
    cache = decoder.new_cache()
    decoder.append(cache, IDS[:5], EMBEDS)
    refused = f"{most + 1} choices were asked for, .* {most} at most"
    with pytest.raises(EngineError, match=refused):
        decoder.append_choices(cache, IDS[5 : 6 + most], EMBEDS)
    assert cache.length == 5
    if most:
        expected = reference.new_cache()
        reference.append(expected, IDS[:5], EMBEDS)
        found = decoder.append_choices(cache, IDS[5:6], EMBEDS)
        assert found == [reference.append_greedy(expected, IDS[5:6], EMBEDS)]
        assert_same_rows(cache, expected)


@pytest.mark.parametrize("form", ["append-token", "fixed"])
def test_a_greedy_token_costs_four_bytes(
    device: Device, plans: dict[str, Path], form: str
) -> None:
    decoder, reference = open_both(device, plans[form])
    cache = decoder.new_cache()
    expected = greedy(reference, reference.new_cache(), 8)
    assert greedy(decoder, cache, 3) == expected[:3]
    for place in range(3, 8):
        device.cuda._copies.clear()
        id_ = np.array(expected[place - 1 : place], np.int32)
        assert decoder.append_greedy(cache, id_, EMBEDS[:1]) == expected[place]
        sizes: dict[str, list[int]] = {}
        for kind, size in device.cuda._copies:
            sizes.setdefault(kind, []).append(size)
        assert sizes["DeviceToHost"] == [4]
        # The id is on the device already; what differs is the length of the cache.
        assert sizes.get("HostToDevice", []) == ([8] if form == "fixed" else [])


@pytest.mark.parametrize("form", ["append-token", "fixed"])
def test_another_id_than_the_chosen_one_is_sent(
    device: Device, plans: dict[str, Path], form: str
) -> None:
    decoder, reference = open_both(device, plans[form])
    cache, expected = decoder.new_cache(), reference.new_cache()
    for step in range(6):
        found = decoder.append_greedy(cache, IDS[step : step + 1], EMBEDS)
        logits = reference.append(expected, IDS[step : step + 1], EMBEDS)
        assert found == logits.argmax()
        chosen = np.array([found], np.int32)
        np.testing.assert_array_equal(
            decoder.append(cache, chosen, EMBEDS), reference.append(expected, chosen, EMBEDS)
        )
    assert_same_rows(cache, expected)


@pytest.mark.parametrize("form", ["append-token", "fixed"])
def test_an_id_on_the_device_serves_one_step(
    device: Device, plans: dict[str, Path], form: str
) -> None:
    """The step leaves its own choice there, also where the logits were asked for."""
    decoder, reference = open_both(device, plans[form])
    cache, expected = decoder.new_cache(), reference.new_cache()
    reference.append(expected, IDS[:5], EMBEDS)
    chosen = np.array([decoder.append_greedy(cache, IDS[:5], EMBEDS)], np.int32)
    for _ in range(4):
        wanted = reference.append(expected, chosen, EMBEDS)
        np.testing.assert_array_equal(decoder.append(cache, chosen, EMBEDS), wanted)
    assert_same_rows(cache, expected)


def test_steps_are_replayed_from_the_third_on(device: Device, plans: dict[str, Path]) -> None:
    decoder, reference = open_both(device, plans["fixed"])
    cache, expected = decoder.new_cache(), reference.new_cache()
    for step, launches in ((0, 0), (1, 1), (2, 2), (3, 3)):
        found = decoder.append(cache, IDS[step : step + 1], EMBEDS)
        logits = reference.append(expected, IDS[step : step + 1], EMBEDS)
        np.testing.assert_array_equal(found, logits)
        assert device.cuda._launches == launches
    runs = len(contexts_of(device)[DECODE]._runs)
    assert runs == 2  # one as it is, one to record
    decoder.append(cache, IDS[4:7], EMBEDS)  # the other context: what is recorded holds
    reference.append(expected, IDS[4:7], EMBEDS)
    found = decoder.append(cache, IDS[7:], EMBEDS)
    np.testing.assert_array_equal(found, reference.append(expected, IDS[7:], EMBEDS))
    assert device.cuda._launches == 4
    assert decoder.replay_problem is None
    assert_same_rows(cache, expected)


def test_each_cache_has_its_own_record(device: Device, plans: dict[str, Path]) -> None:
    decoder, reference = open_both(device, plans["fixed"])
    pairs = [(decoder.new_cache(), reference.new_cache()) for _ in range(2)]
    order = [0, 1, 0, 0, 1, 1, 1, 0, 1, 0]
    for step, which in enumerate(order):
        cache, expected = pairs[which]
        ids = IDS[step % 8 : step % 8 + 1]
        found = decoder.append_greedy(cache, ids, EMBEDS)
        assert found == reference.append(expected, ids, EMBEDS).argmax()
    for cache, expected in pairs:
        assert_same_rows(cache, expected)
    assert device.cuda._launches == 6
    assert len(decoder._replay._recorded) == 2
    del pairs, cache
    gc.collect()
    assert not len(decoder._replay._recorded)


@pytest.mark.parametrize(
    "step", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]
)
def test_steps_that_cannot_be_recorded_run_as_they_are(
    device: Device, plans: dict[str, Path], step: str
) -> None:
    decoder, reference = open_both(device, plans["fixed"])
    cache, expected = decoder.new_cache(), reference.new_cache()
    for place in range(8):
        device.cuda._fail(step, cudaError_t.cudaErrorUnknown)
        ids = IDS[place : place + 1]
        found = decoder.append(cache, ids, EMBEDS)
        np.testing.assert_array_equal(found, reference.append(expected, ids, EMBEDS))
    assert f"{step} failed with cudaErrorUnknown" in decoder.replay_problem
    assert device.cuda._launches == 0
    assert step in device.cuda._failing  # it is not tried any more
    assert_same_rows(cache, expected)


def test_one_failed_recording_is_not_the_last(device: Device, plans: dict[str, Path]) -> None:
    decoder = device.open(plans["fixed"]).open_decoder()
    cache = decoder.new_cache()
    device.cuda._fail("cudaStreamEndCapture", cudaError_t.cudaErrorUnknown)
    for place in range(4):
        decoder.append(cache, IDS[place : place + 1], EMBEDS)
    assert device.cuda._launches == 2
    assert decoder.replay_problem is None


def test_tensorrt_may_say_that_it_cannot_be_captured_yet(
    device: Device, plans: dict[str, Path]
) -> None:
    """As TensorRT-RTX does while it compiles kernels."""
    decoder = device.open(plans["fixed"]).open_decoder()
    cache, answers = decoder.new_cache(), [False, False, True, True]
    contexts_of(device)[DECODE].is_stream_capturable = lambda stream: answers.pop(0)
    for place in range(5):
        decoder.append(cache, IDS[place : place + 1], EMBEDS)
    assert device.cuda._launches == 2


@pytest.mark.parametrize("reason", ["length on the host", "one profile"])
def test_where_a_record_would_not_hold_none_is_made(
    device: Device, sources: dict[str, Path], tmp_path: Path, reason: str
) -> None:
    host = ("past_length",) if reason == "length on the host" else ()
    profiles = short_profiles(8, 4, "fixed")
    if reason == "one profile":
        profiles["decoder"].pop()
    path = with_plans(sources["fixed"], tmp_path / "bundle", profiles=profiles, host=host)
    decoder, reference = open_both(device, path)
    cache, expected = decoder.new_cache(), reference.new_cache()
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8)):
        ids = IDS[start:stop]
        found = decoder.append(cache, ids, EMBEDS)
        np.testing.assert_array_equal(found, reference.append(expected, ids, EMBEDS))
    assert device.cuda._launches == 0
    assert_same_rows(cache, expected)
