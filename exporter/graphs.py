"""The three portable ONNX graphs, captured on fake tensors and written weight by weight.

A component is built without memory for its weights, captured by ``torch.export`` and
translated to ONNX; then each initializer is bound to a deferred read of the checkpoint.
Writing touches one tensor at a time, so a 7B model needs the memory of its largest tensor.

Contracts (B images, S new tokens, T cached tokens, I image rows):

- ``vision_encoder``: ``pixel_values`` [B, 3, H, W] -> ``image_features`` [B, N, C]
- ``projector``: ``image_features`` [B, N, C] -> ``image_embeds`` [B, tokens, D]
- ``decoder``: ``input_ids`` int32 [S], ``image_embeds`` [I, D] and, for each layer n,
  ``past_key_values.{n}.key|value`` [T, H_kv, head_dim] -> ``logits`` float32 [S, V] and
  ``present.{n}.key|value`` [S, H_kv, head_dim], the new rows alone
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mvlm_export.engines.errors import MvlmError
from mvlm_export.engines.kv_cache import cache_names
from mvlm_export.passes.deferred import Array, DeferredValues
from mvlm_export.passes.graph_io import Progress, bind_weight, import_graph, save_graph

from .config import ModelConfig
from .models.components import build_component
from .models.llama import rotary_tables

OPSET = 20
MODEL_FILE = "model.onnx"

WeightSource = Callable[[str], Tensor]
"""Reads one parameter of a component by its module name, in the checkpoint's own dtype."""


class ExportedLinear(nn.Module):
    """A linear layer whose weight lies [in, out], so that it exports as a plain MatMul."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        shape = (linear.in_features, linear.out_features)
        self.weight = nn.Parameter(linear.weight.new_empty(shape), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


def _replace_linears(module: nn.Module, prefix: str = "") -> set[str]:
    """Swap every linear for its exported form; the names of the weights now transposed."""
    transposed: set[str] = set()
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.Linear):
            setattr(module, name, ExportedLinear(child))
            transposed.add(f"{path}.weight")
        else:
            transposed |= _replace_linears(child, f"{path}.")
    return transposed


@dataclass(frozen=True)
class _Signature:
    """Example inputs of a component with the names of tensors and of dynamic axes."""

    args: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    inputs: list[str]
    outputs: list[str]
    dynamic_axes: dict[str, dict[int, str]]


def _image_signature(name: str, config: ModelConfig) -> _Signature:
    batch = torch.export.Dim("B", min=1)
    vision = config.vision
    shape: tuple[int, ...]
    if name == "vision_encoder":
        shape = (2, 3, vision.image_size, vision.image_size)
        inputs, outputs = "pixel_values", "image_features"
    else:
        shape = (2, config.image_feature_tokens, vision.hidden_size)
        inputs, outputs = "image_features", "image_embeds"
    axes = {inputs: {0: "B"}, outputs: {0: "B"}}
    args = (torch.zeros(shape),)
    return _Signature(args, ({0: batch},), [inputs], [outputs], axes)


def _decoder_signature(config: ModelConfig) -> _Signature:
    text = config.text
    new = torch.export.Dim("S", min=1)
    seen = torch.export.Dim("T", min=0)
    rows = torch.export.Dim("I", min=1)
    count = 2 * text.num_hidden_layers
    shape = (5, text.num_key_value_heads, text.head_dim)
    past = [torch.zeros(shape) for _ in range(count)]
    ids = torch.zeros(3, dtype=torch.int32)
    args = (ids, torch.zeros(7, text.hidden_size), past)
    past_names = cache_names("past_key_values", text.num_hidden_layers)
    present_names = cache_names("present", text.num_hidden_layers)
    axes = {"input_ids": {0: "S"}, "image_embeds": {0: "I"}, "logits": {0: "S"}}
    axes |= {name: {0: "T"} for name in past_names}
    axes |= {name: {0: "S"} for name in present_names}
    return _Signature(
        args,
        ({0: new}, {0: rows}, [{0: seen}] * count),
        ["input_ids", "image_embeds", *past_names],
        ["logits", *present_names],
        axes,
    )


@contextmanager
def _quiet_capture() -> Iterator[None]:
    """Silence the exporter's notices about packages and weights it does not need."""
    names = ("torch.onnx", "onnx_ir", "onnxscript")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@dataclass(frozen=True)
class CapturedGraph:
    """An ONNX graph whose weights are not read yet.

    Attributes:
        structure: the model; its weights stand in it as names without values.
        weights: shapes of these weights, float32 all.
        transposed: those that lie [in, out] here, [out, in] in the checkpoint.
        buffers: those that are computed, not read.
        tied: those that are read under another parameter's name.
    """

    name: str
    structure: onnx.ModelProto
    weights: Mapping[str, tuple[int, ...]]
    transposed: frozenset[str]
    buffers: Mapping[str, Tensor]
    tied: Mapping[str, str]


