"""A module with the names that ``tensorrt`` 10.3 has and this project uses, and no others.

It records what is asked of it, so that the builder's way through the API of JetPack 6 is
tested where no such TensorRT can be installed. Names and numbers: TensorRT 10.3's public
pybind sources.
"""

from __future__ import annotations

import enum
import os
import signal
from types import SimpleNamespace

__version__ = "10.3.0"

CRASHES_AT = "FAKE_TENSORRT_CRASHES_AT"
"""Environment variable: the node whose build ends the process, as a fault of TensorRT does."""


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    FP16 = 0
    INT8 = 1
    DEBUG = 2
    TF32 = 7
    BF16 = 16
    FP8 = 17
    INT4 = 20


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class ProfilingVerbosity(enum.IntEnum):
    LAYER_NAMES_ONLY = 0
    NONE = 1
    DETAILED = 2


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    def log(self, severity, msg):
        raise NotImplementedError


class IProgressMonitor:
    pass


class Tensor:
    def __init__(self, name, shape, dims):
        self.name, self.shape, self._dims = name, shape, dims

    def get_dimension_name(self, axis):
        return self._dims[axis]


DECODER_INPUTS = [
    Tensor("input_ids", (-1,), ["S"]),
    Tensor("image_embeds", (-1, 64), ["I", ""]),
    Tensor("past_key_values.0.key", (-1, 4, 16), ["T", "", ""]),
    Tensor("past_key_values.0.value", (-1, 4, 16), ["T", "", ""]),
]


class Layer:
    """A layer between two tensors, as the parser makes one of an ONNX node."""

    num_inputs = num_outputs = 1
    type = SimpleNamespace(name="MATRIX_MULTIPLY")

    def __init__(self, node, read, made):
        self.name, self.metadata = node, f"[ONNX Layer: {node}]"
        self._read, self._made = (SimpleNamespace(name=name) for name in (read, made))

    def get_input(self, index):
        return self._read

    def get_output(self, index):
        return self._made


class Network:
    num_layers = 3

    def __init__(self, flags):
        self.flags = flags
        self.num_inputs = len(DECODER_INPUTS)
        self._layers = [
            Layer("embed", "input_ids", "hidden"),
            Layer("block", "hidden", "mixed"),
            Layer("head", "mixed", "logits"),
        ]
        self._outputs = [self._layers[-1].get_output(0)]

    def get_input(self, index):
        return DECODER_INPUTS[index]

    def get_layer(self, index):
        return self._layers[index]

    @property
    def num_outputs(self):
        return len(self._outputs)

    def get_output(self, index):
        return self._outputs[index]

    def mark_output(self, tensor):
        self._outputs.append(tensor)

    def unmark_output(self, tensor):
        self._outputs.remove(tensor)

    def nodes_built(self):
        """Names of the layers in the chain that the outputs need."""
        outputs = {tensor.name for tensor in self._outputs}
        made = [layer.get_output(0).name for layer in self._layers]
        last = max(index for index, name in enumerate(made) if name in outputs)
        return [layer.name for layer in self._layers[: last + 1]]


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, low, opt, high):
        self.shapes[name] = (tuple(low), tuple(opt), tuple(high))


class Config:
    """Without num_compute_capabilities, which RTX alone has."""

    __slots__ = (
        "builder_optimization_level",
        "cache",
        "flags",
        "pools",
        "profiles",
        "profiling_verbosity",
        "progress_monitor",
    )

    def __init__(self):
        self.flags, self.pools, self.profiles, self.cache = [], {}, [], None
        self.progress_monitor, self.builder_optimization_level = None, 3

    def set_flag(self, flag):
        self.flags.append(flag)

    def set_memory_pool_limit(self, pool, size):
        self.pools[pool] = size

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, data):
        return SimpleNamespace(data=data, serialize=lambda: b"timings:" + data)

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache.data == b"of another device":
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class Builder:
    last: Builder

    def __init__(self, logger):
        self.logger, self.config, self.network = logger, None, None
        Builder.last = self

    def create_network(self, flags):
        if flags >= 1 << len(NetworkDefinitionCreationFlag):
            return None
        self.network = Network(flags)
        return self.network

    def create_builder_config(self):
        self.config = Config()
        return self.config

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        if os.environ.get(CRASHES_AT) in network.nodes_built():
            os.kill(os.getpid(), signal.SIGSEGV)
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        for step in range(2):
            if not monitor.step_complete("Building engine", step):
                return None
        monitor.phase_finish("Building engine")
        for _ in config.profiles:
            self.logger.log(Severity.INFO, "Total Activation Memory: 100 bytes")
        self.logger.log(Severity.INFO, "Total Weights Memory: 4096 bytes")
        return b"a plan of TensorRT 10.3"


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self.network = network

    def parse_from_file(self, path):
        return isinstance(path, str)
