"""Engines of a bundle by TensorRT-RTX: kept, mended, whole or not at all, faults named."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import onnx_graphsurgeon as gs
import pytest

from mvlm_export.engines import build as building
from mvlm_export.engines.build import (
    BuildOptions,
    build_engines,
    build_stand_in,
    examine_plans,
    open_plans,
    plan_trtexec,
)
from mvlm_export.engines.build_process import WorkerCrashError
from mvlm_export.engines.bundle import BUILD_FILE, ENGINES, Bundle, sha256_of
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.manifest import GRAPHS
from mvlm_export.engines.plan_profiles import bundle_profiles, decoder_weight_kind
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_diagnostics import BuildFailedError

from .bundles import derive_bundle
from .manifests import MODEL, tiny_manifest
from .processes import offer_tensorrt_10_3
from .test_trtexec import read_back


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """The tiny bundle for ``rtx``, with its plans; tests must not change it."""
    path = tmp_path_factory.mktemp("rtx") / "bundle"
    bundle = Bundle.load(derive_bundle(tiny.path, path, target="rtx"))
    reports = []
    build_engines(bundle, lambda *report: reports.append(report))
    return bundle, reports


@pytest.fixture
def bundle(source, tmp_path):
    """A copy of it."""
    return Bundle.load(shutil.copytree(source[0].path, tmp_path / "bundle"))


def only_record(bundle):
    (record,) = bundle.engines().values()
    return record


def place_of(bundle):
    return bundle.path / ENGINES / only_record(bundle)["folder"]


def statuses(bundle, *options):
    return {name: state.status for name, state in examine_plans(bundle, *options).items()}


def test_the_record_holds_what_a_build_took_and_how_to_repeat_it(source):
    bundle, reports = source
    record = only_record(bundle)
    assert list(record["plans"]) == list(GRAPHS)
    for name, plan in record["plans"].items():
        assert plan["seconds"] > 0
        assert 50e6 < plan["peak_memory"] < 8e9
        assert plan["options"] == {"workspace_bytes": None, "optimization_level": None}
        assert plan["key"]["digest"]
        assert plan["sha256"] == sha256_of(place_of(bundle) / plan["plan_path"])
        options, shapes = read_back(plan["trtexec"])
        assert (bundle.path / options["--onnx"]).resolve() == bundle.graph_path(name)
        assert bundle.path / options["--saveEngine"] == place_of(bundle) / f"{name}.plan"
        assert len(shapes) == len(plan["profiles"])
        absolute, _ = read_back(plan_trtexec(bundle, record, name))
        assert absolute["--onnx"] == str(bundle.path / options["--onnx"])
    done = [entry[0] for entry in reports]
    assert done == sorted(done)
    assert reports[-1][:2] == (3000, 3000)
    bundle.verify_engines()


def test_fresh_plans_are_found_and_kept(bundle):
    assert statuses(bundle) == dict.fromkeys(GRAPHS, "fresh")
    before = {path.name: path.stat() for path in place_of(bundle).iterdir()}
    record = build_engines(bundle, keep=GRAPHS)
    assert record == only_record(bundle)
    assert {path.name: path.stat() for path in place_of(bundle).iterdir()} == before
    assert set(open_plans(bundle)) == set(GRAPHS)


def test_one_damaged_plan_is_built_again_and_the_others_stay(bundle):
    folder = place_of(bundle)
    whole = (folder / "projector.plan").read_bytes()
    numbers = {name: (folder / f"{name}.plan").stat().st_ino for name in GRAPHS}
    old = only_record(bundle)
    (folder / "projector.plan").write_bytes(whole[:100])
    with pytest.raises(EngineError, match=r"projector\.plan is damaged"):
        open_plans(bundle)
    states = examine_plans(bundle)
    keep = {name for name, state in states.items() if state.status == "fresh"}
    assert keep == {"vision_encoder", "decoder"}
    record = build_engines(bundle, keep=keep)
    assert (folder / "projector.plan").read_bytes() == whole
    for name in keep:
        assert (folder / f"{name}.plan").stat().st_ino == numbers[name]
        assert record["plans"][name] == old["plans"][name]
    assert list(record["plans"]) == list(GRAPHS)
    assert statuses(bundle) == dict.fromkeys(GRAPHS, "fresh")


def test_other_options_make_every_plan_stale(bundle):
    options = BuildOptions(64 << 20, 1)
    assert statuses(bundle, options) == dict.fromkeys(GRAPHS, "stale")
    record = build_engines(bundle, options=options, keep={"vision_encoder", "decoder"})
    assert record == only_record(bundle), "what is returned is what was written"
    arguments, _ = read_back(record["plans"]["projector"]["trtexec"])
    assert arguments["--memPoolSize"] == f"workspace:{64 << 20}B"
    assert arguments["--builderOptimizationLevel"] == "1"
    assert statuses(bundle, options)["projector"] == "fresh"


def test_a_crash_of_one_build_keeps_the_old_plans(bundle, monkeypatch):
    before = only_record(bundle)

    def crash(*arguments, **options):
        raise WorkerCrashError("the process ended", ("crash: SIGKILL",))

    monkeypatch.setattr(building, "build_engine", crash)
    with pytest.raises(WorkerCrashError):
        build_engines(bundle)
    assert only_record(bundle) == before
    assert os.listdir(bundle.path / ENGINES) == [before["folder"]]  # noqa: PTH208
    bundle.verify_engines()


def break_a_reshape(graph: gs.Graph) -> None:
    """Freeze the rows of one Reshape, as a careless export does."""
    node = next(node for node in graph.nodes if node.op == "Reshape")
    shape = node.inputs[1].values.copy()
    shape[0] = 37
    node.inputs[1] = gs.Constant("broken_shape", shape)
    node.name = "the_broken_reshape"


def test_a_graph_that_does_not_build_names_its_node(tiny, tmp_path):
    path = derive_bundle(
        tiny.path, tmp_path / "bundle", {"decoder": break_a_reshape}, target="rtx"
    )
    bundle = Bundle.load(path)
    with pytest.raises(EngineError) as caught:
        build_engines(bundle)
    assert "fault lies at node 'the_broken_reshape' (Reshape)" in str(caught.value)
    assert "with profile 'prefill'" in str(caught.value)
    assert bundle.engines() == {}
    assert not (path / ENGINES).exists()


def test_the_search_can_be_interrupted_and_the_failure_stays(bundle, monkeypatch):
    def fail(*arguments, **options):
        raise BuildFailedError("TensorRT gave up", ("some fault",))

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "build_engine", fail)
    monkeypatch.setattr(building, "find_culprit", interrupt)
    with pytest.raises(BuildFailedError, match=r"(?s)gave up.*search .* was interrupted"):
        build_engines(bundle)


def test_the_stand_in_leaves_nothing(source, tmp_path):
    bundle, _ = source
    graphs = {"projector": bundle.graph_path("projector")}
    found = build_stand_in(graphs, bundle.manifest.model, "fp32", tmp_path)
    assert found["projector"]["peak_memory"] > 50e6
    assert found["projector"]["compute_capability"] == [8, 6]
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_for_orin_by_a_stand_in_for_tensorrt_10_3(tiny, tmp_path, monkeypatch):
    """The whole path with the names of JetPack 6 alone; its network is a decoder's."""
    (tmp_path / "site").mkdir()
    offer_tensorrt_10_3(tmp_path / "site", monkeypatch)
    path = derive_bundle(tiny.path, tmp_path / "bundle", target="orin", jetpack=6)
    bundle = Bundle.load(path)
    monkeypatch.setattr(
        building,
        "bundle_profiles",
        lambda manifest: dict.fromkeys(GRAPHS, bundle_profiles(manifest)["decoder"]),
    )
    record = build_engines(bundle)
    assert record["folder"] == "orin-trt10.3.0-sm87"
    share = get_target("orin").memory_gb * 2**30 // 4
    assert record["plans"]["decoder"]["options"]["workspace_bytes"] == share
    arguments, shapes = read_back(record["plans"]["decoder"]["trtexec"])
    assert arguments["--timingCacheFile"] == "engines/orin-trt10.3.0-sm87/timing.cache"
    assert arguments["--memPoolSize"] == f"workspace:{int(share)}B"
    assert shapes[1]["input_ids"] == ((1,), (1,), (2,))
    assert (path / ENGINES / record["folder"] / "timing.cache").read_bytes() == (
        b"timings:timings:timings:"
    )
    assert (path / ENGINES / record["folder"] / BUILD_FILE).is_file()


