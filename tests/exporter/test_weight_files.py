"""Shards that no index lists: all of them or an error that names what is wrong."""

from __future__ import annotations

import pytest
import torch

from mvlm_export.exporter.checkpoint import Checkpoint

from .test_checkpoint import refuse, save

both = pytest.mark.parametrize("suffix", [".bin", ".safetensors"])


def number(folder, suffix, *numbers, count="00003"):
    stem = {".bin": "pytorch_model", ".safetensors": "model"}[suffix]
    for number in numbers:
        path = folder / f"{stem}-{number:05d}-of-{count}{suffix}"
        save({f"t{number}": torch.full((2,), float(number))}, path)


@both
def test_numbered_shards_need_no_index(tmp_path, suffix):
    number(tmp_path, suffix, 3, 1, 2)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names == ("t1", "t2", "t3")
    assert [checkpoint.load(name)[0].item() for name in checkpoint.names] == [1, 2, 3]


@both
def test_numbered_shard_missing(tmp_path, suffix):
    number(tmp_path, suffix, 1, 3)
    refuse(tmp_path, rf"2 shards of 3; \w+-00002-of-00003\{suffix} is not there.*fetch")


@both
def test_an_absurd_count_is_refused_at_once(tmp_path, suffix):
    number(tmp_path, suffix, 1, count="99999999999999")
    refuse(tmp_path, r"1 shards of 99999999999999; .*-00000000000002-of-")


@both
def test_numbered_shards_of_two_sets(tmp_path, suffix):
    number(tmp_path, suffix, 1, 2, 3)
    number(tmp_path, suffix, 1, 2, count="00002")
    refuse(tmp_path, r"more than one set \(of 0000[23], 0000[23]\): remove")


@both
def test_a_number_beyond_the_count(tmp_path, suffix):
    number(tmp_path, suffix, 0, 1, 2, 3)
    refuse(tmp_path, r"00000-of-00003.* does not fit its count")


@both
def test_a_whole_file_goes_before_numbered_shards(tmp_path, suffix):
    number(tmp_path, suffix, 1)
    save({"whole": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert Checkpoint.open(tmp_path).names == ("whole",)
