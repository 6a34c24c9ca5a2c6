"""The trtexec line, read back as trtexec 10.3 reads it."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePath

import pytest

from mvlm_export.engines.build_options import BuildOptions
from mvlm_export.engines.trtexec import trtexec_line

SHAPES = {
    "prefill": {
        "input_ids": ((1,), (256,), (2048,)),
        "past_key_values.0.key": ((0, 4, 16), (0, 4, 16), (2047, 4, 16)),
    },
    "decode": {
        "input_ids": ((1,), (1,), (2,)),
        "past_key_values.0.key": ((0, 4, 16), (512, 4, 16), (2047, 4, 16)),
    },
}
SWITCHES = {"--stronglyTyped", "--skipInference"}
EDGES = ("min", "opt", "max")
UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def read_shapes(text):
    """``name:1x2,'other:name':3`` to a dict; names may be in single quotes."""
    found = {}
    for quoted, plain, sizes in re.findall(r"(?:'([^']*)'|([^,:']+)):([\dx]+)(?:,|$)", text):
        found[quoted or plain] = tuple(int(size) for size in sizes.split("x"))
    return found


def read_back(line):
    """(arguments without shapes, shapes by profile number and input)."""
    program, *arguments = shlex.split(line)
    assert program == "trtexec"
    options, profiles, current = {}, {}, 0
    for argument in arguments:
        key, given, text = argument.partition("=")
        assert bool(given) != (key in SWITCHES)
        if key == "--profile":
            current = int(text)
            assert current not in profiles
        elif key.endswith("Shapes"):
            profiles.setdefault(current, {})[key[2:5]] = read_shapes(text)
        else:
            assert key not in options
            options[key] = text
    for edges in profiles.values():
        assert tuple(edges) == EDGES
    shapes = {
        number: {name: tuple(edges[edge][name] for edge in EDGES) for name in edges["min"]}
        for number, edges in profiles.items()
    }
    return options, shapes


def test_two_profiles_come_back():
    line = trtexec_line(
        PurePath("/b/decoder/model.onnx"),
        PurePath("/b/engines/k/decoder.plan"),
        SHAPES,
        BuildOptions(2 << 30, 4),
        PurePath("/b/engines/k/timing.cache"),
    )
    options, shapes = read_back(line)
    assert "\n" not in line
    assert shapes == dict(enumerate(SHAPES.values()))
    assert options["--onnx"] == "/b/decoder/model.onnx"
    assert options["--saveEngine"] == "/b/engines/k/decoder.plan"
    assert options["--timingCacheFile"] == "/b/engines/k/timing.cache"
    assert options["--builderOptimizationLevel"] == "4"
    pool, size = options["--memPoolSize"].split(":")
    assert pool == "workspace"
    assert int(size[:-1]) * UNITS[size[-1]] == 2 << 30
    assert set(options) >= SWITCHES


def test_defaults_are_left_out():
    line = trtexec_line(PurePath("m.onnx"), PurePath("m.plan"), {}, BuildOptions())
    options, shapes = read_back(line)
    assert shapes == {}
    assert not {"--memPoolSize", "--builderOptimizationLevel", "--timingCacheFile"} & {
        *options
    }


def test_one_profile_needs_no_number():
    only = {"images": {"pixel_values": ((1, 3, 8, 8), (1, 3, 8, 8), (4, 3, 8, 8))}}
    line = trtexec_line(PurePath("m.onnx"), PurePath("m.plan"), only, BuildOptions())
    assert "--profile=" not in line
    assert read_back(line)[1] == {0: only["images"]}


@pytest.mark.parametrize("folder", ["my bundle", "it's $HOME", 'a"b', "ü;rm"])
def test_odd_names_survive_the_shell(folder):
    onnx, plan = PurePath(folder, "model.onnx"), PurePath(folder, "m.plan")
    shapes = {"p": {"x:0": ((1,), (2,), (3,)), "y": ((1, 2), (1, 2), (1, 2))}}
    options, found = read_back(trtexec_line(onnx, plan, shapes, BuildOptions()))
    assert (options["--onnx"], options["--saveEngine"]) == (str(onnx), str(plan))
    assert found == {0: shapes["p"]}
