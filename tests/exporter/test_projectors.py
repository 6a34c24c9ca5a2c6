"""The projectors against their formulas, written out here a second time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mvlm_export.exporter.checkpoint import Checkpoint
from mvlm_export.exporter.config import (
    PRESETS,
    PROJECTORS,
    ModelConfig,
    parse_config,
    published_config_json,
)
from mvlm_export.exporter.models.components import build_component
from mvlm_export.exporter.models.projectors import count_parameters
from tests.helpers import load_random_component

KINDS = (*PROJECTORS, "mlp1x_gelu", "mlp2x_gelu")


@pytest.fixture(autouse=True)
def one_thread_without_gradients():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def features_for(config: ModelConfig, dtype: torch.dtype) -> Tensor:
    shape = (2, config.image_feature_tokens, config.vision.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(12), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_projector_shapes(tmp_path, kind):
    loaded = load_random_component(tmp_path, "projector", mm_projector_type=kind)
    output = loaded.module(features_for(loaded.config, torch.float32))
    assert output.shape == (2, loaded.config.image_tokens, 64)
    assert output.std() > 0.05


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "pw2"])
def test_tokenwise_projectors_take_the_class_token(tmp_path, kind):
    changes = {"mm_projector_type": kind, "mm_vision_select_feature": "cls_patch"}
    loaded = load_random_component(tmp_path, "projector", **changes)
    features = features_for(loaded.config, torch.float32)
    output = loaded.module(features)
    assert output.shape == (2, 17, 64)
    close(output[:, 1:], loaded.module(features[:, 1:]), 1e-6)


def linear(checkpoint: Checkpoint, name: str, x: Tensor) -> Tensor:
    weight, bias = (checkpoint.load(f"{name}.{leaf}").double() for leaf in ("weight", "bias"))
    return torch.einsum("...i,oi->...o", x, weight) + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def depthwise(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """[B, H, W, C] by [C, 1, 3, 3], zero padding 1, as nine shifted sums."""
    height, width = x.shape[1:3]
    padded = torch.zeros(x.shape[0], height + 2, width + 2, x.shape[3], dtype=x.dtype)
    padded[:, 1:-1, 1:-1] = x
    total = torch.zeros_like(x)
    for row in range(3):
        for column in range(3):
            window = padded[:, row : row + height, column : column + width]
            total = total + window * kernel[:, 0, row, column]
    return total[:, ::stride, ::stride]


def pool(x: Tensor) -> Tensor:
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


@pytest.mark.parametrize("grid", [4, 6])
@pytest.mark.parametrize("kind", ["ldpnetv2", "ldpnetv2_nopool", "pw2_pool", "pw2_pool_pos"])
def test_ldpv2_and_its_ablations_follow_equation_3(tmp_path, kind, grid):
    """f0 = PW(GELU(PW(f_v))); f1 = AvgPool2x2(f0); H_v = DW(f1) + f1."""
    size = {"image_size": 14 * grid}
    loaded = load_random_component(
        tmp_path, "projector", torch.float64, mm_projector_type=kind, vision_config=size
    )
    checkpoint, prefix = loaded.checkpoint, "model.mm_projector."
    features = features_for(loaded.config, torch.float64)
    hidden = gelu(linear(checkpoint, f"{prefix}mlp.mlp.0", features))
    x = linear(checkpoint, f"{prefix}mlp.mlp.2", hidden).reshape(2, grid, grid, 64)
    if kind != "ldpnetv2_nopool":
        x = pool(x)
    if kind.startswith("ldpnetv2"):
        kernel = checkpoint.load(f"{prefix}peg.peg.0.weight").double()
        x = depthwise(x, kernel) + checkpoint.load(f"{prefix}peg.peg.0.bias").double() + x
    x = x.reshape(2, -1, 64)
    if kind == "pw2_pool_pos":
        x = x + checkpoint.load(f"{prefix}pos.weight").double()
    close(loaded.module(features), x, 1e-12)


def test_pooling_is_the_published_adaptive_pooling():
    """On the 24 x 24 grid the published adaptive pool to 12 x 12 is the 2 x 2 mean."""
    x = torch.randn(1, 24, 24, 5, dtype=torch.float64)
    adaptive = nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (12, 12))
    close(pool(x), adaptive.permute(0, 2, 3, 1), 1e-12)


def channel_norm(checkpoint: Checkpoint, name: str, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    scaled = (x - mean) / (variance + 1e-5).sqrt()
    weight, bias = (checkpoint.load(f"{name}.{leaf}").double() for leaf in ("weight", "bias"))
    return scaled * weight + bias


def inverted_residual(checkpoint: Checkpoint, name: str, x: Tensor, stride: int) -> Tensor:
    """DW 3x3, norm, hard-swish; squeeze-excitation; pointwise, norm; skip at stride 1."""

    def squeeze(part: str, mean: Tensor) -> Tensor:
        weight = checkpoint.load(f"{name}.1.{part}.weight").double()[:, :, 0, 0]
        return mean @ weight.T + checkpoint.load(f"{name}.1.{part}.bias").double()

    y = depthwise(x, checkpoint.load(f"{name}.0.0.weight").double(), stride)
    y = channel_norm(checkpoint, f"{name}.0.1", y)
    y = y * (y + 3).clamp(0, 6) / 6
    gate = squeeze("fc2", squeeze("fc1", y.mean((1, 2))).clamp(min=0))
    y = y * (gate / 6 + 0.5).clamp(0, 1)[:, None, None]
    y = y @ checkpoint.load(f"{name}.2.0.weight").double()[:, :, 0, 0].T
    y = channel_norm(checkpoint, f"{name}.2.1", y)
    return y + x if stride == 1 else y


@pytest.mark.parametrize("grid", [4, 5])
def test_v1_ldp_follows_its_formula(tmp_path, grid):
    size = {"image_size": 14 * grid}
    loaded = load_random_component(
        tmp_path, "projector", torch.float64, mm_projector_type="ldpnet", vision_config=size
    )
    checkpoint, prefix = loaded.checkpoint, "model.mm_projector.model."
    features = features_for(loaded.config, torch.float64)
    hidden = gelu(linear(checkpoint, f"{prefix}mlp.1", features))
    x = linear(checkpoint, f"{prefix}mlp.3", hidden).reshape(2, grid, grid, 64)
    x = inverted_residual(checkpoint, f"{prefix}mb_block.1.block", x, stride=1)
    x = inverted_residual(checkpoint, f"{prefix}mb_block.2.block", x, stride=2)
    close(loaded.module(features), x.reshape(2, -1, 64), 1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_llava_projectors(tmp_path, depth):
    kind = f"mlp{depth}x_gelu"
    loaded = load_random_component(
        tmp_path, "projector", torch.float64, mm_projector_type=kind
    )
    features = x = features_for(loaded.config, torch.float64)
    for index in range(depth):
        x = linear(
            loaded.checkpoint, f"model.mm_projector.{2 * index}", gelu(x) if index else x
        )
    close(loaded.module(features), x, 1e-12)


@pytest.mark.parametrize(
    ("kind", "millions"), [("ldpnetv2", 6.32), ("ldpnet", 18.94), ("mlp2x_gelu", 6.30)]
)
def test_projector_parameters_of_the_paper(kind, millions):
    content = published_config_json("v2-1.7b") | {"mm_projector_type": kind}
    with torch.device("meta"):
        projector = build_component("projector", parse_config(content))
    assert round(count_parameters(projector) / 1e6, 2) == millions


def test_depthwise_part_of_ldpv2_is_as_small_as_the_paper_says():
    with torch.device("meta"):
        projector = build_component("projector", PRESETS["v2-1.7b"])
    assert round(count_parameters(projector.peg) / 1e6, 2) == 0.02
