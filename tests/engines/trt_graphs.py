"""Small ONNX files for TensorRT's parser, and a build that must fail."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_builder import ProfileSpec, build_engine

RTX = get_target("rtx")
HEADS, HEAD_DIM, ROWS = 2, 32, 64
WIDTH = HEADS * HEAD_DIM
FLOAT16 = TensorProto.FLOAT16


def value(name, shape, dtype=FLOAT16):
    return helper.make_tensor_value_info(name, dtype, shape)


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def save(path, nodes, inputs, outputs, initializers=(), opset=20, domains=()):
    graph = helper.make_graph(nodes, "test", inputs, outputs, list(initializers))
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def save_relu(path, dim="S"):
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    return save(path, [node], [value("x", [dim, 8])], [value("y", [dim, 8])])


def save_append_attention(path):
    """One attention layer in the decoder's cache form: past rows in, new rows out."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["s"], name="new_rows", start=0, end=1),
        node("Shape", ["past_k"], ["t"], name="past_rows", start=0, end=1),
        node("Add", ["s", "t"], ["all_rows"], name="all_rows"),
        node("Squeeze", ["t", "axis"], ["t0"], name="first"),
        node("Squeeze", ["all_rows", "axis"], ["end"], name="end"),
        node("Range", ["t0", "end", "one"], ["positions"], name="positions"),
        node("Gather", ["table", "positions"], ["rotary"], name="rotary_rows"),
        node("Range", ["zero", "end", "one"], ["columns"], name="columns"),
        node("Unsqueeze", ["positions", "last"], ["rows"], name="rows"),
        node("LessOrEqual", ["columns", "rows"], ["seen"], name="seen"),
        node("Where", ["seen", "nothing", "never"], ["mask"], name="mask"),
    ]
    for part in "qkv":
        nodes += [
            node("MatMul", ["x", f"w_{part}"], [f"{part}_flat"], name=f"{part}_proj"),
            node(
                "Reshape", [f"{part}_flat", "heads"], [f"{part}_heads"], name=f"{part}_split"
            ),
        ]
    nodes += [
        node("Mul", ["q_heads", "rotary"], ["q"], name="q_rotary"),
        node("Mul", ["k_heads", "rotary"], ["present_k"], name="k_rotary"),
        node("Identity", ["v_heads"], ["present_v"], name="v_out"),
        node("Concat", ["past_k", "present_k"], ["keys"], name="keys", axis=0),
        node("Concat", ["past_v", "present_v"], ["values"], name="values", axis=0),
        node("Transpose", ["q"], ["q_t"], name="q_t", perm=[1, 0, 2]),
        node("Transpose", ["keys"], ["k_t"], name="k_t", perm=[1, 2, 0]),
        node("Transpose", ["values"], ["v_t"], name="v_t", perm=[1, 0, 2]),
        node("MatMul", ["q_t", "k_t"], ["scores"], name="scores"),
        node("Add", ["scores", "mask"], ["masked"], name="masked"),
        node("Cast", ["masked"], ["masked32"], name="to32", to=TensorProto.FLOAT),
        node("Softmax", ["masked32"], ["p32"], name="softmax", axis=-1),
        node("Cast", ["p32"], ["p"], name="to16", to=FLOAT16),
        node("MatMul", ["p", "v_t"], ["mixed"], name="mixed"),
        node("Transpose", ["mixed"], ["y"], name="y_t", perm=[1, 0, 2]),
    ]
    weights = [
        constant(f"w_{part}", rng.standard_normal((WIDTH, WIDTH)).astype(np.float16))
        for part in "qkv"
    ]
    weights += [
        constant("table", rng.standard_normal((ROWS, 1, HEAD_DIM)).astype(np.float16)),
        constant("axis", np.array([0], np.int64)),
        constant("last", np.array([1], np.int64)),
        constant("zero", np.array(0, np.int64)),
        constant("one", np.array(1, np.int64)),
        constant("heads", np.array([0, HEADS, HEAD_DIM], np.int64)),
        constant("nothing", np.array(0, np.float16)),
        constant("never", np.array(-60000, np.float16)),
    ]
    past = [value(f"past_{part}", ["T", HEADS, HEAD_DIM]) for part in "kv"]
    new = [value(name, ["S", HEADS, HEAD_DIM]) for name in ("y", "present_k", "present_v")]
    return save(path, nodes, [value("x", ["S", WIDTH]), *past], new, weights)


