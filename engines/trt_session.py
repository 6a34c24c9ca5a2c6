"""TensorRT: a bundle's plans for this machine, and the sessions that run them.

Not run on a GPU yet: the tests run all of it over stand-ins for TensorRT's and CUDA's own
functions, which compute with ONNX Runtime on host memory (tests/engines/fake_tensorrt.py and
fake_cuda.py).
"""

from __future__ import annotations

import numpy as np

from .build import open_plans
from .bundle import Bundle
from .cuda_api import load_cuda
from .device_memory import CudaMemory, DeviceMemory
from .engine_runner import Engine
from .errors import BundleError, EngineError, InputError
from .gpu_probe import GpuInfo, probe_gpu
from .plan_key import BuilderIdentity
from .session import BackendOptions, FloatArray, PixelArray
from .targets import get_target
from .trt_api import load_tensorrt
from .trt_decoder import TrtDecoderSession
from .trt_engine import TrtEngine


class TrtBackend:
    """Opens a bundle's plans in the TensorRT that built them; each is hashed first.

    Raises:
        InputError: the bundle's target has no engines, or an option is ONNX Runtime's.
        EngineError: there is no GPU, or a plan is missing, stale, damaged or of another
            TensorRT or GPU.
        BundleError: a build record cannot be read.
        MissingPackageError: TensorRT or ``cuda-python`` is not installed.
    """

    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        manifest = bundle.manifest
        target = get_target(manifest.target, manifest.jetpack)
        if not target.has_engines:
            raise InputError(
                f"The bundle is for target {target.name!r}, which has no TensorRT plans; run "
                "it with the backend 'onnxruntime', or compile it for another target."
            )
        if options.provider != "cuda" or options.threads is not None:
            raise InputError(
                "TensorRT plans run on the GPU alone: leave out the number of threads and "
                "any provider but 'cuda', or choose the backend 'onnxruntime'."
            )
        gpu = probe_gpu()
        if not gpu.present:
            raise EngineError(
                f"TensorRT plans need a GPU, but there is {gpu.problem}. Run the bundle on "
                "its device, or its ONNX files: provider 'cpu' with `pip install "
                "'mvlm-export[cpu]'`."
            )
        self._trt = load_tensorrt(target.runtime)
        version = str(self._trt.__version__)
        builder = BuilderIdentity(target.runtime, version, gpu.compute_capability)
        self._plans = open_plans(bundle, builder)
        self._model, self._kv_form = manifest.model, manifest.kv_form
        self._memory = CudaMemory(load_cuda())

    def open_graph(self, name: str) -> TrtGraphSession:
        """Load the vision encoder or the projector."""
        return TrtGraphSession(self._load(name), self._memory)

    def open_decoder(self) -> TrtDecoderSession:
        """Load the decoder.

        Raises:
            BundleError: its plan is not of the manifest's model.
        """
        engine = self._load("decoder")
        return TrtDecoderSession(engine, self._memory, self._model, self._kv_form)

    def _load(self, name: str) -> TrtEngine:
        return TrtEngine(self._trt, name, self._plans[name], self._memory)


def has_plans(bundle: Bundle, gpu: GpuInfo) -> bool:
    """Whether the bundle has plans for this GPU, whatever TensorRT built them."""
    wanted = gpu.compute_capability
    return wanted is not None and any(
        key.endswith("-sm{}{}".format(*wanted)) for key in bundle.engines()
    )


class TrtGraphSession:
    """An engine with one input and one output, run by batches of its profile.

    Raises:
        BundleError: the engine has other tensors.
        EngineError: the device has no memory for its buffers.
    """

    def __init__(self, engine: Engine, memory: DeviceMemory) -> None:
        self.name = engine.name
        inputs = [tensor for tensor in engine.tensors.values() if tensor.is_input]
        outputs = [tensor for tensor in engine.tensors.values() if not tensor.is_input]
        if len(inputs) != 1 or len(outputs) != 1:
            raise BundleError(
                f"The plan of {self.name!r} has {len(inputs)} inputs and {len(outputs)} "
                "outputs, but one of each is needed. Build the plans again with `mvlm build`."
            )
        self._input, self._output = inputs[0].name, outputs[0].name
        self._memory = memory
        self._runner = engine.open_runner(0)
        self._limits = engine.limits(self._input, 0)
        largest = self._limits.high
        self._runner.set_input_shape(self._input, largest)
        given = self._runner.output_shape(self._output)
        self._staged_input = memory.allocate_staging(largest, inputs[0].dtype)
        self._staged_output = memory.allocate_staging(given, outputs[0].dtype)
        self._source = memory.allocate(self._staged_input.nbytes)
        self._result = memory.allocate(self._staged_output.nbytes)
        self._runner.set_tensor_address(self._input, self._source.address)
        self._runner.set_tensor_address(self._output, self._result.address)

    def run(self, array: FloatArray | PixelArray) -> FloatArray:
        """As :meth:`GraphSession.run`; more than a batch is run batch by batch."""
        dtype = self._staged_input.dtype
        if (array.dtype == np.uint8) != (dtype == np.uint8):
            raise EngineError(
                f"The graph {self.name!r} takes {dtype}, but {array.dtype} was given: the "
                "manifest says another type than the plan has. Build the plans again with "
                "`mvlm build`."
            )
        largest = self._limits.high
        if array.shape[1:] != largest[1:] or not len(array):
            raise EngineError(
                f"The graph {self.name!r} takes batches of {list(largest[1:])}, but "
                f"{list(array.shape)} was given; compile the bundle for this input."
            )
        with self._memory.lock:
            parts = [
                self._run_batch(array[start : start + largest[0]])
                for start in range(0, len(array), largest[0])
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run_batch(self, array: FloatArray | PixelArray) -> FloatArray:
        memory, count = self._memory, len(array)
        memory.synchronize()  # an interrupted run may still read what was staged for it
        np.copyto(self._staged_input[:count], array, casting="same_kind")
        memory.upload(self._source.address, self._staged_input[:count])
        self._runner.set_input_shape(self._input, array.shape)
        self._runner.execute()
        result = self._staged_output[:count]
        memory.download(result, self._result.address)
        memory.synchronize()
        copied: FloatArray = result.copy()
        return copied