def capture_graph(name: str, config: ModelConfig) -> CapturedGraph:
    """Capture a component as ONNX, in float32, without touching weights.

    Args:
        name: one of ``COMPONENTS``.

    Raises:
        MvlmError: PyTorch cannot export the component, or an axis that must be dynamic came
            out fixed.
    """
    with _quiet_capture():
        with FakeTensorMode(allow_non_fake_inputs=True):
            module = build_component(name, config).eval().requires_grad_(False)
            transposed = _replace_linears(module)
            signature = (
                _decoder_signature(config)
                if name == "decoder"
                else _image_signature(name, config)
            )
            model = _translate(name, module, signature)
            for value in model.graph.initializers.values():
                value.const_value = None
            onnxscript.optimizer.optimize_ir(model)
        model.graph.name = name
        model.producer_name = "mvlm-export"
        model.metadata_props.clear()
        for node in model.graph:
            node.metadata_props.clear()
            node.doc_string = None
        _assert_dynamic(name, model, signature.dynamic_axes)
        structure = ir.to_proto(model)
    buffers: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    if name == "decoder":
        cos, sin = rotary_tables(config.text)
        buffers = {"rotary_cos": cos, "rotary_sin": sin}
        if config.text.tie_word_embeddings:
            tied = {"lm_head.weight": "model.embed_tokens.weight"}
    weights = _unbound_shapes(name, model)
    return CapturedGraph(name, structure, weights, frozenset(transposed), buffers, tied)


def _unbound_shapes(name: str, model: ir.Model) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            continue
        if value.shape is None or value.dtype is not ir.DataType.FLOAT:
            raise MvlmError(
                f"{name}: the exporter left the shape or dtype of {value.name} open. "
                "Install the torch, onnx and onnxscript versions of the lock file."
            )
        shapes[str(value.name)] = value.shape.numpy()
    return shapes


def _translate(name: str, module: nn.Module, signature: _Signature) -> ir.Model:
    """The module as an ONNX graph, as the exporter makes it.

    Raises:
        MvlmError: it cannot; the message holds what PyTorch says.
    """
    problem: Exception | None = None
    try:
        program = torch.onnx.export(
            module,
            signature.args,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=signature.dynamic_shapes,
            input_names=signature.inputs,
            output_names=signature.outputs,
            optimize=False,
            verify=False,
            verbose=False,
        )
    except (torch.onnx.OnnxExporterError, ImportError) as error:
        program, problem = None, error
    if program is None:
        raise MvlmError(
            f"{name}: PyTorch {torch.__version__} cannot export it to ONNX "
            f"({_first_line(problem)}). Install the torch, onnx and onnxscript versions of "
            "the lock file."
        ) from problem
    return program.model


def _first_line(error: Exception | None) -> str:
    lines = str(error or "it gave no graph").strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _assert_dynamic(name: str, model: ir.Model, axes: dict[str, dict[int, str]]) -> None:
    """Every named axis must have kept its name, every other must be a number."""
    values = {str(value.name): value for value in (*model.graph.inputs, *model.graph.outputs)}
    for tensor, named in axes.items():
        shape = values[tensor].shape if tensor in values else None
        if shape is None:
            raise MvlmError(f"{name}: the captured graph has no tensor {tensor!r}.")
        for axis, dim in enumerate(shape):
            found = dim if isinstance(dim, int) else dim.value
            wanted = named.get(axis)
            if (wanted is None) != isinstance(found, int) or (wanted and wanted != found):
                raise MvlmError(
                    f"{name}: axis {axis} of {tensor!r} came out as {found!r}, "
                    f"wanted {wanted or 'a fixed size'}. The exporter specialised a dynamic "
                    "axis; install the torch and onnxscript versions of the lock file."
                )


def bind_weights(captured: CapturedGraph, source: WeightSource) -> gs.Graph:
    """The graph with a deferred read for each weight: float32, transposed on the fly."""
    graph = import_graph(captured.structure)
    for name, shape in captured.weights.items():

        def read(name: str = name) -> Array:
            if name in captured.buffers:
                return captured.buffers[name].numpy()
            tensor = source(captured.tied.get(name, name))
            wide = tensor.t() if name in captured.transposed else tensor
            return wide.float().contiguous().numpy()

        bind_weight(graph, name, DeferredValues(shape, np.float32, read))
    return graph


def write_graph(graph: gs.Graph, folder: Path, progress: Progress | None = None) -> Path:
    """Write ``model.onnx`` and ``model.onnx.data`` into ``folder`` and check them.

    Raises:
        MvlmError: ``onnx.checker`` with full shape inference refuses the file, or it cannot
            be written.
    """
    path = folder / MODEL_FILE
    save_graph(graph, path, progress)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise MvlmError(
            f"{graph.name}: the graph is not valid ONNX: {error} Install the "
            "torch, onnx and onnxscript versions of the lock file; if it stays, report it "
            "with the checkpoint's config.json."
        ) from error
    return path


def export_graph(
    name: str,
    config: ModelConfig,
    source: WeightSource,
    folder: Path,
    progress: Progress | None = None,
) -> Path:
    """Capture, bind and write one component as it is; the path of its ``model.onnx``."""
    return write_graph(bind_weights(capture_graph(name, config), source), folder, progress)
