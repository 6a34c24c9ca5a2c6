"""A manifest reads back as it was; anything else in it is an error that names the field."""

import json
from dataclasses import MISSING, fields, replace

import pytest

from mvlm_export.engines.errors import BundleError
from mvlm_export.engines.manifest import GRAPHS, Manifest, TensorSpec

from .manifests import tiny_manifest

DIGEST = "0123456789abcdef" * 4
FILES = {f"{name}/model.onnx": DIGEST for name in GRAPHS}


def full_manifest(**changes):
    values = {
        "jetpack": 6,
        "tools": {"torch": "2.13.0"},
        "checks": {"conformance": "passed", "estimate": {"seconds": 0.5}},
        "files": FILES,
        "source": {"path": "/models/tiny", "config_sha256": DIGEST},
    }
    return tiny_manifest(**{**values, **changes})


def whole():
    """A whole manifest as JSON reads it back."""
    return json.loads(json.dumps(full_manifest().to_json()))


def damaged(path, value):
    """A whole manifest's JSON with the field at a path replaced."""
    data = whole()
    place, *keys = data, *(path.split("/") if isinstance(path, str) else path)
    for key in keys[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(keys[-1]) if isinstance(place, list) else keys[-1]] = value
    return data


def paths(value, path=()):
    """The path of every field, of those inside it too."""
    if path:
        yield path
    pairs = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    for key, item in pairs:
        yield from paths(item, (*path, key))


SCALES = (0.5, 0.25, 1.5, 0.1)


def with_codes(scales=SCALES):
    """A manifest of a decoder whose cache is int8."""
    manifest = full_manifest(kv_form="fixed", cache_scales=scales)
    decoder = manifest.graphs["decoder"]

    def in_codes(tensors):
        return tuple(
            replace(t, dtype="int8") if t.name.startswith(("past_key", "present")) else t
            for t in tensors
        )

    inputs, outputs = in_codes(decoder.inputs), in_codes(decoder.outputs)
    decoder = replace(decoder, inputs=inputs, outputs=outputs)
    return replace(manifest, graphs={**manifest.graphs, "decoder": decoder})


@pytest.mark.parametrize(
    "manifest",
    [
        tiny_manifest(),
        full_manifest(),
        full_manifest(kv_form="fixed"),
        full_manifest(logits_rows=8),
        with_codes(),
    ],
    ids=["bare", "full", "fixed", "rows", "codes"],
)
def test_reads_back_what_was_written(manifest):
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_fields_with_a_default_may_be_absent():
    data = tiny_manifest().to_json()
    kept = {field.name for field in fields(Manifest) if field.default is not MISSING}
    kept |= {"tools", "checks", "files", "source"}
    for key in kept - {"schema_version"}:
        del data[key]
    assert Manifest.from_json(data) == tiny_manifest()