# How the decoder's weights are stored


def noted(*forms, parts=("q_proj", "o_proj", "gate_proj", "down_proj"), head="int4 g32"):
    """A manifest whose compile noted a form for each layer of each of its two blocks."""
    groups = {"q_proj": "self_attn", "o_proj": "self_attn"}
    layers = {
        f"model.layers.{block}.{groups.get(part, 'mlp')}.{part}": {"form": form}
        for block, form in enumerate(forms)
        for part in parts
    }
    layers["lm_head"] = {"form": head}
    layers["attention_7"] = {"form": None}
    return tiny_manifest(checks={"quantization": {"decoder": {"layers": layers}}})


@pytest.mark.parametrize(
    ("manifest", "kind"),
    [
        (noted("int4 g128", "int4 g64 asym"), "int4"),
        (noted("int4 g128", "int4 g128", head="int8"), "int4"),
        (noted("int4 g128", "int8"), "int8"),
        (noted("int8", "int8"), "int8"),
        (noted("int4 g128"), "fp32"),
        (noted("int4 g128", "int4 g128", parts=("q_proj", "o_proj", "gate_proj")), "fp32"),
        (tiny_manifest(), "fp32"),
    ],
    ids=["int4", "int8-head", "mixed", "int8", "half-a-model", "float-down", "float"],
)
def test_the_weight_kind_is_that_of_every_block(manifest, kind):
    assert decoder_weight_kind(manifest) == kind
    decode = bundle_profiles(manifest)["decoder"][1]
    assert decode.dims["S"] == ((1, 1, 1) if kind == "int4" else (1, 1, 2))
    assert decode.dims["T"][2] == MODEL.max_positions - 1


def test_a_float16_decoder_is_fp16():
    manifest = tiny_manifest()
    half = replace(manifest.graphs["decoder"], dtype="float16")
    graphs = {**manifest.graphs, "decoder": half}
    assert decoder_weight_kind(replace(manifest, graphs=graphs)) == "fp16"
