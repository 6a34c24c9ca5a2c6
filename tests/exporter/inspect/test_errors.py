"""``mvlm inspect`` on what it cannot read or draw."""

import subprocess
import sys

import onnx
import pytest

from .bundles import output, output_json, type_mvlm, write_bundle, write_model

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
