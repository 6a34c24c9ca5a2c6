"""Operators read from the bytes of an ONNX file, against the onnx package."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.onnx_nodes import read_operators

from .trt_graphs import save_append_attention, save_bad_reshape, save_scatter_attention


@pytest.mark.parametrize(
    "save", [save_append_attention, save_bad_reshape, save_scatter_attention]
)
def test_as_the_onnx_package_reads_it(tmp_path, save):
    path = save(tmp_path / "m.onnx")
    nodes = onnx.load(str(path)).graph.node
    assert read_operators(path) == {node.name: node.op_type for node in nodes}


def test_nodes_without_a_name_are_left_out(tmp_path):
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    assert read_operators(path) == {}


@pytest.mark.parametrize("content", [b"", b"\x0b", b"\x3a\xff\x01ab", b"\xff" * 20])
def test_what_is_no_onnx_file(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineError, match="no ONNX file"):
        read_operators(path)


@given(content=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(content)
    try:
        assert all(read_operators(path))
    except EngineError as error:
        assert "no ONNX file" in str(error)
