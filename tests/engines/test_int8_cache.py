"""A decoder whose cache is int8: its rows, its answers, guesses and the shipped prefix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.decoder_state import DecoderState
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.kv_cache import HostKvCache, cache_names
from mvlm_export.engines.ort_session import OrtBackend, OrtDecoder, OrtKvCache
from mvlm_export.engines.prompt import PromptIds
from mvlm_export.engines.prompt_lookup import GreedySteps
from mvlm_export.engines.vlm import VLM
from mvlm_export.passes.lowering.quantize_kv_cache import QuantizeKvCache, quantize_rows
from mvlm_export.passes.lowering.use_group_query_attention import UseGroupQueryAttention
from mvlm_export.passes.transformer.merge_qkv import MergeQkv
from tests.ort_versions import NEEDS_INT8_CACHE

from .bundles import ONE_THREAD, add_next_token, derive_bundle
from .conftest import CONFIG, TinyModel

CAPACITY = CONFIG.text.max_position_embeddings
NAMES = cache_names("present", CONFIG.text.num_hidden_layers)
SCALES = (0.052, 0.048, 0.053, 0.05)
"""The rows of this model reach to 6.4, 127 codes."""

IDS = np.array([1, 40, 512, 513, 90, 515, 7, 300], np.int32)
EMBEDS = np.random.default_rng(1).normal(size=(4, CONFIG.text.hidden_size)).astype(np.float32)
NO_IMAGE = np.zeros((1, CONFIG.text.hidden_size), np.float32)
PICTURE = np.random.default_rng(11).integers(0, 255, (40, 30, 3), dtype=np.uint8)


pytestmark = NEEDS_INT8_CACHE


def derived(model: TinyModel, folder, **fields) -> TinyModel:
    def edit(graph: gs.Graph) -> None:
        for rewrite in (
            MergeQkv(),
            UseGroupQueryAttention(CAPACITY),
            QuantizeKvCache(dict(zip(NAMES, SCALES, strict=True))),
        ):
            assert rewrite.apply(graph).rewritten == CONFIG.text.num_hidden_layers
        add_next_token(graph, 6)

    given = {"kv_form": "fixed", "logits_rows": 6, "cache_scales": SCALES, **fields}
    path = derive_bundle(model.path, folder / "bundle", {"decoder": edit}, **given)
    return replace(model, path=path)


@pytest.fixture(scope="module")
def coded(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return derived(tiny, tmp_path_factory.mktemp("int8"), prefix=True)


@pytest.fixture(scope="module")
def decoder(coded: TinyModel) -> OrtDecoder:
    return OrtBackend(Bundle.load(coded.path), ONE_THREAD).open_decoder()


def test_an_older_onnx_runtime_is_named(
    coded: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with pytest.raises(
        EngineError, match=r"needs ONNX Runtime 1\.27 .* 1\.26\.0 is installed"
    ):
        OrtBackend(Bundle.load(coded.path, verify=False), ONE_THREAD)
    monkeypatch.setattr(onnxruntime, "__version__", "2.0.0")
    OrtBackend(Bundle.load(coded.path, verify=False), ONE_THREAD)


def test_a_row_takes_a_quarter(decoder: OrtDecoder) -> None:
    shape = decoder.new_cache().shape
    assert shape.dtype == "int8"
    assert shape.total_bytes * 4 == replace(shape, dtype="float32").total_bytes


@pytest.mark.parametrize("split", [[8], [1] * 8, [5, 1, 2]])
def test_rows_are_codes_of_those_in_float(
    tiny: TinyModel, decoder: OrtDecoder, split: list[int]
) -> None:
    logits, *rows = tiny.full_run(IDS, torch.from_numpy(EMBEDS))
    cache = decoder.new_cache()
    start = 0
    for count in split:
        found = decoder.append(cache, IDS[start : start + count], EMBEDS)
        start += count
        change = np.linalg.norm(found - logits[start - 1]) / np.linalg.norm(logits[start - 1])
        assert change < 0.03
    for tensor, (expected, scale) in enumerate(zip(rows, SCALES, strict=True)):
        codes = cache.read_rows(tensor, 0, 8)
        assert codes.dtype == np.int8
        steps = np.abs(codes.astype(int) - quantize_rows(expected, scale))
        # The first layer reads no codes; the second sees what they lost.
        assert steps.max() <= (1 if tensor < 2 else 4)
        assert steps.mean() < (0.01 if tensor < 2 else 0.5)


def test_new_rows_alone_are_written(decoder: OrtDecoder) -> None:
    cache = decoder.new_cache()
    assert isinstance(cache, HostKvCache)
    decoder.append(cache, IDS[:5], EMBEDS)
    for tensor in range(4):
        cache.new(tensor, CAPACITY - 5)[...] = 77
    before = [array.copy() for array in cache._memory]  # type: ignore[attr-defined]
    decoder.append(cache, IDS[5:7], EMBEDS)
    for tensor, array in enumerate(cache._memory):  # type: ignore[arg-type]
        rows, old = cache.shape.as_rows(array), cache.shape.as_rows(before[tensor])
        np.testing.assert_array_equal(rows[:5], old[:5])
        np.testing.assert_array_equal(rows[7:], old[7:])
        assert not (rows[5:7] == 77).all()


def test_float_rows_are_refused(decoder: OrtDecoder) -> None:
    cache = decoder.new_cache()
    with pytest.raises(EngineError, match=r"of float32 do not fit .* of int8"):
        cache.write_rows(0, 0, np.zeros((1, 2, 16), np.float32))


def test_memory_of_a_device(decoder: OrtDecoder) -> None:
    host = decoder.new_cache()
    device = OrtKvCache(onnxruntime, host.shape, "cpu")
    for cache in (host, device):
        decoder.append(cache, IDS, EMBEDS)
    for tensor in range(4):
        rows = device.read_rows(tensor, 0, 8)
        np.testing.assert_array_equal(rows, host.read_rows(tensor, 0, 8))


@pytest.mark.parametrize("seed", range(4))
def test_guesses_change_no_token(decoder: OrtDecoder, seed: int) -> None:
    once = np.random.default_rng(seed).integers(3, CONFIG.text.vocab_size, 12).tolist()
    prompt, found, kept = once * 3, [], []
    for allowed in (None, 0):
        state = DecoderState(decoder)
        ids = [int(state.prefill(PromptIds(np.array(prompt, np.int32)), NO_IMAGE).argmax())]
        greedy = GreedySteps(
            state, [*prompt, ids[0]], NO_IMAGE, CONFIG.text.vocab_size, allowed
        )
        for done in range(60):
            ids.append(greedy.next_id(60 - done))
        found.append(ids)
        kept.append(greedy.kept)
    assert found[0] == found[1]
    assert kept[1] == 0


def test_the_prefix_is_of_codes_and_changes_no_answer(coded: TinyModel) -> None:
    answers = []
    for use_prefix in (True, False):
        vlm = VLM.load(coded.path, threads=1, use_prefix=use_prefix)
        chat = vlm.chat()
        asked = [
            vlm.generate(PICTURE, "What is on the table?", max_tokens=12),
            chat.ask("How many?", PICTURE, max_tokens=8),
            chat.ask("Why?", max_tokens=8),
        ]
        assert (asked[0].timings.cached_tokens > 0) is use_prefix
        answers.append([answer.ids for answer in asked])
    assert answers[0] == answers[1]


def test_answers_are_those_of_the_float_cache(coded: TinyModel, vlm: VLM) -> None:
    """Of random weights most steps agree; what a code loses may decide others."""
    found = VLM.load(coded.path, threads=1).generate(PICTURE, "What is it?", max_tokens=4).ids
    assert found == vlm.generate(PICTURE, "What is it?", max_tokens=4).ids
