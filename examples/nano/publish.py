"""Write a trained run as a checkpoint in the published file layout.

python examples/nano/publish.py RUN_DIR CHECKPOINT_DIR
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from network import CONFIG, NanoTower, NanoVlm
from safetensors.torch import save_file
from torch import Tensor
from train import CURRICULA

LAST_STAGE = list(CURRICULA)[-1]
VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."

TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def config_json() -> dict[str, object]:
    """``config.json`` as the authors write it, and a ``vision_config`` for the small tower."""
    text, vision = CONFIG.text, CONFIG.vision
    return {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "max_position_embeddings": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "tie_word_embeddings": False,
        **GENERATION,
        "mm_vision_tower": "nano-clip-vit-64-patch8",
        "vision_tower_type": "clip",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": CONFIG.projector_type,
        "mm_vision_select_layer": CONFIG.select_layer,
        "mm_vision_select_feature": CONFIG.select_feature,
        "image_aspect_ratio": CONFIG.image_aspect_ratio,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "torch_dtype": "float16",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": vision.hidden_act,
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size,
        },
    }


def load_run(run: Path) -> tuple[NanoTower, NanoVlm]:
    """The trained tower, projector and decoder of a run."""
    tower, vlm = NanoTower(), NanoVlm()
    tower.load_state_dict(torch.load(run / "vit.pt", weights_only=True)["model"])
    vlm.load_state_dict(torch.load(run / f"{LAST_STAGE}.pt", weights_only=True)["model"])
    return tower.eval(), vlm.eval()


def published_tensors(tower: NanoTower, vlm: NanoVlm) -> dict[str, Tensor]:
    """Every tensor under its published name, float16; the warm-up's heads are dropped."""
    named = {f"{VISION_PREFIX}{k}": v for k, v in tower.tower.state_dict().items()}
    ending = tower.post_layernorm.state_dict()
    named |= {f"{VISION_PREFIX}post_layernorm.{k}": v for k, v in ending.items()}
    named |= {f"model.mm_projector.{k}": v for k, v in vlm.projector.state_dict().items()}
    named |= dict(vlm.decoder.state_dict())
    return {name: tensor.to(torch.float16).contiguous() for name, tensor in named.items()}


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def publish(run: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(*load_run(run))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config_json())
    write_json(folder / "generation_config.json", GENERATION)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
    shutil.copyfile(run / "tokenizer.model", folder / "tokenizer.model")


if __name__ == "__main__":
    publish(Path(sys.argv[1]), Path(sys.argv[2]))
