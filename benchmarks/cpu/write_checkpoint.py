"""The random checkpoint of a geometry: ``python write_checkpoint.py GEOMETRY FOLDER``.

``mini`` has the published picture and head sizes with little else: for trying the comparison.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from random_checkpoint import write_random_weights

from mvlm_export.exporter.config import published_config_json

MINI: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "mm_hidden_size": 128,
    "mm_vision_tower": "mini-clip-vit-336-patch14",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": 128,
        "image_size": 336,
        "intermediate_size": 512,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 4,
        "patch_size": 14,
    },
}


def main() -> None:
    """Write it."""
    geometry, folder = sys.argv[1], Path(sys.argv[2])
    base = "v2-1.7b" if geometry == "mini" else geometry
    content = {**published_config_json(base), **(MINI if geometry == "mini" else {})}
    shutil.rmtree(folder)
    write_random_weights(folder, content)


if __name__ == "__main__":
    main()
