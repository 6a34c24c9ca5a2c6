"""Bundles with plans for the stand-ins of TensorRT and CUDA, and backends over them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from mvlm_export.engines import backends, trt_session
from mvlm_export.engines.build_options import BuildOptions
from mvlm_export.engines.bundle import BUILD_FILE, ENGINES, Bundle, sha256_of, write_json
from mvlm_export.engines.cuda_api import CudaRuntime
from mvlm_export.engines.gpu_probe import GpuInfo
from mvlm_export.engines.kv_cache import KvForm
from mvlm_export.engines.plan_key import BuilderIdentity, plan_keys
from mvlm_export.engines.plan_profiles import bundle_profiles
from mvlm_export.engines.session import BackendOptions
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_session import TrtBackend

from .bundles import derive_bundle
from .fake_cuda import FakeCuda
from .fake_tensorrt import FakeTensorrt, ICudaEngine, make_plan

ON_GPU = BackendOptions("cuda")
ORIN = GpuInfo("Orin", (8, 7), None)
VERSION = "10.3.0"
JETPACKS: dict[KvForm, int] = {"append": 6, "fixed": 7}
"""JetPacks by the form of cache that their TensorRT is given."""


def with_plans(
    source: Path,
    path: Path,
    *,
    profiles: dict[str, list[dict]] | None = None,
    host: tuple[str, ...] = (),
) -> Path:
    """A copy of a bundle, for ``orin``, with plans in it.

    Args:
        profiles: of the decoder or another graph, in place of those of a build.
        host: tensors that the decoder's plan reads on the host.
    """
    form = Bundle.load(source, verify=False).manifest.kv_form
    derive_bundle(source, path, target="orin", jetpack=JETPACKS[form])
    return add_plans(path, profiles=profiles, host=host)


def add_plans(
    path: Path,
    *,
    profiles: dict[str, list[dict]] | None = None,
    host: tuple[str, ...] = (),
) -> Path:
    """Put plans into a bundle that is for ``orin``; arguments as of :func:`with_plans`."""
    bundle = Bundle.load(path, verify=False)
    manifest = bundle.manifest
    place = get_target("orin").plan_folder(VERSION)
    folder = path / ENGINES / place
    folder.mkdir(parents=True)
    records = {}
    builder = BuilderIdentity("tensorrt", VERSION, ORIN.compute_capability)
    keys = plan_keys(manifest, builder, bundle_profiles(manifest), BuildOptions())
    for name, key in keys.items():
        ranges = [dict(spec.dims) for spec in key.profiles]
        plan = folder / f"{name}.plan"
        given = (profiles or {}).get(name, ranges)
        make_plan(plan, bundle.graph_path(name), given, host if name == "decoder" else ())
        digest = sha256_of(plan)
        records[name] = {"plan_path": plan.name, "sha256": digest, "key": key.to_json()}
    record = {"folder": place, "target": "orin", "tensorrt_version": VERSION, "plans": records}
    write_json(folder / BUILD_FILE, record)
    return path


@dataclass
class Device:
    """A machine with the stand-ins in place of a GPU."""

    cuda: FakeCuda
    trt: FakeTensorrt

    def engine(self, index: int = -1) -> ICudaEngine:
        """One of the engines loaded so far."""
        return self.trt._engines[index]

    def open(self, path: Path) -> TrtBackend:
        return TrtBackend(Bundle.load(path, verify=False), ON_GPU)


def pretend_device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Let the runtime find an Orin with TensorRT 10.3."""
    cuda = FakeCuda()
    trt = FakeTensorrt(cuda, VERSION)
    for module in (trt_session, backends):
        monkeypatch.setattr(module, "probe_gpu", lambda: ORIN)
    monkeypatch.setattr(trt_session, "load_tensorrt", lambda kind: trt)
    monkeypatch.setattr(trt_session, "load_cuda", lambda: CudaRuntime(cuda))
    return Device(cuda, trt)


def copy_of(source: Path, path: Path) -> Path:
    shutil.copytree(source, path)
    return path
