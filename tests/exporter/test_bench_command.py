"""``mvlm bench`` as a user types it, and the arithmetic behind its figures."""

import json

import onnx
import pytest

from mvlm_export.engines.backends import BACKENDS
from mvlm_export.engines.bench import PROTOCOLS, Spread, bench, bytes_per_token
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import EngineError, InputError
from mvlm_export.engines.vlm import VLM
from mvlm_export.exporter.cli.bench_command import PROTOCOL_NAMES, QUESTIONS
from mvlm_export.exporter.cli.errors import run_command
from mvlm_export.exporter.cli.main import mvlm
from mvlm_export.exporter.cli.sampling_options import BACKEND_NAMES

FEW = ("--tokens", "12", "--runs", "3", "--threads", "1")


def type_mvlm(*arguments):
    return run_command(mvlm, [str(argument) for argument in arguments], "mvlm")


def test_figures_agree_with_one_another(compiled, samples, tmp_path, capsys):
    path, output = compiled.bundle.path, tmp_path / "figures.json"
    options = ["--image", samples / "0.png", *FEW, "--json", "--output", output]
    assert type_mvlm("bench", path, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == found
    assert (found["runs"], found["new_tokens"], len(found["ids"])) == (3, 12, 12)
    assert found["protocol"] == "paper"
    assert found["prompt_tokens"] > compiled.bundle.manifest.model.image_tokens
    assert 0 < found["cached_tokens"] < found["prompt_tokens"]
    total = found["seconds"]["total"]
    for key in ("vision", "projector", "prefill"):
        spread = found["seconds"][key]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"] < total["high"]
    assert found["tokens_per_second"]["median"] == pytest.approx(12 / total["median"])
    assert found["tokens_per_second"]["median"] < found["decode_tokens_per_second"]["median"]
    speed = found["decode_tokens_per_second"]["median"]
    assert found["gigabytes_per_second"] == pytest.approx(
        found["bytes_per_token"] * speed / 1e9
    )
    assert (found["model"], found["target"], found["recipe"]) == ("tiny", "cpu", "fp32")
    assert found["machine"]["python"]
    assert found["share_of_bandwidth"] is None  # a CPU's memory is not known


def test_the_decoder_by_itself(compiled, capsys):
    assert type_mvlm("bench", compiled.bundle.path, "--protocol", "decode", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["protocol"], found["new_tokens"], len(found["ids"])) == ("decode", 128, 128)
    assert found["seconds"]["vision"]["high"] == found["seconds"]["projector"]["high"] == 0
    vlm = VLM.load(compiled.bundle.path, threads=1)
    bare = vlm.tokenize(vlm.conversation().ask("Tell a story."))
    assert found["prompt_tokens"] == len(bare)
    assert type_mvlm("bench", compiled.bundle.path, "--protocol", "decode", *FEW) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "decode:" in printed and "12 new ones" in printed
    assert "vision" not in printed


def test_protocols(compiled, samples):
    assert set(PROTOCOL_NAMES) == set(PROTOCOLS) == set(QUESTIONS)
    assert (PROTOCOLS["paper"].new_tokens, PROTOCOLS["paper"].with_image) == (256, True)
    vlm = VLM.load(compiled.bundle.path, threads=1, reuse=False)
    for image, protocol, words in (
        (None, "paper", "asks about an image, but none was given"),
        (samples / "0.png", "decode", "has no image, but one was given"),
        (None, "fast", "no protocol 'fast'; choose one of paper, decode"),
    ):
        with pytest.raises(InputError, match=words):
            bench(vlm, image, "what?", 4, 1, 0, protocol=protocol)


def test_every_run_pays_in_full(compiled, samples):
    vlm = VLM.load(compiled.bundle.path, threads=1, reuse=False)
    report = bench(vlm, samples / "0.png", "what?", new_tokens=4, runs=2, warmup=2)
    assert report.seconds["vision"].low > 0
    plain = VLM.load(compiled.bundle.path, threads=1, reuse=False, use_prefix=False)
    without = bench(plain, samples / "0.png", "what?", new_tokens=4, runs=1, warmup=0)
    assert report.cached_tokens > without.cached_tokens == 0
    assert report.ids == without.ids


def test_bytes_a_token_are_those_of_the_graph(compiled):
    """The decoder's initializers but the token table, and the rows that are filled."""
    bundle = compiled.bundle
    model = onnx.load(bundle.graph_path("decoder"), load_external_data=False)
    spec = bundle.manifest.model
    weights = 0
    for tensor in model.graph.initializer:
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for axis in tensor.dims:
            size *= axis
        weights += 0 if tensor.name == "model.embed_tokens.weight" else size
    row = 2 * spec.num_layers * spec.num_key_value_heads * spec.head_dim * 4
    assert bytes_per_token(bundle, 0) == weights
    assert bytes_per_token(bundle, 10) - bytes_per_token(bundle, 0) == 10 * row


def test_the_tables(compiled, samples, capsys):
    options = ["--image", samples / "0.png", *FEW]
    assert type_mvlm("bench", compiled.bundle.path, *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("time to first token", "decode", "all in", "Decode reads", "12 new ones"):
        assert text in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tokens", "100000"), "fewer than 100000 new tokens"),
        (("--tokens", "1"), "measure nothing"),
        (("--runs", "0"), "measure nothing"),
        (("--tokens", "4", "--image", "nowhere.png"), "nowhere.png"),
        (("--protocol", "decode", "--image", "nowhere.png"), "has no image"),
    ],
)
def test_what_cannot_be_measured(compiled, capsys, options, words):
    assert type_mvlm("bench", compiled.bundle.path, *options) == 2
    assert words in capsys.readouterr().err


def test_backends_by_name(compiled, samples, capsys):
    """Those that exist can be asked for; TensorRT has nothing to run of this bundle."""
    assert set(BACKEND_NAMES) == set(BACKENDS)
    options = ["--image", samples / "0.png", *FEW, "--json"]
    path = compiled.bundle.path
    assert type_mvlm("bench", path, *options, "--backend", "onnxruntime") == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 12
    for command in ("bench", "run", "chat", "parity"):
        asked = ["--prompt", "what?"] if command == "run" else []
        assert type_mvlm(command, path, *asked, "--backend", "tensorrt") == 2
        assert "has no TensorRT plans" in capsys.readouterr().err


def test_runs_that_differ_are_not_averaged(compiled, samples):
    """A decoder that answers otherwise each time is broken, and so are its timings."""
    vlm = VLM.load(compiled.bundle.path, threads=1, reuse=False)
    asked = iter(("what?", "what else is there?", "who?"))
    generate = vlm.generate

    def another(images, question, params):
        return generate(images, next(asked), params)

    vlm.generate = another
    with pytest.raises(EngineError, match=r"Run 2 answered otherwise.*mvlm parity"):
        bench(vlm, samples / "0.png", "what?", new_tokens=8, runs=2, warmup=0)


def test_counts_are_checked_before_anything_runs(compiled):
    vlm = VLM.load(compiled.bundle.path, threads=1, reuse=False)
    with pytest.raises(InputError, match="2 tokens, 1 run"):
        bench(vlm, None, "what?", new_tokens=2, runs=1, warmup=-1, protocol="decode")


def test_a_spread():
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)


def test_a_bundle_that_does_not_say(compiled, monkeypatch):
    bundle = Bundle.load(compiled.bundle.path, verify=False)
    monkeypatch.setitem(bundle.manifest.checks, "estimate", {})
    assert bytes_per_token(bundle, 5) is None
