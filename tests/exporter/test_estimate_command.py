"""``mvlm estimate`` as a user types it: tables, JSON, exit codes, and ways to go wrong."""

import json
from typing import get_args

import pytest

from mvlm_export.calibration.recipe import RECIPES
from mvlm_export.engines.memory_plan import Verdict
from mvlm_export.engines.targets import TARGETS, get_target
from mvlm_export.exporter.cli.errors import run_command
from mvlm_export.exporter.cli.export_command import VERDICTS, export, memory_verdict
from mvlm_export.exporter.cli.main import mvlm
from mvlm_export.exporter.config import PRESETS
from mvlm_export.exporter.estimate import estimate_model
from tests.helpers import tiny_config_json


def type_mvlm(*arguments):
    return run_command(mvlm, [str(argument) for argument in arguments], "mvlm")


def test_command_shows_arithmetic_speed_and_the_papers_figure(capsys):
    assert type_mvlm("estimate", "--model", "v2-1.7b", "--recipe", "int4") == 0
    output = capsys.readouterr().out
    for text in ("keys and values", "2 x 24 layers x 2048 rows", "decoder scratch"):
        assert text in output
    assert "51.63 tokens/s, llama.cpp" in output
    assert "Estimate, not measured" in output
    assert "It fits Jetson AGX Orin 64GB" in output


def test_command_refuses_7b_on_a_4gb_nano_after_the_table(capsys):
    assert type_mvlm("estimate", "--model", "v2-7b", "--target", "orin-nano-4gb") == 2
    captured = capsys.readouterr()
    assert "left for the model" in captured.out
    assert "does not fit Jetson Orin Nano 4GB" in captured.err
    assert "--recipe int4 --target orin-32gb: fits" in captured.err


def test_command_warns_of_what_cannot_be_built(capsys):
    assert type_mvlm("estimate", "--model", "v2-1.7b", "--target", "orin-nano") == 0
    output = capsys.readouterr().out
    assert "to run but not to build" in output
    assert "--recipe int4: fits" in output


def test_commands_json_is_whole_and_plain(capsys):
    arguments = ("--model", "v2-7b", "--target", "orin-nx", "--max-length", 1024, "--json")
    assert type_mvlm("estimate", *arguments, "--recipe", "int4", "--jetpack", 7) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["target"], found["max_length"]) == ("v2-7b", "orin-nx", 1024)
    assert found["plan"]["verdict"] == "runs only"
    assert found["weight_bytes"] == sum(sum(g.values()) for g in found["weights"].values())
    assert found["paper_tokens_per_second"] == 15.49
    assert found["speed"]["tokens_per_second"] > 0
    assert found["proposals"][0]["verdict"] == "fits"


def test_command_reads_a_checkpoints_config_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config_json()))
    assert type_mvlm("estimate", "--model", tmp_path, "--target", "orin-nano", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == tmp_path.name
    assert found["paper_tokens_per_second"] is None


def test_command_compares_all_modules_and_recipes(capsys):
    assert type_mvlm("estimate", "--model", "v2-3b", "--all", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    modules = [name for name, target in TARGETS.items() if target.jetpack is not None]
    assert [(e["target"], e["recipe"]) for e in found] == [
        (name, recipe) for name in modules for recipe in ("fp16", "int8", "int4")
    ]
    assert type_mvlm("estimate", "--model", "v2-3b", "--all") == 0
    output = capsys.readouterr().out
    assert all(name in output for name in modules)
    assert "too small" in output


def test_command_takes_the_nano_model_by_default_and_any_target(capsys):
    assert type_mvlm("estimate", "--target", "cpu") == 0
    assert "No times" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--model", "v2-9b"), "is not a folder"),
        (("--target", "orin-nanno"), "Did you mean 'orin-nano'"),
        (("--recipe", "int3"), "no recipe 'int3'"),
        (("--max-length", "1"), "--max-length 1 does not fit"),
        (("--target", "cpu", "--jetpack", "6"), "no Jetson"),
    ],
)
def test_command_names_what_is_wrong(arguments, complaint, capsys):
    assert type_mvlm("estimate", *arguments) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "target", "words"),
    [
        ("v2-1.7b", "orin", "to build and to run (4."),
        ("v2-1.7b", "orin-nano", "to run but not to build: add swap"),
        ("v2-7b", "orin-nano-4gb", "Warning: it does not fit Jetson Orin Nano 4GB"),
    ],
)
def test_an_export_says_whether_the_module_holds_it(preset, target, words):
    plan = estimate_model(preset, PRESETS[preset], RECIPES["fp16"], get_target(target)).plan
    assert plan.verdict in VERDICTS
    text = memory_verdict(get_target(target).title, plan.to_json())
    assert words in text
    assert "to run, " in text and "that the system leaves)." in text


def test_every_verdict_on_a_known_module_has_its_sentence():
    assert set(VERDICTS) == set(get_args(Verdict)) - {"unknown"}


def test_the_sentence_stands_at_the_end_of_an_export(checkpoint, tmp_path, capsys):
    arguments = ["--target", "orin", "--model", checkpoint, "--output", tmp_path / "bundle"]
    options = [*arguments, "--no-parity", "--no-stand-in"]
    assert run_command(export, [str(option) for option in options], "mvlm-export") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "It fits Jetson AGX Orin 64GB" in printed
    assert ", to build and to run (" in printed