WRONG = [
    ("files", [1], "files is .1.,"),
    ("files", None, "files is None"),
    ("files", {"a": 5}, r"files\.a is 5"),
    ("files", {**FILES, "a": DIGEST[:-1]}, r"files\.a is .* 64 hexadecimal"),
    ("files", {**FILES, "a": "g" * 64}, r"files\.a"),
    ("files", {**FILES, "/etc/passwd": DIGEST}, "files is '/etc/passwd'"),
    ("files", {**FILES, "a/../../b": DIGEST}, "inside the bundle"),
    ("files", {**FILES, "a\\b": DIGEST}, "inside the bundle"),
    ("files", {**FILES, "C:b": DIGEST}, "inside the bundle"),
    ("files", {**FILES, "": DIGEST}, "inside the bundle"),
    ("files", {"decoder/model.onnx": DIGEST}, r"graphs\.vision_encoder\.file .*'files' lists"),
    ("graphs", {}, "graphs is .* vision_encoder, projector, decoder"),
    ("graphs", [], "graphs is .* an object"),
    ("graphs/extra", {}, "graphs is .*extra"),
    ("graphs/decoder", 7, r"graphs\.decoder is 7, but an object"),
    ("graphs/decoder/file", 5, r"graphs\.decoder\.file is 5"),
    ("graphs/decoder/file", "../model.onnx", r"graphs\.decoder\.file is '\.\./model"),
    ("graphs/decoder/dtype", "int8", r"graphs\.decoder\.dtype is 'int8'.*float32, float16"),
    ("graphs/decoder/dtype", ["float32"], r"graphs\.decoder\.dtype"),
    ("graphs/decoder/inputs", 5, r"graphs\.decoder\.inputs is 5"),
    ("graphs/decoder/inputs", [], r"graphs\.decoder\.inputs .*different: image_embeds"),
    ("graphs/decoder/inputs/0", "input_ids", r"graphs\.decoder\.inputs\.0 is 'input_ids'"),
    ("graphs/decoder/inputs/0/name", "ids", r"different: ids, input_ids"),
    ("graphs/decoder/inputs/0/shape", "S", r"inputs\.0\.shape is 'S'"),
    ("graphs/decoder/inputs/0/shape", [None], r"inputs\.0\.shape is .None."),
    ("graphs/decoder/inputs/0/shape", [-1], r"inputs\.0\.shape is .-1."),
    ("graphs/decoder/inputs/0/dtype", "long", r"inputs\.0\.dtype is 'long'"),
    ("graphs/projector/outputs/0/name", "x", r"graphs\.projector\.outputs .*x"),
    ("model", [], "model is .* an object"),
    ("model/image_processor", 5, r"model\.image_processor is 5"),
    ("model/template", [], r"model\.template is \[\]"),
    ("model/name", "", r"model\.name is ''"),
    ("model/max_positions", 1024.5, r"model\.max_positions is 1024\.5"),
    ("model/max_positions", 2**31, r"model\.max_positions"),
    ("model/image_tokens", "16", r"model\.image_tokens is '16'"),
    ("model/num_layers", 0, r"model\.num_layers is 0"),
    ("model/num_layers", 3, r"graphs\.decoder\.inputs .*past_key_values\.2\.key"),
    ("model/num_layers", True, r"model\.num_layers is True"),
    ("model/num_key_value_heads", 3, r"model\.num_key_value_heads is 3.* 2 attention"),
    ("model/stop_ids", "ab", r"model\.stop_ids is 'ab'"),
    ("model/stop_ids", [], r"model\.stop_ids is \[\]"),
    ("model/stop_ids", [10], r"model\.stop_ids is \[10\].* 0 to 9"),
    ("model/stop_ids", [2.0], r"model\.stop_ids"),
    ("model/unheard_of", 1, r"unknown field 'model\.unheard_of'"),
    ("engines", {}, "unknown field 'engines'"),
    ("target", [], r"target is \[\]"),
    ("recipe", None, "recipe is None"),
    ("kv_form", 1, "kv_form is 1"),
    ("kv_form", "ring", "kv_form is 'ring', but one of append, fixed"),
    ("kv_form", "fixed", r"graphs\.decoder\.inputs .*different: past_length"),
    ("graphs/vision_encoder/inputs/0/dtype", "int8", r"pixel_values\.dtype is 'int8'"),
    ("graphs/decoder/inputs/2/dtype", "uint8", r"past_key_values\.0\.key\.dtype is 'uint8'"),
    ("logits_rows", 0, "logits_rows is 0, but a whole number of 1 to"),
    ("logits_rows", -8, "logits_rows is -8"),
    ("logits_rows", 1.5, r"logits_rows is 1\.5"),
    ("logits_rows", True, "logits_rows is True"),
    ("logits_rows", "8", "logits_rows is '8'"),
    ("logits_rows", None, "logits_rows is None"),
    ("cache_scales", 0.1, r"cache_scales is 0\.1, but a list"),
    ("cache_scales", [0.1] * 4, r"cache_scales is .*, but a list of 0 scales"),
    ("cache_scales", [0.1, -0.1], "cache_scales is .*, but a list of positive numbers"),
    ("cache_scales", [True, 0.1], "cache_scales is .*, but a list of positive numbers"),
    ("cache_scales", [float("nan")], "cache_scales is .*, but a list of positive numbers"),
    ("jetpack", "6", "jetpack is '6'"),
    ("tools", {"torch": 2}, r"tools\.torch is 2"),
    ("checks", [], r"checks is \[\]"),
    ("source", {"path": None}, r"source\.path is None"),
    ("schema_version", True, "schema version True"),
    ("schema_version", 2, "schema version 2"),
]


