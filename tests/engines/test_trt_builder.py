"""Real parses and builds by TensorRT-RTX on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mvlm_export.engines import trt_builder
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.gpu_probe import probe_gpu
from mvlm_export.engines.trt_builder import (
    BuildOptions,
    ProfileSpec,
    build_engine,
    decoder_profiles,
)

from ..helpers_plan import plan_kernels
from .trt_graphs import (
    ROWS,
    RTX,
    WIDTH,
    build,
    constant,
    leftovers,
    message_of,
    save,
    save_append_attention,
    save_relu,
    value,
    without_images,
)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same results on a machine with a GPU."""
    absent = probe_gpu("libno-such-driver.so")
    monkeypatch.setattr(trt_builder, "probe_gpu", lambda: absent)


# Builds


def test_append_cache_attention_with_prefill_and_decode(tmp_path):
    path = save_append_attention(tmp_path / "decoder.onnx")
    reports = []
    result = build(
        path, without_images(decoder_profiles(ROWS, 1, "fp16")), progress=reports.append
    )
    plan = result.plan_path.read_bytes()
    assert result.plan_bytes == len(plan) > 10_000
    assert result.profiles == ("prefill", "decode")
    assert set(result.activation_memory) == {"prefill", "decode"}
    assert result.weights_memory > 3 * WIDTH * WIDTH * 2
    assert (result.kind, result.compute_capability) == ("tensorrt_rtx", (8, 6))
    assert result.tensorrt_version.startswith("1.7")
    attention = [entry for entry in plan_kernels(plan) if "mha" in entry.kernel]
    assert len(attention) == 2, "one fused attention kernel for each profile"
    assert {"scores", "softmax", "mixed"} <= set(attention[0].nodes)
    assert leftovers(tmp_path) == ["decoder.plan"]
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert result.to_json()["plan_path"] == "decoder.plan"


def test_decode_profile_with_one_row_duplicates_fp16_weights(tmp_path):
    path = save_append_attention(tmp_path / "decoder.onnx")
    shared = build(path, without_images(decoder_profiles(ROWS, 1, "fp16")))
    split = build(path, without_images(decoder_profiles(ROWS, 1, "int4")))
    assert split.weights_memory > 1.5 * shared.weights_memory


def test_other_compute_capability_makes_another_plan(tmp_path):
    path = save_relu(tmp_path / "relu.onnx")
    result = build(path, [ProfileSpec("p", {"S": (1, 2, 4)})], compute_capability=(8, 9))
    assert result.compute_capability == (8, 9)


def test_unknown_compute_capability_is_refused(tmp_path):
    path = save_relu(tmp_path / "relu.onnx")
    with pytest.raises(EngineError, match="cannot build for SM87"):
        build(path, [ProfileSpec("p", {"S": (1, 2, 4)})], compute_capability=(8, 7))


def test_fixed_shapes_need_no_profile_and_workspace_can_be_limited(tmp_path):
    result = build(save_relu(tmp_path / "relu.onnx", dim=4), [], options=BuildOptions(1 << 24))
    assert result.profiles == ()
    assert list(result.activation_memory) == ["default"]


def test_external_data_beside_the_graph_is_found(tmp_path):
    weight = constant("w", np.ones((64, 64), np.float16))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")
    graph = helper.make_graph(
        [node], "g", [value("x", ["S", 64])], [value("y", ["S", 64])], [weight]
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")
    profile = ProfileSpec("p", {"S": (1, 2, 4)})
    assert build(path, [profile]).plan_bytes > 0
    (tmp_path / "model.plan").unlink()
    (tmp_path / "model.onnx.data").unlink()
    text = message_of(path, [profile])
    assert "model.onnx.data" in text
    assert "beside the .onnx" in text


# Parser errors


def test_unknown_operator_is_named_with_its_place_and_a_cure(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], name="fine"),
        helper.make_node("Swoosh", ["h"], ["y"], name="/layer3/act"),
    ]
    path = save(tmp_path / "m.onnx", nodes, [value("x", ["S", 8])], [value("y", ["S", 8])])
    text = message_of(path)
    assert "node 1, Swoosh '/layer3/act'" in text
    assert "INVALID_NODE" in text
    assert "lower it to standard ONNX operators" in text


def test_all_bad_nodes_are_listed_in_one_go(tmp_path):
    nodes = [
        helper.make_node("Swoosh", ["x"], ["a"], name="first"),
        helper.make_node("Relu", ["x"], ["b"], name="fine"),
        helper.make_node("Whoosh", ["b"], ["y"], name="second"),
    ]
    path = save(tmp_path / "m.onnx", nodes, [value("x", [2, 8])], [value("y", [2, 8])])
    text = message_of(path)
    assert "'first'" in text
    assert "'second'" in text
    assert "'fine'" not in text


def test_mixed_types_get_the_advice_to_cast(tmp_path):
    node = helper.make_node("Add", ["x", "w"], ["y"], name="residual")
    weight = constant("w", np.zeros(8, np.float32))
    path = save(
        tmp_path / "m.onnx", [node], [value("x", ["S", 8])], [value("y", ["S", 8])], [weight]
    )
    text = message_of(path)
    assert "Add 'residual'" in text
    assert "Half and Float" in text
    assert "Cast" in text