def save_bad_reshape(path):
    """Parses, and fails in the build: 16 values cannot become 48, TensorRT says."""
    node = helper.make_node
    nodes = [
        node("Relu", ["x"], ["a"], name="first"),
        node("MatMul", ["a", "w"], ["b"], name="proj"),
        node("Reshape", ["b", "frozen"], ["c"], name="/layer1/bad_reshape"),
        node("Relu", ["c"], ["d"], name="after"),
        node("Softmax", ["d"], ["y"], name="softmax", axis=-1),
    ]
    weights = [
        constant("w", np.ones((8, 8), np.float16)),
        constant("frozen", np.array([3, 16], np.int64)),
    ]
    inputs, outputs = [value("x", ["S", 8])], [value("y", ["R", "C"])]
    return save(path, nodes, inputs, outputs, weights)


def save_scatter_attention(path, rows=64, head_dim=64):
    """Attention over a cache written in place; TensorRT-RTX 1.7 builds it with S 1..2 alone.

    With one new row it has no kernel for the node and says so without naming it.
    """
    rng = np.random.default_rng(0)
    width = HEADS * head_dim
    node = helper.make_node
    nodes = [node("Relu", ["x"], ["a"], name="act")]
    for part in "qkv":
        nodes += [
            node("MatMul", ["a", f"w_{part}"], [f"{part}_flat"], name=f"{part}_proj"),
            node("Reshape", [f"{part}_flat", "split"], [f"{part}_4d"], name=f"{part}_split"),
            node("Transpose", [f"{part}_4d"], [part], name=f"{part}_t", perm=[0, 2, 1, 3]),
        ]
    nodes += [
        node("TensorScatter", ["past_k", "k", "at"], ["keys"], name="k_scatter", axis=-2),
        node("TensorScatter", ["past_v", "v", "at"], ["values"], name="v_scatter", axis=-2),
        node("Shape", ["a"], ["s1"], name="new_rows", start=0, end=1),
        node("Squeeze", ["s1", "first"], ["s0"], name="count"),
        node("Range", ["zero", "s0", "one"], ["r"], name="range"),
        node("Add", ["r", "at"], ["row"], name="row"),
        node("Unsqueeze", ["row", "last"], ["row_2d"], name="row_2d"),
        node("LessOrEqual", ["columns", "row_2d"], ["mask"], name="mask"),
        node("Attention", ["q", "keys", "values", "mask"], ["mixed"], name="/layer0/attn"),
        node("Transpose", ["mixed"], ["mixed_t"], name="back", perm=[0, 2, 1, 3]),
        node("Reshape", ["mixed_t", "flat"], ["merged"], name="merge"),
        node("MatMul", ["merged", "w_q"], ["y"], name="o_proj"),
    ]
    weights = [
        constant(f"w_{p}", (rng.standard_normal((width, width)) / 10).astype(np.float16))
        for p in "qkv"
    ]
    weights += [
        constant("split", np.array([1, -1, HEADS, head_dim])),
        constant("flat", np.array([-1, width])),
        constant("first", np.array([0])),
        constant("last", np.array([1])),
        constant("zero", np.array(0)),
        constant("one", np.array(1)),
        constant("columns", np.arange(rows)),
    ]
    past, new = (
        [value(name, [1, HEADS, rows, head_dim]) for name in names]
        for names in (("past_k", "past_v"), ("keys", "values"))
    )
    inputs = [value("x", ["S", width]), *past, value("at", [1], TensorProto.INT64)]
    return save(path, nodes, inputs, [value("y", ["S", width]), *new], weights, opset=24)


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".onnx")


def without_images(profiles):
    return [
        ProfileSpec(p.name, {d: r for d, r in p.dims.items() if d != "I"}) for p in profiles
    ]


def build(path, profiles, **options):
    return build_engine(path, path.with_suffix(".plan"), profiles, target=RTX, **options)


def message_of(path, profiles=(), error=EngineError):
    with pytest.raises(error) as caught:
        build(path, profiles)
    assert leftovers(path.parent) == []
    assert "cudaError 35" not in str(caught.value)
    return str(caught.value)
