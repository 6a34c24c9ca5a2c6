"""Plans run by ``tensorrt`` 10.3 to 11 or ``tensorrt_rtx``: the engine behind the sessions.

Each profile has an execution context of its own. A context that switched between profiles
would copy what it keeps for them, and work captured in one would not be valid in the other;
a second context costs its scratch memory.

Not run on a GPU yet: the tests run it over a stand-in for TensorRT's classes that computes
with ONNX Runtime (tests/engines/fake_tensorrt.py).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

from .device_memory import ALIGNMENT, CudaMemory
from .engine_runner import EngineTensor, Shape, ShapeLimits
from .errors import EngineError
from .trt_api import LogRecord, TensorRT, TrtObject, tensorrt_log, without_noise

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
}
"""numpy's names of the element types that inputs and outputs have, by TensorRT's."""


class TrtEngine:
    """A plan, loaded; see :class:`Engine`.

    Args:
        trt: the package that built the plan.
        name: of the graph.
        path: of the plan.
        memory: where it runs.

    Raises:
        EngineError: TensorRT refuses the plan, or a tensor has a type that is not known.
    """

    def __init__(self, trt: TensorRT, name: str, path: Path, memory: CudaMemory) -> None:
        self.name = name
        self._trt = trt
        self._memory = memory
        self._log = tensorrt_log(trt)
        # TensorRT wants the runtime to live as long as its engines.
        self._runtime = trt.Runtime(self._log.logger)
        with self._log.collecting() as records:
            self._engine = self._load(path)
        if self._engine is None:
            raise EngineError(
                f"TensorRT {trt.__version__} cannot load {path.name}: {_errors_of(records)} "
                "Plans run on the kind of GPU and the TensorRT that built them; build them "
                "again with `mvlm build`."
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.tensors: Mapping[str, EngineTensor] = {n: self._describe(n) for n in names}

    def _load(self, path: Path) -> TrtObject:
        """Read from mapped pages, which the system can take back, not from a copy."""
        try:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob,
            ):
                return self._runtime.deserialize_cuda_engine(blob)
        except (OSError, ValueError) as error:
            raise EngineError(
                f"Cannot read the plan {path}: {error}. Build it again with `mvlm build`."
            ) from error

    def _describe(self, name: str) -> EngineTensor:
        trt, engine = self._trt, self._engine
        kind = engine.get_tensor_dtype(name)
        if kind.name not in _DTYPES:
            raise EngineError(
                f"The engine {self.name!r} has the tensor {name!r} of type {kind.name}, which "
                f"this runtime does not know ({', '.join(_DTYPES)}); compile the bundle again."
            )
        return EngineTensor(
            name,
            _DTYPES[kind.name],
            tuple(engine.get_tensor_shape(name)),
            engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            engine.get_tensor_location(name) == trt.TensorLocation.HOST,
        )

    @property
    def profile_count(self) -> int:
        """As :attr:`Engine.profile_count`."""
        return int(self._engine.num_optimization_profiles)

    def limits(self, name: str, profile: int) -> ShapeLimits:
        """As :meth:`Engine.limits`."""
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return ShapeLimits(tuple(low), tuple(high))

    def open_runner(self, profile: int) -> TrtRunner:
        """As :meth:`Engine.open_runner`."""
        with self._log.collecting() as records:
            context = self._engine.create_execution_context()
            chosen = context is not None and context.set_optimization_profile_async(
                profile, self._memory.stream
            )
        if not chosen:
            raise EngineError(
                f"TensorRT cannot prepare the engine {self.name!r} in its profile {profile}: "
                f"{_errors_of(records)} End other programs that use the GPU's memory, or "
                "compile the bundle with a smaller --max-length."
            )
        return TrtRunner(self, context)

    def enqueue(self, context: TrtObject) -> None:
        """Queue a run of a context on the memory's stream."""
        with self._log.collecting() as records:
            started = context.execute_async_v3(self._memory.stream)
        if not started:
            raise EngineError(
                f"TensorRT cannot run the engine {self.name!r}: {_errors_of(records)} Build "
                "the plans again with `mvlm build`."
            )

    def is_capturable(self, context: TrtObject) -> bool:
        """Whether a run may be captured; TensorRT-RTX says no while it compiles kernels."""
        if not hasattr(context, "is_stream_capturable"):
            return True  # TensorRT 10 finds out by trying
        return bool(context.is_stream_capturable(self._memory.stream))


class TrtRunner:
    """An execution context in one profile; see :class:`EngineRunner`."""

    def __init__(self, engine: TrtEngine, context: TrtObject) -> None:
        self._engine = engine
        self._context = context
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}

    @property
    def can_be_captured(self) -> bool:
        """As :attr:`EngineRunner.can_be_captured`."""
        return self._engine.is_capturable(self._context)

    def set_input_shape(self, name: str, shape: Shape) -> None:
        """As :meth:`EngineRunner.set_input_shape`."""
        if self._shapes.get(name) == shape:
            return
        if not self._context.set_input_shape(name, shape):
            raise EngineError(
                f"The engine {self._engine.name!r} does not take {list(shape)} as {name!r}: "
                "its profile has other limits. Build the plans again with `mvlm build`."
            )
        self._shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        """As :meth:`EngineRunner.set_tensor_address`."""
        if self._addresses.get(name) == address:
            return
        usable = address > 0 and address % ALIGNMENT == 0
        if not usable or not self._context.set_tensor_address(name, address):
            raise EngineError(
                f"The engine {self._engine.name!r} cannot have its tensor {name!r} at address "
                f"{address}: it must be a multiple of {ALIGNMENT} and not null. This is an "
                "error of the program: please report it."
            )
        self._addresses[name] = address

    def output_shape(self, name: str) -> Shape:
        """As :meth:`EngineRunner.output_shape`."""
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise EngineError(
                f"The size of {name!r}, an output of the engine {self._engine.name!r}, does "
                f"not follow from its inputs' ({list(shape)}); compile the bundle again."
            )
        return shape

    def execute(self) -> None:
        """As :meth:`EngineRunner.execute`."""
        self._engine.enqueue(self._context)


def _errors_of(records: list[LogRecord]) -> str:
    texts = [without_noise(record.text) for record in records if record.is_error]
    return " ".join(text for text in texts if text) or "it gave no reason."
