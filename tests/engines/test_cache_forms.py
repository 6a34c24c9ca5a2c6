"""The fixed form of the cache, and the choice of the next token in the graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.decoder_state import DecoderState
from mvlm_export.engines.errors import BundleError, EngineError
from mvlm_export.engines.kv_cache import HostKvCache
from mvlm_export.engines.ort_session import OrtBackend, OrtDecoder, OrtKvCache
from mvlm_export.engines.vlm import VLM
from mvlm_export.passes.lowering.use_group_query_attention import UseGroupQueryAttention

from .bundles import ONE_THREAD, add_next_token, derive_bundle
from .conftest import CONFIG, TinyModel

IDS = np.array([1, 40, 512, 513, 90, 515, 7, 300], np.int32)
EMBEDS = np.random.default_rng(1).normal(size=(4, CONFIG.text.hidden_size)).astype(np.float32)
PICTURE = np.random.default_rng(11).integers(0, 255, (40, 30, 3), dtype=np.uint8)
QUESTION = "What is on the table?"


def open_decoder(model: TinyModel) -> OrtDecoder:
    return OrtBackend(Bundle.load(model.path, verify=False), ONE_THREAD).open_decoder()


@pytest.fixture(scope="module")
def fixed_gqa(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The fixed form as ONNX Runtime's own operator has it."""
    capacity = CONFIG.text.max_position_embeddings
    edits = {"decoder": UseGroupQueryAttention(capacity).apply}
    path = tmp_path_factory.mktemp("gqa") / "bundle"
    return replace(tiny, path=derive_bundle(tiny.path, path, edits, kv_form="fixed"))


@pytest.fixture(scope="module", params=["tensor-scatter", "group-query-attention"])
def fixed(request: pytest.FixtureRequest) -> TinyModel:
    name = "tiny_fixed" if request.param == "tensor-scatter" else "fixed_gqa"
    found: TinyModel = request.getfixturevalue(name)
    return found


@pytest.mark.parametrize("split", [[8], [1] * 8, [5, 1, 2]])
def test_any_split_equals_one_run_of_the_whole(
    tiny: TinyModel, fixed: TinyModel, split: list[int]
) -> None:
    decoder = open_decoder(fixed)
    logits, *rows = tiny.full_run(IDS, torch.from_numpy(EMBEDS))
    cache = decoder.new_cache()
    assert isinstance(cache, HostKvCache)
    assert cache.past_shape == (1, 2, 512, 16)
    start = 0
    for count in split:
        found = decoder.append(cache, IDS[start : start + count], EMBEDS)
        start += count
        np.testing.assert_allclose(found, logits[start - 1], atol=2e-4)
    for tensor, expected in enumerate(rows):
        np.testing.assert_allclose(cache.past(tensor), expected, atol=2e-5)
        assert not cache.new(tensor, 512 - 8).any()


def test_the_cache_is_written_in_place(fixed: TinyModel) -> None:
    """What is in other rows stays, bit for bit, and the graph's output is the cache itself."""
    decoder = open_decoder(fixed)
    cache = decoder.new_cache()
    assert isinstance(cache, HostKvCache)
    decoder.append(cache, IDS[:5], EMBEDS)
    for tensor in range(4):
        cache.new(tensor, 507)[...] = 7.0
    before = [array.copy() for array in cache._memory]
    decoder.append(cache, IDS[5:7], EMBEDS)
    for tensor, array in enumerate(cache._memory):
        rows, old = cache.shape.as_rows(array), cache.shape.as_rows(before[tensor])
        np.testing.assert_array_equal(rows[:5], old[:5])
        np.testing.assert_array_equal(rows[7:], old[7:])
        assert not (rows[5:7] == 7.0).any()
    names = [output.name for output in decoder._session.get_outputs()]
    bound = decoder._binding.get_outputs()
    places = {v.data_ptr() for v in bound if v.shape() == [1, 2, 512, 16]}
    assert places == {cache.past_address(tensor) for tensor in range(4)}
    assert {"logits", "present.0.key"} <= set(names)


def test_truncated_rows_do_not_come_back(fixed: TinyModel) -> None:
    decoder = open_decoder(fixed)
    cache, fresh = decoder.new_cache(), decoder.new_cache()
    decoder.append(cache, IDS, EMBEDS)
    cache.truncate(3)
    decoder.append(fresh, IDS[:3], EMBEDS)
    found = decoder.append(cache, IDS[5:6], EMBEDS)
    expected = decoder.append(fresh, IDS[5:6], EMBEDS)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("form", ["append", "fixed"])
