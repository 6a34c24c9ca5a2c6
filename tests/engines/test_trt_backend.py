"""From a bundle with plans to an answer, and what is said where they cannot be run."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mvlm_export.engines import trt_api, trt_session
from mvlm_export.engines.backends import BACKENDS, PLAN_BACKENDS, choose_backend, open_backend
from mvlm_export.engines.bundle import (
    BUILD_FILE,
    ENGINES,
    Bundle,
    read_json,
    sha256_of,
    write_json,
)
from mvlm_export.engines.errors import (
    BundleError,
    EngineError,
    InputError,
    MissingPackageError,
)
from mvlm_export.engines.gpu_probe import GpuInfo
from mvlm_export.engines.ort_session import OrtBackend, OrtDecoder
from mvlm_export.engines.session import BackendOptions
from mvlm_export.engines.targets import RUNTIME_TITLES
from mvlm_export.engines.trt_decoder import TrtDecoderSession
from mvlm_export.engines.trt_session import TrtBackend
from mvlm_export.engines.vlm import VLM

from . import fake_tensorrt
from .bundles import ONE_THREAD, derive_bundle, take_raw_pixels
from .conftest import TinyModel
from .plans import ON_GPU, Device, copy_of, pretend_device, with_plans

PICTURE = np.random.default_rng(11).integers(0, 255, (40, 30, 3), dtype=np.uint8)
QUESTION = "What is on the table?"
NO_GPU = GpuInfo(None, None, "no NVIDIA driver (libcuda.so.1 is not installed)")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return pretend_device(monkeypatch)


@pytest.fixture(scope="module")
def plans(
    tiny_prefix: TinyModel, tiny_fixed: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plans")
    return {
        "append": with_plans(tiny_prefix.path, folder / "append"),
        "fixed": with_plans(tiny_fixed.path, folder / "fixed"),
    }


# Answers.


@pytest.mark.parametrize("form", ["append", "fixed"])
def test_answers_are_those_of_onnxruntime(
    device: Device, plans: dict[str, Path], form: str
) -> None:
    vlm = VLM.load(plans[form])
    reference = VLM.load(plans[form], provider="cpu")
    assert isinstance(vlm._states._decoder, TrtDecoderSession)
    assert isinstance(reference._states._decoder, OrtDecoder)
    for pictures in (None, PICTURE, [PICTURE, PICTURE[::-1].copy()]):
        for settings in ({}, {"temperature": 0.7, "seed": 3}):
            found, expected = (
                v.generate(pictures, QUESTION, max_tokens=8, ignore_eos=True, **settings)
                for v in (vlm, reference)
            )
            assert found.ids == expected.ids
            assert found.timings.cached_tokens == expected.timings.cached_tokens
    chats = [v.chat() for v in (vlm, reference)]
    turns = ((QUESTION, PICTURE), ("Why?", None), ("And here?", PICTURE[:, ::-1].copy()))
    for question, pictures in turns:
        found, expected = (chat.ask(question, pictures, max_tokens=5).ids for chat in chats)
        assert found == expected
    assert bool(device.cuda._launches) == (form == "fixed")


def test_a_failed_answer_leaves_no_poison(device: Device, plans: dict[str, Path]) -> None:
    vlm = VLM.load(plans["fixed"])
    expected = vlm.generate(PICTURE, QUESTION, max_tokens=6).ids
    (state,) = vlm._states.free
    rows = state.cache.read_rows(1, 0, state.cache.length)
    state.cache.write_rows(1, 0, np.full_like(rows, np.nan))
    with pytest.raises(EngineError, match="not finite"):
        vlm.generate(PICTURE, "How many people are there?")
    assert vlm.generate(PICTURE, QUESTION, max_tokens=6).ids == expected


# Vision encoder and projector.


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_graphs_run_any_number_of_pictures(
    device: Device, plans: dict[str, Path], count: int
) -> None:
    """Of which a plan takes 4 at once."""
    path = plans["append"]
    reference = OrtBackend(Bundle.load(path), ONE_THREAD)
    backend = device.open(path)
    array = np.random.default_rng(4).normal(size=(count, 3, 32, 32)).astype(np.float32)
    for name in ("vision_encoder", "projector"):
        graph = backend.open_graph(name)
        assert graph.name == name
        found, expected = graph.run(array), reference.open_graph(name).run(array)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        kept = found.copy()
        graph.run(array[:1] + 1)
        np.testing.assert_array_equal(found, kept)  # the caller's own
        array = expected


def test_floats_are_cast_and_pixels_are_not(
    device: Device, tiny: TinyModel, tiny_half: TinyModel, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(2).normal(size=(1, 3, 32, 32)).astype(np.float32)
    half = with_plans(tiny_half.path, tmp_path / "half")
    graph = device.open(half).open_graph("vision_encoder")
    reference = OrtBackend(Bundle.load(half), ONE_THREAD).open_graph("vision_encoder")
    found = graph.run(pixels)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, reference.run(pixels))
    edits = {"vision_encoder": take_raw_pixels}
    raw = with_plans(derive_bundle(tiny.path, tmp_path / "r", edits), tmp_path / "raw")
    takes_pixels = device.open(raw).open_graph("vision_encoder")
    picture = np.full((1, 3, 32, 32), 9, np.uint8)
    assert takes_pixels.run(picture).shape == (1, 16, 32)
    for session, array in ((graph, picture), (takes_pixels, pixels)):
        with pytest.raises(
            EngineError, match=r"'vision_encoder' takes \w+, but \w+ was given"
        ):
            session.run(array)


@pytest.mark.parametrize("shape", [(1, 3, 7, 7), (0, 3, 32, 32), (3, 32, 32)])
def test_other_shapes_are_refused(
    device: Device, plans: dict[str, Path], shape: tuple[int, ...]
) -> None:
    graph = device.open(plans["append"]).open_graph("vision_encoder")
    with pytest.raises(EngineError, match=r"takes batches of \[3, 32, 32\], but"):
        graph.run(np.zeros(shape, np.float32))


def test_a_plan_with_other_tensors_is_no_graph(device: Device, plans: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match="'decoder' has 6 inputs and 5 outputs, but one"):
        device.open(plans["append"]).open_graph("decoder")


# Which backend is taken.


def test_backends_are_named_as_the_runtimes_of_targets() -> None:
    assert BACKENDS.keys() == RUNTIME_TITLES.keys()
    assert BACKENDS.keys() - PLAN_BACKENDS == {"onnxruntime"}


def test_plans_are_run_where_they_can_be(
    device: Device, plans: dict[str, Path], tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_them, without = Bundle.load(plans["append"]), Bundle.load(tiny.path)
    assert choose_backend(with_them) == "tensorrt"
    assert choose_backend(without) == "onnxruntime"
    monkeypatch.setattr(choose_backend_module(), "probe_gpu", lambda: NO_GPU)
    assert choose_backend(with_them) == "onnxruntime"
    other = GpuInfo("RTX 3090", (8, 6), None)
    monkeypatch.setattr(choose_backend_module(), "probe_gpu", lambda: other)
    assert choose_backend(with_them) == "onnxruntime"


def choose_backend_module() -> object:
    return sys.modules[choose_backend.__module__]


@pytest.mark.parametrize("given", [{"provider": "cpu"}, {"threads": 1}])
def test_options_of_onnxruntime_choose_it(
    device: Device, plans: dict[str, Path], given: dict[str, object]
) -> None:
    vlm = VLM.load(plans["append"], **given)
    assert isinstance(vlm._states._decoder, OrtDecoder)


def test_the_bundle_without_plans_runs_as_before(device: Device, tiny: TinyModel) -> None:
    assert isinstance(VLM.load(tiny.path)._states._decoder, OrtDecoder)


# What is said where plans cannot be run.


@pytest.fixture
def bundle(plans: dict[str, Path]) -> Bundle:
    return Bundle.load(plans["append"], verify=False)


@pytest.mark.parametrize("options", [BackendOptions("cpu"), BackendOptions("cuda", 2)])
def test_options_of_another_backend(
    device: Device, bundle: Bundle, options: BackendOptions
) -> None:
    with pytest.raises(InputError, match="leave out the number of threads and any provider"):
        open_backend(bundle, "tensorrt", options)


def test_a_target_without_engines(device: Device, tiny: TinyModel) -> None:
    with pytest.raises(InputError, match="for target 'cpu', which has no TensorRT plans"):
        VLM.load(tiny.path, backend="tensorrt")


def test_no_gpu(device: Device, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_session, "probe_gpu", lambda: NO_GPU)
    with pytest.raises(EngineError, match=r"there is no NVIDIA driver .*provider 'cpu'"):
        VLM.load(bundle.path, backend="tensorrt")


def test_no_plans(device: Device, tiny: TinyModel, tmp_path: Path) -> None:
    path = derive_bundle(tiny.path, tmp_path / "bundle", target="orin")
    message = rf"(?s)decoder: missing, not built yet\n.* with `mvlm build {path}`"
    with pytest.raises(EngineError, match=message):
        VLM.load(path, backend="tensorrt")


def test_plans_of_another_tensorrt(device: Device, bundle: Bundle) -> None:
    device.trt.__version__ = "10.16.1"
    with pytest.raises(
        EngineError, match=r"foreign, .* of orin-trt10.3.0-sm87 .* TensorRT 10.16"
    ):
        TrtBackend(bundle, ON_GPU)


def change_record(path: Path, change: Callable[[dict], None]) -> Bundle:
    (file,) = (path / ENGINES).glob(f"*/{BUILD_FILE}")
    record = read_json(file)
    change(record["plans"])
    write_json(file, record)
    return Bundle.load(path, verify=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda plans: plans["decoder"]["key"].update(graph="0" * 64),
        lambda plans: plans["decoder"].pop("key"),
    ],
)
def test_plans_of_other_graphs(
    device: Device, bundle: Bundle, tmp_path: Path, change: Callable[[dict], None]
) -> None:
    altered = change_record(copy_of(bundle.path, tmp_path / "bundle"), change)
    with pytest.raises(EngineError, match=r"(?s)decoder: stale, .*mvlm build"):
        TrtBackend(altered, ON_GPU)


def test_damaged_plans(device: Device, bundle: Bundle, tmp_path: Path) -> None:
    path = copy_of(bundle.path, tmp_path / "bundle")
    (plan,) = path.glob(f"{ENGINES}/*/projector.plan")
    plan.write_bytes(b"no plan")
    with pytest.raises(EngineError, match=r"(?s)projector.plan is damaged.*mvlm build"):
        VLM.load(path)

    def vouch(plans: dict) -> None:
        plans["projector"]["sha256"] = sha256_of(plan)

    backend = TrtBackend(change_record(path, vouch), ON_GPU)
    message = r"TensorRT 10.3.0 cannot load projector.plan: the header does not conform"
    with pytest.raises(EngineError, match=message):
        backend.open_graph("projector")
    plan.write_bytes(b"")
    with pytest.raises(EngineError, match=r"Cannot read the plan .*projector.plan"):
        backend.open_graph("projector")
    plan.unlink()
    with pytest.raises(EngineError, match=r"Cannot read the plan .*projector.plan"):
        backend.open_graph("projector")


def test_a_context_that_does_not_fit(
    device: Device, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = fake_tensorrt.ICudaEngine.create_execution_context

    def refuse(engine: fake_tensorrt.ICudaEngine) -> None:
        engine._refuses_contexts = True
        create(engine)

    monkeypatch.setattr(fake_tensorrt.ICudaEngine, "create_execution_context", refuse)
    with pytest.raises(EngineError, match=r"'decoder' in its profile 0: out of memory"):
        TrtBackend(bundle, ON_GPU).open_decoder()


def test_a_tensor_of_a_type_that_is_not_known(
    device: Device, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type("Kind", (), {"name": "BF16"})()
    monkeypatch.setattr(fake_tensorrt.ICudaEngine, "get_tensor_dtype", lambda *arguments: kind)
    with pytest.raises(EngineError, match="'input_ids' of type BF16, which this runtime"):
        TrtBackend(bundle, ON_GPU).open_decoder()


@pytest.mark.parametrize("missing", ["tensorrt", "cuda-python"])
def test_missing_packages(
    plans: dict[str, Path], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = trt_session.load_cuda
    device = pretend_device(monkeypatch)
    if missing == "tensorrt":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setattr(trt_session, "load_tensorrt", trt_api.load_tensorrt)
    else:
        for name in ("cuda", "cuda.bindings.runtime", "cuda.cudart"):
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(trt_session, "load_cuda", real)
    with pytest.raises(MissingPackageError, match=missing):
        device.open(plans["append"])


def test_a_plan_of_the_other_form_of_cache(device: Device, bundle: Bundle) -> None:
    backend = TrtBackend(bundle, ON_GPU)
    backend._kv_form = "fixed"
    with pytest.raises(BundleError, match="different: past_length"):
        backend.open_decoder()


# The stand-in of the tests is held to the real classes.


def public_names(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


@pytest.mark.parametrize("name", ["Runtime", "ICudaEngine", "IExecutionContext"])
def test_the_stand_in_has_the_methods_of_the_real_classes(name: str) -> None:
    """With the real names of their arguments."""
    trt = pytest.importorskip("tensorrt_rtx")
    fake, real = getattr(fake_tensorrt, name), getattr(trt, name)
    assert public_names(fake)
    for method in public_names(fake):
        there = getattr(real, method)
        mine = getattr(fake, method)
        if isinstance(mine, property):
            assert isinstance(there, property), method
            continue
        lines = re.findall(rf"{method}\((self: .*)\) ->", there.__doc__)
        theirs = [re.findall(r"(?:^|, )(\w+): ", line) for line in lines]
        arguments = list(inspect.signature(mine).parameters)
        assert any(given[: len(arguments)] == arguments for given in theirs), method


@pytest.mark.parametrize("name", ["TensorIOMode", "TensorLocation", "DataType"])
def test_the_stand_in_has_the_members_of_the_real_enumerations(name: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    for member in getattr(fake_tensorrt, name):
        assert getattr(trt, name).__members__[member.name].name == member.name


def test_the_runtime_uses_no_name_that_tensorrt_has_not() -> None:
    """What is called on engines and contexts is what the stand-in has, or asked for first."""
    trt = pytest.importorskip("tensorrt_rtx")
    source = inspect.getsource(sys.modules["mvlm_export.engines.trt_engine"])
    classes = {"engine": "ICudaEngine", "context": "IExecutionContext", "runtime": "Runtime"}
    used = set(re.findall(r"\b_?(engine|context|runtime)\.(\w+)\(?", source))
    called = {(owner, name) for owner, name in used if name not in OWN}
    assert len(called) > 12
    for owner, name in called:
        assert hasattr(getattr(trt, classes[owner]), name), (owner, name)
    known = {name for kind in classes.values() for name in public_names(stand_in(kind))}
    assert {name for _, name in called} - known == {"is_stream_capturable"}


OWN = {"name", "enqueue", "is_capturable"}
"""What our own ``TrtEngine`` has, behind the same word."""


def stand_in(name: str) -> type:
    kind: type = getattr(fake_tensorrt, name)
    return kind
