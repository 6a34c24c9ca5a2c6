"""Recipes: rules, JSON there and back, and what each mistake is answered with."""

import json
from dataclasses import replace

import pytest

from mvlm_export.calibration.recipe import (
    GRAPHS,
    INT4,
    INT8,
    RECIPES,
    TYPE,
    VERSION,
    GraphRecipe,
    Recipe,
    Rule,
    find_recipe,
    read_recipe,
)
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.engines.errors import InputError

ASYMMETRIC = WeightFormat(4, 64, symmetric=False)
EVERYTHING = Recipe(
    "mine",
    vision_encoder=GraphRecipe(
        INT8, activations=True, attention=True, smooth=True, observer="entropy"
    ),
    projector=GraphRecipe(INT8),
    decoder=GraphRecipe(
        ASYMMETRIC,
        "awq+gptq",
        embedding=INT8,
        rules=(Rule("model.layers.0.*", None), Rule("lm_head", WeightFormat(4, 32))),
        kv_cache_dtype="int8",
    ),
    dtype="float16",
)


def written(recipe, path, change=lambda values: None):
    values = recipe.to_json()
    values = json.loads(json.dumps(values))
    change(values)
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("recipe", [*RECIPES.values(), EVERYTHING], ids=lambda r: r.name)
def test_a_recipe_comes_back_from_json(recipe, tmp_path):
    path = written(recipe, tmp_path / "recipe.json")
    assert read_recipe(path) == recipe
    assert find_recipe(str(path)) == recipe


def test_named_recipes():
    assert set(RECIPES) == {"fp32", "fp16", "int8", "int4", "int8-int4"}
    for name, recipe in RECIPES.items():
        assert find_recipe(name) is recipe
        assert recipe.name == name
        assert recipe.is_float is (name in ("fp32", "fp16"))
        assert recipe.needs_data is not recipe.is_float
    assert not RECIPES["int8"].vision_encoder.attention
    mixed = RECIPES["int8-int4"]
    assert mixed.vision_encoder == RECIPES["int8"].vision_encoder
    assert mixed.projector == RECIPES["int8"].projector
    assert mixed.decoder == RECIPES["int4"].decoder
    assert RECIPES["int4"].decoder.form_of("lm_head", "linear") == WeightFormat(4, 32)
    table = RECIPES["int4"].decoder.form_of("model.embed_tokens", "embedding")
    assert table == WeightFormat(8)


def test_a_file_of_any_name(tmp_path):
    path = written(EVERYTHING, tmp_path / "recipe")
    assert find_recipe(str(path)) == EVERYTHING


def test_the_first_rule_that_fits_counts():
    recipe = GraphRecipe(
        INT4,
        rules=(
            Rule("model.layers.0.mlp.*", WeightFormat(8)),
            Rule("model.layers.0.*", None),
            Rule("model.layers.0.self_attn.q_proj", WeightFormat(4, 32)),
            Rule("*embed*", INT8),
        ),
    )
    forms = {
        name: recipe.form_of(name, kind)
        for name, kind in (
            ("model.layers.0.mlp.up_proj", "linear"),
            ("model.layers.0.self_attn.q_proj", "linear"),
            ("model.layers.1.self_attn.q_proj", "linear"),
            ("model.embed_tokens", "embedding"),
            ("node_matmul_3", "attention"),
        )
    }
    assert list(forms.values()) == [WeightFormat(8), None, INT4, INT8, None]


def test_forms_by_kind():
    recipe = GraphRecipe(INT8, embedding=WeightFormat(4, 32))
    assert recipe.form_of("x", "linear") == recipe.form_of("x", "conv") == INT8
    assert recipe.form_of("x", "embedding") == WeightFormat(4, 32)
    assert GraphRecipe(INT8).form_of("x", "embedding") is None


def test_convolutions_stay_in_float_beside_4_bits():
    """Unless a rule says otherwise."""
    recipe = GraphRecipe(INT4, rules=(Rule("peg", INT8),))
    assert recipe.form_of("patch", "conv") is None
    assert recipe.form_of("peg", "conv") == INT8


def test_a_recipe_with_an_8_bit_cache():
    recipe = RECIPES["int4"].with_kv_cache("int8")
    assert recipe.name == "int4-kv8"
    assert recipe == replace(
        RECIPES["int4"],
        name="int4-kv8",
        decoder=replace(RECIPES["int4"].decoder, kv_cache_dtype="int8"),
    )
    assert recipe.with_kv_cache("int8") is recipe


def test_a_cache_alone_needs_samples_and_its_layers_stay_in_float():
    recipe = RECIPES["fp32"].with_kv_cache("int8")
    assert recipe.decoder.has_float_layers
    assert not recipe.is_float
    assert recipe.needs_data
    assert not recipe.decoder.rounds_by_data
    assert not recipe.vision_encoder.needs_data


def test_the_decoder_alone_has_a_cache():
    with pytest.raises(InputError, match=r"projector\.kv_cache_dtype means nothing"):
        Recipe("r", projector=GraphRecipe(kv_cache_dtype="int8"))


