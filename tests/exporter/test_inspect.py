"""``mvlm inspect`` as a user types it."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import onnx
import pytest

from mvlm_export.engines.bundle import BundleWriter
from mvlm_export.exporter.cli.errors import run_command
from mvlm_export.exporter.cli.inspect_report import parse_axes
from mvlm_export.exporter.cli.inspect_tables import human_macs
from mvlm_export.exporter.cli.main import mvlm
from mvlm_export.passes.graph_io import save_graph
from tests.engines.manifests import tiny_manifest
from tests.passes.graphs import parse_graph

ENCODER = """
<ir_version: 10, opset_import: ["" : 20]>
encoder (float[B,3,4,4] pixel_values) => (float[B,2,2,2] image_features)
{ image_features = Conv<kernel_shape=[2,2], strides=[2,2]>(pixel_values, kernel) }
"""
PROJECTOR = """
<ir_version: 10, opset_import: ["" : 20]>
projector (float[B,4,2] image_features) => (float[B,4,8] image_embeds)
{ image_embeds = MatMul(image_features, w) }
"""
DECODER = """
<ir_version: 10, opset_import: ["" : 20]>
decoder (float[S,8] x, float[T,8] past) => (float[S,10] logits, float[N,8] all)
{ all = Concat<axis=0>(past, x)
  keys = Transpose<perm=[1,0]>(all)
  scores = MatMul(x, keys)
  mixed = MatMul(scores, all)
  logits = MatMul(mixed, head) }
