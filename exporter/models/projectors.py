"""The projectors of MobileVLM (LDP), MobileVLM V2 (LDPv2), LLaVA, and table 7's ablations.

LDPv2, equation 3 of arXiv 2402.03766, per image:

    f0 = PW(GELU(PW(f_v)));   f1 = AvgPool2x2(f0);   H_v = DW(f1) + f1

Submodule names are those of the published checkpoints. Grids are square; the class token, if
kept, can only go through the token-wise projectors (``linear``, ``mlpNx_gelu``, ``pw2``).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig, mlp_depth


def to_grid(tokens: Tensor, grid: int) -> Tensor:
    """[B, grid * grid, C] -> [B, C, grid, grid]."""
    return tokens.transpose(1, 2).unflatten(2, (grid, grid))


def to_tokens(feature_map: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C]."""
    return feature_map.flatten(2).transpose(1, 2)


class PointwisePair(nn.Module):
    """Two pointwise convolutions (linear with bias) with exact GELU between them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_features, out_features),
            nn.GELU(),
            nn.Linear(out_features, out_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class PositionalEncodingGenerator(nn.Module):
    """PEG: depthwise 3x3 convolution with bias plus skip, on [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.peg(x) + x


class LdpV2Projector(nn.Module):
    """LDPv2 and its ablations: pointwise pair, then optional pool, PEG or learned positions.

    [B, grid * grid, mm_hidden] -> [B, tokens, hidden], tokens a quarter where it pools.
    """

    def __init__(self, config: ModelConfig, pool: bool, peg: bool, positions: bool) -> None:
        super().__init__()
        width = config.text.hidden_size
        self.grid = config.vision.grid
        self.pool = pool
        self.mlp = PointwisePair(config.vision.hidden_size, width)
        self.peg = PositionalEncodingGenerator(width) if peg else None
        self.pos = nn.Embedding(config.image_tokens, width) if positions else None

    def forward(self, image_features: Tensor) -> Tensor:
        x = self.mlp(image_features)
        if self.pool or self.peg is not None:
            x = to_grid(x, self.grid)
            if self.pool:
                x = F.avg_pool2d(x, 2)
            if self.peg is not None:
                x = self.peg(x)
            x = to_tokens(x)
        return x if self.pos is None else x + self.pos.weight


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        normed = super().forward(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


def make_divisible(value: float, divisor: int) -> int:
    """Round to a multiple of ``divisor``, never losing over 10 % (MobileNetV3's rule)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class SqueezeExcitation(nn.Module):
    """Channel gates: global average, 1x1, ReLU, 1x1, hard sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = make_divisible(channels // 4, 8)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(gate))))


class InvertedResidual(nn.Module):
    """MobileNetV3's block, unexpanded: depthwise 3x3, SE, pointwise; skip at stride 1."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.skip = stride == 1
        depthwise = nn.Conv2d(
            channels, channels, 3, stride, padding=1, groups=channels, bias=False
        )
        pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, ChannelLayerNorm(channels), nn.Hardswish()),
            SqueezeExcitation(channels),
            nn.Sequential(pointwise, ChannelLayerNorm(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return x + y if self.skip else y


class LdpBlock(nn.Module):
    """V1's LDP body; the leading identities keep the published indices."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Identity(),
            nn.Linear(in_features, out_features),
            nn.GELU(),
            nn.Linear(out_features, out_features),
        )
        self.mb_block = nn.Sequential(
            nn.Identity(),
            InvertedResidual(out_features, stride=1),
            InvertedResidual(out_features, stride=2),
        )


class LdpProjector(nn.Module):
    """LDP of MobileVLM V1 (arXiv 2312.16886): [B, grid * grid, C] -> [B, tokens / 4, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.grid = config.vision.grid
        self.model = LdpBlock(config.vision.hidden_size, config.text.hidden_size)

    def forward(self, image_features: Tensor) -> Tensor:
        x = to_grid(self.model.mlp(image_features), self.grid)
        return to_tokens(self.model.mb_block(x))


def linear_stack(config: ModelConfig, depth: int) -> nn.Module:
    """LLaVA's ``linear`` (depth 1, unindexed names) and ``mlpNx_gelu`` projectors."""
    width = config.text.hidden_size
    layers: list[nn.Module] = [nn.Linear(config.vision.hidden_size, width)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


_BUILDERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "ldpnetv2": lambda c: LdpV2Projector(c, pool=True, peg=True, positions=False),
    "ldpnetv2_nopool": lambda c: LdpV2Projector(c, pool=False, peg=True, positions=False),
    "pw2": lambda c: LdpV2Projector(c, pool=False, peg=False, positions=False),
    "pw2_pool": lambda c: LdpV2Projector(c, pool=True, peg=False, positions=False),
    "pw2_pool_pos": lambda c: LdpV2Projector(c, pool=True, peg=False, positions=True),
    "ldpnet": LdpProjector,
    "linear": lambda c: nn.Linear(c.vision.hidden_size, c.text.hidden_size),
}


def build_projector(config: ModelConfig) -> nn.Module:
    """The projector that ``config.projector_type`` names (checked when the config is read)."""
    depth = mlp_depth(config.projector_type)
    if depth is not None:
        return linear_stack(config, depth)
    return _BUILDERS[config.projector_type](config)


def count_parameters(module: nn.Module) -> int:
    """Number of scalar parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
