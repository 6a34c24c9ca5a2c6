"""Finished weights on disk: packed as ONNX packs them, found again, never half-read."""

import errno
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mvlm_export.calibration.quantized_weight import (
    KEY,
    QuantizedWeight,
    StoredWeight,
    WeightStore,
    pack,
    relative_error,
    unpack,
)
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.calibration.weight_rounding import round_to_nearest
from mvlm_export.engines.errors import MvlmError

FORMS = [WeightFormat(8), WeightFormat(4, 32), WeightFormat(4, 64, symmetric=False)]
NAME = "model.layers.0.mlp/gate proj"
WEIGHT = np.random.default_rng(0).standard_normal((70, 3)).astype(np.float32)

codes_of = arrays(
    np.int8, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(-8, 7)
)


def store_at(path, **key) -> WeightStore:
    return WeightStore(path / "store", {"fingerprint": "f", **key})


def file_of(store: WeightStore) -> Path:
    (path,) = store.folder.glob("*.npz")
    return path


def assert_same(found: QuantizedWeight, expected: QuantizedWeight):
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.grid.scales, expected.grid.scales)
    np.testing.assert_array_equal(found.dequantize(), expected.dequantize())
    assert found.grid.form == expected.grid.form


@given(codes_of)
def test_codes_are_packed_as_onnx_packs_them(codes):
    tensor = onnx.numpy_helper.from_array(codes.astype(ml_dtypes.int4))
    assert pack(codes).tobytes() == tensor.raw_data
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), codes)


@given(codes_of)
def test_unpack_undoes_pack(codes):
    found = unpack(pack(codes), codes.shape)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_weight_comes_back(form, tmp_path):
    weight = round_to_nearest(WEIGHT, form)
    stored = store_at(tmp_path).add(NAME, weight, WEIGHT)
    assert_same(stored.load(), weight)
    assert (stored.shape, stored.form) == ((70, 3), form)
    assert stored.error == relative_error(weight, WEIGHT) > 0
    again = store_at(tmp_path)
    assert again.find(NAME) == stored
    assert again.find("another") is None


def test_four_bits_take_half_a_byte(tmp_path):
    weight = np.random.default_rng(1).standard_normal((512, 256)).astype(np.float32)
    form = WeightFormat(4, 128)
    store = store_at(tmp_path)
    store.add(NAME, round_to_nearest(weight, form), weight)
    expected = form.stored_bytes(512, 256, scale_bytes=4)
    assert expected <= file_of(store).stat().st_size < expected + 2048


def test_the_error_of_zeros_is_zero():
    zeros = np.zeros((32, 2), np.float32)
    assert relative_error(round_to_nearest(zeros, WeightFormat(8)), zeros) == 0


def test_another_key_begins_anew(tmp_path):
    store = store_at(tmp_path)
    store.add(NAME, round_to_nearest(WEIGHT, FORMS[0]), WEIGHT)
    store.write_json("scales", {"a": [1.5, 2]})
    assert store_at(tmp_path).read_json("scales") == {"a": [1.5, 2]}
    other = store_at(tmp_path, recipe="another")
    assert other.find(NAME) is None
    assert other.read_json("scales") is None
    assert [path.name for path in other.folder.iterdir()] == [KEY]


def test_json_that_is_cut_off_is_none(tmp_path):
    store = store_at(tmp_path)
    store.write_json("scales", [1, 2, 3])
    path = store.folder / "scales.json"
    path.write_text(path.read_text()[:-2])
    assert store.read_json("scales") is None


def test_any_cut_or_flipped_byte_is_noticed(tmp_path):
    """Each place of the file in turn: found whole with the same numbers, or made again."""
    store, form = store_at(tmp_path), FORMS[2]
    weight = round_to_nearest(WEIGHT, form)
    store.add(NAME, weight, WEIGHT)
    path = file_of(store)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place])
        assert store.find(NAME) is None
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        found = store.find(NAME)
        if found is not None:
            assert_same(found.load(), weight)
    stored = store.add(NAME, weight, WEIGHT)
    assert path.read_bytes() == whole
    assert store.find(NAME) == stored


def test_a_file_that_lost_a_member_is_made_again(tmp_path):
    store = store_at(tmp_path)
    store.add(NAME, round_to_nearest(WEIGHT, FORMS[2]), WEIGHT)
    with np.load(file_of(store)) as arrays:
        kept = {name: arrays[name] for name in arrays.files if name != "offsets"}
    np.savez(file_of(store), **kept)
    assert store.find(NAME) is None


def test_a_weight_that_went_after_it_was_found(tmp_path):
    store = store_at(tmp_path)
    stored = store.add(NAME, round_to_nearest(WEIGHT, FORMS[1]), WEIGHT)
    file_of(store).unlink()
    with pytest.raises(
        MvlmError, match=r"cannot be read .*Remove .*store and run the command"
    ):
        stored.load()


def test_offsets_of_a_symmetric_weight_are_not_there(tmp_path):
    stored = store_at(tmp_path).add(NAME, round_to_nearest(WEIGHT, FORMS[1]), WEIGHT)
    assert stored.load().grid.offsets is None
    with pytest.raises(MvlmError, match="offsets"):
        stored.offsets()


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": b"years of work"},
        {KEY: b"{}"},
        {KEY: b'{"fingerprint": "mine"}', "thesis.txt": b""},
        {KEY: b"\xff\xfe no text"},
        {KEY: b'["_type", "mvlm-weight-store"]'},
    ],
    ids=["no-key", "other-key", "other-key-and-files", "damaged-key", "list"],
)
def test_a_folder_of_others_is_left_alone(files, tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(MvlmError, match=r"holds other files .*name another folder"):
        store_at(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_what_a_killed_run_left_is_no_hindrance(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".key.json.1234.partial").write_bytes(b"{")
    store = store_at(tmp_path)
    assert store.add(NAME, round_to_nearest(WEIGHT, FORMS[0]), WEIGHT) == store.find(NAME)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(MvlmError, match=r"cannot be written to .*name another folder"):
        store_at(tmp_path)


def test_a_full_disk(tmp_path, monkeypatch):
    store = store_at(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MvlmError, match=r"No space left.*Free some space"):
        store.add(NAME, round_to_nearest(WEIGHT, FORMS[0]), WEIGHT)
    assert store.find(NAME) is None
    with pytest.raises(MvlmError, match="No space left"):
        store.write_json("scales", [])


def test_names_with_slashes_stay_in_the_folder(tmp_path):
    store = store_at(tmp_path)
    stored = store.add("../../x", round_to_nearest(WEIGHT, FORMS[0]), WEIGHT)
    assert stored.path.parent == store.folder
    assert isinstance(store.find("../../x"), StoredWeight)
