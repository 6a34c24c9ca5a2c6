"""Preflight: the published names fit our modules, and all that does not fit is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvlm_export.engines.errors import CheckpointError
from mvlm_export.exporter.checkpoint import Checkpoint
from mvlm_export.exporter.config import PROJECTORS, parse_config, read_config
from mvlm_export.exporter.models.components import COMPONENTS, build_component
from mvlm_export.exporter.preflight import (
    expected_shapes,
    load_component,
    preflight,
    scan_values,
)
from tests.helpers import (
    FORMATS,
    PUBLISHED_VISION_PREFIX,
    published_shapes,
    random_tensor,
    tiny_config_json,
    write_random_checkpoint,
)

KINDS = (*PROJECTORS, "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu")
EMBED = "model.embed_tokens.weight"


def edit(folder: Path, change) -> Checkpoint:
    """Apply ``change`` to the tensors of a single-file safetensors checkpoint in place."""
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    return Checkpoint.open(folder)


class Recorder:
    """A progress callback that remembers its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, done: int, total: int, name: str) -> None:
        self.calls.append((done, total, name))


@pytest.fixture
def folder(tmp_path):
    write_random_checkpoint(tmp_path, tiny_config_json(), "safetensors")
    return tmp_path


def report_of(checkpoint: Checkpoint, tokenizer_vocab=None, **options):
    return preflight(checkpoint, read_config(checkpoint.folder), tokenizer_vocab, **options)


def fails(report, message: str) -> None:
    assert not report.ok
    with pytest.raises(CheckpointError, match=message):
        report.raise_if_failed()


@pytest.mark.parametrize("kind", KINDS)
def test_every_projector_fits_its_published_names(tmp_path, kind):
    config = write_random_checkpoint(tmp_path, tiny_config_json(mm_projector_type=kind))
    report = report_of(Checkpoint.open(tmp_path), tokenizer_vocab=320)
    report.raise_if_failed()
    assert report.ok
    assert report.notes == ()
    used = {name for names in report.weight_map.values() for name in names.values()}
    assert used | set(report.ignored) == set(published_shapes(config))
    assert not used & set(report.ignored)


def test_names_and_order_of_the_map(folder):
    weight_map = report_of(Checkpoint.open(folder)).weight_map
    assert tuple(weight_map) == COMPONENTS == ("vision_encoder", "projector", "decoder")
    assert weight_map["projector"] == {
        f"{name}.{leaf}": f"model.mm_projector.{name}.{leaf}"
        for name in ("mlp.mlp.0", "mlp.mlp.2", "peg.peg.0")
        for leaf in ("weight", "bias")
    }
    assert weight_map["decoder"]["lm_head.weight"] == "lm_head.weight"
    assert weight_map["vision_encoder"]["embeddings.class_embedding"] == (
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    )


def test_what_is_ignored_has_its_reason(folder):
    ignored = report_of(Checkpoint.open(folder)).ignored
    vision = PUBLISHED_VISION_PREFIX
    assert "rope_theta" in ignored["model.layers.1.self_attn.rotary_emb.inv_freq"]
    assert "counts" in ignored[f"{vision}embeddings.position_ids"]
    assert "last norm" in ignored[f"{vision}post_layernorm.weight"]
    assert "vision layer 2" in ignored[f"{vision}encoder.layers.2.mlp.fc1.bias"]
    assert len(ignored) == 2 + 1 + 2 + 16


@pytest.mark.parametrize(
    "prefix",
    [
        PUBLISHED_VISION_PREFIX,
        "vision_tower.vision_model.",
        "model.vision_tower.vision_tower.",
        "model.vision_tower.vision_model.",
    ],
)
@pytest.mark.parametrize("layer", [-1, -2, -4])
def test_vision_prefixes_and_layers(tmp_path, prefix, layer):
    content = tiny_config_json(mm_vision_select_layer=layer)
    write_random_checkpoint(tmp_path, content, vision_prefix=prefix)
    report = report_of(Checkpoint.open(tmp_path))
    report.raise_if_failed()
    used = report.weight_map["vision_encoder"].values()
    assert all(name.startswith(prefix) for name in used)
    blocks = {int(n.split("layers.")[1].split(".")[0]) for n in used if "layers." in n}
    assert blocks == set(range(4 + layer))


def test_a_second_copy_of_the_tower_is_unknown(folder):
    def copy(tensors):
        for name in [n for n in tensors if n.startswith(PUBLISHED_VISION_PREFIX)]:
            other = name.replace(PUBLISHED_VISION_PREFIX, "vision_tower.vision_model.")
            tensors[other] = tensors[name].clone()

    fails(
        report_of(edit(folder, copy)), r"no place in the model: vision_tower\.vision_model\."
    )


# ---------------------------------------------------------------- failures


