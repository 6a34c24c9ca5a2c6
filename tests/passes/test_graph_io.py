"""Graphs to files and back."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from mvlm_export.engines.errors import MvlmError, PassError
from mvlm_export.passes.deferred import DeferredValues, derive, is_deferred, values_of
from mvlm_export.passes.graph_io import (
    ALIGNMENT,
    bind_weight,
    import_graph,
    load_graph,
    save_graph,
    save_structure,
    to_model,
)
from mvlm_export.passes.type_inference import infer_types
from tests.passes.graphs import constants, parse_graph, run_graph

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,16] x) => (float[B,64] y) <float[16,64] w, float[1] one> {
  m = MatMul(x, w)
  y = Add(m, one)
}
"""


def graph_with(read):
    graph = parse_graph(TEXT, one=np.ones(1, np.float32), w=np.zeros((16, 64), np.float32))
    graph.tensors()["w"].values = DeferredValues((16, 64), np.float32, read)
    return graph


def weight(seed=0):
    return np.random.default_rng(seed).standard_normal((16, 64), dtype=np.float32)


def test_a_round_trip_keeps_values_and_streams_large_ones(tmp_path):
    path = tmp_path / "model.onnx"
    seen = []
    save_graph(graph_with(weight), path, lambda *args: seen.append(args))
    proto = onnx.load(str(path), load_external_data=False)
    places = {t.name: t.data_location for t in proto.graph.initializer}
    assert places == {"w": onnx.TensorProto.EXTERNAL, "one": onnx.TensorProto.DEFAULT}
    assert sorted(name for _, _, name in seen) == ["one", "w"]
    assert {(done, total) for done, total, _ in seen} == {(1, 2), (2, 2)}
    onnx.checker.check_model(str(path), full_check=True)
    back = load_graph(path)
    assert is_deferred(back.tensors()["w"])
    np.testing.assert_array_equal(constants(back)["w"], weight())
    feeds = {"x": weight(1)[:, :16].copy()}
    session = onnxruntime.InferenceSession(str(path))
    np.testing.assert_array_equal(session.run(None, feeds)[0], run_graph(back, feeds)["y"])


def test_tensors_in_the_data_file_are_aligned(tmp_path):
    graph = graph_with(weight)
    more = derive("v", [graph.tensors()["w"]], lambda w: w[:, :63], (16, 63))
    node = gs.Node("MatMul", "second", {}, [graph.inputs[0], more], [gs.Variable("z")])
    graph.nodes.append(node)
    graph.outputs.append(gs.Variable("z", np.float32, ["B", 63]))
    node.outputs = [graph.outputs[-1]]
    path = tmp_path / "model.onnx"
    save_graph(graph, path)
    offsets = [
        int(entry.value)
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    ]
    assert len(offsets) == 2
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    np.testing.assert_array_equal(values_of(load_graph(path).tensors()["v"]), weight()[:, :63])


def test_4_bit_weights_are_packed(tmp_path):
    import ml_dtypes

    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[B,32] x) => (float[B,16] y) <float[1,16] s> {
      d = DequantizeLinear<axis=0, block_size=32>(q, s)
      y = MatMul(x, d)
    }
    """
    values = np.random.default_rng(0).integers(-8, 8, (32, 16)).astype(ml_dtypes.int4)
    graph = import_graph(onnx.parser.parse_model(text))
    bind_weight(graph, "s", np.full((1, 16), 0.5, np.float32))
    bind_weight(graph, "q", DeferredValues((32, 16), ml_dtypes.int4, lambda: values))
    path = tmp_path / "model.onnx"
    save_graph(graph, path)
    assert (tmp_path / "model.onnx.data").stat().st_size == 256
    onnx.checker.check_model(str(path), full_check=True)
    x = np.eye(32, dtype=np.float32)
    found = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    np.testing.assert_array_equal(found, values.astype(np.float32) * 0.5)
    back = values_of(load_graph(path).tensors()["q"])
    np.testing.assert_array_equal(back.astype(np.int8), values.astype(np.int8))


def test_small_4_bit_weights_survive_a_round_trip(tmp_path):
    """Inline ones too, which graph-surgeon would write unpacked."""
    import ml_dtypes

    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[B,16] x) => (float[B,2] y) <float[1,2] s> {
      d = DequantizeLinear<axis=0, block_size=16>(q, s)
      y = MatMul(x, d)
    }
    """
    values = np.arange(32).reshape(16, 2).astype(ml_dtypes.int4)
    graph = import_graph(onnx.parser.parse_model(text))
    bind_weight(graph, "s", np.ones((1, 2), np.float32))
    bind_weight(graph, "q", DeferredValues((16, 2), ml_dtypes.int4, lambda: values))
    save_graph(graph, tmp_path / "one.onnx")
    again = load_graph(tmp_path / "one.onnx")
    infer_types(again)
    save_graph(again, tmp_path / "two.onnx")
    feeds = {"x": np.eye(16, dtype=np.float32)}
    found = onnxruntime.InferenceSession(str(tmp_path / "two.onnx")).run(None, feeds)[0]
    np.testing.assert_array_equal(found, values.astype(np.float32))


