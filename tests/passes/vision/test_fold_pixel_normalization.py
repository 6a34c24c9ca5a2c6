"""The normalisation of pixels in the patch convolution."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.deferred import is_deferred
from mvlm_export.passes.vision.fold_pixel_normalization import FoldPixelNormalization
from tests.passes.graphs import (
    assert_close,
    assert_same_structure,
    check_pass,
    constants,
    nano_graph,
    parse_graph,
    run_graph,
    tiny_graph,
)

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CLIP = FoldPixelNormalization(MEAN, STD)
BEFORE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,3,8,8] pixel_values) => (float[B,5,2,2] y) <float[5,3,4,4] w> {
  y = Conv<strides=[4,4], pads=[0,0,0,0]>(pixel_values, w)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (uint8[B,3,8,8] pixel_values) => (float[B,5,2,2] y)
<float[5,3,4,4] w, float[5] b, float s = {0.00390625}> {
  p = Cast<to=1>(pixel_values)
  x = Mul(p, s)
  y = Conv<strides=[4,4], pads=[0,0,0,0]>(x, w, b)
}
"""
BIASED = BEFORE.replace("w>", "w, float[5] b>").replace(
    "pixel_values, w)", "pixel_values, w, b)"
)


def weights(outputs=5, kernel=(4, 4), channels=3, seed=0):
    generator = np.random.default_rng(seed)
    shape = (outputs, channels, *kernel)
    return {
        "w": generator.standard_normal(shape, dtype=np.float32),
        "b": generator.standard_normal(outputs, dtype=np.float32),
    }


def kernel_only():
    return {"w": weights()["w"]}


def test_before_and_expected():
    graph = parse_graph(BEFORE, **kernel_only())
    result = check_pass(CLIP, graph, pixel_values=256)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, parse_graph(EXPECTED, **weights()))


def test_a_bias_takes_the_mean():
    graph = parse_graph(BIASED, **weights())
    assert check_pass(CLIP, graph, pixel_values=256).rewritten == 1
    assert_same_structure(graph, parse_graph(EXPECTED, **weights()))


def test_values():
    given_weights = weights()
    graph = parse_graph(BIASED, **given_weights)
    CLIP.apply(graph)
    found = constants(graph)
    wide = given_weights["w"].astype(np.float64)
    mean, std = (np.reshape(v, (1, 3, 1, 1)) for v in (MEAN, STD))
    scaled = (wide / 255 / std * 256).astype(np.float32)
    np.testing.assert_allclose(found["w.for_bytes"], scaled, rtol=1e-6)
    assert 1 / 256 in [float(v) for v in found.values() if v.shape == ()]
    shift = given_weights["b"] - (wide * mean / std).sum((1, 2, 3))
    np.testing.assert_allclose(found["b.minus_mean"], shift, rtol=1e-6)


def test_float16_holds_the_weights_as_well_as_before():
    """Small weights must not fall below its normal range."""
    small = {"w": weights()["w"] * np.float32(3e-3)}
    graph = parse_graph(BEFORE, **small)
    CLIP.apply(graph)

    def loss(array):
        wide = array.astype(np.float64)
        return np.linalg.norm(array.astype(np.float16) - wide) / np.linalg.norm(wide)

    assert loss(constants(graph)["w.for_bytes"]) < 1.1 * loss(small["w"])
    assert loss(small["w"] / np.float32(68)) > 1.5 * loss(small["w"]), "what it guards against"


def test_the_mean_colour_gives_the_bias():
    """A picture of one colour, computed by hand: no spread, so only the channel sums count."""
    given_weights = weights()
    graph = parse_graph(BIASED, **given_weights)
    CLIP.apply(graph)
    colour = np.array([255, 0, 51], np.uint8)
    pixels = np.broadcast_to(colour.reshape(1, 3, 1, 1), (1, 3, 8, 8)).copy()
    normal = (colour / 255 - MEAN) / STD
    expected = given_weights["w"].sum((2, 3)) @ normal + given_weights["b"]
    found = run_graph(graph, {"pixel_values": pixels})["y"]
    np.testing.assert_allclose(found[0, :, 1, 1], expected, rtol=1e-4)


def test_feeds_before_are_what_the_image_processor_gives():
    pixels = np.arange(192, dtype=np.uint8).reshape(1, 3, 8, 8)
    feeds = CLIP.feeds_before({"pixel_values": pixels, "other": pixels})
    assert feeds["other"] is pixels
    assert feeds["pixel_values"].dtype == np.float32
    last = (191 / 255 - MEAN[2]) / STD[2]
    np.testing.assert_allclose(feeds["pixel_values"][0, 2, 7, 7], last, rtol=1e-6)


