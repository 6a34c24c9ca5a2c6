import json
from pathlib import Path

import pytest

from mvlm_export.engines.bundle import (
    MANIFEST,
    Bundle,
    BundleWriter,
    replace_folder,
    sha256_of,
)
from mvlm_export.engines.errors import BundleError, InputError

from .manifests import tiny_manifest


def write_bundle(path, text="graph", overwrite=False):
    with BundleWriter(path, overwrite) as writer:
        for name, graph in tiny_manifest().graphs.items():
            file = writer.folder / graph.file
            file.parent.mkdir()
            file.write_text(f"{name} {text}")
        (writer.folder / "tokenizer").mkdir()
        (writer.folder / "tokenizer" / "tokenizer.model").write_text("pieces")
        writer.seal(tiny_manifest())
        return writer.commit()


def add_engines(bundle, text="plan", key="rtx-trt1.7-sm86"):
    folder = bundle.path / "engines" / key
    folder.mkdir(parents=True)
    (folder / "decoder.plan").write_text(text)
    plan = {"plan_path": "decoder.plan", "sha256": sha256_of(folder / "decoder.plan")}
    (folder / "build.json").write_text(json.dumps({"plans": {"decoder": plan}}))
    return folder


def leftovers(folder, bundle):
    return [path.name for path in folder.iterdir() if path != bundle]


def test_round_trip(tmp_path):
    path = tmp_path / "bundle"
    written = write_bundle(path)
    loaded = Bundle.load(path)
    assert loaded == written
    assert loaded.manifest.model.stop_ids == (2, 3)
    assert loaded.manifest.graphs["decoder"].inputs[0].shape == ("S",)
    assert loaded.graph_path("decoder").read_text() == "decoder graph"
    assert leftovers(tmp_path, path) == []


