"""Releases of ONNX Runtime that cannot run what is made are named before anything is made."""

import re
from dataclasses import replace

import onnxruntime
import pytest

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.ort_session import OrtBackend
from mvlm_export.engines.session import BackendOptions
from mvlm_export.exporter.cli.errors import run_command
from mvlm_export.exporter.cli.export_command import export

JETPACK_7 = ["--target", "orin", "--jetpack", "7"]
TENSOR_SCATTER = (
    r"whose cache TensorScatter writes, needs ONNX Runtime 1\.25 .* 1\.24\.4 is installed"
)
ROUNDING = (
    r"8-bit activations, which older CPU kernels truncate where they should round, needs ONNX "
    r"Runtime 1\.30 .* 1\.29\.0 is installed"
)
TOO_OLD = {
    "TensorScatter": (JETPACK_7, "1.24.4", TENSOR_SCATTER),
    "8-bit activations": (["--target", "orin", "--recipe", "int8"], "1.29.0", ROUNDING),
}


def install(monkeypatch, version):
    monkeypatch.setattr(onnxruntime, "__version__", version)


def type_export(*arguments):
    return run_command(export, [str(argument) for argument in arguments], "mvlm-export")


@pytest.mark.parametrize("checks", [[], ["--no-parity", "--verify-passes"]])
@pytest.mark.parametrize("case", TOO_OLD)
def test_a_compile_ends_at_once(checkpoint, tmp_path, monkeypatch, capsys, case, checks):
    arguments, version, message = TOO_OLD[case]
    install(monkeypatch, version)
    given = ["--model", checkpoint, "-o", tmp_path / "bundle", *arguments, *checks]
    assert type_export(*given) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error)
    assert "compile with --no-parity and without --verify-passes" in error
    assert "Checking" not in error
    assert not list(tmp_path.iterdir())


def test_a_compile_without_the_comparison(checkpoint, tmp_path, monkeypatch, capsys):
    """Nothing then runs the graphs."""
    install(monkeypatch, "1.20.0")
    output = tmp_path / "bundle"
    given = ["--model", checkpoint, "-o", output, *JETPACK_7, "--no-stand-in"]
    assert type_export(*given, "--no-parity") == 0, capsys.readouterr().err
    bundle = Bundle.load(output)
    with pytest.raises(EngineError, match=r"needs ONNX Runtime 1\.25"):
        OrtBackend(bundle, BackendOptions(threads=1))
    install(monkeypatch, "1.25.0")
    OrtBackend(bundle, BackendOptions(threads=1))


def test_a_compile_without_the_fixed_form(checkpoint, tmp_path, monkeypatch, capsys):
    install(monkeypatch, "1.24.4")
    output = tmp_path / "bundle"
    given = ["--model", checkpoint, "-o", output, *JETPACK_7, "--no-stand-in"]
    assert type_export(*given, "--disable-pass", "use-tensor-scatter") == 0
    assert Bundle.load(output).manifest.kv_form == "append"


def test_a_bundle_with_8_bit_activations_in_float16(compiled, monkeypatch):
    bundle = Bundle.load(compiled.bundle.path, verify=False)
    graphs = bundle.manifest.graphs
    for dtype, runs in (("float16", False), ("float32", True)):
        encoder = replace(graphs["vision_encoder"], dtype=dtype, may_saturate=True)
        given = Bundle(
            bundle.path,
            replace(bundle.manifest, graphs={**graphs, "vision_encoder": encoder}),
        )
        install(monkeypatch, "1.30.0")
        OrtBackend(given, BackendOptions())
        install(monkeypatch, "1.29.0")
        if runs:
            OrtBackend(given, BackendOptions())
            continue
        with pytest.raises(EngineError, match=ROUNDING):
            OrtBackend(given, BackendOptions())
