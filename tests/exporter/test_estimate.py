"""Estimates: bytes and products against real graphs, times against sums done by hand."""

import math
from dataclasses import replace

import onnx
import pytest

from mvlm_export.calibration.recipe import INT4, RECIPES, GraphRecipe, Recipe, Rule
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.engines.errors import InputError
from mvlm_export.engines.targets import get_target
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.config import PRESETS, parse_config, read_config
from mvlm_export.exporter.estimate import (
    estimate_model,
    estimate_target,
)
from mvlm_export.exporter.estimate_layers import describe_layers, store_layers
from mvlm_export.exporter.estimate_proposals import Request, propose
from mvlm_export.exporter.estimate_speed import cache_traffic, estimate_speed
from mvlm_export.exporter.preflight import expected_shapes
from mvlm_export.exporter.settings import CompileSettings, nano_checkpoint
from mvlm_export.passes.macs import count_macs
from mvlm_export.passes.statistics import file_statistics
from tests.helpers import tiny_config_json

from .conftest import Silent

ORIN = get_target("orin")
FP16, INT8_RECIPE, INT4_RECIPE = (RECIPES[name] for name in ("fp16", "int8", "int4"))
BIG = PRESETS["v2-1.7b"]
TABLE = 32000 * 2048 * 2
TABLE8 = 32000 * (2048 + 2 + 1)  # codes, scales and zero points
ROTARY = 2 * 2048 * 128 * 2


def bytes_of(recipe, graph="decoder", config=BIG):
    return sum(layer.bytes for layer in store_layers(config, recipe, 2)[graph])


# Against real graphs


@pytest.fixture(
    scope="module", params=[("nano", "int4"), ("tiny", "fp16"), ("tiny", "int8")], ids="-".join
)
def compiled_for_orin(request, checkpoint, samples, tmp_path_factory):
    """A checkpoint's folder, and the bundle made of it."""
    model, recipe = request.param
    folder = nano_checkpoint() if model == "nano" else checkpoint
    settings = CompileSettings(
        output=tmp_path_factory.mktemp("estimate") / model,
        model=folder,
        target="orin",
        recipe=recipe,
        calib_data=None if model == "nano" else samples,
        calib_samples=2,
        parity=False,
        stand_in=False,
        threads=1,
    )
    return folder, compile_checkpoint(settings, Silent()).bundle


def test_bytes_are_those_of_real_graphs(compiled_for_orin):
    """Within 1 %; scalars and shapes weigh up to 300 bytes, of tiny graphs more than that."""
    folder, bundle = compiled_for_orin
    recipe = RECIPES[bundle.manifest.recipe]
    estimate = estimate_model("x", read_config(folder), recipe, ORIN)
    slack = 300 if folder != nano_checkpoint() else 0
    for graph, forms in estimate.weights.items():
        real = file_statistics(bundle.graph_path(graph), {}).weight_bytes
        assert sum(forms.values()) == pytest.approx(real, rel=0.01, abs=slack)


def test_both_estimates_share_their_arithmetic(compiled_for_orin):
    folder, bundle = compiled_for_orin
    recipe, manifest = RECIPES[bundle.manifest.recipe], bundle.manifest
    planned = estimate_model("x", read_config(folder), recipe, ORIN)
    paths = {name: bundle.graph_path(name) for name in manifest.graphs}
    read = estimate_target(paths, "float16", manifest.model, ORIN)
    total = sum(file_statistics(path, {}).weight_bytes for path in paths.values())
    assert read.weights == total  # two 4-bit weights a byte
    layers, width = manifest.model.num_layers, manifest.model.hidden_size
    assert read.cache == 2 * layers * manifest.model.max_positions * width * 2
    assert [part.name for part in read.plan.run] == [part.name for part in planned.plan.run]
    for real, expected in zip(
        (*read.plan.run, *read.plan.build),
        (*planned.plan.run, *planned.plan.build),
        strict=True,
    ):
        assert expected.bytes == pytest.approx(real.bytes, rel=0.01, abs=300)
    assert read.tokens_per_second == pytest.approx(0.65 * 204.8e9 / read.read_per_token)
    assert read.fits is True


def test_products_are_those_of_real_graphs(compiled_for_orin):
    folder, bundle = compiled_for_orin
    config = read_config(folder)
    layers = store_layers(config, RECIPES[bundle.manifest.recipe], 2)
    speed = estimate_speed(config, layers, ORIN, 2, 2)
    encode, project, prefill, decode = speed.phases
    models = {
        name: onnx.load(str(bundle.graph_path(name)), load_external_data=False)
        for name in layers
    }
    assert encode.macs == count_macs(models["vision_encoder"], {"B": 1}).total
    assert project.macs == count_macs(models["projector"], {"B": 1}).total
    prompt = {"S": speed.prompt, "T": 0, "I": config.image_tokens}
    assert prefill.macs == count_macs(models["decoder"], prompt).total
    filled = round(speed.prompt + (speed.answer - 1) / 2)
    step = {"S": 1, "T": filled, "I": config.image_tokens}
    assert decode.macs == count_macs(models["decoder"], step).total


