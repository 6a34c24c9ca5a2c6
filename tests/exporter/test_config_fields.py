"""Odd values in the JSON files of a checkpoint: errors that name the place, no tracebacks."""

from __future__ import annotations

import pytest

from mvlm_export.engines.errors import CheckpointError
from mvlm_export.exporter.config import parse_config, read_config
from tests.helpers import tiny_config_json

from .test_config import tower_json, write_config


@pytest.mark.parametrize("text", ["[2]", "2", '"x"', "null", '{"eos_token_id": {"a": 2}}'])
def test_unusable_generation_config(tmp_path, text):
    write_config(tmp_path, tiny_config_json())
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "null", '{"vision_config": [1]}', "{}"])
def test_unusable_tower_config(tmp_path, text):
    write_config(tmp_path / "m", tower_json("clip"))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path / "m")


@pytest.mark.parametrize("tower", ["x" * 5000, "clip\0", [1], {"a": 1}])
def test_a_tower_that_can_name_no_folder(tmp_path, tower):
    write_config(tmp_path, tower_json(tower))
    with pytest.raises(CheckpointError, match="mm_vision_tower"):
        read_config(tmp_path)


ODD = (None, [], {}, [1], {"a": 1}, "x", -1, 0, 1.5, True, 10**30, float("inf"))


def test_no_value_of_any_key_is_a_traceback():
    """Every key in turn, the nested ones too, with a value of each other kind."""
    whole = tiny_config_json(rope_parameters={"rope_theta": 1e4}, rms_norm_eps=1e-6)
    refused = 0
    for key in whole:
        nested = whole[key] if isinstance(whole[key], dict) else {}
        changes = [{key: odd} for odd in (*ODD, 10**400)]
        changes += [{key: {**nested, part: odd}} for part in nested for odd in ODD]
        for change in changes:
            try:
                config = parse_config({**whole, **change})
            except CheckpointError as error:
                assert len(str(error)) < 1000
                refused += 1
            else:
                assert config.text.hidden_size == 64
    assert refused > 200
