"""The commands as a user types them: output, exit codes, and thirty ways to go wrong."""

import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mvlm_export.engines.bundle import Bundle
from mvlm_export.exporter import compile as compiling
from mvlm_export.exporter.cli.errors import describe_missing, run_command
from mvlm_export.exporter.cli.export_command import export
from mvlm_export.exporter.cli.main import mvlm
from mvlm_export.exporter.settings import nano_checkpoint


def type_mvlm(*arguments):
    return run_command(mvlm, [str(argument) for argument in arguments], "mvlm")


def type_export(*arguments):
    return run_command(export, [str(argument) for argument in arguments], "mvlm-export")


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may break."""
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def poison(tensors, name, value):
    tensors[name].view(-1)[0] = value


GATE = "model.layers.0.mlp.gate_proj.weight"
BROKEN_CHECKPOINTS = {
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "pytorch_model.bin"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(GATE)), GATE),
    "unknown tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.lora.a": torch.zeros(2)})),
        "model.lora.a",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({GATE: torch.zeros(2, 2)})),
        GATE,
    ),
    "wrong dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({GATE: t[GATE].to(torch.int8)})),
        GATE,
    ),
    "NaN weight": (
        lambda f: edit_tensors(f, lambda t: poison(t, GATE, float("nan"))),
        GATE,
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is not JSON": (lambda f: truncate(f / "config.json"), "config.json"),
    "unknown projector": (lambda f: edit_config(f, mm_projector_type="qformer"), "qformer"),
    "heads do not divide": (lambda f: edit_config(f, num_attention_heads=5), "5 heads"),
    "rope scaling": (
        lambda f: edit_config(f, rope_scaling={"type": "linear", "factor": 2.0}),
        "linear",
    ),
    "vocabulary": (lambda f: edit_config(f, vocab_size=500), "500"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model"),
    "broken tokenizer": (lambda f: truncate(f / "tokenizer.model"), "tokenizer.model"),
    "broken processor": (
        lambda f: (f / "preprocessor_config.json").write_text("{"),
        "preprocessor_config.json",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CHECKPOINTS)
def test_broken_checkpoints(broken, tmp_path, capsys, case):
    breaking, mention = BROKEN_CHECKPOINTS[case]
    breaking(broken)
    assert type_export("--model", broken, "--output", tmp_path / "bundle") == 2
    error = capsys.readouterr().err
    message = error[error.index("Error: ") :]
    assert mention in message
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


BAD_ARGUMENTS = {
    "unknown target": (("--target", "jetson"), "no target 'jetson'"),
    "near miss": (("--target", "orn"), "Did you mean 'orin'"),
    "unknown recipe": (("--recipe", "int2"), "no recipe 'int2'"),
    "unknown template": (("--template", "v7"), "v7"),
    "JetPack of no Jetson": (("--jetpack", "6"), "no Jetson"),
    "unknown JetPack": (("--target", "orin", "--jetpack", "5"), "JetPack 5"),
    "no such checkpoint": (("--model", "nowhere"), "nowhere"),
    "no such samples": (("--samples", "nowhere"), "nowhere"),
    "output is the working folder": (("--output", "."), "working folder"),
    "not a number": (("--max-length", "long"), "long"),
    "unknown option": (("--fast",), "--fast"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(checkpoint, tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, mention = BAD_ARGUMENTS[case]
    model = () if "--model" in arguments else ("--model", checkpoint)
    assert type_export(*model, "--output", tmp_path / "bundle", *arguments) == 2
    error = capsys.readouterr().err
    assert mention in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "bundle"
    assert type_export("--model", checkpoint, "--output", output) == 2
    assert "Choose another --output" in capsys.readouterr().err


def test_output_that_holds_a_bundle(compiled, checkpoint, capsys):
    before = (compiled.bundle.path / "manifest.json").read_bytes()
    assert type_export("--model", checkpoint, "--output", compiled.bundle.path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (compiled.bundle.path / "manifest.json").read_bytes() == before


def test_samples_with_a_bad_picture_are_refused_at_once(checkpoint, tmp_path, capsys):
    folder = tmp_path / "samples"
    folder.mkdir()
    not_an_image(folder)
    (folder / "samples.jsonl").write_text('{"image": "notes.png", "prompt": "what?"}')
    output = tmp_path / "bundle"
    assert type_export("--model", checkpoint, "--samples", folder, "--output", output) == 2
    error = capsys.readouterr().err
    assert "notes.png" in error
    assert "Exporting" not in error
    assert not output.exists()


def test_unknown_tensors_pass_if_allowed(broken, samples, tmp_path, capsys):
    edit_tensors(broken, lambda t: t.update({"model.lora.a": torch.zeros(2)}))
    arguments = ("--model", broken, "--output", tmp_path / "bundle", "--samples", samples)
    assert type_export(*arguments, "--allow-unknown") == 0
    assert "model.lora.a" in capsys.readouterr().out
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert report["preflight"]["unknown"] == ["model.lora.a"]
    assert type_mvlm("parity", tmp_path / "bundle", "--samples", samples, "--limit", 1) == 0


def test_kill_is_as_clean_as_ctrl_c(checkpoint, tmp_path):
    """SIGTERM in the middle of a compile leaves nothing and ends with 130."""
    code = "from mvlm_export.exporter.cli.main import export_main; export_main()"
    output = tmp_path / "bundle"
    arguments = ["--model", str(checkpoint), "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "Exporting vision_encoder" in line:
            assert [path.name for path in tmp_path.iterdir()] != []
            process.terminate()
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert "interrupted" in rest
    assert list(tmp_path.iterdir()) == []


def not_an_image(folder):
    path = folder / "notes.png"
    path.write_text("shopping list")
    return path


def cut_image(folder):
    path = folder / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        path
    )
    truncate(path)
    return path


BAD_RUNS = {
    "image is text": (lambda f: ("--image", not_an_image(f)), "notes.png"),
    "image is cut off": (lambda f: ("--image", cut_image(f)), "cut.png"),
    "no such image": (lambda f: ("--image", f / "none.png"), "none.png"),
    "image is a folder": (lambda f: ("--image", f), "folder"),
    "bad temperature": (lambda f: ("--temperature", "-1"), "temperature"),
    "bad top-p": (lambda f: ("--top-p", "2"), "top_p"),
    "bad max-tokens": (lambda f: ("--max-tokens", "0"), "max_tokens"),
    "prompt too long": (lambda f: ("--prompt", "what? " * 500), "positions"),
    "unknown provider": (lambda f: ("--provider", "tpu"), "tpu"),
    "provider that is not here": (lambda f: ("--provider", "cuda"), "CUDA"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_runs(compiled, tmp_path, capsys, case):
    make, mention = BAD_RUNS[case]
    arguments = ("run", compiled.bundle.path, "--prompt", "what?", *make(tmp_path))
    assert type_mvlm(*arguments) == 2
    error = capsys.readouterr().err
    assert mention in error
    assert "Traceback" not in error


def test_run_prints_text_and_timings(compiled, samples, capsys):
    arguments = ("run", compiled.bundle.path, "--image", samples / "0.png")
    assert type_mvlm(*arguments, "--prompt", "what?", "--max-tokens", 6) == 0
    output = capsys.readouterr()
    assert output.out.strip()
    for phase in ("vision", "projector", "prefill", "first token", "tokens/s"):
        assert phase in output.err


def test_run_json(compiled, samples, capsys):
    arguments = ("run", compiled.bundle.path, "--image", samples / "0.png", "--json")
    assert type_mvlm(*arguments, "--prompt", "what?", "--max-tokens", 6) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"text", "ids", "finish_reason", "timings"}
    assert answer["timings"]["decode_tokens"] == len(answer["ids"]) - 1


def type_chat(monkeypatch, lines, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return type_mvlm("chat", *arguments, "--max-tokens", 4)


def test_chat_keeps_the_past(compiled, samples, capsys, monkeypatch):
    image = ("--image", samples / "0.png")
    lines = ["what is this?", "", "and there?", "/quit", "never asked"]
    assert type_chat(monkeypatch, lines, compiled.bundle.path, *image) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 2
    fresh, later = (
        int(count) for count in re.findall(r"prefill [\d.]+ ms \((\d+) tokens", output.err)
    )
    assert later < fresh


def test_chat_survives_a_bad_picture(compiled, capsys, monkeypatch):
    lines = ["/image nowhere.png", "what is this?", "/reset", "hello"]
    assert type_chat(monkeypatch, lines, compiled.bundle.path) == 0
    output = capsys.readouterr()
    assert "nowhere.png" in output.err
    assert len(output.out.splitlines()) == 2


def test_chat_refuses_a_bad_first_picture(compiled, capsys):
    assert type_mvlm("chat", compiled.bundle.path, "--image", "nowhere.png") == 2
    assert "nowhere.png" in capsys.readouterr().err


def test_build_mends_a_damaged_plan(checkpoint, tmp_path, capsys):
    output = tmp_path / "bundle"
    arguments = ("--target", "rtx", "--model", checkpoint, "--output", output)
    assert type_export(*arguments, "--no-parity") == 0
    (plan,) = output.glob("engines/*/projector.plan")
    truncate(plan)
    assert type_mvlm("run", output, "--prompt", "what?", "--max-tokens", 2) == 0
    assert type_mvlm("build", output, "--workspace-mb", "512", "--json") == 0
    Bundle.load(output).verify_engines()


def test_run_on_a_damaged_bundle(compiled, tmp_path, capsys):
    path = tmp_path / "bundle"
    shutil.copytree(compiled.bundle.path, path)
    truncate(path / "decoder" / "model.onnx.data")
    assert type_mvlm("run", path, "--prompt", "what?") == 2
    assert "decoder/model.onnx.data differs" in capsys.readouterr().err


def test_build_has_nothing_to_do_for_cpu(compiled, capsys):
    assert type_mvlm("build", compiled.bundle.path) == 2
    assert "nothing to build" in capsys.readouterr().err


def test_parity_command(compiled, samples, tmp_path, capsys):
    path = tmp_path / "bundle"  # the command writes into its bundle's report
    shutil.copytree(compiled.bundle.path, path)
    arguments = ("parity", path, "--samples", samples, "--limit", 1)
    assert type_mvlm(*arguments, "--max-tokens", 3, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["passed"] is True
    assert figures["end_to_end"]["samples"] == 1
    report = json.loads((path / "report.json").read_text())
    assert report["accuracy"] == figures.pop("accuracy")
    assert report["parity"] == figures


def test_parity_knows_the_weights_again(checkpoint, samples, tmp_path, capsys):
    """Other weights under the same config.json are not the bundle's checkpoint."""
    folder, output = tmp_path / "model", tmp_path / "bundle"
    shutil.copytree(checkpoint, folder)
    arguments = ("--model", folder, "--output", output, "--no-parity")
    assert type_export(*arguments) == 0
    edit_tensors(folder, lambda tensors: poison(tensors, GATE, 0.5))
    assert type_mvlm("parity", output, "--samples", samples, "--limit", 1) == 2
    assert "has changed" in capsys.readouterr().err


