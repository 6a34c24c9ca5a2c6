"""The ordered list of passes for each graph: exact algebra first, then what the target needs.

Each step that must fire says how often (``Expect``); the compile fails where it does not. What
a model may not need (V1's projector has no PEG) is expected by the model's facts. Passes are
chosen by what a target can do, never by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.kv_cache import KvForm
from mvlm_export.engines.targets import ORT_DOMAIN, TARGETS, Target

from .base import Expect, Step
from .decoder.choose_greedy_token import ChooseGreedyToken
from .decoder.constant_rotary_tables import ConstantRotaryTables
from .decoder.fold_rotary_sign import FoldRotarySign
from .decoder.keep_last_row import KeepLastRow
from .general.clean_layout import CleanLayout
from .general.fold_constants import FoldConstants
from .general.merge_duplicate_constants import MergeDuplicateConstants
from .general.merge_equal_nodes import MergeEqualNodes
from .general.remove_cast_islands import RemoveCastIslands
from .general.remove_dead_code import RemoveDeadCode
from .lowering.convert_to_float16 import ConvertToFloat16
from .lowering.dequantize_gathered_rows import DequantizeGatheredRows
from .lowering.quantize_kv_cache import QuantizeKvCache
from .lowering.use_group_query_attention import HEAD_MULTIPLE, UseGroupQueryAttention
from .lowering.use_integer_matmul import UseIntegerMatMul
from .lowering.use_matmul_nbits import INT8, UseMatMulNBits
from .lowering.use_skip_rms_norm import UseSkipRmsNorm
from .lowering.use_tensor_scatter import UseTensorScatter
from .pass_names import OPTIONAL, check_names
from .projector.fold_peg_skip import FoldPegSkip
from .projector.fuse_pool_into_depthwise import FusePoolIntoDepthwise
from .projector.move_block_to_channels_last import MoveBlockToChannelsLast
from .projector.move_pool_before_pointwise import MovePoolBeforePointwise
from .projector.reshape_without_transposes import ReshapeWithoutTransposes
from .transformer.fold_layernorm_affine import FoldLayerNormAffine
from .transformer.fold_query_scale import FoldQueryScale
from .transformer.fold_rmsnorm_weight import FoldRmsNormWeight
from .transformer.merge_gate_up import MergeGateUp
from .transformer.merge_qkv import MergeQkv
from .vision.drop_vision_tail import DropVisionTail
from .vision.fold_class_and_position import FoldClassAndPosition
from .vision.fold_pixel_normalization import FoldPixelNormalization

FLOAT16_PASS = ConvertToFloat16.name
"""What makes a float16 recipe."""

KV_CACHE_PASS = QuantizeKvCache.name
"""What makes an 8-bit cache."""

TENSOR_SCATTER_PASS = UseTensorScatter.name
"""What makes the fixed form of a cache out of ONNX's own operators."""

LAST_ROW_PASS = KeepLastRow.name
"""What leaves the logits of the last token alone."""

KEPT_FLOAT32 = frozenset({"logits"})
"""Inputs and outputs that stay float32 in a float16 graph."""


@dataclass(frozen=True)
class ModelFacts:
    """What the pipelines must know of a model to say what they expect.

    Attributes:
        vision_layers: blocks that the encoder runs.
        keeps_class_token: whether the class token goes to the projector.
        image_mean, image_std: of the three channels, for pixels of 0 to 1.
        pools: whether the projector averages over patches behind its pointwise layers.
        ldp_blocks: inverted residual blocks of V1's projector.
        has_peg: whether it adds a depthwise convolution to its input.
        positions: rows of the KV cache.
    """

    vision_layers: int
    keeps_class_token: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    pools: bool
    has_peg: bool
    ldp_blocks: int
    decoder_layers: int
    head_dim: int
    positions: int


@dataclass(frozen=True)
class PipelineOptions:
    """What the user chose.

    Attributes:
        dtype: ``float32`` or ``float16``, of the finished graphs.
        disabled: names of passes to leave out.
        enabled: names of optional passes to add.
        progress: told (done, total, name) by passes that read every weight.
        logits_rows: most rows of logits that the decoder gives, the last ones.
    """

    dtype: str
    disabled: frozenset[str] = frozenset()
    enabled: frozenset[str] = frozenset()
    progress: Callable[[int, int, str], None] | None = None
    logits_rows: int = 1


