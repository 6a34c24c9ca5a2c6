"""``mvlm inspect`` on graphs, alone and beside each other."""

import xml.etree.ElementTree as ET

import numpy as np
import onnx
import pytest

from mvlm_export.exporter.cli.inspect_report import parse_axes
from mvlm_export.exporter.cli.inspect_tables import human_macs
from mvlm_export.passes.graph_io import save_graph
from tests.passes.graphs import parse_graph

from .bundles import (
    DECODER,
    FIXED,
    PROJECTOR,
    output,
    output_json,
    prefill_macs,
    type_mvlm,
    write_model,
)


def test_a_decoder_is_counted_for_prefill_and_decode(decoder, capsys):
    found = output_json(capsys, decoder)
    assert found["kind"] == "graph"
    macs = found["macs"]
    assert macs["prefill"]["axes"] == {"S": 256, "T": 0}
    assert macs["prefill"]["total"] == prefill_macs(256, 0)
    assert macs["decode"]["total"] == prefill_macs(1, 1024)
    assert found["operators"] == {"MatMul": 3, "Concat": 1, "Transpose": 1}
    assert found["weights"]["float32"]["bytes"] == 320
    assert found["file_bytes"]["model.onnx"] == decoder.stat().st_size


@pytest.mark.parametrize(
    "settings", [["--set", "S=3", "--set", "T=4"], ["--set", "S=3,T=4"], ["--set", "S=3 T=4"]]
)
def test_axes_can_be_set(decoder, capsys, settings):
    macs = output_json(capsys, decoder, *settings)["macs"]
    assert {name: count["total"] for name, count in macs.items()} == {
        "run": prefill_macs(3, 4)
    }


def test_a_graph_in_tables(decoder, capsys):
    text = output(capsys, decoder)
    for word in (
        "MACs prefill S=256 T=0",
        "Concat",
        "float32 [S, 10]",
        "head",
        "320 B",
        "past",
    ):
        assert word in text


def test_what_cannot_be_counted_is_said(tmp_path, capsys):
    model = onnx.parser.parse_model(PROJECTOR.replace("[B,", "[H,"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((2, 8), "f4"), "w"))
    onnx.save(model, tmp_path / "odd.onnx")
    text = output(capsys, tmp_path / "odd.onnx")
    assert "0 and 1 node not counted" in text
    assert "Not counted: MatMul: axis 'H' of 'image_embeds' has no value" in text
    assert "Not counted" not in output(capsys, tmp_path / "odd.onnx", "--set", "H=2")


def test_the_data_file_may_be_missing(tmp_path, capsys):
    graph = parse_graph(PROJECTOR, w=np.zeros((2, 8), np.float32).repeat(16, 0)[:2])
    graph.tensors()["w"].values = np.zeros((2, 8), np.float32)
    big = parse_graph(
        PROJECTOR.replace("4,2]", "4,64]").replace("4,8]", "4,32]"),
        w=np.zeros((64, 32), np.float32),
    )
    save_graph(big, tmp_path / "p.onnx")
    assert output_json(capsys, tmp_path / "p.onnx")["file_bytes"]["p.onnx.data"] == 8192
    (tmp_path / "p.onnx.data").unlink()
    found = output_json(capsys, tmp_path / "p.onnx")
    assert found["file_bytes"]["p.onnx.data"] is None
    assert found["weight_bytes"] == 8192
    assert "p.onnx.data, missing" in output(capsys, tmp_path / "p.onnx")
    assert type_mvlm(tmp_path / "p.onnx", "--svg", tmp_path / "p.svg") == 0


SCATTERED = """
<ir_version: 10, opset_import: ["" : 24]>
decoder (float[1,1,S,8] x, int64[1] past_length, float[1,1,64,8] KEY, float[1,1,64,8] VALUE)
    => (float[1,1,S,8] y, float[1,1,64,8] NEW_KEY, float[1,1,64,8] NEW_VALUE)
{ NEW_KEY = TensorScatter<axis = -2>(KEY, x, past_length)
  NEW_VALUE = TensorScatter<axis = -2>(VALUE, x, past_length)
  y = Attention(x, NEW_KEY, NEW_VALUE) }
"""


