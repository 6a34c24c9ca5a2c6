"""The TensorRT decoder against ONNX Runtime's: the same graphs, the same numbers.

It runs in full over stand-ins for the functions of CUDA and the classes of TensorRT, which
compute with ONNX Runtime on host memory and refuse what the real ones refuse.
"""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import BundleError, EngineError
from mvlm_export.engines.kv_cache import KvCache
from mvlm_export.engines.ort_session import OrtBackend, OrtDecoder
from mvlm_export.engines.trt_decoder import TrtDecoderSession

from .bundles import ONE_THREAD, add_next_token, derive_bundle
from .conftest import CONFIG, TinyModel
from .fake_cuda import cudaError_t
from .plans import Device, pretend_device, with_plans
from .test_nano_reuse import nano  # noqa: F401 - a fixture

IDS = np.array([1, 40, 512, 513, 90, 515, 7, 300], np.int32)
EMBEDS = np.random.default_rng(1).normal(size=(4, CONFIG.text.hidden_size)).astype(np.float32)
WIDE = np.random.default_rng(2).normal(size=(4, 256)).astype(np.float32)
PREFILL, DECODE = 0, 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return pretend_device(monkeypatch)


@pytest.fixture(scope="module")
def sources(
    tiny: TinyModel,
    tiny_fixed: TinyModel,
    tiny_half: TinyModel,
    nano: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Bundles by what is special of their decoder; rows of nano alone are aligned."""
    folder = tmp_path_factory.mktemp("sources")
    edits = {"decoder": add_next_token}
    return {
        "append": tiny.path,
        "append-token": derive_bundle(tiny.path, folder / "token", edits),
        "half": tiny_half.path,
        "fixed": tiny_fixed.path,
        "nano": nano,
    }


@pytest.fixture(scope="module")
def plans(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same with the plans of a build."""
    folder = tmp_path_factory.mktemp("plans")
    return {name: with_plans(path, folder / name) for name, path in sources.items()}


FORMS = ["append", "append-token", "half", "fixed", "nano"]


def embeds_of(form: str) -> np.ndarray:
    return WIDE if form == "nano" else EMBEDS


def open_both(device: Device, path: Path) -> tuple[TrtDecoderSession, OrtDecoder]:
    bundle = Bundle.load(path, verify=False)
    return device.open(path).open_decoder(), OrtBackend(bundle, ONE_THREAD).open_decoder()


def rows_of(cache: KvCache) -> list[np.ndarray]:
    return [cache.read_rows(t, 0, cache.length) for t in range(cache.shape.tensors)]


def assert_same_rows(found: KvCache, expected: KvCache) -> None:
    assert found.length == expected.length
    for mine, theirs in zip(rows_of(found), rows_of(expected), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def contexts_of(device: Device) -> list:
    """Execution contexts of the engine loaded last, prefill and decode."""
    return device.engine()._contexts


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


def short_profiles(ids: int, rows: int, form: str) -> dict[str, list[dict]]:
    """Profiles of the tiny decoder for few ids and image rows at once."""
    past = {} if form == "fixed" else {"T": (0, 0, 511)}
    return {
        "decoder": [
            {"S": (1, ids, ids), "I": (1, rows, rows), **past},
            {"S": (1, 1, 1), "I": (1, rows, rows), **past},
        ]
    }


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


# Failures.


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


# Greedy answers, and steps that are replayed.


def greedy(decoder: TrtDecoderSession | OrtDecoder, cache: KvCache, count: int) -> list[int]:
    found = [decoder.append_greedy(cache, IDS[:5], EMBEDS)]
    while len(found) < count:
        found.append(decoder.append_greedy(cache, np.array(found[-1:], np.int32), EMBEDS[:1]))
    return found


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


# Plans of something else.


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
