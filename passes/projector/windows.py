"""Average pools and depthwise convolutions as the passes of this folder need them."""

from __future__ import annotations

import onnx_graphsurgeon as gs


def same_depthwise_problem(conv: gs.Node) -> str | None:
    """Why it is no depthwise convolution with an odd kernel that keeps the map's size.

    Args:
        conv: its weight is a constant.
    """
    weight, attrs = conv.inputs[1], conv.attrs
    kernel = list(weight.shape[2:])
    if weight.shape[1] != 1 or attrs.get("group", 1) != weight.shape[0]:
        return f"the convolution has {attrs.get('group', 1)} groups, it is not depthwise"
    if any(size % 2 == 0 for size in kernel):
        return f"the kernel {kernel} has no centre"
    if any(stride != 1 for stride in attrs.get("strides", [1])):
        return f"the strides are {attrs['strides']}, not 1"
    if any(step != 1 for step in attrs.get("dilations", [1])):
        return f"the dilations are {attrs['dilations']}, not 1"
    if attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return f"auto_pad is {attrs['auto_pad']}"
    pads = attrs.get("pads", [0] * 2 * len(kernel))
    if list(pads) != [size // 2 for size in kernel] * 2:
        return f"the pads {list(pads)} do not keep the map's size"
    return None


def tiling_pool_problem(pool: gs.Node) -> str | None:
    """Why its windows do not lie side by side, each on the map as a whole."""
    attrs, kernel = pool.attrs, list(pool.attrs["kernel_shape"])
    strides = list(attrs.get("strides", [1] * len(kernel)))
    if strides != kernel:
        return f"the pool's windows {kernel} do not tile the map, its strides are {strides}"
    if any(attrs.get("pads", [])):
        return f"the pool is padded by {list(attrs['pads'])}"
    if attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"the pool's auto_pad is {attrs['auto_pad']}"
    if any(step != 1 for step in attrs.get("dilations", [1])):
        return f"the pool's dilations are {list(attrs['dilations'])}, not 1"
    if attrs.get("ceil_mode", 0):
        return "the pool's ceil_mode lets windows hang over the edge"
    return None
