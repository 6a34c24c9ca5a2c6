"""``mvlm sensitivity`` as a user types it: figures, recipes, and ways to go wrong."""

import functools
import json
import shlex

import onnx
import pytest
from click.testing import CliRunner

from mvlm_export.calibration.budget import Budget
from mvlm_export.calibration.layer_rounding import FLOAT, Candidate
from mvlm_export.calibration.recipe import INT4, INT8, read_recipe
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.targets import TARGETS
from mvlm_export.exporter import open_sensitivity as opening
from mvlm_export.exporter.cli.errors import run_command
from mvlm_export.exporter.cli.export_command import export
from mvlm_export.exporter.cli.main import mvlm
from mvlm_export.exporter.layer_options import WEIGHT_CANDIDATES
from mvlm_export.exporter.sensitivity import SensitivityOptions, recipe_for_budget
from mvlm_export.exporter.settings import CompileSettings, resolve_settings
from mvlm_export.passes.deferred import stored_bytes
from tests.exporter.conftest import Silent

FINE = Candidate(WeightFormat(4, 32))
LAYERS = 2 * 4 + 2


def type_mvlm(*arguments):
    return run_command(mvlm, [str(argument) for argument in arguments], "mvlm")


CAPTURE = functools.cache(opening.capture_graph)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder; graphs are captured once for all tests, which takes the longest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening, "capture_graph", CAPTURE)
    return tmp_path


@pytest.fixture
def given(checkpoint, samples, here):
    """The tiny checkpoint and its samples, as options."""
    return ["--model", checkpoint, "--calib-data", samples, "--threads", 1]


def read_json(capsys):
    return json.loads(capsys.readouterr().out)


def test_candidates_are_what_a_target_runs_well():
    for target in TARGETS.values():
        has_int8 = Candidate(INT8) in WEIGHT_CANDIDATES[target.has_engines]
        assert has_int8 == (target.runtime == "onnxruntime")
        assert {Candidate(INT4), FINE, FLOAT} <= set(WEIGHT_CANDIDATES[target.has_engines])


def test_a_budget_gives_a_recipe_that_compiles_to_it(given, here, capsys):
    """The whole way: measured, chosen, written, compiled; and the bundle holds the choice."""
    budget = ["--budget", "110kB", "--output", "mix.json"]
    assert type_mvlm("sensitivity", "--target", "cpu", *given, *budget, "--json") == 0
    found = read_json(capsys)
    choice = found["choice"]
    assert len(found["layers"]) == LAYERS
    assert choice["bytes"] <= 110_000
    assert choice["predicted_loss"] >= choice["bound"] > 0
    chosen = choice["chosen"]
    assert len(set(chosen.values())) > 1
    losses = {la["name"]: la["options"] for la in found["layers"]}
    assert choice["predicted_loss"] == pytest.approx(
        sum(losses[name][form]["loss"] for name, form in chosen.items())
    )
    assert choice["measured_loss"] == pytest.approx(choice["predicted_loss"], rel=0.5)
    assert choice["measured_loss"] < choice["alike"]["int4 g32"]

    recipe = read_recipe(here / "mix.json")
    assert json.loads(json.dumps(recipe.to_json())) == choice["recipe"]
    options = ["--target", "cpu", *given, "--recipe", "mix.json", "--output", "bundle"]
    options = [str(option) for option in options]
    assert run_command(export, [*options, "--no-parity"], "mvlm-export") == 0
    bundle = Bundle.load(here / "bundle")
    written = bundle.manifest.checks["quantization"]["decoder"]["layers"]
    forms = {name: layer["form"] for name, layer in written.items()}
    assert forms == {name: form for name, form in chosen.items() if form != "float"}
    assert _weight_bytes(bundle) <= choice["bytes"] <= _weight_bytes(bundle) * 1.02