@pytest.mark.parametrize(
    "projector",
    [
        "ldpnetv2",
        "ldpnetv2_nopool",
        "ldpnet",
        "linear",
        "mlp2x_gelu",
        "mlp3x_gelu",
        "pw2",
        "pw2_pool",
        "pw2_pool_pos",
    ],
)
def test_every_projectors_parameters_are_counted(projector):
    config = replace(BIG, projector_type=projector)
    shapes = expected_shapes(config)["projector"]
    found = sum(layer.rows * layer.columns for layer in describe_layers(config)["projector"])
    assert found == sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", PRESETS)
def test_decoder_parameters_are_those_of_the_model_less_its_norms(name):
    text = PRESETS[name].text
    shapes = expected_shapes(PRESETS[name])["decoder"]
    weights = sum(math.prod(shape) for key, shape in shapes.items() if "norm" not in key)
    found = sum(
        layer.rows * layer.columns for layer in describe_layers(PRESETS[name])["decoder"]
    )
    assert found == weights + 2 * text.max_position_embeddings * text.head_dim


def test_grouped_key_value_heads_make_the_merged_product_narrower():
    config = parse_config(tiny_config_json(num_key_value_heads=2))
    merged = next(
        layer for layer in describe_layers(config)["decoder"] if "q_proj" in layer.name
    )
    assert (merged.rows, merged.columns) == (64, 64 + 2 * 32)


# Against measured sizes, of decoders without a token table


def test_sizes_of_the_1_7b_decoder():
    plain = bytes_of(FP16) - TABLE
    assert plain == pytest.approx(2.60e9, rel=0.001)
    assert plain == pytest.approx(2_603_504_924, rel=0.005)  # a plan of it
    half = Recipe("x", decoder=GraphRecipe(INT4, rules=(Rule("lm_head", None),)))
    assert bytes_of(half) - TABLE == pytest.approx(767.97e6, rel=0.0001)
    whole = Recipe("x", decoder=GraphRecipe(INT4))
    assert bytes_of(whole) - TABLE == pytest.approx(671e6, rel=0.001)
    # The recipe's head has blocks of 32, and two scales more for each 128 weights in 4 bits.
    finer = 32000 * 2048 * (2 / 32 - 2 / 128)
    moved = 49 * 2048 * 2
    assert bytes_of(INT4_RECIPE) - TABLE8 == bytes_of(whole) - TABLE + finer + moved


def test_sizes_of_the_encoder_and_projector():
    both = bytes_of(FP16, "vision_encoder") + bytes_of(FP16, "projector")
    assert both == pytest.approx(594.9e6, rel=0.002)
    integers = bytes_of(INT8_RECIPE, "vision_encoder") + bytes_of(INT8_RECIPE, "projector")
    assert integers == pytest.approx(309.6e6, rel=0.05)  # a plan of it


def test_products_of_the_1_7b_model():
    speed = estimate_model("v2-1.7b", BIG, FP16, ORIN).speed
    encode, _, prefill, decode = speed.phases
    block = 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * 577**2 * 1024
    class_token = 1024**2 + 2 * 1024 * 4096  # not behind the last attention
    assert encode.macs == 576 * 588 * 1024 + 23 * block - class_token
    linear = 24 * (4 * 2048**2 + 3 * 2048 * 5632)
    assert speed.prompt == 200
    last_row = 2048**2 + 3 * 2048 * 5632  # of the last layer, behind its attention
    attention = 2 * 24 * 200**2 * 2048
    assert prefill.macs == 200 * linear - 199 * last_row + attention + 32000 * 2048
    assert decode.macs == linear + 32000 * 2048 + 2 * 24 * 329 * 2048


# Speed


def test_decode_is_bound_by_weights_and_cache():
    speed = estimate_model("v2-1.7b", BIG, INT4_RECIPE, ORIN).speed
    decode = speed.phases[-1]
    weights = bytes_of(INT4_RECIPE) - TABLE8 - ROTARY - 49 * 2048 * 2
    cache = int(3 * (200 + 255 / 2) * 24 * 2 * 4096)
    assert decode.bytes == weights + cache
    assert decode.bound == "memory"
    assert decode.seconds == pytest.approx((weights + cache) / (0.65 * 204.8e9))
    assert speed.decode_per_second == pytest.approx(1 / decode.seconds)


def test_prefill_is_bound_by_products_at_the_recipes_rate():
    for recipe, rate in ((FP16, 16 * 1.3e9 * 2048), (INT8_RECIPE, 2 * 16 * 1.3e9 * 2048)):
        prefill = estimate_model("v2-1.7b", BIG, recipe, ORIN).speed.phases[2]
        attention = 2 * 24 * 200**2 * 2048
        seconds = 2 * (prefill.macs - attention) / (0.4 * rate)
        seconds += 2 * attention / (0.4 * 16 * 1.3e9 * 2048)
        assert prefill.bound == "compute"
        assert prefill.seconds == pytest.approx(seconds)