@pytest.mark.parametrize(
    ("recipe", "is_float", "needs_data"),
    [
        (GraphRecipe(), True, False),
        (GraphRecipe(method="awq"), True, False),
        (GraphRecipe(rules=(Rule("*", None),)), True, False),
        (GraphRecipe(rules=(Rule("lm_head", INT8),)), False, False),
        (GraphRecipe(embedding=INT8), False, False),
        (GraphRecipe(INT4), False, False),
        (GraphRecipe(INT4, "gptq"), False, True),
        (GraphRecipe(INT8, activations=True), False, True),
        (GraphRecipe(attention=True), False, True),
    ],
)
def test_what_needs_samples(recipe, is_float, needs_data):
    assert (recipe.is_float, recipe.needs_data) == (is_float, needs_data)
    whole = Recipe("r", projector=recipe)
    assert (whole.is_float, whole.needs_data) == (is_float, needs_data)
    assert whole.graph("projector") is recipe


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kv_cache_dtype": "int4"}, "no kv_cache_dtype 'int4'. Choose one of int8, or leave"),
        ({"method": "best"}, "no method 'best'. Choose one of rtn, awq, gptq, awq.gptq"),
        ({"activations": True}, "8-bit activations need 8-bit weights"),
        ({"weights": INT4, "activations": True}, "8 by 4 bits have no kernel"),
        ({"weights": INT8, "smooth": True}, "smooth serves 8-bit activations"),
        (
            {"weights": INT8, "activations": True, "smooth": True, "method": "awq"},
            "smooth and awq both choose scales",
        ),
        ({"embedding": ASYMMETRIC}, "token table takes no offsets"),
        ({"observer": "median"}, "no observer 'median'. Choose one of min-max, percentile"),
    ],
)
def test_settings_that_do_not_go_together(fields, complaint):
    with pytest.raises(InputError, match=complaint):
        GraphRecipe(**fields)


def test_dtypes():
    with pytest.raises(
        InputError, match=r"no dtype 'int8'.*float32, float16, or leave it out"
    ):
        Recipe("r", dtype="int8")


def test_an_unknown_name():
    known = "fp32, fp16, int8, int4, int8-int4, or give"
    with pytest.raises(InputError, match=rf"no recipe 'int5'.*{known}"):
        find_recipe("int5")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xff", "cannot be read"),
        (b"[]", r'is no recipe: it needs "_type": "mvlm-recipe"'),
        (b'{"name": "r"}', "is no recipe"),
        (json.dumps({"_type": TYPE, "name": "r"}).encode(), "version None, and this program"),
        (json.dumps({"_type": TYPE, "_version": VERSION + 1}).encode(), "version 2, and this"),
    ],
)
def test_files_that_are_no_recipe(content, complaint, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        read_recipe(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        find_recipe(str(tmp_path / "gone.json"))


def place(*keys):
    """A change of one value, by the way to it."""

    def change(values, new):
        for key in keys[:-1]:
            values = values[key]
        if new is None:
            del values[keys[-1]]
        else:
            values[keys[-1]] = new

    return change


@pytest.mark.parametrize(
    ("way", "new", "complaint"),
    [
        (("name",), None, "The recipe has no name"),
        (("name",), 3, "has 3 for name, where a text is needed"),
        (("nmae",), "x", "The recipe has nmae, which means nothing here; known are name, vis"),
        (("dtype",), "float64", "no dtype 'float64'"),
        (("decoder",), "int4", "decoder is 'int4' where an object is needed"),
        (("decoder", "wieghts"), {}, "decoder has wieghts, which means nothing here"),
        (("decoder", "weights"), "int4", "decoder.weights is 'int4' where an object"),
        (("decoder", "weights", "bits"), None, "decoder.weights has no bits"),
        (("decoder", "weights", "bits"), 4.0, "has 4.0 for bits, where a whole number"),
        (("decoder", "weights", "bits"), 5, "4 or 8 bits, not 5"),
        (("decoder", "weights", "group_size"), "32", "where a whole number or null is needed"),
        (("decoder", "weights", "symmetric"), 0, "has 0 for symmetric, where true or false"),
        (("decoder", "method"), "rtn+", "no method 'rtn.'"),
        (("decoder", "activations"), True, "8-bit activations need 8-bit weights"),
        (("decoder", "activations"), "yes", "has 'yes' for activations, where true or false"),
        (("decoder", "rules"), {}, "decoder.rules is no list"),
        (("decoder", "rules", 0), "lm_head", "decoder.rules is 'lm_head' where an object"),
        (("decoder", "rules", 0, "form"), None, "decoder.rules has no form"),
        (("decoder", "rules", 1, "form", "bits"), 3, "4 or 8 bits, not 3"),
        (("decoder", "rules", 0, "layers"), 0, "has 0 for layers, where a text is needed"),
    ],
)
def test_mistakes_in_a_file(way, new, complaint, tmp_path):
    path = written(EVERYTHING, tmp_path / "r.json", lambda v: place(*way)(v, new))
    with pytest.raises(
        InputError, match=rf"The recipe .*r.json cannot be used: .*{complaint}"
    ):
        read_recipe(path)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_is_left_out_stays_in_float(name, tmp_path):
    path = written(EVERYTHING, tmp_path / "r.json", lambda values: values.pop(name))
    assert read_recipe(path) == replace(EVERYTHING, **{name: GraphRecipe()})


def test_what_is_left_out_has_its_default(tmp_path):
    path = tmp_path / "r.json"
    decoder = {"weights": {"bits": 8}, "rules": [{"layers": "lm_*", "form": None}]}
    values = {"_type": TYPE, "_version": VERSION, "name": "short", "decoder": decoder}
    path.write_text(json.dumps(values))
    expected = Recipe("short", decoder=GraphRecipe(INT8, rules=(Rule("lm_*", None),)))
    assert read_recipe(path) == expected
