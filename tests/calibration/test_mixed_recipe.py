"""Recipes made of choices: every layer gets what was chosen for it, with few rules."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.calibration.layers import find_layers
from mvlm_export.calibration.mixed_recipe import mixed_graph_recipe
from mvlm_export.calibration.recipe import (
    INT4,
    INT8,
    RECIPES,
    GraphRecipe,
    Recipe,
    Rule,
    read_recipe,
)
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.engines.errors import InputError

from .toy_graphs import toy_decoder, toy_encoder

FINE = WeightFormat(4, 32)
FORMS = (INT4, FINE, INT8, None)
LAYERS = find_layers(toy_decoder())
NAMES = [layer.name for layer in LAYERS]
BASE = GraphRecipe(INT4, "awq+gptq", rules=(Rule("lm_head", FINE),))


@given(st.lists(st.sampled_from(FORMS), min_size=6, max_size=6))
def test_every_layer_gets_what_was_chosen(forms):
    wanted = dict(zip(NAMES, forms, strict=True))
    recipe = mixed_graph_recipe(BASE, LAYERS, wanted)
    assert {la.name: recipe.form_of(la.name, la.kind) for la in LAYERS} == wanted
    differing = [
        la.name for la in LAYERS if la.kind == "linear" and wanted[la.name] != recipe.weights
    ]
    assert len(recipe.rules) <= len(differing)
    assert (recipe.method, recipe.activations) == ("awq+gptq", False)


def test_most_layers_need_no_rule():
    forms = dict.fromkeys(NAMES, INT4) | {"lm_head": FINE}
    recipe = mixed_graph_recipe(BASE, LAYERS, forms)
    assert (recipe.weights, recipe.embedding) == (INT4, INT4)
    assert recipe.rules == (Rule("lm_head", FINE),)


def test_one_rule_names_a_kind_of_layer_in_every_block():
    forms = dict.fromkeys(NAMES, INT4)
    forms |= {"model.layers.0.down": INT8, "model.layers.1.down": INT8}
    assert mixed_graph_recipe(BASE, LAYERS, forms).rules == (
        Rule("model.layers.*.down", INT8),
    )


def test_one_rule_names_a_whole_block():
    forms = dict.fromkeys(NAMES, INT4)
    forms |= {"model.layers.1.up": None, "model.layers.1.down": None}
    assert mixed_graph_recipe(BASE, LAYERS, forms).rules == (Rule("model.layers.1.*", None),)


def test_a_pattern_never_takes_a_layer_that_was_chosen_otherwise():
    forms = dict.fromkeys(NAMES, INT4) | {"model.layers.1.down": INT8}
    assert mixed_graph_recipe(BASE, LAYERS, forms).rules == (
        Rule("model.layers.1.down", INT8),
    )


def test_layers_that_are_not_named_stay_in_float():
    recipe = mixed_graph_recipe(BASE, LAYERS, {"lm_head": INT8})
    assert recipe.weights is None
    assert recipe.rules == (Rule("lm_head", INT8),)


def test_attention_is_left_alone():
    layers = find_layers(toy_encoder())
    recipe = mixed_graph_recipe(GraphRecipe(), layers, dict.fromkeys(["patch"], INT8))
    assert {la.kind: recipe.form_of(la.name, la.kind) for la in layers} == {
        "conv": INT8,
        "linear": None,
        "attention": None,
    }


def test_a_mixed_recipe_is_read_back(tmp_path):
    forms = dict(zip(NAMES, (INT8, INT4, FINE, None, INT4, INT8), strict=True))
    recipe = Recipe("mix", decoder=mixed_graph_recipe(BASE, LAYERS, forms))
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(recipe.to_json()))
    assert read_recipe(path) == recipe


def test_8_bit_activations_are_no_place_to_start():
    with pytest.raises(InputError, match="int4"):
        mixed_graph_recipe(RECIPES["int8"].decoder, LAYERS, {})
