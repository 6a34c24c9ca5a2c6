"""Graphs for the tests of passes: textual ONNX, captured components, comparisons."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime

from mvlm_export.passes.base import Pass, PassResult
from mvlm_export.passes.deferred import Array, values_of
from mvlm_export.passes.graph_io import import_graph, to_model
from mvlm_export.passes.type_inference import infer_types

RTOL = 1e-5
"""Of float32 numbers before and after an exact rewrite, relative to the largest."""


def parse_graph(text: str, **weights: Array) -> gs.Graph:
    """A graph from ONNX's text form; ``weights`` replace initializers of that name.

    In the text, an initializer is declared behind the inputs and outputs:
    ``g (float[B,4] x) => (float[B,2] y) <float[4,2] w> { y = MatMul(x, w) }``; give its values
    as ``w=array`` (it need not be in the text then: a free name becomes the constant).
    """
    model = onnx.parser.parse_model(text)
    graph = import_graph(model)
    for name, values in weights.items():
        tensor = graph.tensors()[name]
        if isinstance(tensor, gs.Variable):
            tensor.to_constant(np.asarray(values))
        else:
            tensor.values = np.asarray(values)
    graph.inputs = [value for value in graph.inputs if isinstance(value, gs.Variable)]
    infer_types(graph)
    return graph


def constants(graph: gs.Graph) -> dict[str, Array]:
    """Values of every constant by name."""
    return {
        name: values_of(tensor)
        for name, tensor in graph.tensors().items()
        if isinstance(tensor, gs.Constant)
    }


def assert_same_structure(found: gs.Graph, expected: gs.Graph) -> None:
    """Same nodes, attributes and wiring; names of inner tensors and of constants are free.

    Constants are compared by dtype and shape, and small integer ones by value too.
    """
    assert _canonical(found) == _canonical(expected)


def _canonical(graph: gs.Graph) -> list[Any]:
    graph = graph.copy().cleanup().toposort()
    names = {tensor.name: f"in:{tensor.name}" for tensor in graph.inputs}
    outputs = {tensor.name for tensor in graph.outputs}
    lines: list[Any] = []
    pending = list(graph.nodes)
    signatures: dict[str, Any] = {}

    def signature(tensor: gs.Tensor) -> Any:
        if tensor.is_empty():
            return "empty"
        if isinstance(tensor, gs.Constant):
            values = values_of(tensor)
            small = (
                values.tolist() if values.dtype.kind in "iub" and values.size <= 16 else None
            )
            return ("const", str(values.dtype), values.shape, str(small))
        if tensor.name in names:
            return names[tensor.name]
        return signatures[tensor.name]

    for node in pending:
        attrs = tuple(sorted((key, str(_plain(value))) for key, value in node.attrs.items()))
        key = (node.domain or "", node.op, attrs, tuple(signature(t) for t in node.inputs))
        for index, tensor in enumerate(node.outputs):
            signatures[tensor.name] = (key, index)
            if tensor.name in outputs:
                lines.append((f"out:{tensor.name}", key, index))
    return sorted(lines, key=str)


def _plain(value: Any) -> Any:
    if isinstance(value, gs.Tensor):
        return values_of(value).tolist()
    return list(value) if isinstance(value, (list, tuple)) else value


def run_graph(graph: gs.Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name, from ONNX Runtime on the CPU without its own graph rewrites."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        to_model(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def random_feeds(
    graph: gs.Graph, sizes: Mapping[str, int] | None = None, seed: int = 0, **ranges: int
) -> dict[str, Array]:
    """Normal floats and small integers for every input.

    Args:
        sizes: of dynamic axes by name; others are 3.
        ranges: for integer inputs by name, one past the largest value.
    """
    generator = np.random.default_rng(seed)
    feeds = {}
    for tensor in graph.inputs:
        shape = [
            axis if isinstance(axis, int) else (sizes or {}).get(axis, 3)
            for axis in tensor.shape
        ]
        dtype = np.dtype(
            onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype)
            if isinstance(tensor.dtype, int)
            else tensor.dtype
        )
        if dtype.kind == "f":
            feeds[tensor.name] = generator.standard_normal(shape).astype(dtype)
        else:
            high = ranges.get(tensor.name, 2)
            feeds[tensor.name] = generator.integers(0, high, shape).astype(dtype)
    return feeds


def assert_close(found: Array, expected: Array, rtol: float = RTOL) -> None:
    """Every element within ``rtol`` of the largest expected magnitude."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if expected.size == 0:
        return
    bound = rtol * float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


def check_pass(
    rewrite: Pass,
    graph: gs.Graph,
    sizes: Mapping[str, int] | None = None,
    rtol: float = RTOL,
    **ranges: int,
) -> PassResult:
    """Apply a pass and hold it to its promise: same numbers, and nothing left to do again.

    Args:
        sizes, ranges: as ``random_feeds``.
    """
    before = graph.copy()
    result = rewrite.apply(graph)
    feeds = random_feeds(graph, sizes, **ranges)
    if result.rewritten:
        expected = run_graph(before, rewrite.feeds_before(feeds))
        expected = dict(rewrite.outputs_after(expected, feeds))
    else:
        expected = run_graph(before, feeds)
    found = run_graph(graph, feeds)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert_close(found[name], values, rtol)
    assert rewrite.apply(graph.copy()).rewritten == 0, "a second run must find nothing to do"
    return result


@functools.cache
def _nano_source() -> Any:
    from mvlm_export.exporter.checkpoint import Checkpoint
    from mvlm_export.exporter.config import read_config
    from mvlm_export.exporter.preflight import preflight
    from mvlm_export.exporter.settings import nano_checkpoint

    folder: Path = nano_checkpoint()
    config, checkpoint = read_config(folder), Checkpoint.open(folder)
    return config, checkpoint, preflight(checkpoint, config).weight_map


@functools.cache
def _captured(name: str, config: Any) -> Any:
    from mvlm_export.exporter.graphs import capture_graph

    return capture_graph(name, config)


def nano_config() -> Any:
    """The nano model's ``ModelConfig``."""
    return _nano_source()[0]


def nano_graph(name: str) -> gs.Graph:
    """A component of the trained nano model, as captured, weights deferred."""
    from mvlm_export.exporter.graphs import bind_weights

    config, checkpoint, weight_map = _nano_source()
    tensors = weight_map[name]
    return bind_weights(_captured(name, config), lambda key: checkpoint.load(tensors[key]))


def tiny_config(**changes: Any) -> Any:
    """``ModelConfig`` of ``tests.helpers.tiny_config_json``."""
    from mvlm_export.exporter.config import parse_config
    from tests.helpers import tiny_config_json

    return parse_config(tiny_config_json(**changes))


def tiny_graph(name: str, seed: int = 0, **changes: Any) -> gs.Graph:
    """A component with random weights in a tiny geometry, as captured, weights deferred.

    Args:
        changes: go into ``tiny_config_json``: ``mm_projector_type="ldpnet"``,
            ``num_key_value_heads=2``, ``vision_config={...}``.
    """
    import torch

    from mvlm_export.exporter.graphs import bind_weights
    from mvlm_export.exporter.models.components import build_component

    config = tiny_config(**changes)
    torch.manual_seed(seed)
    module = build_component(name, config).eval().requires_grad_(False)
    for key, parameter in module.named_parameters():
        if "norm" in key:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        else:
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(std=scale)
    weights = dict(module.named_parameters())
    return bind_weights(_captured(name, config), weights.__getitem__)
