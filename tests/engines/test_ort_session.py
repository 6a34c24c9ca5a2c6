"""ONNX Runtime sessions against the PyTorch modules, and the proof that no row is copied."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from mvlm_export.engines.backends import open_backend
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import (
    BundleError,
    EngineError,
    InputError,
    MissingPackageError,
)
from mvlm_export.engines.kv_cache import HostKvCache
from mvlm_export.engines.ort_session import OrtBackend, OrtDecoder, OrtKvCache
from mvlm_export.engines.session import BackendOptions

from .conftest import TinyModel

ONE_THREAD = BackendOptions(threads=1)
IDS = np.array([1, 40, 512, 513, 90, 515, 7, 300], np.int32)
SENTINEL = 1234.0


@pytest.fixture(scope="module")
def decoder(tiny: TinyModel) -> OrtDecoder:
    return OrtBackend(Bundle.load(tiny.path), ONE_THREAD).open_decoder()


@pytest.fixture(scope="module")
def embeds(tiny: TinyModel) -> np.ndarray:
    size = (4, tiny.config.text.hidden_size)
    return np.random.default_rng(1).normal(size=size).astype(np.float32)


def host_cache(decoder: OrtDecoder) -> HostKvCache:
    cache = decoder.new_cache()
    assert isinstance(cache, HostKvCache)
    return cache


@pytest.mark.parametrize("split", [[8], [1] * 8, [5, 1, 2], [1, 7]])
def test_any_split_equals_one_run_of_the_whole(
    tiny: TinyModel, decoder: OrtDecoder, embeds: np.ndarray, split: list[int]
) -> None:
    logits, *rows = tiny.full_run(IDS, torch.from_numpy(embeds))
    cache = host_cache(decoder)
    start = 0
    for count in split:
        found = decoder.append(cache, IDS[start : start + count], embeds)
        start += count
        assert cache.length == start
        assert found.shape == (512,)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, logits[start - 1], atol=2e-4)
    for tensor, expected in enumerate(rows):
        np.testing.assert_allclose(cache.past(tensor), expected, atol=2e-5)


def test_half_precision(tiny_half: TinyModel) -> None:
    bundle = Bundle.load(tiny_half.path)
    backend = OrtBackend(bundle, ONE_THREAD)
    decoder = backend.open_decoder()
    cache = host_cache(decoder)
    assert cache.shape.dtype == "float16"
    assert cache.past(0).dtype == np.float16
    pixels = np.random.default_rng(2).normal(size=(1, 3, 32, 32)).astype(np.float32)
    features = backend.open_graph("vision_encoder").run(pixels)
    embeds = backend.open_graph("projector").run(features)[0]
    assert features.dtype == embeds.dtype == np.float16
    expected = tiny_half.embed(pixels)
    np.testing.assert_allclose(embeds, expected.numpy(), rtol=3e-3, atol=0.05)
    logits, *rows = tiny_half.full_run(IDS, expected)
    decoder.append(cache, IDS[:6], embeds)
    decoder.append(cache, IDS[6:7], embeds)
    found = decoder.append(cache, IDS[7:], embeds)
    assert np.corrcoef(found, logits[-1])[0, 1] > 0.999
    np.testing.assert_allclose(cache.past(0), rows[0], atol=0.02)


def test_past_is_left_alone_and_new_rows_land_behind_it(
    decoder: OrtDecoder, embeds: np.ndarray
) -> None:
    cache = host_cache(decoder)
    for tensor in range(4):
        cache.new(tensor, cache.capacity)[...] = SENTINEL
    decoder.append(cache, IDS[:5], embeds)
    for count in (1, 2):
        before = [cache.past(tensor).tobytes() for tensor in range(4)]
        length, starts = cache.length, [cache.past_address(tensor) for tensor in range(4)]
        targets = [cache.new_address(tensor) for tensor in range(4)]
        decoder.append(cache, IDS[length : length + count], embeds)
        written = dict(
            zip(
                (output.name for output in decoder._session.get_outputs()),
                decoder._binding.get_outputs(),
                strict=True,
            )
        )
        for tensor, name in enumerate(decoder._present):
            assert written[name].data_ptr() == targets[tensor]
            assert written[name].shape() == [count, 2, 16]
            assert cache.past_address(tensor) == starts[tensor]
            assert cache.past(tensor)[:length].tobytes() == before[tensor]
            fresh = cache.past(tensor)[length:]
            assert fresh.ctypes.data == targets[tensor]
            assert not (fresh == SENTINEL).any()
            assert (cache.new(tensor, cache.capacity - cache.length) == SENTINEL).all()


def test_the_past_is_bound_at_the_start_of_its_buffer(
    decoder: OrtDecoder, embeds: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: dict[str, tuple[tuple[int, ...], int]] = {}
    original = decoder._binding.bind_input

    def record(name, device, index, dtype, shape, pointer) -> None:
        bound[name] = (tuple(shape), pointer)
        original(name, device, index, dtype, shape, pointer)

    monkeypatch.setattr(decoder._binding, "bind_input", record)
    cache = host_cache(decoder)
    for length in (0, 3):
        decoder.append(cache, IDS[length : length + 3], embeds)
        for tensor, name in enumerate(decoder._past):
            assert bound[name] == ((length, 2, 16), cache.past_address(tensor))
            assert bound[name][1] != 0


def test_steps_allocate_nothing_that_stays(decoder: OrtDecoder, embeds: np.ndarray) -> None:
    cache = host_cache(decoder)
    step_logits = decoder._step_logits.ctypes.data
    for _ in range(5):
        decoder.append(cache, IDS[:1], embeds)
    beneath_this_test = tracemalloc.Filter(True, __file__, all_frames=True)
    tracemalloc.start(16)  # frames: those of a step, down to this one
    try:
        for _ in range(200):
            kept = decoder.append(cache, IDS[:1], embeds)
        snapshot = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    # Only what a step did counts, not the threads of the test runner, and only blocks that
    # could hold a row: ONNX Runtime's bindings look an attribute up by a new string of
    # 124 bytes in every run, and CPython's type cache keeps up to 4096 of those.
    row = cache.shape.row_bytes
    traces = snapshot.filter_traces([beneath_this_test]).traces
    stays = sum(trace.size for trace in traces if trace.size >= row)
    assert kept.nbytes <= stays < kept.nbytes + 20 * row
    assert decoder._step_logits.ctypes.data == step_logits
    assert cache.length == 205


def test_logits_are_the_callers_own(decoder: OrtDecoder, embeds: np.ndarray) -> None:
    cache = host_cache(decoder)
    first = decoder.append(cache, IDS[:1], embeds)
    kept = first.copy()
    decoder.append(cache, IDS[1:2], embeds)
    np.testing.assert_array_equal(first, kept)


def test_device_memory_behaves_as_host_memory(decoder: OrtDecoder, embeds: np.ndarray) -> None:
    """The cache that CUDA gets, allocated by ONNX Runtime, here on the CPU device."""
    host = host_cache(decoder)
    device = OrtKvCache(onnxruntime, host.shape, "cpu")
    for start, stop in ((0, 5), (5, 6), (6, 8)):
        expected = decoder.append(host, IDS[start:stop], embeds)
        found = decoder.append(device, IDS[start:stop], embeds)
        np.testing.assert_array_equal(found, expected)
    buffers = device._memory
    for tensor in range(4):
        np.testing.assert_array_equal(buffers[tensor].numpy()[:8], host.past(tensor))


def test_truncated_rows_do_not_come_back(decoder: OrtDecoder, embeds: np.ndarray) -> None:
    cache, fresh = host_cache(decoder), host_cache(decoder)
    decoder.append(cache, IDS, embeds)
    cache.truncate(3)
    decoder.append(fresh, IDS[:3], embeds)
    found = decoder.append(cache, IDS[5:6], embeds)
    expected = decoder.append(fresh, IDS[5:6], embeds)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_caches_of_two_threads_do_not_mix(decoder: OrtDecoder, embeds: np.ndarray) -> None:
    def run(ids: np.ndarray, results: list[np.ndarray]) -> None:
        cache = decoder.new_cache()
        results += [decoder.append(cache, ids[i : i + 1], embeds) for i in range(len(ids))]

    sequences = [np.tile(IDS, 5), np.tile(IDS[::-1], 5)]
    alone: list[list[np.ndarray]] = [[], []]
    beside: list[list[np.ndarray]] = [[], []]
    for ids, results in zip(sequences, alone, strict=True):
        run(ids, results)
    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(sequences, beside, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.array(beside), np.array(alone))


def copy_bundle(tiny: TinyModel, place: Path) -> Bundle:
    shutil.copytree(tiny.path, place)
    return Bundle.load(place, verify=False)


def test_a_graph_with_the_last_row_alone(
    tiny: TinyModel, decoder: OrtDecoder, embeds: np.ndarray, tmp_path: Path
) -> None:
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    path = bundle.graph_path("decoder")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["all_logits" if o == "logits" else o for o in node.output]
    bounds = [np.array([value], np.int64) for value in (-1, 2**31, 0)]
    names = ["last_start", "last_end", "last_axis"]
    model.graph.initializer.extend(map(onnx.numpy_helper.from_array, bounds, names))
    model.graph.node.append(onnx.helper.make_node("Slice", ["all_logits", *names], ["logits"]))
    rows = model.graph.output[0].type.tensor_type.shape.dim[0]
    rows.Clear()
    rows.dim_value = 1
    onnx.save(model, path)
    last_only = OrtBackend(bundle, ONE_THREAD).open_decoder()
    expected = decoder.append(decoder.new_cache(), IDS, embeds)
    found = last_only.append(last_only.new_cache(), IDS, embeds)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_failed_run_names_the_graph_and_leaves_the_cache(
    decoder: OrtDecoder, embeds: np.ndarray
) -> None:
    cache = host_cache(decoder)
    decoder.append(cache, IDS[:3], embeds)
    beyond = np.array([512 + 99], np.int32)
    with pytest.raises(EngineError, match="ONNX Runtime cannot run the graph 'decoder'"):
        decoder.append(cache, beyond, embeds)
    assert cache.length == 3
    decoder.append(cache, IDS[3:4], embeds)


def test_full_cache_is_refused_before_the_run(decoder: OrtDecoder, embeds: np.ndarray) -> None:
    cache = host_cache(decoder)
    cache.advance(510)
    with pytest.raises(EngineError, match="holds 510 of 512 positions, so 3 more"):
        decoder.append(cache, IDS[:3], embeds)


def test_wrong_pixels_name_the_graph(tiny: TinyModel) -> None:
    graph = OrtBackend(Bundle.load(tiny.path), ONE_THREAD).open_graph("vision_encoder")
    with pytest.raises(EngineError, match="cannot run the graph 'vision_encoder'"):
        graph.run(np.zeros((1, 3, 7, 7), np.float32))


def test_damaged_graph_names_the_graph(tiny: TinyModel, tmp_path: Path) -> None:
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    bundle.graph_path("projector").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match="cannot load the graph 'projector'"):
        OrtBackend(bundle, ONE_THREAD).open_graph("projector")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_layers": 3}, "inputs are not those of the manifest's model"),
        ({"num_key_value_heads": 4}, "2, 16, 512, float32, but .* needs 4, 16, 512, float32"),
        ({"vocab_size": 500}, "but the manifest's model needs 2, 16, 500"),
    ],
)
def test_manifest_of_another_model(
    altered: Callable[..., Bundle], model: dict, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        OrtBackend(altered(model), ONE_THREAD).open_decoder()


def test_other_forms_of_cache_are_refused(altered: Callable[..., Bundle]) -> None:
    with pytest.raises(EngineError, match="has the KV form 'capacity', but the onnxruntime"):
        OrtBackend(altered(kv_form="capacity"), ONE_THREAD)


def test_unknown_names(tiny: TinyModel) -> None:
    bundle = Bundle.load(tiny.path)
    with pytest.raises(InputError, match="no backend 'onnx'; choose one of onnxruntime"):
        open_backend(bundle, "onnx", ONE_THREAD)
    with pytest.raises(InputError, match=r"no ONNX Runtime provider 'gpu'; .* cpu, cuda"):
        open_backend(bundle, "onnxruntime", BackendOptions("gpu"))
    with pytest.raises(InputError, match="threads is 0; give 1 or more"):
        BackendOptions(threads=0)


def test_missing_onnxruntime_names_the_extra(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    bundle = Bundle.load(tiny.path)
    for provider, extra in (("cpu", "cpu"), ("cuda", "gpu")):
        with pytest.raises(MissingPackageError, match=rf"mvlm-export\[{extra}\]"):
            OrtBackend(bundle, BackendOptions(provider))


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is there"
)
def test_onnxruntime_without_cuda_says_what_to_install(tiny: TinyModel) -> None:
    with pytest.raises(EngineError, match=r"has no CUDAExecutionProvider.*mvlm-export\[gpu\]"):
        OrtBackend(Bundle.load(tiny.path), BackendOptions("cuda"))


def test_a_silent_fall_back_is_an_error(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA is listed, but the session starts on the CPU, as it does without a driver."""
    backend = OrtBackend(Bundle.load(tiny.path), ONE_THREAD)
    fallen = SimpleNamespace(
        __version__="1.99",
        capi=onnxruntime.capi,
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=lambda *_, **__: SimpleNamespace(
            get_providers=lambda: ["CPUExecutionProvider"]
        ),
    )
    monkeypatch.setattr(backend, "_ort", fallen)
    cuda = SimpleNamespace(name="CUDAExecutionProvider", device="cuda", extra="gpu")
    monkeypatch.setattr(backend, "_provider", cuda)
    with pytest.raises(EngineError, match=r"fell back to CPUExecutionProvider .* 'projector'"):
        backend.open_graph("projector")


def test_threads_reach_the_session(tiny: TinyModel) -> None:
    session = OrtBackend(Bundle.load(tiny.path), ONE_THREAD).open_decoder()._session
    assert session.get_session_options().intra_op_num_threads == 1
    assert not session.get_session_options().enable_mem_pattern
    assert json.loads((tiny.path / "manifest.json").read_text())["kv_form"] == "append"