@pytest.mark.parametrize(
    ("text", "prefill", "decode"),
    [(FIXED, 63 * 63, 64), (SCATTERED, 63 * 64, 64)],
    ids=["filled rows", "all rows"],
)
def test_a_fixed_cache_is_counted_up_to_its_capacity(tmp_path, capsys, text, prefill, decode):
    macs = output_json(capsys, write_model(tmp_path / "f.onnx", text))["macs"]
    assert macs["prefill"]["axes"] == {"S": 63, "T": 0}
    assert macs["decode"]["axes"] == {"S": 1, "T": 63}
    assert macs["prefill"]["total"] == 2 * 8 * prefill
    assert macs["decode"]["total"] == 2 * 8 * decode


def test_two_forms_of_a_cache_are_compared_at_one_length(tmp_path, decoder, capsys):
    fixed = write_model(tmp_path / "f.onnx", FIXED)
    (found,) = output_json(capsys, "--diff", decoder, fixed)["graphs"]
    decode = found["comparisons"]["decode S=1 T=63"]["macs"]
    assert (decode["before"], decode["after"]) == (prefill_macs(1, 63), 2 * 8 * 64)


@pytest.fixture
def changed(tmp_path):
    text = DECODER.replace("logits = MatMul(mixed, head)", "logits = Gemm(r, head)")
    text = text.replace("  logits", "  r = Relu(mixed)  logits")
    graph = parse_graph(text, head=np.zeros((8, 10), np.float32))
    save_graph(graph, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def test_a_difference(decoder, changed, capsys):
    (found,) = output_json(capsys, "--diff", decoder, changed)["graphs"]
    assert set(found["comparisons"]) == {"prefill S=256 T=0", "decode S=1 T=1024"}
    comparison = found["comparisons"]["decode S=1 T=1024"]
    assert comparison["nodes"] == {"before": 5, "after": 6, "ratio": 1.2}
    assert comparison["operators"]["Relu"] == {"before": 0, "after": 1, "ratio": None}
    assert comparison["macs"]["ratio"] == 1.0
    assert comparison["macs_by_operator"]["Gemm"]["after"] == 80
    text = output(capsys, "--diff", decoder, changed)
    assert "+1" in text
    assert "Gemm" in text
    assert "MACs decode S=1 T=1024" in text


def test_no_difference(decoder, capsys):
    text = output(capsys, "--diff", decoder, decoder)
    assert "The same operators, inputs and outputs." in text


def test_pictures(decoder, changed, tmp_path, capsys):
    picture = tmp_path / "out.svg"
    assert f"Drawn: {picture}" in output(capsys, decoder, "--svg", picture)
    assert "decoder" in {item.text for item in ET.parse(picture).iter()}
    output(capsys, decoder, "--svg", picture, "--around", "logits", "--depth", "1")
    assert "2 of 5 nodes, 1 step around logits" in {i.text for i in ET.parse(picture).iter()}
    output_json(capsys, "--diff", decoder, changed, "--svg", picture)
    assert str(changed) in {item.text for item in ET.parse(picture).iter()}


def test_help_has_examples(capsys):
    assert type_mvlm("--help") == 0
    text = capsys.readouterr().out
    assert "mvlm inspect --diff before.onnx after.onnx" in text
    assert "multiply-accumulates" in text


@pytest.mark.parametrize(
    ("settings", "axes"),
    [((), {}), (("S=1",), {"S": 1}), (("S=1, T=2", "B=0"), {"S": 1, "T": 2, "B": 0})],
)
def test_parse_axes(settings, axes):
    assert parse_axes(settings) == axes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1234, "1.23 k"),
        (939524096, "940 M"),
        (6.9e9, "6.9 G"),
        (2e12, "2 T"),
    ],
)
def test_human_macs(count, text):
    assert human_macs(count) == text