def test_missing_tensors_are_named_and_long_lists_cut(folder):
    missing = [f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("up", "gate")]
    report = report_of(edit(folder, lambda t: [t.pop(name) for name in missing]))
    assert set(report.missing) == set(missing)
    for name in missing:
        fails(report, f"4 tensors are missing: .*{name}.*download is complete")

    def drop_layer(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.")]:
            del tensors[name]

    fails(report_of(edit(folder, drop_layer)), "18 tensors are missing: .* and 8 more")


def test_no_vision_tower_at_all(folder):
    def drop(tensors):
        for name in [n for n in tensors if "vision_tower" in n]:
            del tensors[name]

    fails(report_of(edit(folder, drop)), "holds no vision tower at all.*LLaVA-style")


def test_misshapen_tensors(folder):
    name = "model.layers.0.self_attn.k_proj.weight"

    def cut(tensors):
        tensors[name] = tensors[name][:32].clone()

    fails(report_of(edit(folder, cut)), rf"{name} \(expected \[64, 64\], found \[32, 64\]\)")


def test_unknown_tensors_unless_allowed(folder):
    def add(tensors):
        tensors["model.image_newline"] = torch.zeros(64)

    checkpoint = edit(folder, add)
    fails(report_of(checkpoint), r"no place.*model\.image_newline.*--allow-unknown")
    report = report_of(checkpoint, allow_unknown=True)
    report.raise_if_failed()
    assert report.unknown == ("model.image_newline",)


def test_vision_layers_beyond_the_config_are_unknown(folder):
    def add(tensors):
        name = f"{PUBLISHED_VISION_PREFIX}encoder.layers.{{}}.mlp.fc1.bias"
        tensors[name.format(3)] = tensors[name.format(2)].clone()

    fails(report_of(edit(folder, add)), r"no place in the model: .*layers\.3\.mlp\.fc1\.bias")


def test_wrong_dtype(folder):
    name = "model.layers.1.mlp.down_proj.weight"

    def quantise(tensors):
        tensors[name] = tensors[name].to(torch.int8)

    fails(report_of(edit(folder, quantise)), rf"{name} \(torch\.int8\).*before quantisation")


def test_everything_at_once_in_one_error(folder):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.zeros(5, 5)
        tensors["extra"] = torch.zeros(1)
        name = "model.mm_projector.peg.peg.0.bias"
        tensors[name] = tensors[name].double()

    with pytest.raises(CheckpointError) as caught:
        report_of(edit(folder, spoil), tokenizer_vocab=999).raise_if_failed()
    parts = ["model.norm.weight", "lm_head.weight (exp", "extra", "peg.peg.0.bias (", "999"]
    assert [part for part in parts if part not in str(caught.value)] == []
    assert str(caught.value).count("\n- ") == 5


def test_tokenizer_larger_or_smaller_than_the_table(folder):
    checkpoint = Checkpoint.open(folder)
    fails(report_of(checkpoint, 321), f"321 tokens, but {EMBED} has 320 rows")
    report = report_of(checkpoint, 300)
    report.raise_if_failed()
    assert "20 more rows" in report.notes[0]
    assert report_of(checkpoint, 320).notes == ()


def test_vocabulary_of_config_against_the_table(folder):
    config = parse_config(tiny_config_json(vocab_size=321))
    fails(
        preflight(Checkpoint.open(folder), config), "320 rows.*vocab_size 321: set vocab_size"
    )


def test_tied_head(tmp_path):
    content = tiny_config_json(tie_word_embeddings=True)
    write_random_checkpoint(tmp_path, content, "safetensors")
    report = report_of(Checkpoint.open(tmp_path))
    report.raise_if_failed()
    assert "lm_head.weight" not in report.weight_map["decoder"]

    def add(value):
        return lambda tensors: tensors.update({"lm_head.weight": tensors[EMBED] + value})

    report = report_of(edit(tmp_path, add(0)))
    report.raise_if_failed()
    assert report.ignored["lm_head.weight"] == f"tied to {EMBED}"
    fails(report_of(edit(tmp_path, add(1))), "different values.*tie_word_embeddings to false")


def test_old_torch_files_are_noted(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    report = report_of(Checkpoint.open(folder))
    report.raise_if_failed()
    assert "pytorch_model.bin is in PyTorch's old format" in report.notes[0]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan_and_infinity_are_found(tmp_path, bad, dtype):
    write_random_checkpoint(tmp_path, tiny_config_json(), "safetensors", dtype)
    clean = Checkpoint.open(tmp_path)
    weight_map = report_of(clean).weight_map
    scan_values(clean, weight_map)
    names = ["model.norm.weight", "model.mm_projector.mlp.mlp.2.weight"]
    unused = f"{PUBLISHED_VISION_PREFIX}post_layernorm.weight"

    def spoil(tensors):
        for name in [*names, unused]:
            tensors[name].view(-1)[7] = bad

    with pytest.raises(CheckpointError, match=r"2 tensors .*NaN or infinity") as caught:
        scan_values(edit(tmp_path, spoil), weight_map)
    assert all(name in str(caught.value) for name in names)
    assert unused not in str(caught.value)


@pytest.mark.parametrize("fmt", FORMATS)
def test_scan_gives_the_largest_magnitude_and_progress(tmp_path, fmt):
    config = write_random_checkpoint(tmp_path, tiny_config_json(), fmt)
    checkpoint = Checkpoint.open(tmp_path)
    weight_map = report_of(checkpoint).weight_map
    seen = Recorder()
    largest = scan_values(checkpoint, weight_map, seen)
    shapes = published_shapes(config)
    for name, value in largest.items():
        tensor = random_tensor(name, shapes[name], config, torch.bfloat16, 0)
        assert value == tensor.abs().max().item(), name
    count = sum(map(len, weight_map.values()))
    assert [call[:2] for call in seen.calls] == [(i + 1, count) for i in range(count)]
    assert {call[2] for call in seen.calls} == set(largest)


def test_float16_overflow_is_refused(folder):
    name = "model.layers.0.mlp.up_proj.weight"

    def enlarge(tensors):
        tensors[name][0, 0] = 1e6

    checkpoint = edit(folder, enlarge)
    weight_map = report_of(checkpoint).weight_map
    decoder = build_component("decoder", read_config(folder))
    with pytest.raises(CheckpointError, match=rf"{name} does not fit torch\.float16"):
        load_component(decoder, "decoder", weight_map, checkpoint, torch.float16)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ldpnetv2", "ldpnet", "linear"])
def test_loading_gives_every_parameter_its_value(tmp_path, kind, dtype, device):
    config = write_random_checkpoint(tmp_path, tiny_config_json(mm_projector_type=kind))
    checkpoint = Checkpoint.open(tmp_path)
    weight_map = report_of(checkpoint).weight_map
    shapes = published_shapes(config)
    for component in COMPONENTS:
        with torch.device(device):
            module = build_component(component, config)
        seen = Recorder()
        loaded = load_component(module, component, weight_map, checkpoint, dtype, seen)
        assert loaded is module
        parameters = dict(module.named_parameters())
        assert len(seen.calls) == len(parameters) == len(weight_map[component])
        for name, value in parameters.items():
            source = weight_map[component][name]
            wanted = random_tensor(source, shapes[source], config, torch.bfloat16, 0)
            assert value.dtype == dtype
            assert not value.requires_grad
            assert torch.equal(value, wanted.to(dtype)), name
        assert not any(tensor.is_meta for tensor in [*module.buffers(), *parameters.values()])


def test_rotary_tables_are_real_after_loading(folder):
    config, checkpoint = read_config(folder), Checkpoint.open(folder)
    wanted = build_component("decoder", config)
    with torch.device("meta"):
        decoder = build_component("decoder", config)
        load_component(
            decoder, "decoder", report_of(checkpoint).weight_map, checkpoint, torch.bfloat16
        )
    for name in ("rotary_cos", "rotary_sin"):
        table = getattr(decoder, name)
        assert table.dtype == torch.float32
        assert torch.equal(table, getattr(wanted, name))
        assert name not in decoder.state_dict()


def test_loading_a_tied_head_keeps_the_tie(tmp_path):
    config = write_random_checkpoint(tmp_path, tiny_config_json(tie_word_embeddings=True))
    checkpoint = Checkpoint.open(tmp_path)
    with torch.device("meta"):
        decoder = build_component("decoder", config)
    weight_map = report_of(checkpoint).weight_map
    load_component(decoder, "decoder", weight_map, checkpoint, torch.float32)
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert torch.equal(decoder.lm_head.weight, checkpoint.load(EMBED).float())


def test_loading_what_does_not_fit_is_refused(folder):
    checkpoint = edit(folder, lambda tensors: tensors.pop("model.norm.weight"))
    config = read_config(folder)
    decoder = build_component("decoder", config)
    weight_map = report_of(checkpoint).weight_map
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*run preflight first"):
        load_component(decoder, "decoder", weight_map, checkpoint, torch.float32)
    wide = parse_config(tiny_config_json(intermediate_size=128))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight \[128, 64\].*no fitting"):
        load_component(
            build_component("decoder", wide), "decoder", weight_map, checkpoint, torch.float32
        )


def test_expected_shapes_leave_a_tied_head_out():
    config = parse_config(tiny_config_json(tie_word_embeddings=True))
    shapes = expected_shapes(config)
    assert shapes["decoder"][EMBED] == (320, 64)
    assert "lm_head.weight" not in shapes["decoder"]
    assert shapes["projector"]["peg.peg.0.weight"] == (64, 1, 3, 3)


def test_sizes_that_no_tensor_can_have():
    config = parse_config(tiny_config_json(hidden_size=2**31 - 64, vocab_size=2**31 - 1))
    with pytest.raises(CheckpointError, match="No model can be built of the sizes"):
        expected_shapes(config)
