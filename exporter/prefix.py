"""Keys and values of the prompt's constant prefix, from the checkpoint, one layer at a time.

The system sentence stands in front of every question, so its cache rows are computed once.
Each decoder layer is built, given its weights in float32, run on the prefix and dropped: the
memory is that of one layer, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mvlm_export.engines.errors import CheckpointError

from .checkpoint import Checkpoint
from .config import TextConfig
from .models.llama import LlamaDecoder, LlamaLayer, rotary_tables

Rows = npt.NDArray[Any]
Progress = Callable[[int, int, str], None]
"""Called with (layers done, layers in all, name)."""


@torch.inference_mode()
def compute_prefix(
    ids: npt.NDArray[np.int32],
    config: TextConfig,
    checkpoint: Checkpoint,
    weights: Mapping[str, str],
    dtype: str = "float32",
    progress: Progress | None = None,
) -> list[Rows]:
    """Cache rows [P, H_kv, head_dim] of ``ids``: key 0, value 0, key 1, value 1, ...

    Args:
        ids: [P] token ids at positions 0 to P - 1; no image rows.
        weights: the decoder's part of the weight map, parameter to tensor name.
        dtype: ``float32`` or ``float16``, of the result.

    Raises:
        CheckpointError: a row is not finite, or beyond what ``dtype`` holds.
    """
    count = len(ids)
    table = checkpoint.load(weights["model.embed_tokens.weight"])
    hidden = table[torch.from_numpy(ids).long()].float()
    cos, sin = (table[:count].unsqueeze(1) for table in rotary_tables(config))
    order = torch.arange(count)
    mask = torch.where(order <= order.unsqueeze(1), 0.0, LlamaDecoder.MASKED)
    empty = torch.zeros(0, config.num_key_value_heads, config.head_dim)
    rows: list[Rows] = []
    for index in range(config.num_hidden_layers):
        layer = _load_layer(config, f"model.layers.{index}.", checkpoint, weights)
        hidden, key, value = layer(hidden, cos, sin, mask, (empty, empty))
        rows += [_checked(key, index, dtype), _checked(value, index, dtype)]
        if progress is not None:
            progress(index + 1, config.num_hidden_layers, f"layer {index}")
    return rows


def _load_layer(
    config: TextConfig, prefix: str, checkpoint: Checkpoint, weights: Mapping[str, str]
) -> LlamaLayer:
    with torch.device("meta"):
        layer = LlamaLayer(config)
    for name, _ in list(layer.named_parameters()):
        path, _, leaf = name.rpartition(".")
        values = checkpoint.load(weights[prefix + name]).float()
        parameter = nn.Parameter(values, requires_grad=False)
        setattr(layer.get_submodule(path), leaf, parameter)
    return layer


def _checked(tensor: Tensor, layer: int, dtype: str) -> Rows:
    with np.errstate(over="ignore"):
        rows: Rows = tensor.numpy().astype(dtype)
    if not np.isfinite(rows).all():
        raise CheckpointError(
            f"The cache rows of layer {layer} are not finite in {dtype} for the prompt's "
            "constant prefix. Compile with --recipe fp32; if that fails as well, the "
            "checkpoint's weights are damaged: copy it again."
        )
    return rows
