"""The checkpoint's decoder as a Hugging Face ``LlamaForCausalLM`` folder.

``python hf_folder.py CHECKPOINT FOLDER``
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

COPIED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "torch_dtype",
    "vocab_size",
)


def main() -> None:
    """Write config, tokenizer and the decoder's weights."""
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    given = json.loads((source / "config.json").read_text())
    config = {key: given[key] for key in COPIED if key in given}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"rope_theta": given.get("rope_theta", 10000.0), "attention_bias": False}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    weights = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if not name.startswith(("model.vision_tower.", "model.mm_projector.")):
                    weights[name] = file.get_tensor(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
