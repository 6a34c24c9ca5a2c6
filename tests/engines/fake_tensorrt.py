"""TensorRT's runtime classes over ONNX Runtime, with the names of ``tensorrt`` 10.3.

A plan is JSON: the ONNX file, the ranges of its profiles, and the tensors whose values are
read on the host. What TensorRT refuses is refused: a shape outside the profile, an address
that is null or no multiple of 256, a run with something not set, and a capture right behind a
change of shape or address. Runs read and write at raw addresses, on the fake CUDA's queue.
"""

from __future__ import annotations

import enum
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime

from .fake_cuda import FakeCuda

_TYPES = {
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
}
_NUMPY = {"FLOAT": "f4", "HALF": "f2", "INT32": "i4", "INT64": "i8", "UINT8": "u1"}


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    def log(self, severity, msg):
        raise NotImplementedError


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


DataType = enum.Enum("DataType", list(_NUMPY))


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


def make_plan(path: Path, onnx_path: Path, profiles: list[dict], host: tuple = ()) -> bytes:
    """Write a plan; a profile is (min, opt, max) by dimension name."""
    plan = json.dumps({"onnx": str(onnx_path), "profiles": profiles, "host": host}).encode()
    path.write_bytes(plan)
    return plan


class Runtime:
    def __init__(self, logger, module):
        self._logger, self._module = logger, module

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self._logger.log(Severity.ERROR, "the header does not conform")
            return None
        engine = ICudaEngine(plan, self._module._cuda, self._logger)
        self._module._engines.append(engine)
        return engine


class ICudaEngine:
    def __init__(self, plan, cuda, logger):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self._session = onnxruntime.InferenceSession(plan["onnx"], options)
        self._inputs = {t.name: t for t in self._session.get_inputs()}
        self._all = {**self._inputs, **{t.name: t for t in self._session.get_outputs()}}
        self._plan, self._cuda, self._logger = plan, cuda, logger
        self._contexts: list[IExecutionContext] = []
        self._refuses_contexts = False

    @property
    def num_io_tensors(self):
        return len(self._all)

    @property
    def num_optimization_profiles(self):
        return len(self._plan["profiles"])

    def get_tensor_name(self, index):
        return list(self._all)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType[_TYPES[self._all[name].type]]

    def get_tensor_location(self, name):
        return TensorLocation.HOST if name in self._plan["host"] else TensorLocation.DEVICE

    def get_tensor_shape(self, name):
        return tuple(d if isinstance(d, int) else -1 for d in self._all[name].shape)

    def get_tensor_profile_shape(self, name, profile_index):
        ranges = self._plan["profiles"][profile_index]
        shape = self._inputs[name].shape
        return [
            tuple(d if isinstance(d, int) else ranges[d][which] for d in shape)
            for which in range(3)
        ]

    def create_execution_context(self):
        if self._refuses_contexts:
            self._logger.log(Severity.ERROR, "out of memory")
            return None
        self._contexts.append(IExecutionContext(self))
        return self._contexts[-1]


class IExecutionContext:
    def __init__(self, engine):
        self._engine = engine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._settled = False
        self._failing = False
        self._runs: list[SimpleNamespace] = []

    def _refuse(self, text):
        self._engine._logger.log(Severity.ERROR, text)
        return False

    def set_optimization_profile_async(self, profile_index, stream_handle):
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._refuse("no such profile")
        self._profile, self._shapes = profile_index, {}
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = len(low) == len(shape)
        if not fits or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._refuse(f"{name} {shape} is outside the profile {low} to {high}")
        self._shapes[name], self._settled = tuple(shape), False
        return True

    def set_tensor_address(self, name, memory):
        if name not in self._engine._all or memory == 0 or memory % 256:
            return self._refuse(f"address {memory} of {name}")
        self._addresses[name], self._settled = memory, False
        return True

    def _sizes(self):
        sizes = {}
        for name, tensor in self._engine._inputs.items():
            for dim, size in zip(tensor.shape, self._shape_of_input(name), strict=True):
                sizes.setdefault(dim, size)
        return sizes

    def _shape_of_input(self, name):
        shape = self._engine.get_tensor_shape(name)
        return self._shapes.get(name, shape)

    def get_tensor_shape(self, name):
        if name in self._engine._inputs:
            return self._shape_of_input(name)
        sizes = self._sizes()
        return tuple(
            d if isinstance(d, int) else sizes.get(d, -1)
            for d in self._engine._all[name].shape
        )

    def execute_async_v3(self, stream_handle):
        engine, cuda = self._engine, self._engine._cuda
        shapes = {name: self.get_tensor_shape(name) for name in engine._all}
        unset = [n for n, s in shapes.items() if -1 in s or n not in self._addresses]
        if unset or self._profile is None or stream_handle != 7001:
            return self._refuse(f"not set: {unset}")
        if self._failing:
            return self._refuse("the kernel cannot be launched")
        if cuda._capture is not None and not self._settled:
            return self._refuse("captured before a run with these shapes")
        self._settled = True
        run = SimpleNamespace(shapes=shapes, addresses=dict(self._addresses))
        self._runs.append(run)
        cuda._enqueue(lambda: self._compute(run))
        return True

    def _compute(self, run):
        engine, cuda = self._engine, self._engine._cuda
        binding = engine._session.io_binding()
        for name, shape in run.shapes.items():
            dtype, address = np.dtype(_NUMPY[engine.get_tensor_dtype(name).name]), None
            address = run.addresses[name]
            on_host = engine.get_tensor_location(name) == TensorLocation.HOST
            space = cuda._host if on_host else cuda._device
            space.check(address, math.prod(shape) * dtype.itemsize)
            bind = binding.bind_input if name in engine._inputs else binding.bind_output
            bind(name, "cpu", 0, dtype.type, shape, address)
        engine._session.run_with_iobinding(binding)


class FakeTensorrt:
    """The module, over one fake CUDA; ``_engines`` are those loaded so far."""

    ILogger = ILogger
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation
    NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag

    def __init__(self, cuda: FakeCuda, version: str = "10.3.0") -> None:
        self.__version__ = version
        self._cuda = cuda
        self._engines: list[ICudaEngine] = []

    def Runtime(self, logger):
        return Runtime(logger, self)
