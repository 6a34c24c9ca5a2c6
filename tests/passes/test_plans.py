"""What TensorRT-RTX makes of the finished graphs, read from its plans (pinned to 1.7.1)."""

from importlib import metadata

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest

from mvlm_export.engines import trt_builder
from mvlm_export.engines.gpu_probe import probe_gpu
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_builder import build_engine, decoder_profiles, vision_profiles
from mvlm_export.passes.base import PassManager
from mvlm_export.passes.deferred import derive, values_of
from mvlm_export.passes.editing import insert_node
from mvlm_export.passes.graph_io import save_graph
from mvlm_export.passes.pipeline import PipelineOptions, build_pipeline
from mvlm_export.passes.type_inference import infer_types
from tests.helpers_plan import plan_kernels

from .graphs import nano_config, nano_graph
from .test_pipeline import facts_of

LAYERS = 4
BLOCK = 64
WHOLE_WEIGHT = "__myl_CastMulCast"
"""The kernel that writes a dequantized weight out, once each run."""


@pytest.fixture(autouse=True)
def pinned(monkeypatch):
    """Kernel names are those of one version; and none is built for a GPU that is here."""
    pytest.importorskip("tensorrt_rtx")
    if metadata.version("tensorrt_rtx_cu13") != "1.7.1.116":
        pytest.skip("the names of kernels are known for TensorRT-RTX 1.7.1 alone")
    absent = probe_gpu("libno-such-driver.so")
    monkeypatch.setattr(trt_builder, "probe_gpu", lambda: absent)


def finished(name, target):
    graph = nano_graph(name)
    options = PipelineOptions("float16")
    PassManager(build_pipeline(name, facts_of(nano_config()), target, options)).run(graph)
    return graph


def kernels_of(graph, tmp_path, profiles):
    save_graph(graph, tmp_path / "model.onnx")
    plan = tmp_path / "model.plan"
    result = build_engine(tmp_path / "model.onnx", plan, profiles, target=get_target("rtx"))
    return [entry.kernel for entry in plan_kernels(result.plan_path.read_bytes())]


def quantize_weights(graph, per_channel=False):
    """Round every constant MatMul weight to INT4: by blocks of rows, or one scale a column."""
    graph.opset = 21
    count = 0
    for node in [n for n in graph.nodes if n.op == "MatMul"]:
        weight = node.inputs[1]
        if not isinstance(weight, gs.Constant):
            continue
        rows, columns = weight.shape
        block = rows if per_channel else BLOCK
        values = values_of(weight).astype(np.float32).reshape(rows // block, block, columns)
        scale = np.abs(values).max(1, keepdims=True) / 7
        codes = np.round(values / scale).reshape(rows, columns).astype(ml_dtypes.int4)
        packed = derive(f"{weight.name}.int4", [weight], lambda _, c=codes: c, codes.shape,
                        ml_dtypes.int4)  # fmt: skip
        scales = scale[:, 0].astype(np.float16)
        attrs = {"axis": 1} if per_channel else {"axis": 0, "block_size": block}
        operands = [packed, scales[0] if per_channel else scales]
        stem = f"{weight.name}.dequantized"
        node.inputs[1] = insert_node(
            graph, "DequantizeLinear", operands, weight, attrs=attrs, stem=stem
        )
        count += 1
    graph.cleanup().toposort()
    infer_types(graph)
    return count


def prefill_and_decode(kv_form="append"):
    image_rows = nano_config().image_tokens
    return decoder_profiles(256, image_rows, "fp16", kv_form=kv_form)


@pytest.mark.parametrize("name", ["vision_encoder", "decoder"])
def test_one_attention_kernel_a_layer(name, tmp_path):
    profiles = prefill_and_decode() if name == "decoder" else vision_profiles()
    kernels = kernels_of(finished(name, get_target("orin")), tmp_path, profiles)
    fused = [kernel for kernel in kernels if "mha" in kernel]
    assert len(fused) == LAYERS * len(profiles)
    assert not [kernel for kernel in kernels if "softmax" in kernel.lower()]


def test_one_attention_kernel_a_layer_in_the_fixed_form(tmp_path):
    profiles = prefill_and_decode("fixed")
    kernels = kernels_of(finished("decoder", get_target("orin", 7)), tmp_path, profiles)
    assert len([k for k in kernels if "mha" in k]) == LAYERS * len(profiles)


def test_int4_weights_are_dequantized_inside_the_products(tmp_path):
    graph = finished("decoder", get_target("orin"))
    assert quantize_weights(graph) == 4 * LAYERS + 1
    kernels = kernels_of(graph, tmp_path, prefill_and_decode())
    assert not [kernel for kernel in kernels if WHOLE_WEIGHT in kernel]
    assert len([k for k in kernels if "mha" in k]) == 2 * LAYERS


def test_a_whole_weight_would_be_seen(tmp_path):
    """One scale a column makes TensorRT write the weight out: the test above can fail."""
    graph = finished("decoder", get_target("orin"))
    quantize_weights(graph, per_channel=True)
    kernels = kernels_of(graph, tmp_path, prefill_and_decode())
    assert [kernel for kernel in kernels if WHOLE_WEIGHT in kernel]
