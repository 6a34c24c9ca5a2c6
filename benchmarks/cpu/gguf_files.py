"""llama.cpp's files of a checkpoint: the decoder by its own quantizer, and two mmproj files.

Runs in the llama.cpp environment: ``python gguf_files.py CHECKPOINT FOLDER``. Query and key
rows are interleaved as llama.cpp's rotary positions want them (``permute`` in its converter).

The vision tower is written as llama.cpp's converter does, with one difference: the layer whose
output is used is named (``clip.vision.feature_layer``), as else llama.cpp runs one layer fewer
than the model has. Its class token stands last where the model's stands first; no file can
change that, and it costs no time.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from checkpoint_tensors import PROJECTOR, VISION, CheckpointTensors
from gguf import GGMLQuantizationType as Quant

FTYPES = {
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
VISION_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
}


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head from half-split to interleaved rotary order."""
    rows, width = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows, width)


def write_decoder(source: CheckpointTensors, path: Path) -> None:
    """The decoder in float16, norms in float32."""
    config = source.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_vocabulary(writer, config["vocab_size"])
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for index in range(config["num_hidden_layers"]):
        for theirs, ours in LAYER_NAMES.items():
            names[f"model.layers.{index}.{theirs}.weight"] = f"blk.{index}.{ours}.weight"
    for name, target in names.items():
        weight = source.read(name)
        if "q_proj" in name or "k_proj" in name:
            weight = interleave(weight, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(target, weight if weight.ndim == 1 else weight.astype(np.float16))
    _finish(writer)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A vocabulary of the right size; which words it holds does not matter here."""
    kinds = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256
    tokens += [f"▁w{index}" for index in range(len(tokens), size)]
    types += [kinds.NORMAL] * (size - len(types))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_token_types([int(kind) for kind in types])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_mmproj(source: CheckpointTensors, path: Path, linear: Quant) -> None:
    """Vision tower and projector, its linear weights as ``linear``."""
    config = source.config
    vision = {**VISION_DEFAULTS, **config.get("vision_config", {})}
    select = config["mm_vision_select_layer"]
    layers = select if select >= 0 else vision["num_hidden_layers"] + select + 1
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "ldpv2")
    writer.add_bool("clip.use_gelu", False)
    writer.add_uint32("clip.vision.image_size", vision["image_size"])
    writer.add_uint32("clip.vision.patch_size", vision["patch_size"])
    writer.add_uint32("clip.vision.embedding_length", vision["hidden_size"])
    writer.add_uint32("clip.vision.feed_forward_length", vision["intermediate_size"])
    writer.add_uint32("clip.vision.projection_dim", config["hidden_size"])
    writer.add_uint32("clip.vision.attention.head_count", vision["num_attention_heads"])
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
    writer.add_uint32("clip.vision.block_count", layers)
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_array("clip.vision.image_mean", MEAN)
    writer.add_array("clip.vision.image_std", STD)
    is_f16 = linear == Quant.F16
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.MOSTLY_F16 if is_f16 else kinds.MOSTLY_Q8_0)
    for name, target in _mmproj_names(layers).items():
        _add_mmproj_tensor(writer, target, source.read(name), linear)
    _finish(writer)


VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
}


def _mmproj_names(layers: int) -> dict[str, str]:
    names = {
        VISION + "embeddings.class_embedding": "v.class_embd",
        VISION + "embeddings.patch_embedding.weight": "v.patch_embd.weight",
        VISION + "embeddings.position_embedding.weight": "v.position_embd.weight",
    }
    for part in ("weight", "bias"):
        names[f"{VISION}pre_layrnorm.{part}"] = f"v.pre_ln.{part}"
        for index in range(layers):
            layer = f"{VISION}encoder.layers.{index}"
            for theirs, ours in VISION_NAMES.items():
                names[f"{layer}.{theirs}.{part}"] = f"v.blk.{index}.{ours}.{part}"
        for index in (0, 2):
            names[f"{PROJECTOR}mlp.mlp.{index}.{part}"] = f"mm.model.mlp.{index}.{part}"
        names[f"{PROJECTOR}peg.peg.0.{part}"] = f"mm.model.peg.0.{part}"
    return names


def _add_mmproj_tensor(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray[Any, Any], linear: Quant
) -> None:
    if values.ndim == 4:
        writer.add_tensor(name, values.astype(np.float16))  # as ggml's convolutions want it
    elif values.ndim == 1 or "position" in name:
        writer.add_tensor(name, values)
    elif linear == Quant.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(values, linear), raw_dtype=linear)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, path: Path, ftype: int) -> None:
    """llama.cpp's own quantizer.

    Raises:
        RuntimeError: it failed.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(path).encode(), ctypes.byref(params)
    )
    if failed:
        raise RuntimeError(f"llama_model_quantize gave {failed} for {path.name}.")


def weights_read(path: Path) -> int:
    """Bytes of all tensors that a decode step reads whole: all but the token table."""
    tensors = gguf.GGUFReader(path).tensors
    return sum(int(t.n_bytes) for t in tensors if t.name != "token_embd.weight")


def main() -> None:
    """Write all files."""
    source, folder = CheckpointTensors(Path(sys.argv[1])), Path(sys.argv[2])
    write_mmproj(source, folder / "mmproj-f16.gguf", Quant.F16)
    write_mmproj(source, folder / "mmproj-q8_0.gguf", Quant.Q8_0)
    whole = folder / "decoder-f16.gguf"
    write_decoder(source, whole)
    for name, ftype in FTYPES.items():
        quantize(whole, folder / f"decoder-{name}.gguf", ftype)
    whole.unlink()
    sizes = {name: weights_read(folder / f"decoder-{name}.gguf") for name in FTYPES}
    (folder / "sizes.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main()
