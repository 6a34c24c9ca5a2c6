"""Make the outlier twin: the same function, hard to quantize.

    python examples/nano/plant_outliers.py CHECKPOINT_DIR TWIN_DIR

A few channels of every norm that feeds linear layers are scaled up by a power of two, and the
matching weight columns of those layers down by the same. In float32 nothing changes; but the
activations between them now have the outlier channels of large language models, which spoil
naive per-tensor activation scales. (Stored in float16, columns that fall below its normal
range are rounded; that is the only difference.)
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FACTOR = 64.0
CHANNELS = 4

FOLLOWERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "layer_norm1": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "layer_norm2": ("mlp.fc1",),
}
"""Linear layers that read each norm, both named inside their block."""

_NORM = re.compile(r"(.*\.layers\.\d+)\.(\w+)\.weight$")


def norms_and_followers(tensors: dict[str, Tensor]) -> dict[str, list[str]]:
    """Norm name (without ``.weight``) to the names of the linear layers that read it."""
    found = {"model.norm": ["lm_head"]}
    for name in sorted(tensors):
        match = _NORM.match(name)
        if match and match.group(2) in FOLLOWERS:
            block, norm = match.groups()
            found[f"{block}.{norm}"] = [f"{block}.{linear}" for linear in FOLLOWERS[norm]]
    return found


def plant_outliers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy with planted outliers; the channels follow from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    planted = {name: tensor.clone() for name, tensor in tensors.items()}
    for norm, linears in norms_and_followers(tensors).items():
        width = tensors[f"{norm}.weight"].shape[0]
        channels = torch.randperm(width, generator=generator)[:CHANNELS]
        for part in ("weight", "bias"):
            if f"{norm}.{part}" in planted:
                planted[f"{norm}.{part}"][channels] *= FACTOR
        for linear in linears:
            planted[f"{linear}.weight"][:, channels] /= FACTOR
    return planted


def write_twin(source: Path, twin: Path) -> None:
    """Copy a checkpoint folder with outliers planted into its weights."""
    shutil.copytree(source, twin, dirs_exist_ok=True)
    planted = plant_outliers(load_file(source / "model.safetensors"))
    save_file(planted, twin / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    write_twin(Path(sys.argv[1]), Path(sys.argv[2]))