def test_device_memory_behaves_as_host_memory(
    tiny: TinyModel, tiny_fixed: TinyModel, form: str
) -> None:
    """What CUDA gets, allocated by ONNX Runtime, here on the CPU: rows copied and all."""
    decoder = open_decoder(tiny if form == "append" else tiny_fixed)
    host = decoder.new_cache()
    device = OrtKvCache(onnxruntime, host.shape, "cpu")
    for start, stop in ((0, 5), (5, 6)):
        expected = decoder.append(host, IDS[start:stop], EMBEDS)
        found = decoder.append(device, IDS[start:stop], EMBEDS)
        np.testing.assert_array_equal(found, expected)
    copy = OrtKvCache(onnxruntime, host.shape, "cpu")
    for tensor in range(4):
        rows = device.read_rows(tensor, 0, 6)
        np.testing.assert_array_equal(rows, host.read_rows(tensor, 0, 6))
        copy.write_rows(tensor, 2, rows[2:])
        copy.write_rows(tensor, 0, rows[:2])
    copy.advance(6)
    found = decoder.append(copy, IDS[6:], EMBEDS)
    np.testing.assert_array_equal(found, decoder.append(host, IDS[6:], EMBEDS))
    with pytest.raises(EngineError, match="it holds 8"):
        host.read_rows(0, 0, 9)
    with pytest.raises(EngineError, match="do not fit at position 511"):
        copy.write_rows(0, 511, rows[:2])


def test_new_device_memory_of_the_fixed_form_is_zero(tiny_fixed: TinyModel) -> None:
    shape = open_decoder(tiny_fixed).new_cache().shape
    cache = OrtKvCache(onnxruntime, shape, "cpu")
    assert all(not buffer.numpy().any() for buffer in cache._memory)  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_answers_are_those_of_the_append_form(vlm: VLM, fixed: TinyModel, count: int) -> None:
    other = VLM.load(fixed.path, threads=1)
    pictures = [PICTURE, PICTURE[::-1].copy()][:count] or None
    expected = vlm.generate(pictures, QUESTION, max_tokens=12)
    assert other.generate(pictures, QUESTION, max_tokens=12).ids == expected.ids
    chats = [v.chat() for v in (vlm, other)]
    for question in (QUESTION, "Why?"):
        found = [chat.ask(question, pictures, max_tokens=6).ids for chat in chats]
        assert found[0] == found[1]


def test_a_failed_answer_leaves_no_poison(tiny_fixed: TinyModel) -> None:
    """NaN behind the filled rows would come through the mask of the next answer."""
    vlm = VLM.load(tiny_fixed.path, threads=1)
    expected = vlm.generate(PICTURE, QUESTION, max_tokens=6).ids
    (state,) = vlm._states.free
    prefill = state.prefill

    def overflow(*arguments: object) -> np.ndarray:
        logits = prefill(*arguments)
        for tensor in range(4):
            state.cache.past(tensor)[-4:] = np.nan
        return np.full_like(logits, np.nan)

    state.prefill = overflow
    with pytest.raises(EngineError, match="not finite"):
        vlm.generate(PICTURE, "How many people are there?")
    del state.prefill
    assert vlm.generate(PICTURE, QUESTION, max_tokens=6).ids == expected


def test_a_cache_of_another_size_is_refused(tiny_fixed: TinyModel) -> None:
    bundle = Bundle.load(tiny_fixed.path)
    model = replace(bundle.manifest.model, max_positions=256)
    other = Bundle(bundle.path, replace(bundle.manifest, model=model))
    with pytest.raises(BundleError, match=r"cache is \[1, 2, 512, 16\], .* \[1, 2, 256, 16\]"):
        OrtBackend(other, ONE_THREAD).open_decoder()


def test_a_manifest_of_the_other_form(tiny: TinyModel, tiny_fixed: TinyModel) -> None:
    for model, form in ((tiny, "fixed"), (tiny_fixed, "append")):
        bundle = Bundle.load(model.path)
        other = Bundle(bundle.path, replace(bundle.manifest, kv_form=form))
        with pytest.raises(BundleError, match=r"inputs are not .*different: past_length"):
            OrtBackend(other, ONE_THREAD).open_decoder()


# The choice in the graph.


