"""The peers' quantizers run on our graphs, and their bytes are counted alike."""

import inspect

import numpy as np
import onnx
import pytest
from decoder_scores import decoder_feeds, score
from feature_scores import feature_cosine
from img_focus import apply_exact_passes as apply_encoder_passes
from img_focus_peers import Scheme, attention_nodes, prepare
from img_focus_peers import quantize as quantize_encoder
from onnx_sessions import open_session
from onnxruntime.quantization import quantize_static
from smollm2 import apply_exact_passes
from smollm2_peers import METHODS, Job, head_nodes, quantize, quantized_bytes

from mvlm_export.exporter.graphs import write_graph

IDS = np.random.default_rng(0).integers(0, 320, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def decoder(tiny, tmp_path_factory):
    _, graph = tiny("decoder")
    apply_exact_passes(tiny.config, graph)
    return write_graph(graph, tmp_path_factory.mktemp("float"))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name} {m.symmetric}")
def test_every_method_quantizes_all_but_the_head(method, decoder, tmp_path):
    session = open_session(decoder)
    job = Job(32, IDS, lambda ids: decoder_feeds(session, ids))
    output = quantize(decoder, method, job, tmp_path / "out" / "model.onnx", head=False)
    nodes = onnx.load(str(output), load_external_data=False).graph.node
    # Two layers of qkv, o, gate-up and down.
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == 8
    assert head_nodes(output) == head_nodes(decoder)
    found = score(output, IDS, reference=decoder)
    assert 0 < found.distance.relative < 0.3


def test_bytes_hold_codes_float16_scales_and_packed_zero_points(decoder, tmp_path):
    # Layers of [64, 128] qkv, [64, 64] o, [64, 192] gate-up, [96, 64] down; twice.
    products = [(64, 128), (64, 64), (64, 192), (96, 64)]
    codes = 2 * sum(k * n // 2 for k, n in products)
    scales = 2 * sum(2 * n * k // 32 for k, n in products)
    zeros = 2 * sum(n * -(-k // 32 // 2) for k, n in products)
    found = {}
    for method in METHODS[:2]:
        job = Job(32, IDS, dict)
        path = quantize(decoder, method, job, tmp_path / "out" / "model.onnx", head=False)
        found[method.symmetric] = quantized_bytes(path)
    assert found == {True: codes + scales, False: codes + scales + zeros}


@pytest.mark.skipif(
    "calibration_cache_path" not in inspect.signature(quantize_static).parameters,
    reason="ONNX Runtime that keeps no ranges",
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_encoder_is_quantized_with_and_without_attention(symmetric, tiny, tmp_path):
    _, graph = tiny("vision_encoder")
    apply_encoder_passes(tiny.config, graph)
    path = write_graph(graph, tmp_path / "float")
    prepared = prepare(path, tmp_path / "schemes" / "prepared.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 56, 56)).astype(np.uint8)
    counts = {}
    for attention in (False, True):
        scheme = Scheme("min-max", symmetric, attention=attention)
        output = tmp_path / "schemes" / f"{attention}.onnx"
        quantize_encoder(prepared, scheme, pixels, output)
        nodes = onnx.load(str(output)).graph.node
        counts[attention] = sum(node.op_type == "QuantizeLinear" for node in nodes)
        assert 0.95 < feature_cosine(output, path, pixels).cosine < 1
    assert counts[False] < counts[True]
    assert len(attention_nodes(prepared)) == 2 * tiny.config.vision_layers_used