"""
WEIGHTS = {
    "vision_encoder": {"kernel": np.zeros((2, 3, 2, 2), np.float32)},
    "projector": {"w": np.zeros((2, 8), np.float32)},
    "decoder": {"head": np.zeros((8, 10), np.float32)},
}
TEXTS = {"vision_encoder": ENCODER, "projector": PROJECTOR, "decoder": DECODER}
PASSES = {
    "projector": [
        {
            "name": "fold-peg-skip",
            "summary": "...",
            "matched": 2,
            "rewritten": 1,
            "refusals": [{"node": "Add 'add_41'", "reason": "the weight 'w' is shared"}],
            "nodes": [12, 11],
            "initializers": [8, 8],
            "bytes": [2000, 1000],
            "seconds": 0.1,
        },
        {"name": "merge-linears", "matched": 0, "rewritten": 0, "refusals": []},
    ]
}


def type_mvlm(*arguments):
    return run_command(mvlm, ["inspect", *map(str, arguments)], "mvlm")


def write_bundle(path, decoder=DECODER, **changes):
    with BundleWriter(path, overwrite=True) as writer:
        for name, text in {**TEXTS, "decoder": decoder}.items():
            weights = WEIGHTS[name] if text is TEXTS[name] else {}
            save_graph(parse_graph(text, **weights), writer.folder / name / "model.onnx")
        (writer.folder / "tokenizer").mkdir()
        (writer.folder / "tokenizer" / "tokenizer.model").write_bytes(b"words")
        np.savez(writer.folder / "prefix.npz", ids=np.arange(7, dtype=np.int32))
        writer.seal(tiny_manifest(**changes))
        return writer.commit().path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "bundle"
    return write_bundle(path, checks={"passes": PASSES, "conformance": "passed"})


@pytest.fixture
def decoder(bundle):
    return bundle / "decoder" / "model.onnx"


def output(capsys, *arguments):
    assert type_mvlm(*arguments) == 0
    return capsys.readouterr().out


def output_json(capsys, *arguments):
    return json.loads(output(capsys, *arguments, "--json"))


def prefill_macs(new, past):
    return new * (past + new) * 8 * 2 + new * 8 * 10


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


def test_a_bundle(bundle, capsys):
    found = output_json(capsys, bundle)
    assert (found["kind"], found["target"], found["recipe"]) == ("bundle", "cpu", "fp32")
    assert found["prefix_tokens"] == 7
    assert found["engines"] == {}
    assert found["passes"] == PASSES
    assert found["graphs"]["vision_encoder"]["macs"]["run"]["total"] == 2 * 2 * 2 * 3 * 2 * 2
    assert found["graphs"]["projector"]["macs"]["run"]["total"] == 4 * 2 * 8
    # The model has 128 positions: that is the longest prefill, and the fullest cache.
    decode = found["graphs"]["decoder"]["macs"]["decode"]
    assert (decode["axes"], decode["total"]) == ({"S": 1, "T": 127}, prefill_macs(1, 127))
    assert found["files"]["tokenizer/tokenizer.model"] == 5


def test_a_bundle_in_tables(bundle, capsys):
    text = output(capsys, bundle)
    for word in (
        "tiny",
        "7 tokens",
        "none: it runs the graphs",
        "Passes on projector",
        "1 of 2",
        "12 → 11",
        "2.0 kB → 1.0 kB",
        "Passes that found nothing in projector: merge-linears.",
        "Refused by fold-peg-skip: Add 'add_41': the weight 'w' is shared.",
    ):
        assert word in text


@pytest.mark.parametrize("passes", [None, {}, "none", {"decoder": None}, {"decoder": [1]}])
def test_a_bundle_without_a_pass_report(tmp_path, capsys, passes):
    checks = {} if passes is None else {"passes": passes}
    path = write_bundle(tmp_path / "b", checks=checks)
    assert "Passes on" not in output(capsys, path)


RECORD = {"name": "merge-qkv", "matched": 1, "rewritten": 1, "refusals": []}
MALFORMED = [
    {"bytes": ["many", "few"]},
    {"bytes": 7},
    {"bytes": [1, 2, 3]},
    {"nodes": [1.5, None]},
    {"name": None},
    {"matched": "one"},
    {"rewritten": None},
    {"refusals": 3},
    {"refusals": ["because"]},
]


@pytest.mark.parametrize("change", MALFORMED)
def test_a_malformed_pass_record_is_left_out(tmp_path, capsys, change):
    records = [RECORD, {**RECORD, "name": "fold-odd", **change}]
    path = write_bundle(tmp_path / "b", checks={"passes": {"projector": records}})
    assert output_json(capsys, path)["passes"] == {"projector": [RECORD]}
    text = output(capsys, path)
    assert "merge-qkv" in text
    assert "fold-odd" not in text


def test_a_pass_that_found_something_once_is_not_named_as_idle(tmp_path, capsys):
    idle = {**RECORD, "matched": 0, "rewritten": 0}
    records = [idle, RECORD, {**idle, "name": "fold"}, {**idle, "name": "fold"}]
    path = write_bundle(tmp_path / "b", checks={"passes": {"projector": records}})
    assert "Passes that found nothing in projector: fold." in output(capsys, path)


def test_a_bundle_may_be_named_by_its_manifest(bundle, capsys, monkeypatch):
    wanted = output_json(capsys, bundle)
    assert output_json(capsys, bundle / "manifest.json") == wanted
    found = output_json(capsys, "--diff", bundle / "manifest.json", bundle)["graphs"]
    assert len(found) == 3
    monkeypatch.chdir(bundle)
    assert output_json(capsys, "manifest.json")["graphs"].keys() == wanted["graphs"].keys()


FIXED = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
decoder (float[1,S,8] x, int64[1] past_length, float[1,1,64,8] KEY, float[1,1,64,8] VALUE,
         int32[1] filled, int32 total)
    => (float[1,S,8] y, float[1,1,64,8] NEW_KEY, float[1,1,64,8] NEW_VALUE)
{ y, NEW_KEY, NEW_VALUE = com.microsoft.GroupQueryAttention
      <num_heads = 1, kv_num_heads = 1> (x, x, x, KEY, VALUE, filled, total) }
"""
SCATTERED = """
<ir_version: 10, opset_import: ["" : 24]>
decoder (float[1,1,S,8] x, int64[1] past_length, float[1,1,64,8] KEY, float[1,1,64,8] VALUE)
    => (float[1,1,S,8] y, float[1,1,64,8] NEW_KEY, float[1,1,64,8] NEW_VALUE)
{ NEW_KEY = TensorScatter<axis = -2>(KEY, x, past_length)
  NEW_VALUE = TensorScatter<axis = -2>(VALUE, x, past_length)
  y = Attention(x, NEW_KEY, NEW_VALUE) }
"""
NAMES = {"KEY": "past_key_values.0.key", "VALUE": "past_key_values.0.value"}


def name_cache(model):
    """Names with dots, which the textual form has no place for."""
    values = (*model.graph.input, *model.graph.output)
    for value in values:
        value.name = NAMES.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [NAMES.get(name, name) for name in node.input]
    return model


def write_model(path, text):
    onnx.save(name_cache(onnx.parser.parse_model(text)), path)
    return path


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


