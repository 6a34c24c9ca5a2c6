"""TensorRT-RTX keeps quantized weights in few bits (read from its plans, pinned to 1.7.1)."""

import pytest

from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.calibration.write_quantization import WriteQuantization
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_builder import build_engine
from mvlm_export.engines.trt_profiles import ProfileSpec
from mvlm_export.passes.graph_io import save_graph
from mvlm_export.passes.lowering.convert_to_float16 import ConvertToFloat16
from tests.helpers_plan import plan_kernels
from tests.passes import test_plans
from tests.passes.test_plans import WHOLE_WEIGHT

from .quantized_graphs import HEAD, Case, parsed, plan_of

pinned = test_plans.pinned
"""Skips where the package is another or missing."""

ROWS, INNER = 2048, 1024
TEXT = (
    HEAD
    + """
    g (float[S,2048] x) => (float[S,2048] y) <float[2048,1024] w, float[1024,2048] v> {
      a = MatMul(x, w)
      s = Sigmoid(a)
      h = Mul(a, s)
      y = MatMul(h, v)
    }
    """
)
EMBEDDING = (
    HEAD
    + """
    g (int32[S] ids) => (float[S,64] y) <float[4096,512] embed, float[512,64] v> {
      e = Gather(embed, ids)
      y = MatMul(e, v)
    }
    """
)
INT8 = WeightFormat(8)
PROFILES = [
    ProfileSpec("prefill", {"S": (1, 64, 128)}),
    ProfileSpec("decode", {"S": (1, 1, 1)}),
]


def build(text, plan, inputs, folder):
    """The plan's size, and the kernels of all profiles."""
    graph = parsed(text)
    case = Case(text, "", plan, inputs)
    WriteQuantization(plan_of(graph, case, folder)[0]).apply(graph)
    ConvertToFloat16().apply(graph)
    save_graph(graph, folder / "model.onnx")
    result = build_engine(
        folder / "model.onnx", folder / "model.plan", PROFILES, target=get_target("rtx")
    )
    content = result.plan_path.read_bytes()
    return len(content), [entry.kernel for entry in plan_kernels(content)]


@pytest.mark.parametrize(
    ("form", "inputs", "copies", "share", "kernel"),
    [
        (INT8, (0.03,), 2, 1.12, "MulMinMaxRounCast"),
        (WeightFormat(4, 128), (), 1, 1.15, "ReplCastMulCastFc"),
        (WeightFormat(4, 32), (), 1, 1.15, "ReplCastMulCastFc"),
        (WeightFormat(4, 128, symmetric=False), (), 1, 1.5, "ReplCastMulCastFc"),
    ],
    ids=["w8a8", "int4-g128", "int4-g32", "int4-g128-asym"],
)
def test_weights_stay_in_few_bits(form, inputs, copies, share, kernel, tmp_path):
    """Little more than codes, scales and offsets; the rest is the program of two profiles.

    8-bit weights are laid out anew for each profile, as float16 ones are.
    """
    size, kernels = build(TEXT, {"w": form, "v": form}, inputs, tmp_path)
    stored = form.stored_bytes(ROWS, INNER) + form.stored_bytes(INNER, ROWS)
    assert size < share * copies * stored
    assert not [name for name in kernels if WHOLE_WEIGHT in name]
    assert len([name for name in kernels if kernel in name]) == 2 * len(PROFILES)


def test_a_whole_weight_would_be_seen(tmp_path):
    """8-bit weights beside float16 activations are written out by the decode profile."""
    _, kernels = build(TEXT, {"w": INT8, "v": INT8}, (), tmp_path)
    whole = [name for name in kernels if name.endswith(WHOLE_WEIGHT)]
    assert len(whole) == 2


@pytest.mark.parametrize("form", [INT8, WeightFormat(4, 32)], ids=str)
def test_a_table_is_read_row_by_row(form, tmp_path):
    size, kernels = build(EMBEDDING, {"embed": form}, (), tmp_path)
    assert size < form.stored_bytes(512, 4096) + 600_000
    assert len([name for name in kernels if name.endswith("CastMulCastGath")]) == 2
    assert not [name for name in kernels if name.endswith(WHOLE_WEIGHT)]


def test_a_last_block_that_is_shorter_is_refused(tmp_path):
    text = TEXT.replace("2048", "576")
    with pytest.raises(EngineError, match="must divide into whole blocks"):
        build(text, {"w": WeightFormat(4, 128)}, (), tmp_path)