def test_hashes_are_of_the_files(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    names = [f"{name}/model.onnx" for name in ("vision_encoder", "projector", "decoder")]
    assert bundle.manifest.files == {
        name: sha256_of(bundle.path / name) for name in [*names, "tokenizer/tokenizer.model"]
    }


def test_changed_file_is_named(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    bundle.graph_path("decoder").write_text("grapH")
    with pytest.raises(BundleError, match=r"decoder/model\.onnx differs"):
        Bundle.load(bundle.path)
    assert Bundle.load(bundle.path, verify=False).manifest == bundle.manifest


def test_missing_file_is_named(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    bundle.graph_path("decoder").unlink()
    with pytest.raises(BundleError, match=r"decoder/model\.onnx missing"):
        Bundle.load(bundle.path)


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_failure_leaves_nothing_and_keeps_the_old_bundle(tmp_path, failure):
    path = tmp_path / "bundle"
    write_bundle(path, "old")
    with pytest.raises(failure), BundleWriter(path, overwrite=True) as writer:
        (writer.folder / "half").write_text("half")
        raise failure
    assert Bundle.load(path).graph_path("decoder").read_text() == "decoder old"
    assert leftovers(tmp_path, path) == []


def test_overwrite_replaces_the_whole_bundle(tmp_path):
    path = tmp_path / "bundle"
    write_bundle(path, "old")
    (path / "engines").mkdir()
    write_bundle(path, "new", overwrite=True)
    assert Bundle.load(path).graph_path("decoder").read_text() == "decoder new"
    assert not (path / "engines").exists()
    assert leftovers(tmp_path, path) == []


def test_an_existing_bundle_needs_overwrite(tmp_path):
    write_bundle(tmp_path / "bundle")
    with pytest.raises(InputError, match="--overwrite"):
        write_bundle(tmp_path / "bundle")


def test_other_files_are_never_replaced(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    (path / "holiday.jpg").write_text("dear")
    with pytest.raises(InputError, match="left alone"):
        write_bundle(path, overwrite=True)
    assert (path / "holiday.jpg").read_text() == "dear"


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "bundle").write_text("file")
    with pytest.raises(InputError, match="is a file"):
        write_bundle(tmp_path / "bundle")


def test_output_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write the bundle"):
        write_bundle(tmp_path / "file" / "bundle")


def test_not_a_bundle(tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.load(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"model": {}}, "damaged"),
        ({"unheard_of": 1}, "damaged"),
    ],
)
def test_manifest_that_cannot_be_read(tmp_path, change, message):
    bundle = write_bundle(tmp_path / "bundle")
    file = bundle.path / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(BundleError, match=message):
        Bundle.load(bundle.path)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_manifest_that_is_no_json_object(tmp_path, text):
    bundle = write_bundle(tmp_path / "bundle")
    (bundle.path / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="Compile the bundle again"):
        Bundle.load(bundle.path)


def test_the_report_may_change(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    (bundle.path / "report.json").write_text("{}")
    assert Bundle.load(bundle.path) == bundle


def test_engines_have_their_own_records(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    assert bundle.engines() == {}
    folder = add_engines(bundle)
    assert list(Bundle.load(bundle.path).engines()) == [folder.name]
    bundle.verify_engines()
    (folder / "decoder.plan").write_text("other plan")
    assert Bundle.load(bundle.path) == bundle  # graphs still run, and `mvlm build` mends it
    with pytest.raises(BundleError, match=r"decoder\.plan differs.*mvlm build"):
        bundle.verify_engines()


@pytest.mark.parametrize(
    "plans",
    ["[1]", "[]", '{"decoder": 1}', '{"decoder": {"plan_path": "../x", "sha256": "0"}}'],
)
def test_a_broken_build_record_is_named(tmp_path, plans):
    bundle = write_bundle(tmp_path / "bundle")
    folder = add_engines(bundle)
    (folder / "build.json").write_text(f'{{"plans": {plans}}}')
    with pytest.raises(BundleError, match="not a build record"):
        bundle.engines()


def test_a_build_that_was_killed_is_not_seen(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    add_engines(bundle, key=".rtx-trt1.7-sm86.x7").joinpath("decoder.plan").write_text("half")
    assert Bundle.load(bundle.path).engines() == {}


def edit_manifest(bundle, change):
    file = bundle.path / MANIFEST
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("name", ["decoder/model.onnx", "tokenizer/tokenizer.model"])
def test_a_file_without_a_hash_is_refused(tmp_path, name):
    bundle = write_bundle(tmp_path / "bundle")
    edit_manifest(bundle, lambda data: data["files"].pop(name))
    with pytest.raises(BundleError, match=name):
        Bundle.load(bundle.path, verify=False)


def test_weights_without_a_hash_are_refused(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    (bundle.path / "decoder" / "model.onnx.data").write_text("weights")
    with pytest.raises(BundleError, match=r"no hash for decoder/model\.onnx\.data"):
        Bundle.load(bundle.path)


def test_a_manifest_may_not_reach_outside(tmp_path):
    (tmp_path / "secret").write_text("x")
    bundle = write_bundle(tmp_path / "bundle")
    digest = sha256_of(tmp_path / "secret")
    edit_manifest(bundle, lambda data: data["files"].update({"../secret": digest}))
    with pytest.raises(BundleError, match="secret"):
        Bundle.load(bundle.path)


def test_a_link_may_not_reach_outside(tmp_path):
    (tmp_path / "secret").write_text("pieces")
    bundle = write_bundle(tmp_path / "bundle")
    (bundle.path / "tokenizer" / "tokenizer.model").unlink()
    (bundle.path / "tokenizer" / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(bundle.path)


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="working folder"):
        write_bundle(Path())
    assert list(tmp_path.iterdir()) == []


def test_parents_that_were_made_go_again(tmp_path):
    with pytest.raises(ValueError), BundleWriter(tmp_path / "a" / "b" / "c"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    write_bundle(tmp_path / "a" / "b" / "c")
    assert Bundle.load(tmp_path / "a" / "b" / "c")


def test_an_unsealed_bundle_is_not_committed(tmp_path):
    with pytest.raises(BundleError, match="sealed"), BundleWriter(tmp_path / "b") as writer:
        writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_swap_puts_the_old_folder_back(tmp_path):
    old = tmp_path / "place"
    old.mkdir()
    (old / "kept").write_text("kept")
    with pytest.raises(OSError, match="missing"):
        replace_folder(tmp_path / "missing", old)
    assert (old / "kept").read_text() == "kept"
    assert leftovers(tmp_path, old) == []
