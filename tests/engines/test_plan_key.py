"""What a plan depends on, and the words for a plan that does not hold any more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mvlm_export.engines import jetson
from mvlm_export.engines.build import examine_plans, open_plans
from mvlm_export.engines.build_options import WORKSPACE_SHARE, BuildOptions, default_workspace
from mvlm_export.engines.bundle import (
    BUILD_FILE,
    ENGINES,
    TOKENIZER,
    Bundle,
    BundleWriter,
    read_json,
    sha256_of,
    write_json,
)
from mvlm_export.engines.errors import EngineError, InputError
from mvlm_export.engines.plan_key import (
    BuilderIdentity,
    graph_sources,
    plan_keys,
    read_plan_states,
    require_plans,
)
from mvlm_export.engines.plan_profiles import bundle_profiles
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_profiles import ProfileSpec

from .manifests import tiny_manifest
from .tokenizer_files import write_tokenizer

ORIN = get_target("orin")
HERE = BuilderIdentity("tensorrt", "10.3.0", (8, 7))
OPTIONS = BuildOptions(1 << 30, 3)
FOLDER = "orin-trt10.3.0-sm87"


@pytest.fixture
def bundle(tmp_path):
    """Of graphs of a few bytes, for Orin."""
    manifest = tiny_manifest(target="orin", jetpack=6)
    with BundleWriter(tmp_path / "bundle") as writer:
        for name, graph in manifest.graphs.items():
            path = writer.folder / graph.file
            path.parent.mkdir()
            path.write_text(name)
            path.with_name("model.onnx.data").write_text(f"weights of {name}")
        write_tokenizer(writer.folder / TOKENIZER)
        writer.seal(manifest)
        return writer.commit()


def keys_of(bundle, builder=HERE, options=OPTIONS, **profiles):
    given = {**bundle_profiles(bundle.manifest), **profiles}
    return plan_keys(bundle.manifest, builder, given, options)


@pytest.fixture
def built(bundle):
    """The same with plans of a few bytes and their record, as a build leaves them."""
    folder = bundle.path / ENGINES / FOLDER
    folder.mkdir(parents=True)
    plans = {}
    for name, key in keys_of(bundle).items():
        plan = folder / f"{name}.plan"
        plan.write_text(f"plan of {name}")
        plans[name] = {"plan_path": plan.name, "sha256": sha256_of(plan), "key": key.to_json()}
    write_json(folder / BUILD_FILE, {"folder": FOLDER, "plans": plans})
    return Bundle.load(bundle.path)


def states_of(bundle, **changes):
    runs_only = changes.pop("runs_only", False)
    return read_plan_states(bundle, ORIN, keys_of(bundle, **changes), runs_only)


def statuses(states):
    return {name: state.status for name, state in states.items()}


def test_a_bundle_without_plans(bundle):
    states = states_of(bundle)
    assert set(statuses(states).values()) == {"missing"}
    with pytest.raises(EngineError, match=r"(?s)missing, not built yet.*mvlm build"):
        require_plans(bundle, states)


def test_plans_that_hold(built):
    states = states_of(built)
    assert statuses(states) == dict.fromkeys(built.manifest.graphs, "fresh")
    assert states["decoder"].reason == "already built"
    require_plans(built, states)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"builder": replace(HERE, version="10.7.0")},
            r"the bundle has plans of orin-trt10\.3\.0-sm87 alone, this is TensorRT 10\.7\.0 "
            r"for compute capability 8\.7",
        ),
        (
            {"builder": replace(HERE, compute_capability=(8, 6))},
            r"of orin-trt10\.3\.0-sm87 alone, this is .* compute capability 8\.6",
        ),
    ],
)
def test_plans_of_another_machine(built, changes, words):
    states = states_of(built, **changes)
    assert set(statuses(states).values()) == {"foreign"}
    with pytest.raises(EngineError, match=words):
        require_plans(built, states)


def test_other_options_are_stale_for_a_build_and_nothing_to_a_run(built):
    options = BuildOptions(1 << 30, 5)
    state = states_of(built, options=options)["decoder"]
    assert state.status == "stale"
    assert "optimization_level 3" in state.reason.split("would be")[0]
    assert "optimization_level 5" in state.reason.split("would be")[1]
    assert set(statuses(states_of(built, options=options, runs_only=True)).values()) == {
        "fresh"
    }


def test_other_profiles(built):
    longer = (ProfileSpec("images", {"B": (1, 1, 9)}),)
    states = states_of(built, projector=longer)
    assert statuses(states) == {
        "vision_encoder": "fresh",
        "projector": "stale",
        "decoder": "fresh",
    }
    assert "its profiles were images {'B': [1, 1, 4]}" in states["projector"].reason
    assert "would be images {'B': [1, 1, 9]}" in states["projector"].reason


def test_another_graph(built):
    files = {**built.manifest.files, "decoder/model.onnx.data": "0" * 64}
    changed = replace(built, manifest=replace(built.manifest, files=files))
    states = states_of(changed)
    assert statuses(states)["decoder"] == "stale"
    assert statuses(states)["projector"] == "fresh"
    assert "the graph's files are not those it was built from" in states["decoder"].reason


def test_a_copied_folder_is_known_by_its_key(built):
    """A folder renamed by hand: the record inside says what built it."""
    other = BuilderIdentity("tensorrt", "10.7.0", (8, 7))
    (built.path / ENGINES / FOLDER).rename(built.path / ENGINES / "orin-trt10.7.0-sm87")
    state = states_of(built, builder=other)["decoder"]
    assert (state.status, "built by TensorRT 10.3.0" in state.reason) == ("stale", True)


def test_a_damaged_and_a_missing_plan(built):
    folder = built.path / ENGINES / FOLDER
    (folder / "decoder.plan").write_text("cut")
    (folder / "projector.plan").unlink()
    states = states_of(built)
    assert "decoder.plan is damaged" in states["decoder"].reason
    assert "projector.plan is gone" in states["projector"].reason
    assert statuses(states)["vision_encoder"] == "fresh"
    with pytest.raises(EngineError, match=r"(?s)projector: stale.*decoder: stale") as caught:
        require_plans(built, states)
    assert "vision_encoder" not in str(caught.value)


def test_a_record_of_an_older_version(built):
    file = built.path / ENGINES / FOLDER / BUILD_FILE
    record = read_json(file)
    del record["plans"]["decoder"]["key"]
    write_json(file, record)
    state = states_of(built)["decoder"]
    assert (state.status, "older version" in state.reason) == ("stale", True)


def test_loading_code_gets_paths_or_a_reason(built):
    plans = open_plans(built, HERE)
    assert plans == {
        name: built.path / ENGINES / FOLDER / f"{name}.plan" for name in built.manifest.graphs
    }
    with pytest.raises(EngineError, match="foreign"):
        open_plans(built, replace(HERE, version="10.9.0"))
    assert statuses(examine_plans(built, OPTIONS, HERE))["decoder"] == "fresh"


def test_every_part_is_in_the_digest(bundle):
    key = keys_of(bundle)["decoder"]
    others = [
        replace(key, builder=replace(HERE, version="10.3.1")),
        replace(key, builder=replace(HERE, compute_capability=(8, 9))),
        replace(key, graph="0" * 64),
        replace(key, profiles=key.profiles[:1]),
        replace(key, options=BuildOptions()),
    ]
    digests = {entry.digest for entry in (key, *others)}
    assert len(digests) == 1 + len(others)
    assert key.digest == keys_of(bundle)["decoder"].digest
    assert all(key.find_difference(other.to_json()) for other in others)
    assert key.find_difference(key.to_json()) is None


def test_the_graph_part_is_the_manifests_hashes(bundle):
    sources = graph_sources(bundle.manifest, "decoder")
    assert sources == {
        f"decoder/{name}": sha256_of(bundle.path / "decoder" / name)
        for name in ("model.onnx", "model.onnx.data")
    }


# Options


def test_the_default_workspace_is_a_share_of_the_modules_memory():
    for name in ("orin", "orin-nano"):
        target = get_target(name)
        expected = int(target.memory_gb * WORKSPACE_SHARE * 2**30)
        assert BuildOptions().for_target(target).workspace_bytes == expected
    assert default_workspace(get_target("orin-nano")) == 2 << 30
    assert default_workspace(get_target("rtx")) is None
    assert BuildOptions(5).for_target(ORIN) == BuildOptions(5)


def test_the_device_that_builds_counts_and_not_the_bundles():
    nano = get_target("orin-nano")
    here = jetson.Jetson("NVIDIA Jetson Orin Nano", "36.4.3", 6, nano.name)
    assert default_workspace(ORIN, here) == default_workspace(nano)
    unknown = replace(here, target=None)
    assert default_workspace(ORIN, unknown) == default_workspace(ORIN)


@pytest.mark.parametrize(("workspace", "level"), [(0, None), (-1, None), (1, 6), (1, -1)])
def test_options_that_do_not_exist(workspace, level):
    with pytest.raises(InputError):
        BuildOptions(workspace, level)