def test_dynamic_quantize_has_words_where_tensorrt_says_false(tmp_path):
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"], name="dyn")
    path = save(
        tmp_path / "m.onnx",
        [node],
        [value("x", [2, 8], TensorProto.FLOAT)],
        [value("y", [2, 8], TensorProto.UINT8)],
    )
    text = message_of(path)
    assert "no importer" in text
    assert "(UNSUPPORTED_NODE)" in text


def test_non_zero_zero_point(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], name="dq", axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="mm"),
    ]
    quantized = [
        constant("q", np.zeros((8, 8), np.int8)),
        constant("s", np.ones(8, np.float16)),
        constant("z", np.ones(8, np.int8)),
    ]
    path = save(
        tmp_path / "m.onnx", nodes, [value("x", ["S", 8])], [value("y", ["S", 8])], quantized
    )
    assert "Quantize symmetrically" in message_of(path)


def test_uint4_weights(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], name="dq", block_size=32),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="mm"),
    ]
    quantized = [
        helper.make_tensor("q", TensorProto.UINT4, [64, 8], np.zeros(512, np.uint8)),
        constant("s", np.ones((2, 8), np.float16)),
    ]
    inputs, outputs = [value("x", ["S", 64])], [value("y", ["S", 8])]
    path = save(tmp_path / "m.onnx", nodes, inputs, outputs, quantized, opset=21)
    text = message_of(path)
    assert "q cannot be imported" in text
    assert "UINT4" in text


def test_causal_attention_with_a_mask(tmp_path):
    node = helper.make_node("Attention", ["q", "k", "v", "m"], ["y"], name="at", is_causal=1)
    inputs = [value(name, [1, 2, 8, 32]) for name in "qkv"]
    inputs.append(value("m", [8, 8], TensorProto.BOOL))
    path = save(tmp_path / "m.onnx", [node], inputs, [value("y", None)], opset=23)
    assert "leave is_causal 0" in message_of(path)


def test_dropped_input_is_an_error(tmp_path):
    inputs = [value("x", ["S", 8]), value("lengths", [2])]
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    path = save(tmp_path / "m.onnx", [node], inputs, [value("y", ["S", 8])])
    text = message_of(path, [ProfileSpec("p", {"S": (1, 2, 4)})])
    assert "would ignore the input(s) lengths" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "is empty"), (b"no onnx at all", "damaged or is no ONNX file")],
)
def test_files_that_hold_no_graph(tmp_path, content, expected):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert expected in message_of(path)


def test_graph_without_nodes(tmp_path):
    path = save(tmp_path / "m.onnx", [], [], [])
    assert "without a single node" in message_of(path)


def test_missing_file(tmp_path):
    assert "There is no ONNX file" in message_of(tmp_path / "absent.onnx")


# Failure and interruption leave nothing


def test_failed_build_keeps_the_older_plan(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"garbage")
    older = tmp_path / "m.plan"
    older.write_bytes(b"older")
    with pytest.raises(EngineError):
        build(path, [])
    assert older.read_bytes() == b"older"
    assert leftovers(tmp_path) == ["m.plan"]


def test_error_in_the_progress_callback_stops_the_build_and_comes_through(tmp_path):
    class CallbackError(Exception):
        pass

    def report(progress):
        raise CallbackError(progress.phase)

    path = save_relu(tmp_path / "m.onnx")
    with pytest.raises(CallbackError):
        build(path, [ProfileSpec("p", {"S": (1, 2, 4)})], progress=report)
    assert leftovers(tmp_path) == []


def test_ctrl_c_stops_the_build_and_leaves_nothing(tmp_path):
    path = save_append_attention(tmp_path / "decoder.onnx")
    interrupted = threading.Event()

    def report(progress):
        if progress.fraction > 0 and not interrupted.is_set():
            interrupted.set()
            signal.raise_signal(signal.SIGINT)
            threading.Event().wait(0.5)

    with pytest.raises(KeyboardInterrupt):
        build(path, without_images(decoder_profiles(ROWS, 1, "fp16")), progress=report)
    assert interrupted.is_set()
    assert leftovers(tmp_path) == []


def test_disk_that_cannot_be_written(tmp_path):
    path = save_relu(tmp_path / "m.onnx")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EngineError, match="Cannot write"):
        build_engine(
            path,
            tmp_path / "file" / "m.plan",
            [ProfileSpec("p", {"S": (1, 2, 4)})],
            target=RTX,
        )


def test_the_build_path_needs_neither_onnx_nor_torch(tmp_path):
    path = save_relu(tmp_path / "m.onnx")
    code = (
        "import sys; sys.modules['onnx'] = sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from mvlm_export.engines.targets import get_target\n"
        "from mvlm_export.engines.trt_builder import ProfileSpec, build_engine\n"
        "assert 'tensorrt_rtx' not in sys.modules\n"
        "path = Path(sys.argv[1])\n"
        "build_engine(path, path.with_suffix('.plan'),"
        " [ProfileSpec('p', {'S': (1, 2, 4)})], target=get_target('rtx'))\n"
    )
    subprocess.run([sys.executable, "-c", code, os.fspath(path)], check=True, timeout=60)
    assert leftovers(tmp_path) == ["m.plan"]
