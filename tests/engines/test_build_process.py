"""Builds in processes of their own: reproducible, watched, nothing left whatever ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from mvlm_export.engines import build_process, trt_builder
from mvlm_export.engines.build_process import WorkerCrashError, build_engine
from mvlm_export.engines.errors import EngineError, InputError, MissingPackageError
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_builder import BuildOptions, ProfileSpec, decoder_profiles
from mvlm_export.engines.trt_diagnostics import BuildFailedError

from .processes import children_of, offer_tensorrt_10_3, wait_until, worker
from .trt_graphs import (
    ROWS,
    RTX,
    leftovers,
    save,
    save_append_attention,
    save_bad_reshape,
    save_relu,
    value,
    without_images,
)

PROFILE = ProfileSpec("p", {"S": (1, 2, 4)})
SM86 = (8, 6)
PARENT = """
import sys
from pathlib import Path
from mvlm_export.engines.build_process import build_engine
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_builder import ProfileSpec

def wait(progress):
    print("building", flush=True)
    sys.stdin.read()

path = Path(sys.argv[1])
profile = ProfileSpec("p", {"S": (1, 2, 4)})
plan, rtx = path.with_suffix(".plan"), get_target("rtx")
build_engine(path, plan, [profile], target=rtx, progress=wait)
"""


def build(path, profiles=(PROFILE,), **options):
    plan = path.with_suffix(".plan")
    options = {"target": RTX, "compute_capability": SM86, **options}
    return build_engine(path, plan, profiles, **options)


def hash_of(path):
    return sha256(path.read_bytes()).hexdigest()


# What comes out


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    """On a busy machine a few dozen bytes can differ; so a hash must come again soon."""
    path = save_append_attention(tmp_path / "decoder.onnx")
    profiles = without_images(decoder_profiles(ROWS, 1, "fp16"))
    results, hashes = [], set()
    for _ in range(6):
        results.append(build(path, profiles))
        digest = hash_of(results[-1].plan_path)
        if digest in hashes:
            break
        hashes.add(digest)
    assert len(hashes) < len(results)
    assert len({result.plan_bytes for result in results}) == 1


def test_in_one_process_it_would_not(tmp_path):
    """The test above can fail: TensorRT's names go on counting in a process."""
    path = save_append_attention(tmp_path / "decoder.onnx")
    profiles = without_images(decoder_profiles(ROWS, 1, "fp16"))
    hashes = set()
    for _ in range(4):
        plan = tmp_path / "decoder.plan"
        trt_builder.build_engine(path, plan, profiles, target=RTX, compute_capability=SM86)
        hashes.add(hash_of(plan))
    assert len(hashes) > 1


def test_progress_and_figures_come_back(tmp_path):
    path = save_append_attention(tmp_path / "decoder.onnx")
    reports, threads = [], set()

    def report(progress):
        reports.append(progress)
        threads.add(threading.current_thread())

    ballast = np.ones(1 << 26)  # 512 MiB: the figure is the worker's, not this process's
    profiles = without_images(decoder_profiles(ROWS, 1, "fp16"))
    result = build(path, profiles, progress=report, options=BuildOptions(1 << 24, 2))
    assert ballast.nbytes > result.peak_memory > 50e6
    assert result.seconds > 0
    assert threads == {threading.main_thread()}
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len(set(fractions)) > 3
    assert result.plan_bytes == result.plan_path.stat().st_size > 10_000
    assert result.options == BuildOptions(1 << 24, 2)
    assert result.shapes["decode"]["past_k"] == ((0, 2, 32), (16, 2, 32), (63, 2, 32))
    assert build_process.BuildResult.from_json(result.to_json(), result.plan_path) == result
    assert leftovers(tmp_path) == ["decoder.plan"]


def test_the_process_is_gone_afterwards(tmp_path):
    build(save_relu(tmp_path / "m.onnx"))
    assert children_of(os.getpid()) == []


def test_paths_may_be_relative(tmp_path, monkeypatch):
    save_relu(tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    result = build(Path("m.onnx"))
    assert result.plan_path == tmp_path / "m.plan"
    assert leftovers(tmp_path) == ["m.plan"]


# Errors of the build come through as they are


def test_a_parser_error_keeps_its_words(tmp_path):
    nodes = [helper.make_node("Swoosh", ["x"], ["y"], name="/layer3/act")]
    path = save(tmp_path / "m.onnx", nodes, [value("x", ["S", 8])], [value("y", ["S", 8])])
    with pytest.raises(EngineError, match=r"node 0, Swoosh '/layer3/act'") as caught:
        build(path)
    assert not isinstance(caught.value, BuildFailedError)
    assert leftovers(tmp_path) == []


def test_a_failed_build_keeps_tensorrts_words_and_the_older_plan(tmp_path):
    path = save_bad_reshape(tmp_path / "m.onnx")
    (tmp_path / "m.plan").write_bytes(b"older")
    with pytest.raises(BuildFailedError) as caught:
        build(path)
    assert not isinstance(caught.value, WorkerCrashError)
    (text,) = caught.value.errors
    assert "reshape would change volume" in text
    assert (tmp_path / "m.plan").read_bytes() == b"older"
    assert leftovers(tmp_path) == ["m.plan"]


def test_a_missing_package_is_a_missing_package(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tensorrt.py").write_text("raise ImportError('no libnvinfer.so')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    path = save_relu(tmp_path / "m.onnx")
    with pytest.raises(MissingPackageError, match="no libnvinfer"):
        build(path, target=get_target("orin"))


def test_a_target_without_engines(tmp_path):
    with pytest.raises(InputError, match="builds no engines"):
        build(save_relu(tmp_path / "m.onnx"), target=get_target("cpu"))


def test_a_plan_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    path = save_relu(tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="Cannot write"):
        build_engine(path, tmp_path / "file" / "m.plan", [PROFILE], target=RTX)


# Whatever ends it, nothing half-made is left


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, r"SIGKILL\): most often Linux ran out of memory"),
        (signal.SIGSEGV, r"SIGSEGV\): this is a fault of TensorRT"),
        (signal.SIGABRT, r"SIGABRT\): this is a fault of TensorRT"),
        (signal.SIGTERM, r"SIGTERM\): something sent it this signal"),
        (signal.SIGINT, r"SIGINT\): something sent it this signal"),
    ],
)
def test_a_worker_that_a_signal_ends(tmp_path, number, words):
    path = save_append_attention(tmp_path / "decoder.onnx")
    (tmp_path / "decoder.plan").write_bytes(b"older")
    sent = []

    def end_it(progress):
        if not sent:
            sent.append(number)
            os.kill(worker(), number)

    with pytest.raises(WorkerCrashError, match=words) as caught:
        build(path, without_images(decoder_profiles(ROWS, 1, "fp16")), progress=end_it)
    assert " ended during '" in str(caught.value)
    assert "Nothing half-made is left" in str(caught.value)
    assert caught.value.errors == (f"crash: {number.name}",)
    assert (tmp_path / "decoder.plan").read_bytes() == b"older"
    assert leftovers(tmp_path) == ["decoder.plan"]