def test_a_fixed_bundle(tmp_path, capsys):
    path = write_bundle(tmp_path / "b", kv_form="fixed", decoder=FIXED)
    found = output_json(capsys, path)
    assert found["kv_form"] == "fixed"
    assert found["graphs"]["decoder"]["macs"]["decode"]["axes"] == {"S": 1, "T": 127}
    text = output(capsys, path)
    assert "fixed, 128 positions at most" in text
    assert "past_length int64 [1]" in " ".join(text.split())


def test_engines_of_a_bundle(tmp_path, capsys):
    path = write_bundle(tmp_path / "b")
    folder = path / "engines" / "orin-trt10.3-sm87"
    folder.mkdir(parents=True)
    plan = {"plan_path": "decoder.plan", "sha256": "0" * 64, "plan_bytes": 1234}
    (folder / "build.json").write_text(json.dumps({"plans": {"decoder": plan}}))
    text = output(capsys, path)
    assert "Engines orin-trt10.3-sm87" in text
    assert "1.2 kB" in text
    assert (
        output_json(capsys, path)["engines"]["orin-trt10.3-sm87"]["plans"]["decoder"] == plan
    )


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


def test_two_bundles(bundle, capsys):
    found = output_json(capsys, "--diff", bundle, bundle)["graphs"]
    assert [graph["graph"] for graph in found] == ["vision_encoder", "projector", "decoder"]


def test_pictures(decoder, changed, tmp_path, capsys):
    picture = tmp_path / "out.svg"
    assert f"Drawn: {picture}" in output(capsys, decoder, "--svg", picture)
    assert "decoder" in {item.text for item in ET.parse(picture).iter()}
    output(capsys, decoder, "--svg", picture, "--around", "logits", "--depth", "1")
    assert "2 of 5 nodes, 1 step around logits" in {i.text for i in ET.parse(picture).iter()}
    output_json(capsys, "--diff", decoder, changed, "--svg", picture)
    assert str(changed) in {item.text for item in ET.parse(picture).iter()}


