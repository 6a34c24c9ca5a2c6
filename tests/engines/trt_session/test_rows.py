"""The TensorRT decoder against ONNX Runtime's: the same graphs, the same numbers.

It runs in full over stand-ins for the functions of CUDA and the classes of TensorRT, which
compute with ONNX Runtime on host memory and refuse what the real ones refuse.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

from mvlm_export.engines.errors import EngineError

from ..plans import Device, with_plans
from .both_sessions import (
    DECODE,
    EMBEDS,
    FORMS,
    IDS,
    PREFILL,
    WIDE,
    assert_same_rows,
    contexts_of,
    embeds_of,
    open_both,
    rows_of,
    short_profiles,
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [[8], [1] * 8, [5, 1, 2]])
def test_logits_and_rows_are_those_of_onnxruntime(
    device: Device, plans: dict[str, Path], form: str, split: list[int]
) -> None:
    decoder, reference = open_both(device, plans[form])
    cache, expected = decoder.new_cache(), reference.new_cache()
    start = 0
    for count in split:
        ids, embeds = IDS[start : start + count], embeds_of(form)
        found = decoder.append(cache, ids, embeds)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, reference.append(expected, ids, embeds))
        assert_same_rows(cache, expected)
        start += count


# Where things are.


def test_the_cache_is_bound_by_address_and_nothing_is_moved(
    device: Device, plans: dict[str, Path]
) -> None:
    decoder = device.open(plans["nano"]).open_decoder()
    cache = decoder.new_cache()
    row = cache.shape.row_bytes
    assert row % 256 == 0
    for start, stop, profile in ((0, 3, PREFILL), (3, 4, DECODE), (4, 8, PREFILL)):
        device.cuda._copies.clear()
        decoder.append(cache, IDS[start:stop], WIDE)
        run = contexts_of(device)[profile]._runs[-1]
        for tensor, (past, present) in enumerate(
            zip(decoder._past, decoder._present, strict=True)
        ):
            begin = cache.past_address(tensor)
            assert run.addresses[past] == begin != 0
            assert run.addresses[present] == begin + start * row
            assert run.shapes[past] == (start, 4, 64)
            assert run.shapes[present] == (stop - start, 4, 64)
        assert "DeviceToDevice" not in {kind for kind, _ in device.cuda._copies}


def test_rows_that_tensorrt_cannot_address_are_moved_behind_the_past(
    device: Device, plans: dict[str, Path]
) -> None:
    decoder = device.open(plans["append"]).open_decoder()
    cache = decoder.new_cache()
    row = cache.shape.row_bytes
    assert row == 128
    for start, stop, profile in ((0, 3, PREFILL), (3, 4, DECODE)):
        device.cuda._copies.clear()
        decoder.append(cache, IDS[start:stop], EMBEDS)
        run = contexts_of(device)[profile]._runs[-1]
        assert all(address % 256 == 0 for address in run.addresses.values())
        moved = [size for kind, size in device.cuda._copies if kind == "DeviceToDevice"]
        assert moved == [(stop - start) * row] * 4
    # What lies behind is as it was allocated.
    cache.advance(1)
    assert np.isnan(cache.read_rows(0, 4, 5)).all()


def test_the_fixed_cache_is_past_and_present_at_one_address(
    device: Device, plans: dict[str, Path]
) -> None:
    decoder = device.open(plans["fixed"]).open_decoder()
    cache = decoder.new_cache()
    decoder.append(cache, IDS[:5], EMBEDS)
    decoder.append(cache, IDS[5:6], EMBEDS)
    for context in contexts_of(device):
        (run,) = context._runs
        for tensor, (past, present) in enumerate(
            zip(decoder._past, decoder._present, strict=True)
        ):
            assert run.addresses[past] == run.addresses[present] == cache.past_address(tensor)
    whole = cache.shape.buffer
    cache.advance(whole[2] - 6)
    assert not cache.read_rows(0, 6, whole[2]).any()


def test_steps_allocate_nothing(device: Device, plans: dict[str, Path]) -> None:
    decoder = device.open(plans["nano"]).open_decoder()
    cache = decoder.new_cache()
    decoder.append(cache, IDS, WIDE)
    blocks = [set(space.blocks) for space in (device.cuda._device, device.cuda._host)]
    for id_ in IDS:
        decoder.append(cache, np.array([id_]), WIDE)
    assert blocks == [set(s.blocks) for s in (device.cuda._device, device.cuda._host)]


def test_all_memory_is_given_back(device: Device, plans: dict[str, Path]) -> None:
    decoder = device.open(plans["fixed"]).open_decoder()
    cache = decoder.new_cache()
    for id_ in IDS[:4]:
        decoder.append(cache, np.array([id_]), EMBEDS)
    assert any(device.cuda._graphs.values())
    device.trt._engines.clear()
    del decoder, cache
    gc.collect()
    assert not device.cuda._device.blocks
    assert not device.cuda._host.blocks
    assert not any(device.cuda._graphs.values())


# Limits.


@pytest.mark.parametrize("form", ["append", "fixed"])
def test_the_cache_can_be_filled_to_its_last_row(
    device: Device, plans: dict[str, Path], form: str
) -> None:
    decoder, reference = open_both(device, plans[form])
    cache, expected = decoder.new_cache(), reference.new_cache()
    most = cache.capacity
    ids = np.arange(most, dtype=np.int32) % 512
    decoder.append(cache, ids[: most - 2], EMBEDS)
    reference.append(expected, ids[: most - 2], EMBEDS)
    for place in (most - 2, most - 1):
        found = decoder.append(cache, ids[place : place + 1], EMBEDS)
        wanted = reference.append(expected, ids[place : place + 1], EMBEDS)
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(EngineError, match="holds 512 of 512 positions, so 1 more cannot"):
        decoder.append(cache, ids[:1], EMBEDS)
    assert_same_rows(cache, expected)


@pytest.mark.parametrize(("ids", "rows", "runs"), [(3, 4, 3), (8, 2, 2), (5, 1, 3), (2, 1, 5)])
@pytest.mark.parametrize("form", ["append", "append-token", "fixed"])
def test_a_prompt_in_chunks_is_as_one(
    device: Device,
    sources: dict[str, Path],
    tmp_path: Path,
    form: str,
    ids: int,
    rows: int,
    runs: int,
) -> None:
    limits = short_profiles(ids, rows, form)
    path = with_plans(sources[form], tmp_path / "bundle", profiles=limits)
    decoder, reference = open_both(device, path)
    cache, expected = decoder.new_cache(), reference.new_cache()
    found = decoder.append(cache, IDS, EMBEDS)
    np.testing.assert_allclose(found, reference.append(expected, IDS, EMBEDS), atol=2e-5)
    for mine, theirs in zip(rows_of(cache), rows_of(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    assert sum(len(context._runs) for context in contexts_of(device)) == runs
    if decoder.chooses_greedily:
        other = decoder.new_cache()
        assert decoder.append_greedy(other, IDS, EMBEDS) == found.argmax()


def test_only_the_image_rows_that_are_named_are_sent(
    device: Device, plans: dict[str, Path]
) -> None:
    """Of a long chat's many pictures too, of which the profile would not take all."""
    decoder, reference = open_both(device, plans["append"])
    cache, expected = decoder.new_cache(), reference.new_cache()
    many = np.random.default_rng(3).normal(size=(40, 64)).astype(np.float32)
    ids = np.array([5, 512 + 37, 512 + 38, 9], np.int32)
    found = decoder.append(cache, ids, many)
    np.testing.assert_array_equal(found, reference.append(expected, ids, many))
    assert contexts_of(device)[PREFILL]._runs[-1].shapes["image_embeds"] == (2, 64)
    device.cuda._copies.clear()
    decoder.append(cache, ids[:1], many)
    assert [c for c in device.cuda._copies if c[0] == "HostToDevice"] == [("HostToDevice", 4)]