@pytest.mark.parametrize("scales", [(), SCALES[:3], (*SCALES, 0.1)])
def test_codes_need_a_scale_for_each_tensor(scales):
    data = with_codes(scales).to_json()
    with pytest.raises(BundleError, match="a list of 4 scales"):
        Manifest.from_json(data)


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_a_wrong_field_is_named(path, value, message):
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.from_json(damaged(path, value))
    assert "ompile" in str(caught.value), "no cure"


@pytest.mark.parametrize(
    "path", ["model", "target", "model/stop_ids", "graphs/decoder/file", "graphs/decoder"]
)
def test_a_missing_field_is_named(path):
    data = full_manifest().to_json()
    place, *keys = data, *path.split("/")
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    with pytest.raises(BundleError, match="decoder" if "graphs" in path else keys[-1]):
        Manifest.from_json(data)


def test_a_tensor_twice_is_an_error():
    data = whole()
    data["graphs"]["projector"]["outputs"] *= 2
    with pytest.raises(BundleError, match=r"graphs\.projector\.outputs"):
        Manifest.from_json(data)


def test_no_value_anywhere_is_a_traceback():
    """Every field in turn, replaced by a value of each other kind that JSON has."""
    refused = 0
    every = list(paths(whole()))
    for path in every:
        for value in (None, 5, -1, 1.5, float("nan"), "x", [], {}, [1], [[]], {"a": 1}, True):
            data = damaged(path, value)
            try:
                manifest = Manifest.from_json(data)
            except BundleError:
                refused += 1
            else:
                hash(manifest.model.stop_ids), hash(manifest.graphs["decoder"])
    assert refused > 8 * len(every)


def test_a_fixed_cache_needs_its_length():
    data = full_manifest(kv_form="fixed").to_json()
    data["kv_form"] = "append"
    with pytest.raises(BundleError, match=r"graphs\.decoder\.inputs .*different: past_length"):
        Manifest.from_json(data)


def test_the_decoder_alone_may_choose_the_next_token():
    token = {"name": "next_token", "dtype": "int64", "shape": [1]}
    data = whole()
    data["graphs"]["decoder"]["outputs"].append(token)
    decoder = Manifest.from_json(data).graphs["decoder"]
    assert decoder.outputs[-1] == TensorSpec("next_token", "int64", (1,))
    data["graphs"]["decoder"]["outputs"].append(token)
    with pytest.raises(BundleError, match="next_token once at most"):
        Manifest.from_json(data)
    data = whole()
    data["graphs"]["projector"]["outputs"].append(token)
    with pytest.raises(BundleError, match=r"projector\.outputs .*different: next_token"):
        Manifest.from_json(data)


def test_what_the_runtime_chooses_by():
    manifest = Manifest.from_json(damaged("graphs/vision_encoder/inputs/0/dtype", "uint8"))
    assert (manifest.pixel_dtype, full_manifest().pixel_dtype) == ("uint8", "float32")
    data = whole()
    for tensor in data["graphs"]["decoder"]["inputs"][2:]:
        tensor["dtype"] = "float16"
    assert Manifest.from_json(data).cache_dtype == "float16"
    assert full_manifest().cache_dtype == "float32"