def _weight_bytes(bundle):
    """Bytes of a decoder's weights, from its file."""
    model = onnx.load(bundle.graph_path("decoder"), load_external_data=False)
    return sum(
        stored_bytes(tensor.dims, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        for tensor in model.graph.initializer
    )


def test_the_compile_takes_a_budget_itself(given, here, capsys):
    """By estimates, as ``--estimate`` does; and the bundle holds the choice."""
    options = ["--target", "cpu", "--recipe", "int4", *given, "--budget", "110kB"]
    options = [str(option) for option in [*options, "--no-parity", "--output", "bundle"]]
    assert run_command(export, options, "mvlm-export") == 0
    printed = capsys.readouterr()
    assert "0.11 MB" in printed.err
    assert "Within the budget the decoder has" in printed.out
    bundle = Bundle.load(here / "bundle")
    choice = json.loads((here / "bundle" / "report.json").read_text())["budget"]
    written = bundle.manifest.checks["quantization"]["decoder"]["layers"]
    chosen = {name: form for name, form in choice["chosen"].items() if form != "float"}
    assert {name: layer["form"] for name, layer in written.items()} == chosen
    assert len(set(choice["chosen"].values())) > 1
    assert _weight_bytes(bundle) <= choice["bytes"] <= 110_000
    assert bundle.manifest.recipe == "int4-0.11MB"
    assert [path.name for path in here.iterdir()] == ["bundle"]


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_a_budget_needs_bits_to_mix(here, recipe, capsys):
    options = ["--recipe", recipe, "--budget", "1MB"]
    assert run_command(export, options, "mvlm-export") == 2
    assert "Add --recipe int4" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_the_tables_and_the_next_command(given, here, capsys):
    arguments = ["--target", "cpu", *given, "--budget", "0.02nats"]
    assert type_mvlm("sensitivity", *arguments) == 0
    output = capsys.readouterr()
    assert "losses         measured" in output.err
    for text in ("model.layers.1.mlp.down_proj", "all int8", "KL measured", "awq+gptq"):
        assert text in output.out
    next_line = next(la for la in output.out.splitlines() if la.startswith("Next: "))
    command = shlex.split(next_line.removeprefix("Next: "))
    assert command[0] == "mvlm-export"
    assert command[command.index("--recipe") + 1] == "tiny-cpu-int4-0.02nats.json"
    context = export.make_context("mvlm-export", command[1:])
    resolved = resolve_settings(CompileSettings(**_without_json(context.params)))
    assert resolved.recipe.name == "int4-0.02nats"


def _without_json(options):
    return {name: value for name, value in options.items() if name != "as_json"}


def test_figures_are_kept_for_another_budget(given, here, capsys):
    arguments = ["sensitivity", "--target", "cpu", *given, "--no-check", "--json"]
    assert type_mvlm(*arguments) == 0
    first = read_json(capsys)
    kept = {path: path.stat().st_mtime_ns for path in here.rglob("loss-*.json")}
    assert len(kept) == LAYERS
    assert "choice" not in first
    assert type_mvlm(*arguments, "--budget", "120kB") == 0
    second = read_json(capsys)
    assert second["layers"] == first["layers"]
    assert "measured_loss" not in second["choice"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert type_mvlm(*arguments, "--calib-samples", "1") == 0
    assert read_json(capsys)["layers"] != first["layers"]


def test_estimates_are_near_what_is_measured(given, capsys):
    arguments = ["sensitivity", "--target", "cpu", *given, "--json"]
    assert type_mvlm(*arguments) == 0
    measured = read_json(capsys)
    assert type_mvlm(*arguments, "--estimate") == 0
    estimated = read_json(capsys)
    sums = [
        sum(layer["options"]["int8"]["loss"] for layer in found["layers"])
        for found in (measured, estimated)
    ]
    assert sums[1] == pytest.approx(sums[0], rel=0.5)


def test_layers_that_are_to_stay_float_do(given, here, capsys):
    arguments = ["--target", "cpu", *given, "--budget", "340kB", "--no-check", "--json"]
    arguments += ["--keep-float", "lm_head", "--keep-float", "*.embed_tokens"]
    assert type_mvlm("sensitivity", *arguments) == 0
    found = read_json(capsys)
    assert len(found["layers"]) == LAYERS - 2
    recipe = read_recipe(here / found["choice"]["file"]).decoder
    assert recipe.form_of("lm_head", "linear") is None
    assert recipe.form_of("model.embed_tokens", "embedding") is None


def test_engines_never_get_8_bit_weights_alone(given, capsys):
    assert type_mvlm("sensitivity", *given, "--json") == 0
    found = read_json(capsys)
    assert found["settings"]["target"] == "orin"
    assert found["settings"]["dtype"] == "float16"
    options: dict[str, set[str]] = {}
    for layer in found["layers"]:
        options.setdefault(layer["kind"], set()).update(layer["options"])
    assert options["linear"] == {"int4 g32", "float"}  # 64 rows are no block of 128
    assert options["embedding"] == {"int8", "int4 g32", "float"}, "read row by row"


def test_the_recipes_own_rounding_is_nearer_than_the_fast_one(given, capsys):
    arguments = ["sensitivity", "--target", "cpu", *given, "--json"]
    sums = {}
    for rounding in ("fast", "recipe"):
        assert type_mvlm(*arguments, "--rounding", rounding) == 0
        layers = read_json(capsys)["layers"]
        sums[rounding] = sum(layer["options"]["int4 g32"]["loss"] for layer in layers)
    assert sums["recipe"] < sums["fast"]


@pytest.mark.parametrize("graph", ["vision_encoder", "projector"])
def test_other_graphs_are_measured_by_their_output(given, capsys, graph):
    assert type_mvlm("sensitivity", *given, "--graph", graph, "--json") == 0
    layers = read_json(capsys)["layers"]
    kinds = {layer["kind"] for layer in layers}
    assert {"conv", "linear"} <= kinds
    assert ("attention" in kinds) == (graph == "vision_encoder")
    for layer in layers:
        losses = [option["loss"] for option in layer["options"].values()]
        assert losses[-1] == 0.0
        assert 0 < losses[0] < 0.01
    assert type_mvlm("sensitivity", *given, "--graph", graph) == 0
    assert "relative to its size" in capsys.readouterr().out


def test_a_compile_can_choose_by_itself(checkpoint, samples, here):
    """What ``mvlm-export --budget`` calls."""
    resolved = resolve_settings(
        CompileSettings(
            model=checkpoint,
            output=here / "bundle",
            recipe="int4",
            calib_data=samples,
            parity=False,
            threads=1,
        )
    )
    folder = here / "figures"
    options = SensitivityOptions(estimate=True)
    opened, _ = opening.open_sensitivity(resolved, "decoder", options, folder, Silent())
    choice = recipe_for_budget(
        opened.quantizer, opened.captured, Budget(bytes=120_000), options, folder
    )
    assert choice.mix.bytes <= 120_000
    assert choice == opened.choose(opened.measure(), Budget(bytes=120_000))


BAD_OPTIONS = {
    "no budget": (("--budget", "350"), "350MB"),
    "too small": (("--budget", "50kB", "--target", "cpu"), "Give at least"),
    "output alone": (("--output", "x.json"), "add --budget"),
    "budget of another graph": (("--graph", "projector", "--budget", "1MB"), "decoder"),
    "estimate of another graph": (("--graph", "projector", "--estimate"), "--estimate"),
    "unknown target": (("--target", "orn"), "Did you mean 'orin'"),
    "unknown recipe": (("--recipe", "int3"), "no recipe 'int3'"),
    "float recipe": (("--recipe", "fp16"), "Start from int4"),
    "8-bit activations": (("--recipe", "int8"), "8-bit activations"),
    "no such checkpoint": (("--model", "nowhere"), "nowhere"),
    "no such samples": (("--calib-data", "nowhere.jsonl"), "nowhere.jsonl"),
    "all in float": (("--keep-float", "*"), "--keep-float"),
    "no samples": (("--calib-samples", "0"), "calib-samples"),
    "unknown graph": (("--graph", "encoder"), "encoder"),
    "folder as output": (("--budget", "1MB", "--output", "."), "directory"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(given, here, capsys, case):
    options, mention = BAD_OPTIONS[case]
    assert type_mvlm("sensitivity", *given, *options) == 2
    error = capsys.readouterr().err
    assert mention in error[error.index("Error: ") :]
    assert "Traceback" not in error
    assert not list(here.glob("*.json"))


def test_a_budget_that_is_named_as_the_least_can_be_met(given, capsys):
    arguments = ["sensitivity", "--target", "cpu", *given, "--no-check"]
    assert type_mvlm(*arguments, "--budget", "1kB") == 2
    least = capsys.readouterr().err.split("Give at least ")[1].strip().rstrip(".")
    assert type_mvlm(*arguments, "--budget", least) == 0


def test_a_recipe_is_not_replaced_unasked(given, here, capsys):
    arguments = ["sensitivity", *given, "--budget", "1MB", "--no-check", "-o", "mix.json"]
    (here / "mix.json").write_text("mine")
    assert type_mvlm(*arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (here / "mix.json").read_text() == "mine"
    assert type_mvlm(*arguments, "--overwrite") == 0
    assert read_recipe(here / "mix.json").name == "int4-1MB"


def test_help_has_examples_of_both_budgets():
    text = CliRunner().invoke(mvlm, ["sensitivity", "--help"]).output
    for part in ("900MB", "0.01nats", "mvlm-export --target cpu --recipe mixed.json"):
        assert part in text
