"""The prompt prefix: its file, its rows, and what a prompt saves by it."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvlm_export.engines.bundle import PREFIX, Bundle
from mvlm_export.engines.decoder_state import DecoderState
from mvlm_export.engines.errors import BundleError, EngineError
from mvlm_export.engines.kv_cache import CacheShape, HostKvCache
from mvlm_export.engines.manifest import ModelSpec
from mvlm_export.engines.ort_session import OrtBackend, OrtKvCache
from mvlm_export.engines.prefix import (
    PromptPrefix,
    load_prefix,
    save_prefix,
)
from mvlm_export.engines.prompt import PromptIds, tokenize_constant_prefix
from mvlm_export.engines.vlm import VLM

from .bundles import ONE_THREAD
from .conftest import TinyModel
from .manifests import MODEL

QUESTION = "What is on the table?"
PICTURE = np.random.default_rng(11).integers(0, 255, (40, 30, 3), dtype=np.uint8)
IDS = np.array([1, 7, 3], np.int32)


def random_prefix(dtype: str = "float32", **changes: object) -> PromptPrefix:
    rng = np.random.default_rng(5)
    rows = tuple(rng.normal(size=(3, 1, 4)).astype(dtype) for _ in range(4))
    return replace(PromptPrefix(IDS, rows), **changes)  # type: ignore[arg-type]


def save_arrays(path: Path, **changes: np.ndarray | None) -> Path:
    """The file of a prefix that fits ``MODEL``, with arrays replaced or left out."""
    save_prefix(path, random_prefix())
    with np.load(path) as data:
        arrays = {**data, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


# The file.


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_reads_back_what_was_saved(tmp_path: Path, dtype: str) -> None:
    prefix = random_prefix(dtype)
    save_prefix(tmp_path / PREFIX, prefix)
    found = load_prefix(tmp_path / PREFIX, MODEL, dtype)
    assert len(found) == 3
    assert found.ids.dtype == np.int32
    np.testing.assert_array_equal(found.ids, IDS)
    for row, expected in zip(found.rows, prefix.rows, strict=True):
        assert row.dtype == dtype
        np.testing.assert_array_equal(row, expected)
    assert [path.name for path in tmp_path.iterdir()] == [PREFIX]
    with np.load(tmp_path / PREFIX) as data:
        assert data.files == ["ids", "key.0", "value.0", "key.1", "value.1"]


def test_the_same_prefix_makes_the_same_bytes(tmp_path: Path) -> None:
    save_prefix(tmp_path / "a", random_prefix())
    save_prefix(tmp_path / "b", random_prefix())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EngineError, match="Cannot write"):
        save_prefix(tmp_path / "file" / PREFIX, random_prefix())


WRONG = [
    ({"value.1": None}, r"its arrays are not the model's \(value\.1\)"),
    ({"key.2": np.zeros(1)}, r"not the model's \(key\.2\)"),
    ({"ids": IDS.astype(np.int64)}, r"ids is int64 \[3\], not int32"),
    ({"ids": IDS[None]}, r"ids is int32 \[1, 3\]"),
    ({"ids": IDS[:0]}, "ids has 0 entries, not 1 to 127"),
    ({"ids": np.zeros(128, np.int32)}, "ids has 128 entries"),
    ({"ids": np.array([1, 10, 3], np.int32)}, "ids holds others than 0 to 9"),
    ({"ids": np.array([1, -1, 3], np.int32)}, "ids holds others"),
    ({"ids": IDS[:2]}, r"key\.0 is float32 \[3, 1, 4\], not float32 \[2, 1, 4\]"),
    ({"key.1": np.zeros((3, 4, 1), np.float32)}, r"key\.1 is float32 \[3, 4, 1\]"),
    ({"value.0": np.zeros((3, 1, 4), np.float16)}, r"value\.0 is float16"),
    ({"key.0": np.full((3, 1, 4), np.inf, np.float32)}, r"key\.0 holds .* not finite"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_file_of_another_model(tmp_path: Path, changes: dict, message: str) -> None:
    path = save_arrays(tmp_path / PREFIX, **changes)
    with pytest.raises(BundleError, match=message) as caught:
        load_prefix(path, MODEL, "float32")
    assert PREFIX in str(caught.value)
    assert "Compile the bundle again" in str(caught.value)


def test_a_cache_of_another_dtype(tmp_path: Path) -> None:
    save_prefix(tmp_path / PREFIX, random_prefix())
    with pytest.raises(BundleError, match=r"key\.0 is float32 .*, not float16"):
        load_prefix(tmp_path / PREFIX, MODEL, "float16")


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / PREFIX
    save_prefix(path, random_prefix())
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", IDS)
    empty_zip = tmp_path / "empty"
    with zipfile.ZipFile(empty_zip, "w"):
        pass
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, ids=np.array([{}], object))
    contents = [
        b"",
        b"no zip",
        whole[:200],
        whole[:-30],
        (tmp_path / "array.npy").read_bytes(),
    ]
    contents += [empty_zip.read_bytes(), pickled.read_bytes()]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(BundleError, match=r"prefix\.npz does not fit the bundle"):
            load_prefix(path, MODEL, "float32")
    with pytest.raises(BundleError, match="cannot be read"):
        load_prefix(tmp_path / "missing", MODEL, "float32")
    for place in range(0, len(whole), 37):  # a damaged byte is read as it is, or named
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            load_prefix(path, MODEL, "float32")
        except BundleError as error:
            assert PREFIX in str(error)


def change_member(path: Path, name: str, old: bytes, new: bytes) -> None:
    """Replace bytes in a file inside the zip, whose checksum fits afterwards."""
    with zipfile.ZipFile(path) as source:
        members = {member: source.read(member) for member in source.namelist()}
    assert old in members[name]
    members[name] = members[name].replace(old, new)
    with zipfile.ZipFile(path, "w") as target:
        for member, data in members.items():
            target.writestr(member, data)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("ids.npy", b"NUMPY", b"NUMBY"),
        ("key.0.npy", b"NUMPY", b"NUMBY"),
        ("key.0.npy", b"}", b"("),
        ("key.0.npy", b"'shape'", b"  shape'"),
    ],
    ids=["no-npy-ids", "no-npy-key", "unclosed-header", "no-literal"],
)
def test_a_damaged_member(tmp_path: Path, name: str, old: bytes, new: bytes) -> None:
    path = tmp_path / PREFIX
    save_prefix(path, random_prefix())
    change_member(path, name, old, new)
    with pytest.raises(BundleError, match=r"cannot be read .*`--no-prefix`"):
        load_prefix(path, MODEL, "float32")


# Its rows.


def test_computed_rows_are_those_of_a_run(tiny: TinyModel, tiny_prefix: TinyModel) -> None:
    bundle = Bundle.load(tiny_prefix.path)
    assert bundle.prefix_path is not None
    prefix = load_prefix(bundle.prefix_path, bundle.manifest.model, "float32")
    vlm = VLM(bundle, OrtBackend(bundle, ONE_THREAD))
    ids = tokenize_constant_prefix(vlm.conversation().template, vlm.text_model.tokenizer)
    np.testing.assert_array_equal(prefix.ids, ids)
    assert len(ids) > 10
    _, *rows = tiny.full_run(ids)
    for found, expected in zip(prefix.rows, rows, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("form", ["append", "fixed"])
@pytest.mark.parametrize("device", [False, True])
def test_a_part_is_written_behind_rows_that_agree(form: str, device: bool) -> None:
    ort = pytest.importorskip("onnxruntime")
    shape = CacheShape(2, 1, 4, 8, "float32", form)  # type: ignore[arg-type]
    cache = OrtKvCache(ort, shape, "cpu") if device else HostKvCache(shape)
    prefix = random_prefix()
    prefix.write(cache, 0, 3)
    assert cache.length == 3
    for tensor in range(4):
        cache.write_rows(tensor, 1, np.full((2, 1, 4), 9, np.float32))
    prefix.write(cache, 2, 3)
    for tensor, rows in enumerate(prefix.rows):
        found = cache.read_rows(tensor, 0, 3)
        np.testing.assert_array_equal(found[[0, 2]], rows[[0, 2]])
        np.testing.assert_array_equal(found[1], 9)


# What it saves.


@pytest.mark.parametrize("pictures", [None, PICTURE], ids=["text", "image"])
def test_answers_are_those_without(
    tiny: TinyModel, tiny_prefix: TinyModel, pictures: np.ndarray | None
) -> None:
    plain = VLM.load(tiny.path, threads=1, reuse=False)
    expected = plain.generate(pictures, QUESTION, max_tokens=12)
    assert expected.timings.cached_tokens == expected.timings.prefix_tokens == 0
    for use_prefix in (True, False):
        vlm = VLM.load(tiny_prefix.path, threads=1, use_prefix=use_prefix, reuse=False)
        for _ in range(2):
            answer = vlm.generate(pictures, QUESTION, max_tokens=12)
            assert answer.ids == expected.ids
            t = answer.timings
            assert t.cached_tokens == t.prefix_tokens
            assert (t.prefix_tokens > 10) == use_prefix
            assert t.prefill_tokens + t.prefix_tokens == expected.timings.prefill_tokens


def test_a_prompt_uses_what_it_shares_of_it(tiny_prefix: TinyModel) -> None:
    """Behind an image the prefix stands whole; before text its end is cut otherwise."""
    vlm = VLM.load(tiny_prefix.path, threads=1)
    ids = tokenize_constant_prefix(vlm.conversation().template, vlm.text_model.tokenizer)
    image = vlm.generate(PICTURE, QUESTION, max_tokens=1).timings
    assert image.prefix_tokens == image.cached_tokens == len(ids)
    prompt = vlm.tokenize(vlm.conversation().ask(QUESTION))
    shared = prompt.shared_prefix(ids)
    text = vlm.generate(None, QUESTION, max_tokens=1).timings
    assert text.prefix_tokens == text.cached_tokens == shared < len(ids)


def test_a_chat_begins_with_it_and_again_after_a_reset(tiny_prefix: TinyModel) -> None:
    vlm = VLM.load(tiny_prefix.path, threads=1, reuse=False)
    chat = vlm.chat()
    length = chat._state.cache.length
    assert length > 10
    for _ in range(2):
        first = chat.ask("See", PICTURE, max_tokens=4).timings
        assert (first.cached_tokens, first.prefix_tokens) == (length, length)
        second = chat.ask("And?", max_tokens=4).timings
        assert second.cached_tokens > second.prefix_tokens == length
        chat.reset()


def state_with(prefix: PromptPrefix, cheap: bool) -> DecoderState:
    class Decoder:
        def new_cache(self) -> HostKvCache:
            cache = HostKvCache(CacheShape(2, 1, 4, 16, "float32"))
            cache.writes_cheaply = cheap
            return cache

        def append(self, cache: HostKvCache, ids: np.ndarray, embeds: np.ndarray) -> None:
            for tensor in range(4):
                cache.new(tensor, len(ids))[...] = -ids.reshape(-1, 1, 1)
            cache.advance(len(ids))

    return DecoderState(Decoder(), prefix)  # type: ignore[arg-type]


@pytest.mark.parametrize("cheap", [True, False])
def test_overwritten_rows_are_put_back_where_that_is_cheap(cheap: bool) -> None:
    prefix = random_prefix()
    state = state_with(prefix, cheap)
    whole = PromptIds(np.array([1, 7, 3, 4, 5], np.int32))
    other = PromptIds(np.array([1, 8, 9, 4], np.int32))
    assert state.rewind(whole).count == 3
    state.prefill(whole, np.zeros((1, 1), np.float32))
    assert state.rewind(other).count == 1
    state.prefill(other, np.zeros((1, 1), np.float32))
    np.testing.assert_array_equal(state.ids, other.ids)
    kept = state.rewind(whole)
    assert kept.count == kept.from_prefix == (3 if cheap else 1)
    np.testing.assert_array_equal(state.ids, whole.ids[: kept.count])
    for tensor, rows in enumerate(prefix.rows):
        found = state.cache.read_rows(tensor, 0, kept.count)
        np.testing.assert_array_equal(found, rows[: kept.count])


def test_the_last_row_is_run_even_if_the_prefix_holds_it() -> None:
    state = state_with(random_prefix(), True)
    kept = state.rewind(PromptIds(IDS[:2]))
    assert (kept.count, kept.from_prefix) == (1, 1)


# In a bundle.


def test_a_bundle_without_one_works_as_before(tiny: TinyModel) -> None:
    bundle = Bundle.load(tiny.path)
    assert bundle.prefix_path is None
    assert VLM(bundle, OrtBackend(bundle, ONE_THREAD)).new_state().cache.length == 0


def test_it_is_hashed(tiny_prefix: TinyModel, tmp_path: Path) -> None:
    bundle = Bundle.load(tiny_prefix.path)
    assert PREFIX in bundle.manifest.files
    files = {name: h for name, h in bundle.manifest.files.items() if name != PREFIX}
    with pytest.raises(BundleError, match=r"has no hash for prefix\.npz"):
        Bundle(bundle.path, replace(bundle.manifest, files=files))._check_listing()


def test_one_of_another_model_is_refused_or_left_out(
    tiny_prefix: TinyModel,
) -> None:
    bundle = Bundle.load(tiny_prefix.path)
    spec: ModelSpec = replace(bundle.manifest.model, head_dim=8)
    wrong = Bundle(bundle.path, replace(bundle.manifest, model=spec))
    backend = OrtBackend(bundle, ONE_THREAD)
    with pytest.raises(BundleError, match=r"prefix\.npz does not fit .*use_prefix=False"):
        VLM(wrong, backend)
    assert VLM(wrong, backend, use_prefix=False).new_state().cache.length == 0