def test_what_a_crashed_worker_printed_is_shown(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tensorrt.py").write_text(
        "import os, sys\nprint('libnvinfer: corrupted size', flush=True)\nos._exit(3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(WorkerCrashError, match=r"(?s)exit code 3\).*corrupted size"):
        build(save_relu(tmp_path / "m.onnx"), target=get_target("orin"))


def test_a_python_that_does_not_start(tmp_path, monkeypatch):
    path = save_relu(tmp_path / "m.onnx")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(EngineError, match="cannot be started"):
        build(path)
    assert leftovers(tmp_path) == []


def test_a_python_without_the_package(tmp_path, monkeypatch):
    path = save_relu(tmp_path / "m.onnx")
    monkeypatch.setattr(build_process, "WORKER", "mvlm_export.no_such_module")
    with pytest.raises(WorkerCrashError, match=r"(?s)before TensorRT began.*no_such_module"):
        build(path)


def test_a_worker_that_is_gone_before_it_is_asked(tmp_path, monkeypatch):
    """What could not be sent is not tried again when the pipe is closed."""
    start = build_process._start

    def start_and_wait(printed):
        child = start(printed)
        child.wait()
        return child

    monkeypatch.setattr(build_process, "WORKER", "mvlm_export.no_such_module")
    monkeypatch.setattr(build_process, "_start", start_and_wait)
    with pytest.raises(WorkerCrashError, match=r"(?s)before TensorRT began.*no_such_module"):
        build(save_relu(tmp_path / "m.onnx"))


def test_an_error_of_the_callback_ends_the_worker(tmp_path):
    class CallbackError(Exception):
        pass

    def report(progress):
        raise CallbackError(progress.phase)

    with pytest.raises(CallbackError):
        build(save_relu(tmp_path / "m.onnx"), progress=report)
    assert children_of(os.getpid()) == []
    assert leftovers(tmp_path) == []


def test_ctrl_c_ends_the_worker_and_passes_on(tmp_path):
    def interrupt(progress):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(save_relu(tmp_path / "m.onnx"), progress=interrupt)
    assert children_of(os.getpid()) == []
    assert leftovers(tmp_path) == []


def test_a_worker_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(build_process, "_GRACE", 0.2)

    def stop_it(progress):
        os.kill(worker(), signal.SIGSTOP)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(save_relu(tmp_path / "m.onnx"), progress=stop_it)
    assert children_of(os.getpid()) == []
    assert leftovers(tmp_path) == []


def start_parent(path):
    """Another Python that builds and waits in the middle; with its worker."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, os.fspath(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout.readline() == "building\n"
    (child,) = children_of(parent.pid)
    return parent, child


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_ctrl_c_in_the_terminal(tmp_path):
    """A terminal sends SIGINT to the whole foreground group: the worker is not in it."""
    parent, child = start_parent(save_relu(tmp_path / "m.onnx"))
    os.killpg(parent.pid, signal.SIGINT)
    _, printed = parent.communicate(timeout=30)
    assert parent.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in printed
    assert is_gone(child)
    assert leftovers(tmp_path) == []


def test_a_worker_ends_with_its_parent(tmp_path):
    parent, child = start_parent(save_relu(tmp_path / "m.onnx"))
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate(timeout=30)
    assert wait_until(lambda: is_gone(child))
    assert "m.plan" not in leftovers(tmp_path)


# The timing cache of TensorRT 10.3, by a package with its names alone


def test_the_timing_cache_goes_in_and_out(tmp_path, monkeypatch):
    offer_tensorrt_10_3(tmp_path, monkeypatch)
    (tmp_path / "here").mkdir()
    path, cache = save_relu(tmp_path / "here" / "m.onnx"), tmp_path / "here" / "timing.cache"
    profiles = decoder_profiles(2048, 144, "fp16")
    for_orin = {"target": get_target("orin"), "compute_capability": None}
    for stored in (b"timings:", b"timings:timings:"):
        build(path, profiles, timing_cache=cache, **for_orin)
        assert cache.read_bytes() == stored
    assert (tmp_path / "here" / "m.plan").read_bytes() == b"a plan of TensorRT 10.3"
    assert leftovers(tmp_path / "here") == ["m.plan", "timing.cache"]
