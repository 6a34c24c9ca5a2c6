"""Passes by the names that users give: which there are, and which may be asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mvlm_export.engines.errors import InputError

from .base import Pass
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
from .lowering.use_group_query_attention import UseGroupQueryAttention
from .lowering.use_integer_matmul import UseIntegerMatMul
from .lowering.use_matmul_nbits import UseMatMulNBits
from .lowering.use_skip_rms_norm import UseSkipRmsNorm
from .lowering.use_tensor_scatter import UseTensorScatter
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

OPTIONAL: dict[str, str] = {
    FusePoolIntoDepthwise.name: FusePoolIntoDepthwise.summary,
    MoveBlockToChannelsLast.name: MoveBlockToChannelsLast.summary,
    ChooseGreedyToken.name: ChooseGreedyToken.summary,
    UseIntegerMatMul.name: UseIntegerMatMul.summary,
    UseSkipRmsNorm.name: UseSkipRmsNorm.summary,
}
"""Passes that run only when asked for, or where the target has them as its own (``own_passes``
of its record), with what they do."""

_PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        ChooseGreedyToken,
        CleanLayout,
        ConstantRotaryTables,
        ConvertToFloat16,
        DequantizeGatheredRows,
        DropVisionTail,
        FoldClassAndPosition,
        FoldConstants,
        FoldLayerNormAffine,
        FoldPegSkip,
        FoldPixelNormalization,
        FoldQueryScale,
        FoldRmsNormWeight,
        FoldRotarySign,
        FusePoolIntoDepthwise,
        KeepLastRow,
        MergeDuplicateConstants,
        MergeEqualNodes,
        MergeGateUp,
        MergeQkv,
        MoveBlockToChannelsLast,
        MovePoolBeforePointwise,
        QuantizeKvCache,
        RemoveCastIslands,
        RemoveDeadCode,
        ReshapeWithoutTransposes,
        UseGroupQueryAttention,
        UseIntegerMatMul,
        UseMatMulNBits,
        UseSkipRmsNorm,
        UseTensorScatter,
    )
}


def pass_names() -> list[str]:
    """Names of every pass that some pipeline may run, in alphabetical order."""
    return sorted(_PASSES)


def check_names(disabled: Iterable[str], enabled: Iterable[str]) -> None:
    """Refuse names that no pass has.

    Raises:
        InputError: a name is unknown or in both, or ``enabled`` names a pass that always runs.
    """
    disabled, enabled = list(disabled), list(enabled)
    both = sorted(set(disabled) & set(enabled))
    if both:
        raise InputError(f"{', '.join(both)}: both --disable-pass and --enable-pass name it.")
    for name in (*disabled, *enabled):
        if name not in _PASSES:
            close = difflib.get_close_matches(name, _PASSES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise InputError(f"There is no pass {name!r}.{hint} Known: {', '.join(_PASSES)}.")
    for name in enabled:
        if name not in OPTIONAL:
            raise InputError(
                f"The pass {name!r} runs anyway; --enable-pass is for {', '.join(OPTIONAL)}."
            )