BAD = {
    "nothing": ([], "Name one GRAPH or BUNDLE"),
    "both": (["{decoder}", "--diff", "{decoder}", "{decoder}"], "Name one GRAPH or BUNDLE"),
    "missing": (["no.onnx"], "no.onnx does not exist"),
    "missing in a diff": (["--diff", "{decoder}", "no.onnx"], "no.onnx does not exist"),
    "not ONNX": (["{text}"], "cannot be read as ONNX"),
    "not ONNX, drawn": (["{text}", "--svg", "x.svg"], "cannot be read as ONNX"),
    "not a bundle": (["{folder}"], "is not a bundle"),
    "graph and bundle": (["--diff", "{decoder}", "{bundle}"], "are a bundle and a graph"),
    "unknown axis": (
        ["{decoder}", "--set", "Q=3"],
        "no dynamic axis 'Q' to set. The axes are",
    ),
    "unknown axis of a bundle": (["{bundle}", "--set", "Q=3"], "axes are: B, S, T."),
    "axis of a word": (["{decoder}", "--set", "S=many"], "not of the form AXIS=NUMBER"),
    "negative axis": (["{decoder}", "--set", "S=-1"], "not of the form AXIS=NUMBER"),
    "an axis too long": (["{decoder}", "--set", f"S={10**20}"], "at most 2147483647"),
    "no such node": (
        ["{decoder}", "--svg", "{folder}/x.svg", "--around", "logit"],
        "Close names: logits",
    ),
    "around without a picture": (["{decoder}", "--around", "x"], "add --svg"),
    "depth without around": (["{decoder}", "--svg", "x.svg", "--depth", "2"], "add --around"),
    "a picture of a bundle": (["{bundle}", "--svg", "x.svg"], "one graph is drawn at a time"),
    "a picture of a bundle by its manifest": (
        ["{bundle}/manifest.json", "--svg", "x.svg"],
        "one graph is drawn at a time",
    ),
    "a picture in the graph's place": (["{decoder}", "--svg", "{decoder}"], "would replace"),
    "no place for the picture": (
        ["{decoder}", "--svg", "{folder}/no/x.svg"],
        "cannot be writ",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_errors_are_one_message_and_exit_2(
    arguments, message, decoder, bundle, tmp_path, capsys
):
    (tmp_path / "text.txt").write_text("no model at all")
    (tmp_path / "folder").mkdir()
    places = {
        "decoder": decoder,
        "bundle": bundle,
        "text": tmp_path / "text.txt",
        "folder": tmp_path / "folder",
    }
    assert type_mvlm(*(argument.format(**places) for argument in arguments)) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.count("Error: ") == 1
    assert message in caught.err.replace("\n", " ")
    assert "Traceback" not in caught.err


RELU = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[S,4] a) => (float[S,4] y) { y = Relu(a) }
"""


def relu(**values):
    model = onnx.parser.parse_model(RELU.replace("Relu(a)", "Add(a, w)") if values else RELU)
    if values:
        weight = onnx.helper.make_tensor("w", 1, [4], [0.0] * 4)
        for field, value in values.items():
            setattr(weight, field, value)
        model.graph.initializer.append(weight)
    return model


def with_unknown_dtype():
    model = relu()
    model.graph.input[0].type.tensor_type.elem_type = 99
    return model


def with_sparse_constant():
    model = relu()
    model.graph.sparse_initializer.add()
    return model


def with_short_data():
    model = relu(raw_data=b"abc")
    model.graph.initializer[0].ClearField("float_data")
    return model


DAMAGED = {
    "short data": with_short_data,
    "unknown dtype": with_unknown_dtype,
    "unknown dtype of a weight": lambda: relu(data_type=99),
    "sparse constant": with_sparse_constant,
}


@pytest.mark.parametrize("make", DAMAGED.values(), ids=DAMAGED)
def test_what_cannot_be_drawn_can_be_counted(make, tmp_path, capsys):
    onnx.save(make(), tmp_path / "odd.onnx")
    assert output_json(capsys, tmp_path / "odd.onnx")["nodes"] == 1
    assert "odd.onnx" in output(capsys, tmp_path / "odd.onnx")
    assert type_mvlm(tmp_path / "odd.onnx", "--svg", tmp_path / "x.svg") == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.count("Error: ") == 1
    assert "odd.onnx" in caught.err
    assert not (tmp_path / "x.svg").exists()


CYCLE = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[S,4] a) => (float[S,4] y) { z = Add(y, a)  y = Relu(z) }
"""


@pytest.mark.parametrize("extra", [[], ["--json"], ["--svg", "{folder}/x.svg"]])
def test_a_cycle_is_one_message(tmp_path, capsys, extra):
    path = write_model(tmp_path / "cycle.onnx", CYCLE)
    assert type_mvlm(path, *(item.format(folder=tmp_path) for item in extra)) == 2
    assert type_mvlm("--diff", path, path) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.count("its nodes make a cycle, ") == 2
    assert "Relu 'y'" in caught.err


def test_an_axis_that_is_too_large_is_named(tmp_path, capsys):
    text = RELU.replace("float[S,4] y", "float[N,4] y")
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "S*S*S*S"
    onnx.save(model, tmp_path / "big.onnx")
    assert type_mvlm(tmp_path / "big.onnx", "--set", "S=3") == 0
    assert type_mvlm(tmp_path / "big.onnx", "--set", "S=2147483647") == 2
    assert "more than 2**63 elements for S=2147483647" in capsys.readouterr().err


def test_a_damaged_prefix_is_one_message(tmp_path, capsys):
    path = write_bundle(tmp_path / "b")
    (path / "prefix.npz").write_bytes(b"nothing")
    assert type_mvlm(path) == 2
    assert "prefix.npz cannot be read" in capsys.readouterr().err


def run_without(package, *arguments):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from mvlm_export.exporter.cli.main import mvlm\n"
        "from mvlm_export.exporter.cli.errors import run_command\n"
        f"sys.exit(run_command(mvlm, ['inspect', *{[str(a) for a in arguments]!r}], 'mvlm'))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_torch_is_not_needed(bundle, decoder, tmp_path):
    assert run_without("torch", bundle).returncode == 0
    drawn = run_without("torch", decoder, "--svg", tmp_path / "d.svg")
    assert drawn.returncode == 0, drawn.stderr
    assert run_without("torch", "--diff", decoder, decoder).returncode == 0


@pytest.mark.parametrize("package", ["onnx", "onnx_graphsurgeon"])
def test_a_missing_package_is_named(package, decoder):
    run = run_without(package, decoder)
    assert run.returncode == 2
    assert f"needs the package {package!r}" in run.stderr
    assert "mvlm-export[export]" in run.stderr


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
