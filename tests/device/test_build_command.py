"""``mvlm build`` as a device has it: no torch, onnx or ONNX Runtime, in no process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.manifest import GRAPHS
from tests.engines.processes import children_of, wait_until
from tests.engines.test_trtexec import read_back

from .small_bundle import write_small_bundle

ROOT = Path(__file__).resolve().parents[2]
REFUSED = ("torch", "onnx", "onnxruntime", "onnx_graphsurgeon", "onnx_ir", "ml_dtypes")
HOOK = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {REFUSED!r}:
            raise ModuleNotFoundError(f"{{name}} must not be imported here", name=name)

sys.meta_path.insert(0, Refuse())
"""
"""As sitecustomize.py on PYTHONPATH it is loaded by every Python, workers too."""

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(HOOK)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture
def bundle(tmp_path):
    return write_small_bundle(tmp_path / "my bundle")


def python(environment, code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def mvlm(environment, *arguments):
    code = "from mvlm_export.exporter.cli.main import main; main()"
    return python(environment, code, *arguments)


@pytest.mark.parametrize("package", REFUSED)
def test_the_hook_refuses(environment, package):
    ran = python(environment, f"import {package}")
    assert ran.returncode == 1
    assert "must not be imported here" in ran.stderr


def test_build_keep_rebuild(environment, bundle):
    first = mvlm(environment, "build", bundle.path)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("building (missing: not built yet)") == 3
    (record,) = Bundle.load(bundle.path).engines().values()
    assert set(record["plans"]) == set(GRAPHS)
    lines = [line for line in first.stdout.splitlines() if line.startswith("trtexec")]
    found = [read_back(line) for line in lines]
    graphs = [options["--onnx"] for options, _ in found]
    assert graphs == [str(bundle.path / f"{name}/model.onnx") for name in GRAPHS]
    assert found[2][1][1]["input_ids"] == ((1,), (1,), (2,))

    second = mvlm(environment, "build", bundle.path)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("kept (fresh: already built)") == 3
    assert second.stdout.count("already built") == 3
    (kept,) = Bundle.load(bundle.path).engines().values()
    assert kept == record

    options = ("--workspace-mb", "64", "--optimization-level", "1", "--json")
    third = mvlm(environment, "build", bundle.path, *options)
    assert third.returncode == 0, third.stderr
    assert "its options were TensorRT's own, they would be" in third.stderr
    printed = json.loads(third.stdout)
    assert printed["built"] == sorted(GRAPHS)
    assert printed["before"]["decoder"]["status"] == "stale"
    assert printed["plans"]["decoder"]["options"] == {
        "workspace_bytes": 64 << 20,
        "optimization_level": 1,
    }
    assert printed["plans"]["decoder"]["peak_memory"] > 50e6

    forced = mvlm(environment, "build", bundle.path, *options, "--force")
    again = json.loads(forced.stdout)
    assert again["built"] == sorted(GRAPHS)
    assert {name: plan["plan_bytes"] for name, plan in again["plans"].items()} == {
        name: plan["plan_bytes"] for name, plan in printed["plans"].items()
    }


def test_a_damaged_plan_alone_is_built_again(environment, bundle):
    assert mvlm(environment, "build", bundle.path).returncode == 0
    (plan,) = bundle.path.glob("engines/*/projector.plan")
    plan.write_bytes(plan.read_bytes()[:64])
    ran = mvlm(environment, "build", bundle.path, "--json")
    assert ran.returncode == 0, ran.stderr
    assert "projector: building (stale: projector.plan is damaged" in ran.stderr
    assert json.loads(ran.stdout)["built"] == ["projector"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing(environment, bundle, number):
    code = "from mvlm_export.exporter.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "build", str(bundle.path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert wait_until(lambda: children_of(process.pid))
    (worker,) = children_of(process.pid)
    time.sleep(0.3)
    os.killpg(process.pid, number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "interrupted; nothing half-made is left" in printed
    assert "Traceback" not in printed
    assert wait_until(lambda: not Path(f"/proc/{worker}").exists())
    assert not (bundle.path / "engines").exists()
    Bundle.load(bundle.path)


def test_a_killed_worker_is_one_message(environment, bundle):
    code = "from mvlm_export.exporter.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "build", str(bundle.path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert wait_until(lambda: children_of(process.pid))
    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 2, printed
    assert re.search(r"Error: The process that builds from .* \(SIGKILL\)", printed)
    assert "Traceback" not in printed
    assert not (bundle.path / "engines").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--workspace-mb", "0"), "0 is not in the range"),
        (("--optimization-level", "6"), "6 is not in the range"),
    ],
)
def test_options_that_cannot_be(environment, bundle, options, words):
    ran = mvlm(environment, "build", bundle.path, *options)
    assert ran.returncode == 2
    assert words in ran.stderr
    assert not (bundle.path / "engines").exists()