def test_a_graph_without_large_weights_has_no_data_file(tmp_path):
    text = TEXT.replace("float[16,64] w", "float[16,1] w").replace(
        "float[B,64] y", "float[B,1] y"
    )
    graph = parse_graph(text, one=np.ones(1, np.float32), w=np.ones((16, 1), np.float32))
    save_graph(graph, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_graph_may_be_saved_over_the_files_it_is_read_from(tmp_path):
    path = tmp_path / "model.onnx"
    save_graph(graph_with(weight), path)
    save_graph(load_graph(path), path)
    np.testing.assert_array_equal(constants(load_graph(path))["w"], weight())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_a_save_that_fails_leaves_the_old_files(tmp_path):
    path = tmp_path / "model.onnx"
    save_graph(graph_with(weight), path)

    def fail():
        raise PassError("no")

    with pytest.raises(PassError, match="no"):
        save_graph(graph_with(fail), path)
    np.testing.assert_array_equal(constants(load_graph(path))["w"], weight())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_structure_is_saved_without_reading_weights(tmp_path):
    def fail():
        raise AssertionError("a weight was read")

    path = tmp_path / "dumps" / "01-pass.onnx"
    save_structure(graph_with(fail), path)
    proto = onnx.load(str(path), load_external_data=False)
    assert [node.op_type for node in proto.graph.node] == ["MatMul", "Add"]
    assert [list(t.dims) for t in proto.graph.initializer if t.name == "w"] == [[16, 64]]


def test_bind_weight_turns_a_free_name_into_a_constant():
    text = TEXT.replace("<float[16,64] w, float[1] one>", "<float[1] one>")
    graph = import_graph(onnx.parser.parse_model(text))
    bind_weight(graph, "w", weight())
    np.testing.assert_array_equal(constants(graph)["w"], weight())
    with pytest.raises(PassError, match="no free tensor 'm'"):
        bind_weight(graph, "m", weight())
    with pytest.raises(PassError, match="no free tensor 'absent'"):
        bind_weight(graph, "absent", weight())


def test_to_model_holds_every_weight():
    model = to_model(graph_with(weight))
    onnx.checker.check_model(model, full_check=True)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    np.testing.assert_array_equal(values["w"], weight())


def test_files_that_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MvlmError, match=r"cannot be written.*--output"):
        save_graph(graph_with(weight), tmp_path / "file" / "model.onnx")
    with pytest.raises(MvlmError, match="cannot be written"):
        save_structure(graph_with(weight), tmp_path / "file" / "model.onnx")
    with pytest.raises(PassError, match="cannot be read as ONNX"):
        load_graph(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\x07not onnx")
    with pytest.raises(PassError, match="cannot be read as ONNX"):
        load_graph(tmp_path / "broken.onnx")


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_data_file_is_named(tmp_path, damage):
    path = tmp_path / "model.onnx"
    save_graph(graph_with(weight), path)
    data = tmp_path / "model.onnx.data"
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(PassError, match=r"'w' cannot be read from .*compile the model again"):
        values_of(load_graph(path).tensors()["w"])


def test_a_model_that_cannot_be_imported(tmp_path):
    model = to_model(graph_with(weight))
    model.graph.initializer[0].raw_data = b"123"
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(PassError, match="holds what cannot be read"):
        load_graph(tmp_path / "model.onnx")
