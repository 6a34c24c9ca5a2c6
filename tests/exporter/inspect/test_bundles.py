"""``mvlm inspect`` on bundles."""

import json

import pytest

from .bundles import (
    FIXED,
    PASSES,
    output,
    output_json,
    prefill_macs,
    write_bundle,
)


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


def test_two_bundles(bundle, capsys):
    found = output_json(capsys, "--diff", bundle, bundle)["graphs"]
    assert [graph["graph"] for graph in found] == ["vision_encoder", "projector", "decoder"]
