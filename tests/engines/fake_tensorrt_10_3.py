"""A module with the names that ``tensorrt`` 10.3 has and this project uses, and no others.

It records what is asked of it, so that the builder's way through the API of JetPack 6 is
tested where no such TensorRT can be installed. Names and numbers: TensorRT 10.3's public
pybind sources.
"""

from __future__ import annotations

import enum
from types import SimpleNamespace

__version__ = "10.3.0"


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


class Network:
    num_layers = 3

    def __init__(self, flags):
        self.flags = flags
        self.num_inputs = len(DECODER_INPUTS)

    def get_input(self, index):
        return DECODER_INPUTS[index]


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, low, opt, high):
        self.shapes[name] = (tuple(low), tuple(opt), tuple(high))


class Config:
    """Without num_compute_capabilities, which RTX alone has."""

    __slots__ = (
        "cache",
        "flags",
        "pools",
        "profiles",
        "profiling_verbosity",
        "progress_monitor",
    )

    def __init__(self):
        self.flags, self.pools, self.profiles, self.cache = [], {}, [], None
        self.progress_monitor = None

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
