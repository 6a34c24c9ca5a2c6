"""`mvlm triton`: what is written, what is left out, and the ways to go wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mvlm_export.engines import triton_front
from mvlm_export.engines.bundle import TOKENIZER, Bundle, BundleWriter, sha256_of, write_json
from mvlm_export.engines.errors import EngineError, InputError
from mvlm_export.engines.kv_cache import cache_names
from mvlm_export.engines.manifest import GRAPHS
from mvlm_export.exporter import triton_repository
from mvlm_export.exporter.cli.errors import run_command
from mvlm_export.exporter.cli.main import mvlm
from mvlm_export.exporter.triton_config import ConfigTensor, TritonConfig
from mvlm_export.exporter.triton_repository import write_repository
from tests.engines.manifests import tiny_manifest
from tests.engines.tokenizer_files import write_tokenizer

from .pbtxt import parse


def type_triton(*arguments):
    return run_command(mvlm, ["triton", *map(str, arguments)], "mvlm")


def config_of(repository, name):
    return parse((repository / name / "config.pbtxt").read_text(encoding="ascii"))


def tensors(messages):
    return {
        message["name"][0]: (message["data_type"][0][0], message["dims"])
        for message in messages
    }


def files_of(repository):
    return sorted(
        path.relative_to(repository).as_posix()
        for path in repository.rglob("*")
        if path.is_file()
    )


@pytest.fixture(scope="module")
def bundle(compiled):
    return Bundle.load(compiled.bundle.path)


@pytest.fixture(scope="module")
def repository(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "models"
    write_repository(bundle, folder)
    return folder


def test_files_are_those_of_the_bundle(bundle, repository):
    expected = ["mvlm/1/model.py", *(f"{name}/config.pbtxt" for name in (*GRAPHS, "mvlm"))]
    for name in GRAPHS:
        for file in ("model.onnx", "model.onnx.data"):
            expected.append(f"{name}/1/model.onnx/{file}")
            copied = repository / name / "1/model.onnx" / file
            assert sha256_of(copied) == bundle.manifest.files[f"{name}/{file}"]
            assert copied.samefile(bundle.path / name / file)
    assert files_of(repository) == sorted(expected)
    front = (repository / "mvlm/1/model.py").read_bytes()
    assert front == Path(triton_front.__file__).read_bytes()
    assert repository.stat().st_mode & 0o777 == 0o755


def test_tensors_are_those_of_the_manifest(bundle, repository):
    batched = {"vision_encoder": 4, "projector": 4, "decoder": 0}
    for name, graph in bundle.manifest.graphs.items():
        config = config_of(repository, name)
        assert config["name"] == [name]
        assert config["platform"] == ["onnxruntime_onnx"]
        assert config["max_batch_size"] == [batched[name]]
        assert ("dynamic_batching" in config) == bool(batched[name])
        assert config["instance_group"] == [{"count": [1], "kind": [("KIND_CPU",)]}]
        for key, specs in (("input", graph.inputs), ("output", graph.outputs)):
            skipped = 1 if batched[name] else 0
            assert tensors(config[key]) == {
                spec.name: (
                    triton_repository.DATA_TYPES[spec.dtype],
                    [size if isinstance(size, int) else -1 for size in spec.shape[skipped:]],
                )
                for spec in specs
            }
    pixels = tensors(config_of(repository, "vision_encoder")["input"])
    assert pixels == {"pixel_values": ("TYPE_UINT8", [3, 56, 56])}


def test_the_front_is_decoupled_and_names_the_bundle(bundle, repository):
    config = config_of(repository, "mvlm")
    assert config["backend"] == ["python"]
    assert config["model_transaction_policy"] == [{"decoupled": [True]}]
    assert config["parameters"] == [
        {"key": ["bundle"], "value": [{"string_value": [str(bundle.path.resolve())]}]}
    ]
    optional = {m["name"][0] for m in config["input"] if m.get("optional") == [True]}
    assert optional == {tensor.name for tensor in triton_front.INPUTS} - {"prompt"}
    assert tensors(config["output"])["final"] == ("TYPE_BOOL", [1])


def test_tritons_own_schema_reads_every_configuration(repository):
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    for name in (*GRAPHS, "mvlm"):
        text = (repository / name / "config.pbtxt").read_text()
        config = text_format.Parse(text, schema.ModelConfig())
        ours = parse(text)
        for key, messages in (("input", config.input), ("output", config.output)):
            assert tensors(ours[key]) == {
                message.name: (schema.DataType.Name(message.data_type), list(message.dims))
                for message in messages
            }
        assert config.name == name
        assert config.max_batch_size == ours["max_batch_size"][0]
        assert config.HasField("dynamic_batching") == ("dynamic_batching" in ours)
        assert config.model_transaction_policy.decoupled == (name == "mvlm")
    path = config.parameters["bundle"].string_value
    assert Path(path).is_dir()


ODD = 'a "b" \\ c\n\tü 猫 {}:#'


def odd_config():
    tensor = ConfigTensor(ODD, "TYPE_INT8", (1, -1), optional=True)
    return TritonConfig(
        "odd",
        ("platform", "tensorrt_plan"),
        (tensor,),
        (replace(tensor, optional=False),),
        "KIND_GPU",
        profiles=(0, 1),
        parameters={"path": ODD},
    )


def test_any_text_survives():
    config = parse(odd_config().to_text())
    message = {"name": [ODD], "data_type": [("TYPE_INT8",)], "dims": [1, -1]}
    assert config == {
        "name": ["odd"],
        "platform": ["tensorrt_plan"],
        "max_batch_size": [0],
        "input": [{**message, "optional": [True]}],
        "output": [message],
        "instance_group": [
            {"count": [1], "kind": [("KIND_GPU",)], "profile": ["0", "1"]},
        ],
        "parameters": [{"key": ["path"], "value": [{"string_value": [ODD]}]}],
    }


def test_any_text_survives_in_tritons_own_schema():
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    config = text_format.Parse(odd_config().to_text(), schema.ModelConfig())
    assert config.input[0].name == ODD
    assert config.parameters["path"].string_value == ODD
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU


PROFILES = {
    "vision_encoder": [{"name": "images", "dims": {"B": [1, 1, 3]}}],
    "projector": [{"name": "images", "dims": {"B": [1, 1, 2]}}],
    "decoder": [{"name": n, "dims": {"S": [1, 1, 9]}} for n in ("prefill", "decode")],
}


def bundle_for(folder, target, plans=(), **changes):
    """A bundle of empty graphs, with folders of plans that are a few bytes each."""
    manifest = tiny_manifest(target=target, **changes)
    with BundleWriter(folder) as writer:
        for graph in manifest.graphs.values():
            (writer.folder / graph.file).parent.mkdir()
            (writer.folder / graph.file).touch()
        write_tokenizer(writer.folder / TOKENIZER)
        writer.seal(manifest)
        bundle = writer.commit()
    for key in plans:
        engines = folder / "engines" / key
        engines.mkdir(parents=True)
        record = {"folder": key, "target": target, "plans": {}}
        for name in GRAPHS:
            (engines / f"{name}.plan").write_text(f"{key} {name}")
            record["plans"][name] = {
                "plan_path": f"{name}.plan",
                "sha256": sha256_of(engines / f"{name}.plan"),
                "profiles": PROFILES[name],
                "sources": {f"{name}/model.onnx": bundle.manifest.files[f"{name}/model.onnx"]},
            }
        write_json(engines / "build.json", record)
    return bundle


def test_plans_are_served_with_all_their_profiles(tmp_path):
    bundle = bundle_for(tmp_path / "bundle", "orin", ["a", "b"], jetpack=6)
    written = write_repository(bundle, tmp_path / "models", engines="b")
    assert [(m.name, m.runs_on, m.max_batch_size) for m in written.models] == [
        ("vision_encoder", "tensorrt_plan", 3),
        ("projector", "tensorrt_plan", 2),
        ("decoder", "tensorrt_plan", 0),
        ("mvlm", "python", 0),
    ]
    for name in GRAPHS:
        assert (written.path / name / "1/model.plan").read_text() == f"b {name}"
    decoder = config_of(written.path, "decoder")
    assert decoder["instance_group"] == [
        {"count": [1], "kind": [("KIND_GPU",)], "profile": ["0", "1"]}
    ]
    assert tensors(decoder["input"])["past_key_values.0.key"] == ("TYPE_FP32", [-1, 1, 4])
    assert {name for name in tensors(decoder["output"]) if name != "logits"} == {
        *cache_names("present", 2)
    }


def test_a_plan_that_writes_in_place_is_left_out(tmp_path):
    bundle = bundle_for(tmp_path / "bundle", "orin", ["a"], jetpack=7, kv_form="fixed")
    written = write_repository(bundle, tmp_path / "models")
    assert [model.name for model in written.models] == ["vision_encoder", "projector", "mvlm"]
    assert "at one address" in written.left_out["decoder"]


def test_graphs_that_triton_has_no_backend_for_are_left_out(tmp_path, capsys):
    bundle_for(tmp_path / "bundle", "rtx")
    assert type_triton(tmp_path / "bundle", "--output", tmp_path / "models") == 0
    assert files_of(tmp_path / "models") == ["mvlm/1/model.py", "mvlm/config.pbtxt"]
    assert "TensorRT-RTX" in capsys.readouterr().out


def test_plans_that_are_missing_are_asked_for(tmp_path):
    bundle = bundle_for(tmp_path / "bundle", "orin", jetpack=6)
    with pytest.raises(EngineError, match=r"no plans yet.*`mvlm build "):
        write_repository(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_damaged_plan_is_found(tmp_path, capsys):
    bundle = bundle_for(tmp_path / "bundle", "orin", ["a"], jetpack=6)
    (bundle.path / "engines/a/decoder.plan").write_text("other")
    assert type_triton(bundle.path, "-o", tmp_path / "models") == 2
    assert "engines/a/decoder.plan differs" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
    assert type_triton(bundle.path, "-o", tmp_path / "models", "--no-verify") == 0


def test_plans_of_other_graphs_are_refused(tmp_path):
    bundle = bundle_for(tmp_path / "bundle", "orin", ["a"], jetpack=6)
    other = replace(
        bundle, manifest=replace(bundle.manifest, files=dict.fromkeys(bundle.manifest.files))
    )
    with pytest.raises(EngineError, match=r"not those of this bundle's graphs.*mvlm build"):
        write_repository(other, tmp_path / "models")


@pytest.mark.parametrize(
    ("plans", "engines", "mention"),
    [(["a", "b"], None, "2 folders of plans: a, b"), (["a"], "c", "Give one of: a")],
)
def test_the_folder_of_plans_must_be_clear(tmp_path, plans, engines, mention):
    bundle = bundle_for(tmp_path / "bundle", "orin", plans, jetpack=6)
    with pytest.raises(InputError, match=mention):
        write_repository(bundle, tmp_path / "models", engines=engines)


def test_the_command_prints_what_starts_the_server(bundle, tmp_path, capsys):
    folder = tmp_path / "with space"
    assert type_triton(bundle.path, "--output", folder, "--no-verify", "--threads", 2) == 0
    out = capsys.readouterr().out
    assert f"tritonserver --model-repository='{folder}' " in out
    assert "--load-model=mvlm" in out
    assert {name for name in (*GRAPHS, "mvlm") if f" {name} " in out} == {*GRAPHS, "mvlm"}
    values = {
        message["key"][0]: message["value"][0]["string_value"][0]
        for message in config_of(folder, "mvlm")["parameters"]
    }
    assert values.keys() == {"bundle", "threads", "verify"}
    assert (values["threads"], values["verify"]) == ("2", "false")
    (threads,) = config_of(folder, "decoder")["parameters"]
    assert threads["key"] == ["intra_op_thread_count"]
    assert threads["value"] == [{"string_value": ["2"]}]


def test_json_and_overwrite(bundle, tmp_path, capsys):
    folder = tmp_path / "models"
    arguments = (bundle.path, "-o", folder, "--json", "--no-verify")
    assert type_triton(*arguments, "--bundle-path", "/bundle", "--no-prefix") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(folder)
    assert report["bundle"] == "/bundle"
    assert [model["name"] for model in report["models"]] == [*GRAPHS, "mvlm"]
    assert report["left_out"] == {}
    assert type_triton(*arguments) == 2
    assert "already holds a model repository. Add --overwrite" in capsys.readouterr().err
    assert config_of(folder, "mvlm")["parameters"][0]["value"] == [
        {"string_value": ["/bundle"]}
    ]
    assert type_triton(*arguments, "--overwrite") == 0
    assert config_of(folder, "mvlm")["parameters"][0]["value"] == [
        {"string_value": [str(bundle.path.resolve())]}
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def occupied(folder):
    folder.mkdir()
    (folder / "notes.txt").touch()


PLACES = {
    "a file": (lambda folder: folder.touch(), "is a file"),
    "other files": (occupied, "holds other files"),
    "the working folder": (lambda folder: folder.mkdir(), "working folder"),
}


@pytest.mark.parametrize("case", PLACES)
def test_what_is_there_is_left_alone(bundle, tmp_path, monkeypatch, capsys, case):
    folder = tmp_path / "models"
    prepare, mention = PLACES[case]
    prepare(folder)
    if case == "the working folder":
        monkeypatch.chdir(folder)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert type_triton(bundle.path, "-o", folder, "--overwrite", "--no-verify") == 2
    assert mention in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_repository_with_models_of_others_is_left_alone(bundle, tmp_path):
    folder = tmp_path / "models"
    write_repository(bundle, folder)
    (folder / "resnet").mkdir()
    with pytest.raises(InputError, match="holds other files"):
        write_repository(bundle, folder, overwrite=True)


def test_a_folder_in_the_bundle_is_refused(tmp_path):
    bundle = bundle_for(tmp_path / "bundle", "cpu")
    with pytest.raises(InputError, match="is in the bundle"):
        write_repository(bundle, bundle.path / "models")


def test_no_bundle(tmp_path, capsys):
    assert type_triton(tmp_path / "none", "-o", tmp_path / "models") == 2
    assert "mvlm-export --output" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_one(bundle, tmp_path, monkeypatch, error):
    folder = tmp_path / "models"
    write_repository(bundle, folder)
    before = files_of(folder)

    def fail(*arguments):
        raise error

    monkeypatch.setattr(triton_repository.shutil, "copyfile", fail)
    with pytest.raises(type(error)):
        write_repository(bundle, folder, overwrite=True)
    assert files_of(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_files_are_copied_where_links_cannot_be(bundle, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(triton_repository.os, "link", refuse)
    write_repository(bundle, tmp_path / "models")
    copied = tmp_path / "models/decoder/1/model.onnx/model.onnx.data"
    assert sha256_of(copied) == bundle.manifest.files["decoder/model.onnx.data"]
    assert not copied.samefile(bundle.path / "decoder/model.onnx.data")