def counted(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the decoder of a VLM is asked for logits and for a token."""
    decoder, calls = open_decoder_of(vlm), {"append": 0, "append_greedy": 0}

    def count(name: str) -> None:
        original = getattr(decoder, name)

        def run(*arguments: object) -> object:
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(decoder, name, run)

    for name in calls:
        count(name)
    return calls


def test_greedy_answers_fetch_the_token_alone(
    vlm: VLM, tiny_fixed: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = VLM.load(tiny_fixed.path, threads=1)
    calls = counted(other, monkeypatch)
    answer = other.generate(PICTURE, QUESTION, max_tokens=9, ignore_eos=True)
    expected = vlm.generate(PICTURE, QUESTION, max_tokens=9, ignore_eos=True)
    assert answer.ids == expected.ids
    assert calls == {"append": 1, "append_greedy": 8}
    for settings in ({"temperature": 0.5, "seed": 1}, {"repetition_penalty": 1.3}):
        calls.update(append=0, append_greedy=0)
        answer = other.generate(PICTURE, QUESTION, max_tokens=5, ignore_eos=True, **settings)
        expected = vlm.generate(PICTURE, QUESTION, max_tokens=5, ignore_eos=True, **settings)
        assert answer.ids == expected.ids
        assert calls == {"append": 5, "append_greedy": 0}


def test_a_decoder_without_the_choice_gives_logits(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not open_decoder_of(vlm).chooses_greedily
    calls = counted(vlm, monkeypatch)
    vlm.generate(None, QUESTION, max_tokens=3, ignore_eos=True)
    assert calls == {"append": 3, "append_greedy": 0}


def open_decoder_of(vlm: VLM) -> OrtDecoder:
    decoder = vlm._states._decoder
    assert isinstance(decoder, OrtDecoder)
    return decoder


def test_the_token_is_that_of_the_logits(tiny_fixed: TinyModel) -> None:
    decoder = open_decoder(tiny_fixed)
    assert decoder.chooses_greedily
    caches = [decoder.new_cache() for _ in range(2)]
    for start, stop in ((0, 5), (5, 6), (6, 8)):
        logits = decoder.append(caches[0], IDS[start:stop], EMBEDS)
        token = decoder.append_greedy(caches[1], IDS[start:stop], EMBEDS)
        assert token == logits.argmax()
        assert caches[1].length == stop


@pytest.fixture(scope="module")
def tiny_choosing(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The append form with the choice in the graph."""
    path = tmp_path_factory.mktemp("choosing") / "bundle"
    return replace(tiny, path=derive_bundle(tiny.path, path, {"decoder": add_next_token}))


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("form", ["tiny_choosing", "tiny_fixed"])
@pytest.mark.parametrize("row", [0, -1], ids=["kept", "new"])
def test_a_nan_is_an_error_at_once_and_does_not_stay(
    vlm: VLM, form: str, row: int, temperature: float, request: pytest.FixtureRequest
) -> None:
    """In a row that was kept from an earlier turn, too; the next question is answered."""
    other = VLM.load(request.getfixturevalue(form).path, threads=1, verify=False)
    settings = {"max_tokens": 6, "ignore_eos": True, "seed": 1, "temperature": temperature}
    chats = [v.chat() for v in (vlm, other)]
    first = [chat.ask(QUESTION, PICTURE, **settings).ids for chat in chats]
    assert first[0] == first[1]
    stream = chats[1].stream("Why?", **settings)
    next(stream)
    poison(chats[1]._state, row)
    with pytest.raises(EngineError, match="not finite"):
        stream.read()
    again = [chat.ask("Why?", **settings).ids for chat in chats]
    assert again[0] == again[1]


def poison(state: DecoderState, row: int) -> None:
    cache = state.cache
    assert isinstance(cache, HostKvCache)
    cache.past(1)[row] = np.nan


def test_a_token_outside_the_vocabulary_is_an_error(tiny: TinyModel, tmp_path: Path) -> None:
    """So may a graph say that its logits are not finite."""

    def edit(graph: gs.Graph) -> None:
        add_next_token(graph)
        token = graph.outputs[-1]
        chosen = gs.Variable("chosen", np.dtype(np.int64), [1])
        token.inputs[0].outputs = [chosen]
        minus = gs.Constant("minus", np.array([-1000], np.int64))
        graph.nodes.append(gs.Node("Add", "damage", inputs=[chosen, minus], outputs=[token]))

    path = derive_bundle(tiny.path, tmp_path / "bundle", {"decoder": edit})
    decoder = open_decoder(replace(tiny, path=path))
    cache = decoder.new_cache()
    decoder.append(cache, IDS[:3], EMBEDS)
    with pytest.raises(EngineError, match=r"gave the token -\d+ of 512, .* not finite"):
        decoder.append_greedy(cache, IDS[3:5], EMBEDS)
    assert cache.length == 3
    vlm = VLM.load(path, threads=1)
    with pytest.raises(EngineError, match="not finite"):
        vlm.generate(PICTURE, QUESTION)
    assert vlm.generate(PICTURE, QUESTION, temperature=1.0, seed=1, max_tokens=3).ids
