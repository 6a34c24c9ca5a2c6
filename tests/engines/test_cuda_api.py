"""CUDA's functions: found, checked, and the stand-in of the tests held to the real ones."""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mvlm_export.engines import cuda_api
from mvlm_export.engines.cuda_api import CUDA_MODULES, CudaRuntime, load_cuda
from mvlm_export.engines.device_memory import CudaMemory
from mvlm_export.engines.errors import EngineError, MissingPackageError
from mvlm_export.engines.gpu_probe import probe_gpu

from .fake_cuda import FakeCuda, cudaError_t

ENGINES = Path(cuda_api.__file__).parent


def names_used() -> set[str]:
    """CUDA's names in the text of the runtime: functions, and constants by dotted path."""
    found = set()
    for file in ENGINES.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r"cuda[A-Z]\w*(\.\w+)?", text):
                found.add(text)
    return {name for name in found if not name.startswith("cudaError")}


def resolve(module: object, path: str) -> object:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def test_values_come_without_their_status() -> None:
    module = SimpleNamespace(
        nothing=lambda: (0,), one=lambda size: (0, size), two=lambda: (0, 1, 2)
    )
    cuda = CudaRuntime(module)
    assert cuda.call("nothing") is None
    assert cuda.call("one", 5) == 5
    assert cuda.call("two") == (1, 2)


@pytest.mark.parametrize(
    ("status", "cure"),
    [
        ("cudaErrorInsufficientDriver", r"cuda-python>=12.6,<13.*JetPack 6"),
        ("cudaErrorMemoryAllocation", "no memory left.*--max-length"),
        ("cudaErrorIllegalAddress", "by a new process.*mvlm build"),
    ],
)
def test_an_error_has_its_name_and_a_cure(status: str, cure: str) -> None:
    fake = FakeCuda()
    fake._fail("cudaMalloc", cudaError_t[status])
    message = rf"cudaMalloc failed with {status} \(what went wrong\)\. .*{cure}"
    with pytest.raises(EngineError, match=message):
        CudaRuntime(fake).call("cudaMalloc", 8)


def test_what_is_given_back_raises_nothing() -> None:
    fake = FakeCuda()
    cuda = CudaRuntime(fake)
    address = cuda.call("cudaMalloc", 8)
    fake._fail("cudaFree", cudaError_t.cudaErrorIllegalAddress)
    cuda.release("cudaFree", address)


@pytest.mark.parametrize("present", CUDA_MODULES)
def test_either_module_will_do(monkeypatch: pytest.MonkeyPatch, present: str) -> None:
    def load(name: str) -> object:
        if name != present:
            raise ImportError(f"No module named {name!r}")
        return SimpleNamespace(here=lambda: (0, name))

    monkeypatch.setattr(importlib, "import_module", load)
    assert load_cuda().call("here") == present


def test_without_cuda_python_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    for name in CUDA_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"'cuda-python', which .*JetPack 6.*>=13"):
        load_cuda()


def test_the_stand_in_has_what_the_runtime_uses() -> None:
    used = names_used()
    assert {"cudaMalloc", "cudaGraphLaunch", "cudaMemcpyKind.cudaMemcpyDeviceToHost"} <= used
    for name in used:
        resolve(FakeCuda(), name)


def test_the_stand_in_is_as_the_real_module() -> None:
    """Functions with the arguments of the real ones, constants with their numbers."""
    real = pytest.importorskip("cuda.bindings.runtime")
    for name in names_used():
        resolve(real, name)
    for name, value in vars(FakeCuda).items():
        if not name.startswith("cuda"):
            continue
        if inspect.isfunction(value):
            first_line = getattr(real, name).__doc__.strip().splitlines()[0]
            arguments = re.search(r"\((.*)\)", first_line)[1].split(", ")
            theirs = [text.split(":")[0].split()[-1] for text in arguments if text]
            assert list(inspect.signature(value).parameters)[1:] == theirs, name
        elif inspect.isclass(value):
            numbers = {member.name: int(member) for member in value}
            assert numbers == {n: int(getattr(getattr(real, name), n)) for n in numbers}
        else:
            assert value == getattr(real, name)


class BothModules:
    """The stand-in, each of whose calls is made to the real module first.

    Without a driver the real one refuses to work, but only behind the reading of its
    arguments.
    """

    def __init__(self, real: object) -> None:
        self._real, self._fake = real, FakeCuda()
        self.refused: set[str] = set()

    def __getattr__(self, name: str) -> object:
        real, fake = getattr(self._real, name), getattr(self._fake, name)
        if not inspect.isfunction(getattr(FakeCuda, name, None)):
            return real

        def call(*arguments: object) -> object:
            status = real(*arguments)[0]
            if int(status) == 35:
                self.refused.add(name)
            return fake(*arguments)

        return call


@pytest.mark.skipif(probe_gpu().present, reason="the addresses are not those of this GPU")
def test_the_real_module_takes_the_arguments_that_it_is_given() -> None:
    both = BothModules(pytest.importorskip("cuda.bindings.runtime"))
    memory = CudaMemory(CudaRuntime(both))
    array = memory.allocate_staging([2, 3], "float32")
    buffer = memory.allocate(1024)
    for pitch in (None, 64):
        memory.upload(buffer.address, array, pitch)
        memory.download(array, buffer.address, pitch)
    memory.copy(buffer.address, buffer.address + 256, 16)
    memory.capture(lambda: memory.zero(buffer.address, 8)).launch()
    memory.synchronize()
    with pytest.raises(EngineError):
        memory.capture(lambda: memory.allocate(8) and None)
    del array
    first, buffer = buffer, memory.allocate(8)
    del first
    gc.collect()
    functions = {name for name in names_used() if "." not in name} - {"cudaStreamNonBlocking"}
    # These say why a call failed, or give back, at the end, what no call of the real gave.
    assert functions - both.refused <= {
        "cudaGetErrorName",
        "cudaGetErrorString",
        "cudaGetLastError",
        "cudaStreamDestroy",
    }
