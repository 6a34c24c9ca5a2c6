"""Whole components in float16: numbers, casts, and what TensorRT makes of them."""

import numpy as np
import onnx
import pytest

from mvlm_export.engines import trt_builder
from mvlm_export.engines.gpu_probe import probe_gpu
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_builder import build_engine, decoder_profiles, vision_profiles
from mvlm_export.passes.deferred import is_deferred
from mvlm_export.passes.graph_io import save_graph
from mvlm_export.passes.lowering.convert_to_float16 import ConvertToFloat16
from tests.helpers_plan import plan_kernels
from tests.passes.graphs import nano_config, nano_graph, tiny_graph

from .test_convert_to_float16 import casts, check, dtypes


def assert_all_float16(graph):
    assert dtypes(graph, "MatMul") <= {"float16"}
    assert dtypes(graph, "Conv") <= {"float16"}
    large = [
        t for t in graph.tensors().values() if hasattr(t, "_values") and t.values.size > 16
    ]
    assert {str(t.dtype) for t in large if t.dtype != np.int64} <= {"float16"}


@pytest.mark.parametrize("name", ["vision_encoder", "projector", "decoder"])
def test_nano(name):
    graph = nano_graph(name)
    sizes = {"S": 5, "T": 7, "I": 3, "B": 2}
    result = check(graph, sizes, input_ids=500)
    assert result.refusals == ()
    assert all(
        is_deferred(t) for n, t in graph.tensors().items() if n.endswith("weight.float16")
    )
    assert_all_float16(graph)
    layers = 4
    expected = {"vision_encoder": 2 * layers, "projector": 0, "decoder": 6 * layers + 3}[name]
    assert (
        len([node for node in casts(graph) if node.outputs[0].dtype != np.int64]) == expected
    )


def test_decoder_with_grouped_queries():
    graph = tiny_graph("decoder", num_key_value_heads=2)
    result = check(graph, {"S": 5, "T": 7, "I": 3}, input_ids=60)
    assert result.refusals == ()
    assert_all_float16(graph)


@pytest.mark.parametrize("kind", ["ldpnetv2", "ldpnet", "mlp2x_gelu"])
def test_projectors(kind):
    graph = tiny_graph("projector", mm_projector_type=kind)
    result = check(graph, {"B": 2})
    assert result.refusals == ()
    assert_all_float16(graph)


@pytest.fixture
def no_gpu(monkeypatch):
    absent = probe_gpu("libno-such-driver.so")
    monkeypatch.setattr(trt_builder, "probe_gpu", lambda: absent)


@pytest.mark.parametrize("name", ["vision_encoder", "decoder"])
def test_tensorrt_fuses_the_attention_of_every_layer(name, tmp_path, no_gpu):
    graph = nano_graph(name)
    ConvertToFloat16(keep_io=["logits"]).apply(graph)
    save_graph(graph, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    config = nano_config()
    profiles = vision_profiles()
    layers = 4
    if name == "decoder":
        profiles = decoder_profiles(256, config.image_tokens, "fp16")[:1]
        layers = config.text.num_hidden_layers
    result = build_engine(
        tmp_path / "model.onnx", tmp_path / "m.plan", profiles, target=get_target("rtx")
    )
    kernels = [k.kernel for k in plan_kernels(result.plan_path.read_bytes())]
    assert sum("_gemm_mha_v2" in kernel for kernel in kernels) == layers
    assert not [text for text in result.warnings if "overflow" in text]