def test_parity_with_another_model_fails(compiled, samples, capsys):
    arguments = ("parity", compiled.bundle.path, "--samples", samples)
    assert type_mvlm(*arguments, "--model", nano_checkpoint()) == 2
    assert "was not made from" in capsys.readouterr().err


def test_a_missed_bound_is_exit_code_1(checkpoint, samples, tmp_path, capsys, monkeypatch):
    """A compile whose decoder went wrong is written, reported, and ends with 1."""
    real = compiling.export_optimized

    def spoil(name, plan, read, *others):
        def wrong(parameter):
            return read(parameter) * (1.05 if parameter == "model.norm.weight" else 1)

        return real(name, plan, wrong, *others)

    monkeypatch.setattr(compiling, "export_optimized", spoil)
    output = tmp_path / "bundle"
    arguments = ("--model", checkpoint, "--output", output, "--samples", samples)
    assert type_export(*arguments) == 1
    assert "decoder: logits differ" in capsys.readouterr().err
    assert json.loads((output / "report.json").read_text())["parity"]["passed"] is False
    assert type_mvlm("parity", output, "--samples", samples, "--limit", 1) == 1


def test_export_json(checkpoint, tmp_path, capsys):
    arguments = ("--model", checkpoint, "--output", tmp_path / "b", "--no-parity", "--json")
    assert type_export(*arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bundle"] == str(tmp_path / "b")
    assert report["settings"]["target"] == "cpu"


def test_orin_says_what_to_run_on_the_device(checkpoint, tmp_path, capsys):
    arguments = ("--target", "orin", "--model", checkpoint, "--output", tmp_path / "b")
    assert type_export(*arguments, "--no-parity", "--no-stand-in") == 0
    output = capsys.readouterr().out
    assert "mvlm build b" in output
    assert "tokens/s" in output


def test_doctor(capsys):
    assert type_mvlm("doctor") == 0
    output = capsys.readouterr().out
    assert "onnxruntime" in output
    assert "mvlm build BUNDLE" in output
    assert type_mvlm("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    verdicts = {verdict["target"]: verdict for verdict in report["targets"]}
    assert verdicts["cpu"]["run"]["ok"] is True


@pytest.mark.parametrize("command", ["export", "run", "chat", "build", "parity", "doctor"])
def test_help_has_examples(capsys, command):
    assert type_mvlm(command, "--help") == 0
    assert "Examples:" in capsys.readouterr().out


def test_missing_packages_name_their_extra():
    missing = describe_missing(ModuleNotFoundError("no", name="onnxruntime.capi"))
    assert "mvlm-export[cpu]" in str(missing)
    assert describe_missing(ModuleNotFoundError("no", name="numpy")) is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--disable-pass", "merge-qvk"), "Did you mean 'merge-qkv'"),
        (
            ("--recipe", "fp16", "--disable-pass", "convert-to-float16"),
            "--recipe fp32 instead",
        ),
        (("--dump-dir", "{output}"), "lie one in the other"),
        (("--dump-dir", "{output}/dumps"), "lie one in the other"),
        (("--dump-dir", "{file}/dumps"), "cannot be written"),
        (
            ("--target", "orin", "--enable-pass", "use-skip-rms-norm"),
            "is not for target 'orin'",
        ),
    ],
    ids=["typo", "fp16", "dump-is-output", "dump-in-output", "dump-unwritable", "no-place"],
)
def test_pass_options_that_cannot_be_met(checkpoint, tmp_path, capsys, arguments, complaint):
    output, file = tmp_path / "bundle", tmp_path / "file"
    file.touch()
    given = [argument.format(output=output, file=file) for argument in arguments]
    assert type_export("--model", checkpoint, "--output", output, *given) == 2
    assert complaint in capsys.readouterr().err
    assert not output.exists()


def test_dumps_and_verification(checkpoint, tmp_path, capsys):
    arguments = ("--model", checkpoint, "--output", tmp_path / "bundle", "--no-parity")
    watched = ("--dump-dir", tmp_path / "dumps", "--verify-passes")
    assert type_export(*arguments, *watched) == 0
    assert "largest change" in capsys.readouterr().out
    names = [path.name for path in sorted((tmp_path / "dumps" / "projector").iterdir())]
    assert names[0] == "00-captured.onnx"
    assert any(name.endswith("-fold-peg-skip.onnx") for name in names)
    bundle = Bundle.load(tmp_path / "bundle")
    records = bundle.manifest.checks["passes"]["decoder"]
    assert all(r["change"] is not None for r in records if r["rewritten"])
