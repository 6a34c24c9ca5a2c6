"""Reading llama.cpp's layout of weights."""

import numpy as np
import pytest
import torch
from smollm2 import GgufDecoder, join_halves, parameter_name

from mvlm_export.exporter.models.components import build_component


def interleave(weight, heads):
    """As llama.cpp's converter writes W_q and W_k (``permute`` of its LLaMA conversion)."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def test_names_are_our_decoders(tiny):
    parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    tensors = [
        f"blk.{n}.{part}.weight" for n in (0, 1) for part in (*parts, "attn_norm", "ffn_norm")
    ]
    tensors += ["token_embd.weight", "output_norm.weight", "output.weight"]
    names = {name for name, _ in build_component("decoder", tiny.config).named_parameters()}
    assert {parameter_name(tensor) for tensor in tensors} == names


@pytest.mark.parametrize("heads", [1, 3])
def test_halves_are_joined(heads):
    weight = np.random.default_rng(0).normal(size=(heads * 8, 5)).astype(np.float32)
    stored = interleave(weight, heads)
    assert not np.array_equal(stored, weight)
    assert np.array_equal(join_halves(stored, heads), weight)


def test_a_gguf_file_gives_the_decoder_it_was_made_of(tiny, tmp_path):
    gguf = pytest.importorskip("gguf")
    module, _ = tiny("decoder")
    text, state = tiny.config.text, module.state_dict()
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}
    for tensor in _tensor_names(text.num_hidden_layers):
        values = state[parameter_name(tensor)].numpy()
        part = tensor.split(".")[-2]
        if part in heads:
            values = interleave(values, heads[part])
        writer.add_tensor(tensor, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GgufDecoder(path)
    assert found.config.num_key_value_heads == text.num_key_value_heads
    assert found.config.vocab_size == text.vocab_size
    assert not found.config.tie_word_embeddings
    for name in found.names():
        assert torch.equal(found.read(name), state[name]), name


def _tensor_names(layers):
    parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    tensors = [
        f"blk.{n}.{part}.weight"
        for n in range(layers)
        for part in (*parts, "attn_norm", "ffn_norm")
    ]
    return [*tensors, "token_embd.weight", "output_norm.weight", "output.weight"]