def test_shape_may_read_the_input_too():
    text = BEFORE.replace("float[B,5,2,2] y)", "float[B,5,2,2] y, int64[1] n)")
    text = text.replace("  y =", "  n = Shape<start=0, end=1>(pixel_values)\n  y =")
    graph = parse_graph(text, **kernel_only())
    assert check_pass(CLIP, graph, pixel_values=256).rewritten == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            ("pads=[0,0,0,0]", "pads=[1,1,1,1]"),
            "the pads are [1, 1, 1, 1], and padding is not",
        ),
        (("pads=[0,0,0,0]", 'auto_pad="SAME_UPPER"'), "auto_pad is SAME_UPPER, and padding"),
        (("y = Conv", "z = Relu(pixel_values)\n  y = Conv"), "is also read by Relu"),
        (("y = Conv", "z = Conv(pixel_values, w)\n  y = Conv"), "is also read by Conv"),
        (("y = Conv", "z = Relu(w)\n  y = Conv"), "'w' is shared with Relu"),
        (("y = Conv", "z = Relu(b)\n  y = Conv"), "'b' is shared with Relu"),
        (("pixel_values) =>", "pixel_values, float[5,3,4,4] w) =>"), "'w' is an input of the"),
        (("float[B,3,8,8]", "float16[B,3,8,8]"), "is float16, not float32"),
    ],
    ids=["pads", "auto-pad", "relu", "conv", "shared", "shared-bias", "input", "float16"],
)
def test_refusals(change, reason):
    text, given_weights = BIASED.replace(*change), weights()
    if "z =" in text:
        text = text.replace("[B,5,2,2] y)", "[B,5,2,2] y, float[K,L,M,N] z)")
        text = text.replace("[K,L,M,N]", "[K]") if "Relu(b)" in text else text
    if "input" in reason:
        text = text.replace("<float[5,3,4,4] w, ", "<")
        given_weights.pop("w")
    if "float16" in reason:
        text = text.replace("float[", "float16[")
        given_weights = {name: v.astype(np.float16) for name, v in given_weights.items()}
    graph = parse_graph(text, **given_weights)
    result = CLIP.apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason
    assert graph.inputs[0].dtype != np.uint8


def test_grouped_convolutions_and_other_channel_counts_are_refused():
    text = BEFORE.replace("[5,", "[6,").replace("[B,5", "[B,6")
    grouped = text.replace("Conv<", "Conv<group=3, ").replace("[6,3,", "[6,1,")
    graph = parse_graph(grouped, w=np.ones((6, 1, 4, 4), np.float32))
    assert "3 groups" in CLIP.apply(graph).refusals[0].reason
    grey = FoldPixelNormalization((0.5,), (0.5,)).apply(parse_graph(BEFORE, **kernel_only()))
    assert "the image has 3 channels, the mean 1" in grey.refusals[0].reason


def test_an_input_that_is_also_an_output_is_refused():
    graph = parse_graph(BEFORE, **kernel_only())
    graph.outputs.append(graph.inputs[0])
    assert "also an output of the graph" in CLIP.apply(graph).refusals[0].reason


def test_another_input_or_op_is_no_match():
    for change in (("pixel_values", "image"), ("pixel_values, w", "r, w")):
        text = BEFORE.replace(*change)
        text = (
            text.replace("  y =", "  r = Relu(pixel_values)\n  y =")
            if "r, w" in text
            else text
        )
        assert CLIP.apply(parse_graph(text, **kernel_only())).matched == 0


@pytest.mark.parametrize(
    ("mean", "std"), [((), ()), ((0.5,), (0.5, 0.5)), ((0.5,), (0.0,))], ids=str
)
def test_bad_settings(mean, std):
    with pytest.raises(PassError, match="deviations above 0"):
        FoldPixelNormalization(mean, std)


@given(
    outputs=st.integers(1, 5),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stats=st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 1)), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_size(outputs, kernel, grid, stats, batch, seed):
    channels = len(stats)
    height, width = (g * k for g, k in zip(grid, kernel, strict=True))
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[B,{channels},{height},{width}] pixel_values) => (float[B,M,H,W] y)
      <float[{outputs},{channels},{kernel[0]},{kernel[1]}] w, float[{outputs}] b> {{
      y = Conv<strides=[{kernel[0]},{kernel[1]}]>(pixel_values, w, b)
    }}
    """
    mean, std = zip(*stats, strict=True)
    graph = parse_graph(text, **weights(outputs, kernel, channels, seed))
    rewrite = FoldPixelNormalization(mean, std)
    # Beside float32 rounding: what cancels is as large as the weights' sum.
    assert check_pass(rewrite, graph, {"B": batch}, rtol=1e-4, pixel_values=256).rewritten == 1


@pytest.mark.parametrize("keep", ["patch", "cls_patch"])
def test_the_captured_encoder(keep):
    graph = tiny_graph(
        "vision_encoder", mm_vision_select_feature=keep, mm_projector_type="linear"
    )
    assert check_pass(CLIP, graph, pixel_values=256).rewritten == 1
    assert graph.inputs[0].dtype == np.uint8


def test_nano():
    graph = nano_graph("vision_encoder")
    source = constants(graph)["embeddings.patch_embedding.weight"].astype(np.float64)
    assert check_pass(CLIP, graph, pixel_values=256).rewritten == 1
    name = "embeddings.patch_embedding.weight"
    assert is_deferred(graph.tensors()[f"{name}.for_bytes"])
    found, std = constants(graph), np.reshape(STD, (1, 3, 1, 1))
    assert_close(found[f"{name}.for_bytes"] * 255 / 256 * std, source)
    shift = -(source * np.reshape(MEAN, (1, 3, 1, 1)) / std).sum((1, 2, 3))
    assert_close(found[f"{name}.minus_mean"], shift.astype(np.float32))