def test_the_papers_protocol_counts_the_picture_too():
    speed = estimate_model("v2-1.7b", BIG, INT4_RECIPE, ORIN).speed
    first = sum(phase.seconds for phase in speed.phases[:3])
    assert speed.first_token == pytest.approx(first)
    whole = first + 256 * speed.phases[3].seconds
    assert speed.tokens_per_second == pytest.approx(256 / whole)
    assert speed.tokens_per_second < speed.decode_per_second


def test_the_fixed_form_reads_all_rows_once():
    assert cache_traffic(row=10, filled=100, capacity=2048, form="append") == 3000
    assert cache_traffic(row=10, filled=100, capacity=2048, form="fixed") == 20480
    seven = get_target("orin", 7)
    decode = estimate_model("v2-1.7b", BIG, INT4_RECIPE, seven).speed.phases[-1]
    weights = bytes_of(INT4_RECIPE) - TABLE8 - ROTARY - 49 * 2048 * 2
    assert decode.bytes == weights + 402_653_184


def test_no_time_is_made_up_where_the_machine_varies():
    estimate = estimate_model("v2-1.7b", BIG, FP16, get_target("cuda"))
    assert estimate.speed.tokens_per_second is None
    assert all(phase.seconds is None and phase.macs > 0 for phase in estimate.speed.phases)
    assert estimate.plan.verdict == "unknown"


# Verdicts and proposals


def request_of(name, recipe, target, max_length=None):
    return Request(name, PRESETS[name], RECIPES[recipe], get_target(target), max_length)


def options_of(request):
    return [proposal.options for proposal in propose(request)]


def test_what_fits_needs_no_proposal():
    assert propose(request_of("v2-1.7b", "int4", "orin-nano")) == ()
    assert propose(request_of("v2-1.7b", "fp16", "rtx")) == ()


def test_1_7b_in_float16_runs_on_a_nano_that_cannot_build_it():
    request = request_of("v2-1.7b", "fp16", "orin-nano")
    assert request.estimate().plan.verdict == "runs only"
    assert options_of(request) == ["--recipe int8", "--recipe int4", "--target orin-nx"]


def test_7b_is_refused_on_a_4gb_nano_with_modules_that_take_it():
    request = request_of("v2-7b", "fp16", "orin-nano-4gb")
    assert request.estimate().plan.verdict == "too small"
    assert options_of(request) == ["--target orin", "--recipe int4 --target orin-32gb"]


def test_a_shorter_cache_is_the_longest_that_helps():
    request = request_of("v2-7b", "int4", "orin-nano")
    shorter = propose(request)[0]
    length = shorter.estimate.max_length
    assert shorter.options == f"--max-length {length}"
    assert shorter.estimate.plan.verdict == "runs only"
    assert "cannot be built" in shorter.text
    longer = replace(request, max_length=length + 64).estimate()
    assert longer.plan.verdict == "too small"


def test_a_proposal_on_the_same_device_may_change_recipe_and_length():
    """No recipe is enough for a model of much cache; a shorter one is, with each of them."""
    text = replace(BIG.text, num_hidden_layers=8, max_position_embeddings=98304)
    config = replace(BIG, text=text)
    request = Request("cache", config, FP16, get_target("orin-nano"))
    lengths = [int(options.split("--max-length ")[1]) for options in options_of(request)[:3]]
    recipes = [options.split("--max-length")[0] for options in options_of(request)[:3]]
    assert recipes == ["", "--recipe int8 ", "--recipe int4 "]
    assert lengths[0] < min(lengths[1:])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("target", ["orin-32gb", "orin-nx-8gb", "orin-nano-4gb"])
def test_every_proposal_holds_when_it_is_taken(name, recipe, target):
    request = request_of(name, recipe, target)
    order = ["too small", "runs only", "fits"]
    before = order.index(request.estimate().plan.verdict)
    for proposal in propose(request):
        words = proposal.options.split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        taken = Request(
            given.get("--model", name),
            PRESETS[given.get("--model", name)],
            RECIPES[given.get("--recipe", recipe)],
            get_target(given.get("--target", target)),
            int(given["--max-length"]) if "--max-length" in given else None,
        )
        assert order.index(taken.estimate().plan.verdict) > before
        assert taken.estimate().plan == proposal.estimate.plan


def test_lengths_are_those_that_a_compile_takes():
    assert BIG.limited(208).text.max_position_embeddings == 208
    for length in (207, 2049):
        with pytest.raises(InputError, match=r"208 .* to 2048"):
            BIG.limited(length)


def test_groups_shrink_to_what_divides_the_rows():
    """3B's FFN of 6912 is 54 x 128, and its head size of 80 touches no group."""
    layers = store_layers(PRESETS["v2-3b"], INT4_RECIPE, 2)["decoder"]
    forms = {layer.form for layer in layers if layer.layer.kind == "linear"}
    assert forms == {INT4, WeightFormat(4, 32)}
