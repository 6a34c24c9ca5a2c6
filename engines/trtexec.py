"""The ``trtexec`` command that builds the same plan: for NVIDIA's forum, and for profiling.

Syntax of TensorRT 10.3's trtexec (``trtexec --help``; samples/common/sampleOptions.cpp of its
public source): shapes are ``name:1x2``, several inputs with commas; each ``--profile=N``
begins a profile of its own; a memory pool takes the suffix B for bytes. Not run on a device.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePath

from .build_options import BuildOptions
from .trt_profiles import ShapeRange

_EDGES = ("min", "opt", "max")


def trtexec_line(
    onnx_path: PurePath,
    plan_path: PurePath,
    shapes: Mapping[str, Mapping[str, ShapeRange]],
    options: BuildOptions,
    timing_cache: PurePath | None = None,
) -> str:
    """One line for a POSIX shell.

    Args:
        shapes: (min, opt, max) by profile, in the order of their indices, and input.
    """
    return shlex.join(
        [
            "trtexec",
            f"--onnx={onnx_path}",
            f"--saveEngine={plan_path}",
            "--stronglyTyped",
            *_profile_arguments(shapes),
            *_option_arguments(options),
            *([] if timing_cache is None else [f"--timingCacheFile={timing_cache}"]),
            "--profilingVerbosity=detailed",
            "--skipInference",
        ]
    )


def _profile_arguments(shapes: Mapping[str, Mapping[str, ShapeRange]]) -> list[str]:
    arguments = []
    for index, inputs in enumerate(shapes.values()):
        if len(shapes) > 1:
            arguments.append(f"--profile={index}")
        if not inputs:
            continue
        for edge, name in enumerate(_EDGES):
            listed = ",".join(f"{_quoted(i)}:{_by_x(r[edge])}" for i, r in inputs.items())
            arguments.append(f"--{name}Shapes={listed}")
    return arguments


def _option_arguments(options: BuildOptions) -> list[str]:
    arguments = []
    if options.workspace_bytes is not None:
        arguments.append(f"--memPoolSize=workspace:{options.workspace_bytes}B")
    if options.optimization_level is not None:
        arguments.append(f"--builderOptimizationLevel={options.optimization_level}")
    return arguments


def _quoted(name: str) -> str:
    """trtexec takes a name that holds its own separators in single quotes."""
    return f"'{name}'" if ":" in name or "," in name else name


def _by_x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
