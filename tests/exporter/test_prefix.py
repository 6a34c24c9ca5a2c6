"""Cache rows of the prompt's constant prefix, against the whole decoder in PyTorch."""

import numpy as np
import pytest
import torch

from mvlm_export.engines.errors import CheckpointError
from mvlm_export.engines.prompt import TEMPLATES, tokenize_constant_prefix
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.exporter.prefix import compute_prefix
from mvlm_export.exporter.reference import ReferenceModel
from mvlm_export.exporter.settings import nano_checkpoint
from tests.engines.tokenizer_files import write_tokenizer
from tests.helpers import tiny_config_json, write_random_checkpoint


def rows_of_the_whole_decoder(reference, ids):
    zeros = np.zeros((1, reference.config.text.hidden_size), np.float32)
    _, run = reference.greedy_run(ids, zeros, 1)
    return run.prefill.rows


def computed(reference, ids, dtype="float32", progress=None):
    return compute_prefix(
        ids,
        reference.config.text,
        reference._checkpoint,
        reference._weights["decoder"],
        dtype,
        progress,
    )


@pytest.fixture(params=["nano", "gqa"])
def reference(request, tmp_path):
    if request.param == "nano":
        return ReferenceModel.open(nano_checkpoint())
    changes = {"num_key_value_heads": 2, "vocab_size": 512, "num_hidden_layers": 3}
    write_random_checkpoint(tmp_path / "gqa", tiny_config_json(**changes))
    write_tokenizer(tmp_path / "gqa")
    return ReferenceModel.open(tmp_path / "gqa")


def test_rows_are_those_of_the_whole_decoder(reference):
    tokenizer = LlamaTokenizer.from_folder(reference.folder)
    ids = tokenize_constant_prefix(TEMPLATES["v1"], tokenizer)
    assert len(ids) > 20
    seen = []
    found = computed(reference, ids, progress=lambda *args: seen.append(args))
    expected = rows_of_the_whole_decoder(reference, ids)
    assert len(found) == len(expected) == 2 * reference.config.text.num_hidden_layers
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    layers = reference.config.text.num_hidden_layers
    assert [done for done, _, _ in seen] == list(range(1, layers + 1))


def test_rows_depend_on_the_ids(reference):
    ids = np.array([1, 5, 9], np.int32)
    other = np.array([1, 7, 9], np.int32)
    first, second = computed(reference, ids), computed(reference, other)
    np.testing.assert_array_equal(first[0][0], second[0][0])
    assert np.abs(first[-1][2] - second[-1][2]).max() > 1e-3


def test_rows_beyond_float16_are_an_error(reference, monkeypatch):
    load = reference._checkpoint.load
    monkeypatch.setattr(
        reference._checkpoint,
        "load",
        lambda name: load(name).float() * (1e6 if "v_proj" in name else 1),
    )
    ids = np.array([1, 5], np.int32)
    assert computed(reference, ids)[1].dtype == np.float32
    with pytest.raises(CheckpointError, match=r"layer 0 .*float16.*--recipe fp32"):
        computed(reference, ids, "float16")


def test_weights_that_are_not_finite_are_an_error(reference, monkeypatch):
    load = reference._checkpoint.load

    def spoil(name):
        tensor = load(name)
        return torch.full_like(tensor, float("nan")) if "k_proj" in name else tensor

    monkeypatch.setattr(reference._checkpoint, "load", spoil)
    with pytest.raises(CheckpointError, match="layer 0 are not finite"):
        computed(reference, np.array([1, 5], np.int32))