def build_pipeline(
    name: str,
    facts: ModelFacts,
    target: Target,
    options: PipelineOptions,
    quantization: Sequence[Step] = (),
    cache_scales: Mapping[str, float] | None = None,
) -> list[Step]:
    """The steps for one graph.

    Args:
        name: ``vision_encoder``, ``projector`` or ``decoder``.
        quantization: what writes integers into the graph, between the exact rewrites and the
            conversion to float16.
        cache_scales: of an 8-bit cache, as :class:`.QuantizeKvCache` takes them; None or empty
            for one in float.

    Raises:
        InputError: a name in ``disabled`` or ``enabled`` is no pass, or is not optional.
    """
    steps = [
        *exact_steps(name, facts, options),
        *quantization,
        *_convert(options),
        *_lower(name, facts, target, options, cache_scales or {}),
    ]
    return _chosen(steps, replace(options, enabled=options.enabled | target.own_passes))


def exact_steps(name: str, facts: ModelFacts, options: PipelineOptions) -> list[Step]:
    """The first part of a pipeline: what changes no number beyond rounding, for any target.

    Raises:
        InputError: as :func:`build_pipeline`.
    """
    check_names(options.disabled, options.enabled)
    return _chosen([*_prepare(), *_EXACT[name](facts, options), *_clean_up()], options)


def _chosen(steps: list[Step], options: PipelineOptions) -> list[Step]:
    optional = set(OPTIONAL) - options.enabled
    left_out = options.disabled | optional
    return [step for step in steps if step.rewrite.name not in left_out]


def _prepare() -> list[Step]:
    """What the rewrites need: constants where constants are meant.

    No more than that: they find their places by a weight of its own in each, equal or not, of
    ones or not.
    """
    return [Step(FoldConstants()), Step(RemoveDeadCode())]


def _clean_up() -> list[Step]:
    return [
        Step(FoldConstants()),
        Step(MergeDuplicateConstants()),
        Step(MergeEqualNodes()),
        Step(CleanLayout()),
        Step(RemoveDeadCode()),
    ]


def _vision_steps(facts: ModelFacts, options: PipelineOptions) -> list[Step]:
    layers = facts.vision_layers
    return [
        Step(
            FoldPixelNormalization(facts.image_mean, facts.image_std),
            Expect(1, "one patch convolution"),
        ),
        Step(FoldClassAndPosition(), Expect(1, "one embedding")),
        Step(DropVisionTail(), Expect(int(not facts.keeps_class_token), "one class row")),
        Step(FoldLayerNormAffine(), Expect(2 * layers, "two a block")),
        Step(FoldQueryScale(), Expect(layers, "one a block")),
        Step(MergeQkv(), Expect(layers, "one a block")),
    ]


def _projector_steps(facts: ModelFacts, options: PipelineOptions) -> list[Step]:
    fuses = FusePoolIntoDepthwise.name in options.enabled
    return _fused_pool_steps(facts) if fuses else _split_pool_steps(facts)


def _split_pool_steps(facts: ModelFacts) -> list[Step]:
    return [
        Step(MovePoolBeforePointwise(), Expect(int(facts.pools), "one pool")),
        Step(FoldPegSkip(), Expect(int(facts.has_peg), "one PEG")),
        Step(MoveBlockToChannelsLast(), Expect(facts.ldp_blocks, "one a block of LDP")),
        Step(ReshapeWithoutTransposes(), Expect(int(facts.ldp_blocks > 0), "one LDP")),
    ]


def _fused_pool_steps(facts: ModelFacts) -> list[Step]:
    """The other way round: the pool goes into PEG instead of before the pointwise layer."""
    once = Expect(int(facts.pools and facts.has_peg), "one pool with a PEG")
    first = [Step(FoldPegSkip()), Step(FusePoolIntoDepthwise(), once)]
    replaced = (MovePoolBeforePointwise, FoldPegSkip)
    return first + [s for s in _split_pool_steps(facts) if not isinstance(s.rewrite, replaced)]


def _decoder_steps(facts: ModelFacts, options: PipelineOptions) -> list[Step]:
    layers = facts.decoder_layers
    return [
        Step(KeepLastRow(count=options.logits_rows), Expect(1, "one output of logits")),
        Step(ConstantRotaryTables(facts.positions)),
        Step(FoldRotarySign(), Expect(2 * layers, "query and key of each layer")),
        Step(FoldRmsNormWeight(), Expect(2 * layers + 1, "two a layer and the last")),
        Step(FoldQueryScale(), Expect(layers, "one a layer")),
        Step(MergeQkv(), Expect(layers, "one a layer")),
        Step(MergeGateUp(), Expect(layers, "one a layer")),
    ]


