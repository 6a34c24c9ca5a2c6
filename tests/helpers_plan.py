"""What the plans of TensorRT-RTX 1.7 hold, read from their bytes without a GPU.

The format is undocumented, so this stays a test helper, for the version in
requirements.lock.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class PlanKernel(NamedTuple):
    """One entry of a plan's program: its kind, its kernel, the ONNX nodes it covers."""

    kind: str
    kernel: str
    nodes: list[str]


_TEXT = re.compile(rb"[\x09\x0a\x20-\x7e]{8,}")
_START = re.compile(r'(\w+)=\{ name="?([^\s"]+)"?')
_LAYERS = re.compile(r'layers="([^"]*)"')
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def plan_kernels(plan: bytes) -> list[PlanKernel]:
    """The kernels that cover ONNX nodes, in the plan's order."""
    text = b"\n".join(_TEXT.findall(plan)).decode()
    starts = list(_START.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    kernels = []
    for match, end in zip(starts, ends, strict=True):
        layers = _LAYERS.search(text, match.end(), end)
        nodes = _NODE.findall(layers[1]) if layers else []
        if nodes:
            kernels.append(
                PlanKernel(match[1], re.sub(r"_0x[0-9a-f]+.*", "", match[2]), nodes)
            )
    return kernels
