"""Memory and decode speed that a target can be expected to reach, from the graphs' bytes.

Decoding one token reads every decoder weight but the embedding table (one row of it) and the
cache once, so tokens/s is at most bandwidth over those bytes. Peers reach 65 to 76 per cent of
the bus on Orin; ``EFFICIENCY`` is the low end of that. Not measured on a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mvlm_export.engines.manifest import ModelSpec
from mvlm_export.engines.targets import Target

EFFICIENCY = 0.65
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Estimate:
    """Bytes at run time and the speed that follows.

    Attributes:
        weights: all three graphs' initializers.
        cache: keys and values at ``max_positions``.
        read_per_token: decoder weights but the embedding, and the cache half full.
        memory: of the module, None where it varies.
        tokens_per_second: ``EFFICIENCY`` times bandwidth over ``read_per_token``.
    """

    weights: int
    cache: int
    read_per_token: int
    memory: int | None
    fits: bool | None
    efficiency: float
    bandwidth_gb_s: float | None
    tokens_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _initializer_bytes(path: Path) -> dict[str, int]:
    model = onnx.load(str(path), load_external_data=False)
    sizes = {}
    for tensor in model.graph.initializer:
        count = 1
        for dim in tensor.dims:
            count *= dim
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        sizes[tensor.name] = count * width
    return sizes


def estimate_target(
    graphs: Mapping[str, Path], dtype: str, model: ModelSpec, target: Target
) -> Estimate:
    """Read the graphs' initializer sizes (not their values) and do the arithmetic."""
    sizes = {name: _initializer_bytes(path) for name, path in graphs.items()}
    weights = sum(sum(parts.values()) for parts in sizes.values())
    row = model.num_key_value_heads * model.head_dim * np.dtype(dtype).itemsize
    cache = 2 * model.num_layers * model.max_positions * row
    decoder = sum(sizes["decoder"].values()) - sizes["decoder"].get(EMBEDDING, 0)
    read = decoder + cache // 2
    memory = None if target.memory_gb is None else int(target.memory_gb * 1e9)
    bandwidth = target.bandwidth_gb_s
    return Estimate(
        weights=weights,
        cache=cache,
        read_per_token=read,
        memory=memory,
        fits=None if memory is None else weights + cache < 0.8 * memory,
        efficiency=EFFICIENCY,
        bandwidth_gb_s=bandwidth,
        tokens_per_second=None if bandwidth is None else EFFICIENCY * bandwidth * 1e9 / read,
    )