_EXACT: dict[str, Callable[[ModelFacts, PipelineOptions], list[Step]]] = {
    "vision_encoder": _vision_steps,
    "projector": _projector_steps,
    "decoder": _decoder_steps,
}


def _convert(options: PipelineOptions) -> list[Step]:
    if options.dtype == "float32":
        return []
    return [
        Step(ConvertToFloat16(keep_io=KEPT_FLOAT32, progress=options.progress)),
        Step(RemoveCastIslands()),
    ]


def cache_form(facts: ModelFacts, target: Target, options: PipelineOptions) -> KvForm:
    """The form of the decoder's cache: the target's, where the model and the user allow it."""
    rewrite = _fixed_form(target)
    if rewrite.name in options.disabled:
        return "append"
    if rewrite is UseGroupQueryAttention and facts.head_dim % HEAD_MULTIPLE:
        return "append"
    return target.kv_form


def require_cache_dtype(dtype: str, target: Target) -> None:
    """Refuse a recipe's cache that no decoder for this target has.

    Raises:
        InputError: the target has none of that dtype.
    """
    if dtype not in target.kv_cache_dtypes:
        able = [t.name for t in TARGETS.values() if dtype in t.kv_cache_dtypes]
        raise InputError(
            f"Target {target.name!r} keeps its KV cache in the graph's floats, not in "
            f"{dtype}. Leave the {dtype} cache out, or compile for {' or '.join(able)}."
        )


def require_kv_cache(
    dtype: str, facts: ModelFacts, target: Target, options: PipelineOptions
) -> None:
    """Refuse a recipe's cache that the decoder's operators cannot hold.

    Raises:
        InputError: they cannot, or a pass that it needs is left out.
    """
    require_cache_dtype(dtype, target)
    if cache_form(facts, target, options) != "fixed":
        raise InputError(
            f"A KV cache of {dtype} needs ONNX Runtime's GroupQueryAttention, which is "
            f"disabled or cannot take heads of {facts.head_dim} (only multiples of "
            f"{HEAD_MULTIPLE}). Leave the {dtype} cache out."
        )
    if KV_CACHE_PASS in options.disabled:
        raise InputError(
            f"The recipe's KV cache of {dtype} is made by the pass {KV_CACHE_PASS!r}, which "
            "is disabled. Leave one of the two out."
        )


def _fixed_form(target: Target) -> type[UseGroupQueryAttention] | type[UseTensorScatter]:
    """What makes the fixed form out of the append form for a target."""
    return UseTensorScatter if target.scatters_cache else UseGroupQueryAttention


def _lower(
    name: str,
    facts: ModelFacts,
    target: Target,
    options: PipelineOptions,
    cache_scales: Mapping[str, float],
) -> list[Step]:
    form = cache_form(facts, target, options)
    has_contrib = ORT_DOMAIN in target.extra_domains
    steps: list[Step] = []
    if name == "decoder" and form == "fixed":
        rewrite = _fixed_form(target)(facts.positions)
        each = Expect(facts.decoder_layers, "one a layer")
        steps.append(Step(rewrite, each))
        if cache_scales:
            steps.append(Step(QuantizeKvCache(cache_scales), each))
    if has_contrib and name != "decoder":
        steps.append(Step(UseIntegerMatMul()))
    if has_contrib:
        steps += [
            Step(DequantizeGatheredRows()),
            # Three to four times as fast on a CPU as float32 (docs/performance.md). With
            # float16 tensors ONNX Runtime 1.31's CPU gives wrong numbers at that level.
            Step(UseMatMulNBits(INT8 if options.dtype == "float32" else 0)),
            Step(UseSkipRmsNorm()),
            Step(CleanLayout()),
        ]
    if name == "decoder":
        steps.append(Step(ChooseGreedyToken()))
    return [*steps, Step(MergeDuplicateConstants()), Step(RemoveDeadCode())]


def require_enabled(facts: ModelFacts, target: Target, options: PipelineOptions) -> None:
    """Refuse an enabled pass that is in none of the pipelines for this target.

    Raises:
        InputError: there is one.
    """
    running = {
        step.rewrite.name
        for name in _EXACT
        for step in build_pipeline(name, facts, target, options)
    }
    for name in sorted(options.enabled - running):
        raise InputError(
            f"The pass {name!r} is not for target {target.name!r}: it would not run. Leave "
            "--enable-pass out, or choose another target."
        )