@pytest.mark.parametrize(
    ("ids", "embeds", "message"),
    [
        ([1, 512 + 4], EMBEDS, "The id 516 names no row: the vocabulary has 512 and 4 image"),
        ([-1], EMBEDS, "The id -1 names no row"),
        ([], EMBEDS, "given no ids"),
        ([512], EMBEDS[:, :9], r"Image rows \[1, 9\] were given to a decoder of width 64"),
    ],
)
@pytest.mark.parametrize("form", ["append", "fixed"])
def test_what_a_gpu_would_not_notice_is_refused(
    device: Device,
    plans: dict[str, Path],
    form: str,
    ids: list[int],
    embeds: np.ndarray,
    message: str,
) -> None:
    decoder = device.open(plans[form]).open_decoder()
    cache = decoder.new_cache()
    decoder.append(cache, IDS[:3], EMBEDS)
    runs = len(contexts_of(device)[PREFILL]._runs)
    with pytest.raises(EngineError, match=message):
        decoder.append(cache, np.array(ids, np.int32), embeds)
    assert cache.length == 3
    assert len(contexts_of(device)[PREFILL]._runs) == runs


@pytest.mark.parametrize("form", ["append", "fixed"])
def test_caches_of_two_threads_do_not_mix(
    device: Device, plans: dict[str, Path], form: str
) -> None:
    decoder, reference = open_both(device, plans[form])

    def run(session, ids: np.ndarray, results: list[np.ndarray]) -> None:
        cache = session.new_cache()
        for place in range(len(ids)):
            results.append(session.append(cache, ids[place : place + 1], EMBEDS))
            cache.read_rows(0, 0, 1)

    sequences = [np.tile(IDS, 2), np.tile(IDS[::-1], 2)]
    alone: list[list[np.ndarray]] = [[], []]
    beside: list[list[np.ndarray]] = [[], []]
    for ids, results in zip(sequences, alone, strict=True):
        run(reference, ids, results)
    threads = [
        threading.Thread(target=run, args=(decoder, ids, results))
        for ids, results in zip(sequences, beside, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.array(beside), np.array(alone))
