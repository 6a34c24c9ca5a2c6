"""Graphs that fit, and foreign graphs that are each refused by name with a cure."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.targets import TARGETS, get_target
from mvlm_export.passes.conformance import check_conformance
from mvlm_export.passes.tensorrt_ops import OP_SETS, REPLACEMENTS

ORIN = get_target("orin")
ORIN_JETPACK_7 = get_target("orin", jetpack=7)
FLOAT16, FLOAT, INT4 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT4


def value(name, shape, dtype=FLOAT16):
    return helper.make_tensor_value_info(name, dtype, shape)


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def model_of(
    nodes, inputs=None, outputs=None, tensors=(), opset=20, ir=10, domains=(), **more
):
    inputs = inputs or [value("x", ["S", 64])]
    outputs = outputs or [value("y", ["S", 64])]
    graph = helper.make_graph(nodes, "foreign", inputs, outputs, list(tensors))
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir, **more)


def node(op, inputs=("x",), outputs=("y",), name="culprit", **attributes):
    return helper.make_node(op, list(inputs), list(outputs), name=name, **attributes)


def int4_linear(scale=None, zero=None, axis=0, block=32, shape=(64, 64), data_type=INT4):
    """x @ DequantizeLinear(q): the block-wise form unless told otherwise."""
    packed = b"\x11" * -(-int(np.prod(shape)) // 2)
    q = helper.make_tensor("q", data_type, shape, packed, raw=True)
    scale = np.ones((2, 64), np.float16) if scale is None else scale
    tensors, names = [q, constant("s", scale)], ["q", "s"]
    if zero is not None:
        tensors.append(helper.make_tensor("z", data_type, zero.shape, zero.ravel()))
        names.append("z")
    attributes = {"axis": axis, **({"block_size": block} if block else {})}
    nodes = [
        node("DequantizeLinear", names, ["w"], **attributes),
        node("MatMul", ["x", "w"], name="linear"),
    ]
    return model_of(nodes, tensors=tensors, opset=21)


def foreign_operators():
    """(rule, words of the message, model): graphs that TensorRT 10.3 must not be given."""
    x32 = [value("x", ["S", 64], FLOAT)]
    heads = [value(name, [1, 4, 8, 64]) for name in ("x", "k", "v")]
    out = [value("y", None)]
    yield (
        "op",
        "TensorRT 10.3 has no importer for it. Write it as MatMul, Softmax",
        model_of([node("Attention", ["x", "k", "v"])], heads, out, opset=21),
    )
    yield (
        "op",
        "ReduceMean",
        model_of([node("RMSNormalization", ["x", "x"])], opset=21),
    )
    yield (
        "op",
        "constant scales",
        model_of([node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])], x32),
    )
    yield (
        "domain",
        "domain 'com.microsoft', unknown to Jetson AGX Orin",
        model_of([node("MatMulNBits", domain="com.microsoft")], domains=["com.microsoft"]),
    )
    yield "opset", "opset 23", model_of([node("Relu")], opset=23)
    yield "ir", "ir_version 10", model_of([node("Relu")], ir=11)


def foreign_types_and_forms():
    x32 = [value("x", ["S", 64], FLOAT)]
    yield "dtype", "DOUBLE", model_of([node("Cast", to=TensorProto.DOUBLE)])
    yield (
        "dtype",
        "no FP8",
        model_of([node("Cast", to=TensorProto.FLOAT8E4M3FN)]),
    )
    yield (
        "dtype",
        "UINT4",
        int4_linear(data_type=TensorProto.UINT4),
    )
    yield (
        "dtype",
        "STRING",
        model_of([node("Identity")], [value("x", [2], TensorProto.STRING)]),
    )
    yield (
        "dtype",
        "UINT8 inside the graph",
        model_of([node("Cast", to=TensorProto.UINT8)]),
    )
    yield (
        "form",
        "input 'axes' is computed",
        model_of([node("ReduceSum", ["x", "axes"])], [*x32, value("axes", [1], 7)]),
    )
    yield (
        "form",
        "first output alone",
        model_of([node("LayerNormalization", ["x", "x", "x"], ["y", "mean"])]),
    )
    yield (
        "quantization",
        "no block_size",
        int4_linear(np.ones(64, np.float16), axis=1, block=0),
    )
    yield "quantization", "not positive", int4_linear(np.zeros((2, 64), np.float16))
    yield "quantization", "is not zero", int4_linear(zero=np.ones((2, 64), np.int8))
    yield "quantization", "need [2, 64]", int4_linear(np.ones((4, 64), np.float16))
    yield (
        "quantization",
        "reads INT4 weight 'q' directly",
        model_of(
            [node("Gather", ["q", "x"])],
            [value("x", ["S"], TensorProto.INT32)],
            [value("y", ["S", 4], INT4)],
            [helper.make_tensor("q", INT4, [8, 4], np.zeros(32, np.int8))],
            opset=21,
        ),
    )


FOREIGN = [*foreign_operators(), *foreign_types_and_forms()]


@pytest.mark.parametrize(("rule", "words", "model"), FOREIGN, ids=[f[1][:30] for f in FOREIGN])
def test_foreign_graph_is_refused_by_name(rule, words, model):
    report = check_conformance(model, ORIN)
    assert not report.ok
    found = [v for v in report.violations if v.rule == rule]
    assert found, report.violations
    assert any(words in str(v) for v in found), [str(v) for v in found]
    assert all(v.cure.endswith(".") and v.what for v in report.violations)
    if rule in ("op", "domain", "form"):
        assert found[0].node == "culprit"
    with pytest.raises(EngineError, match=r"does not fit Jetson AGX Orin 64GB, JetPack 6"):
        report.raise_if_failed()


def test_plain_graph_fits_every_target():
    model = model_of(
        [node("MatMul", ["x", "w"])], tensors=[constant("w", np.eye(64, dtype="f2"))]
    )
    for target in TARGETS.values():
        report = check_conformance(model, target)
        assert report.ok
        assert report.nodes == 1
        report.raise_if_failed()


@pytest.mark.parametrize("zero", [None, np.zeros((2, 64), np.int8)])
def test_block_wise_int4_fits_orin(zero):
    assert check_conformance(int4_linear(zero=zero), ORIN).violations == ()


def test_int4_forms_that_are_onnx_runtimes_alone():
    model = int4_linear(np.ones(64, np.float16), axis=1, block=0)
    assert check_conformance(model, get_target("cpu")).ok


def test_three_dimensional_or_odd_int4_weights():
    report = check_conformance(int4_linear(shape=(2, 64, 64)), ORIN)
    assert "takes two dimensions" in report.violations[0].what
    odd = int4_linear(np.ones((2, 63), np.float16), shape=(64, 63))
    assert "odd number" in check_conformance(odd, ORIN).violations[0].what


def test_computed_scales_and_zero_points():
    quantized = [constant("q", np.zeros((64, 64), np.int8)), constant("s", np.float16(1))]
    dq = node("DequantizeLinear", ["q", "s", "z"], ["w"])
    inputs = [value("x", ["S", 64]), value("z", [], TensorProto.INT8)]
    model = model_of([dq, node("MatMul", ["x", "w"], name="mm")], inputs, tensors=quantized)
    assert "computed" in check_conformance(model, ORIN).violations[0].what


def test_uint8_pixels_may_enter():
    pixels = [value("x", ["B", 3, 336, 336], TensorProto.UINT8)]
    model = model_of([node("Cast", to=FLOAT16)], pixels, [value("y", ["B", 3, 336, 336])])
    assert check_conformance(model, ORIN).ok


def test_attention_of_jetpack_7_and_its_traps():
    heads = [value(name, [1, 4, 8, 64]) for name in ("x", "k", "v", "pk", "pv")]
    out = [value("y", None)]
    plain = model_of([node("Attention", ["x", "k", "v"])], heads[:3], out, opset=23)
    assert check_conformance(plain, ORIN_JETPACK_7).ok
    trapped = node(
        "Attention", ["x", "k", "v", "", "pk", "pv"], ["y", "a", "b"], is_causal=1, softcap=0.0
    )
    report = check_conformance(model_of([trapped], heads, out, opset=23), ORIN_JETPACK_7)
    text = "\n".join(str(v) for v in report.violations)
    assert {v.rule for v in report.violations} == {"form"}
    assert all(
        word in text for word in ("past_key", "past_value", "is_causal", "first output")
    )
    assert "softcap" not in text


def test_nodes_of_subgraphs_are_looked_at():
    branch = helper.make_graph([node("Swish", [], ["b"])], "branch", [], [value("b", [2])])
    chooser = node("If", ["x"], name="if", then_branch=branch, else_branch=branch)
    model = model_of([chooser], [value("x", [], TensorProto.BOOL)], [value("y", [2])])
    report = check_conformance(model, ORIN)
    assert report.nodes == 3
    assert [v.op for v in report.violations] == ["Swish", "Swish"]


def test_local_functions_are_refused():
    function = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 20)],
    )
    model = model_of([node("Twice", domain="local")], domains=["local"], functions=[function])
    report = check_conformance(model, ORIN)
    assert [v.rule for v in report.violations] == ["domain", "domain"]
    assert "Inline it" in report.violations[0].cure


def test_sparse_initializers_are_refused():
    model = model_of([node("Relu")])
    sparse = helper.make_sparse_tensor(
        constant("sparse", np.ones(1, np.float16)), constant("at", np.array([0])), [4]
    )
    model.graph.sparse_initializer.append(sparse)
    assert "sparse" in check_conformance(model, ORIN).violations[0].what


def test_nameless_node_is_known_by_its_output():
    report = check_conformance(model_of([node("Swish", name="")]), ORIN)
    assert report.violations[0].node == "(makes y)"


def test_many_like_violations_are_one_line():
    nodes = [node("Swish", ["x"], [f"t{i}"], name=f"layer{i}") for i in range(24)]
    nodes += [node(f"Foreign{i}", ["x"], [f"u{i}"], name=f"f{i}") for i in range(20)]
    with pytest.raises(EngineError) as caught:
        check_conformance(model_of(nodes), ORIN).raise_if_failed()
    message = str(caught.value)
    assert "44 violations" in message
    assert "Swish 'layer0'" in message
    assert "(24 nodes alike)" in message
    assert "and 9 more kinds" in message


# Files


@pytest.fixture
def external(tmp_path):
    """A file with INT4 weights and scales outside it."""
    path = tmp_path / "model.onnx"
    onnx.save(
        int4_linear(np.full((2, 64), 0.5, np.float16)),
        path,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    return path


def test_external_data_that_is_whole_fits(external):
    assert check_conformance(external, ORIN).violations == ()
    assert check_conformance(str(external), ORIN).model == str(external)


def test_external_data_missing(external):
    (external.parent / "model.onnx.data").unlink()
    report = check_conformance(external, ORIN)
    assert {v.rule for v in report.violations} == {"data"}
    assert {v.node for v in report.violations} == {"q", "s"}
    assert "'model.onnx.data' is missing" in str(report.violations[0])


def test_external_data_cut_short(external):
    data = external.parent / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    report = check_conformance(external, ORIN)
    assert "ends at byte 100" in str(report.violations[0])


def test_external_data_of_wrong_length(external):
    model = onnx.load(external, load_external_data=False)
    model.graph.initializer[0].dims[1] = 32
    external.write_bytes(model.SerializeToString())
    assert "its shape needs 1024" in str(check_conformance(external, ORIN).violations[0])


def test_external_data_outside_the_folder(external):
    model = onnx.load(external, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../elsewhere.data"
    external.write_bytes(model.SerializeToString())
    assert "outside the model's folder" in str(check_conformance(external, ORIN).violations[0])


def test_scales_outside_the_file_are_read(external):
    data = external.parent / "model.onnx.data"
    data.write_bytes(b"\0" * data.stat().st_size)
    report = check_conformance(external, ORIN)
    assert ["not positive" in v.what for v in report.violations] == [True]


def test_model_in_memory_skips_the_data_unless_told_where(external):
    model = onnx.load(external, load_external_data=False)
    (external.parent / "model.onnx.data").unlink()
    assert check_conformance(model, ORIN).ok
    assert not check_conformance(model, ORIN, folder=external.parent).ok


@pytest.mark.parametrize("content", [b"no onnx at all", b""])
def test_files_that_are_no_model(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"is no ONNX file|holds no graph"):
        check_conformance(path, ORIN)


def test_missing_file(tmp_path):
    with pytest.raises(EngineError, match="Cannot read"):
        check_conformance(tmp_path / "absent.onnx", ORIN)


def test_report_prints_as_json():
    report = check_conformance(model_of([node("Swish")]), ORIN)
    data = json.loads(json.dumps(report.to_json()))
    assert data["violations"][0]["op"] == "Swish"


# The data


def test_op_sets_hold_what_the_targets_name():
    assert {t.op_set for t in TARGETS.values()} - {None} <= set(OP_SETS)
    assert ORIN_JETPACK_7.op_set in OP_SETS


def test_newer_parsers_only_add_but_for_non_zero():
    old, new, rtx = (
        OP_SETS[n].ops for n in ("tensorrt_10_3", "tensorrt_10_16", "tensorrt_rtx_1_7")
    )
    assert {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"} <= new - old
    assert old < new
    assert new - rtx == {"NonZero"}


def test_all_listed_operators_are_onnx_operators():
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert OP_SETS["tensorrt_rtx_1_7"].ops <= known
    assert OP_SETS["tensorrt_10_3"].ops <= known


def test_replacements_are_for_what_is_not_listed():
    assert not set(REPLACEMENTS) & OP_SETS["tensorrt_10_3"].ops
