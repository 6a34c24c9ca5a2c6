"""Our PyTorch definition of the vision tower and the language model against transformers.

Random weights are written as a checkpoint in the published layout, read through our own code
into our modules, and copied into transformers' from the same file.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mvlm_export.exporter.checkpoint import Checkpoint
from mvlm_export.exporter.config import (
    PRESETS,
    ModelConfig,
    parse_config,
    published_config_json,
)
from mvlm_export.exporter.models.components import COMPONENTS, build_component
from mvlm_export.exporter.models.llama import LlamaDecoder
from mvlm_export.exporter.models.projectors import count_parameters
from mvlm_export.exporter.preflight import (
    expected_shapes,
)
from tests.helpers import (
    PUBLISHED_VISION_PREFIX,
    LoadedComponent,
    load_random_component,
    published_shapes,
    tiny_config_json,
)

transformers = pytest.importorskip("transformers")

GREEDY_TOKENS = 64


@pytest.fixture(autouse=True)
def one_thread_without_gradients():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def fill(module: nn.Module, checkpoint: Checkpoint, prefix: str = "") -> nn.Module:
    """Copy the checkpoint's tensors of the same names, all of them, into a foreign module."""
    for name, parameter in module.named_parameters():
        parameter.copy_(checkpoint.load(prefix + name))
    return module.eval()


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- vision


def clip(config: ModelConfig):
    vision = config.vision
    theirs = transformers.CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
    )
    return transformers.CLIPVisionModel._from_config(theirs, attn_implementation="eager")


def clip_names(model: nn.Module) -> str:
    """What stands before CLIP's names in this version of transformers."""
    first = next(name for name, _ in model.named_parameters())
    return first[: first.index("embeddings.")]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layer", [-1, -2, -4, 2])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_vision_features(tmp_path, feature, layer, activation):
    ours = load_random_component(
        tmp_path,
        "vision_encoder",
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_feature=feature,
        mm_vision_select_layer=layer,
        vision_config={"hidden_act": activation, "layer_norm_eps": 1e-3},
    )
    theirs = clip(ours.config)
    assert clip_names(theirs) in ("", "vision_model.")
    prefix = PUBLISHED_VISION_PREFIX.removesuffix(clip_names(theirs))
    fill(theirs, ours.checkpoint, prefix)
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    hidden = theirs(pixels, output_hidden_states=True).hidden_states[layer]
    wanted = hidden if feature == "cls_patch" else hidden[:, 1:]
    features = ours.module(pixels)
    assert features.shape == (3, ours.config.image_feature_tokens, 32)
    assert features.std() > 0.3
    close(features, wanted, 2e-5)


# ---------------------------------------------------------------- language model

GEOMETRIES = {
    "one_kv_head_per_head": {},
    "grouped_query": {"num_key_value_heads": 2},
    "multi_query": {"num_key_value_heads": 1, "rope_theta": 500000.0},
    "head_80": {"hidden_size": 320, "intermediate_size": 864},
    "tied_wide_eps": {"tie_word_embeddings": True, "rms_norm_eps": 1e-2},
}


def llama(loaded: LoadedComponent):
    text = loaded.config.text
    theirs = transformers.LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        tie_word_embeddings=text.tie_word_embeddings,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM._from_config(theirs, attn_implementation="eager")
    return fill(model, loaded.checkpoint)


def empty_cache(config: ModelConfig) -> list[Tensor]:
    text = config.text
    shape = (0, text.num_key_value_heads, text.head_dim)
    return [torch.zeros(shape) for _ in range(2 * text.num_hidden_layers)]


def no_image(config: ModelConfig) -> Tensor:
    return torch.zeros(1, config.text.hidden_size)


def random_ids(count: int, vocabulary: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count,), generator=generator, dtype=torch.int32)


@pytest.fixture(params=GEOMETRIES)
def decoder(request, tmp_path) -> LoadedComponent:
    return load_random_component(tmp_path, "decoder", **GEOMETRIES[request.param])


def test_geometries_are_what_they_are_called():
    configs = {name: parse_config(tiny_config_json(**g)) for name, g in GEOMETRIES.items()}
    assert configs["head_80"].text.head_dim == 80
    assert configs["grouped_query"].text.num_attention_heads == 4


def test_logits_and_cache_rows(decoder):
    config = decoder.config
    ids = random_ids(41, config.text.vocab_size, seed=2)
    logits, *rows = decoder.module(ids, no_image(config), empty_cache(config))
    theirs = llama(decoder)(ids.long().unsqueeze(0), use_cache=True)
    assert logits.dtype == torch.float32
    assert logits.std() > 0.3
    close(logits, theirs.logits[0], 2e-5)
    for index, layer in enumerate(theirs.past_key_values.layers):
        close(rows[2 * index], layer.keys[0].transpose(0, 1), 2e-5)
        close(rows[2 * index + 1], layer.values[0].transpose(0, 1), 2e-5)


def decode_greedily(loaded: LoadedComponent, ids: Tensor, count: int) -> list[int]:
    """Prefill, then one token at a time on the growing cache."""
    config, past, tokens = loaded.config, empty_cache(loaded.config), []
    for _ in range(count):
        logits, *rows = loaded.module(ids, no_image(config), past)
        past = [torch.cat(pair) for pair in zip(past, rows, strict=True)]
        tokens.append(int(logits[-1].argmax()))
        ids = torch.tensor(tokens[-1:], dtype=torch.int32)
    return tokens


def test_greedy_tokens(decoder):
    ids = random_ids(17, decoder.config.text.vocab_size, seed=3)
    theirs = llama(decoder).generate(
        ids.long().unsqueeze(0),
        attention_mask=torch.ones(1, 17),
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
    )
    ours = decode_greedily(decoder, ids, GREEDY_TOKENS)
    assert len(ours) == GREEDY_TOKENS
    if not decoder.config.text.tie_word_embeddings:  # a tied head loves its own input
        assert len(set(ours)) > 10
    assert ours == theirs[0, 17:].tolist()


@pytest.mark.parametrize("parts", [[1] * 12, [7, 1, 1, 3], [11, 1], [2, 10]])
def test_decoding_in_parts_equals_one_forward(decoder, parts):
    config = decoder.config
    ids = random_ids(12, config.text.vocab_size, seed=4)
    whole, *whole_rows = decoder.module(ids, no_image(config), empty_cache(config))
    past, pieces = empty_cache(config), []
    for part in ids.split(parts):
        logits, *rows = decoder.module(part, no_image(config), past)
        assert rows[0].shape[0] == len(part)
        past = [torch.cat(pair) for pair in zip(past, rows, strict=True)]
        pieces.append(logits)
    close(torch.cat(pieces), whole, 2e-5)
    for cached, wanted in zip(past, whole_rows, strict=True):
        close(cached, wanted, 2e-5)


def test_image_rows_by_id(decoder):
    """Two images in a prompt equal transformers given the rows as input embeddings."""
    config = decoder.config
    vocab = config.text.vocab_size
    image = torch.randn(8, config.text.hidden_size, generator=torch.Generator().manual_seed(5))
    first, second = torch.arange(4) + vocab, torch.arange(4, 8) + vocab
    text = random_ids(9, vocab, seed=6)
    ids = torch.cat([text[:3], first, text[3:5], second, text[5:]]).to(torch.int32)
    logits, *_ = decoder.module(ids, image, empty_cache(config))
    model = llama(decoder)
    table = model.get_input_embeddings()
    text_rows = table(text.long())
    rows = [text_rows[:3], image[:4], text_rows[3:5], image[4:], text_rows[5:]]
    close(logits, model(inputs_embeds=torch.cat(rows).unsqueeze(0)).logits[0], 2e-5)


def test_image_rows_in_any_order_and_repeated(tmp_path):
    loaded = load_random_component(tmp_path, "decoder")
    vocab = loaded.config.text.vocab_size
    image = torch.randn(3, 64, generator=torch.Generator().manual_seed(7))
    ids = torch.tensor([vocab + 2, 5, vocab, vocab + 2, vocab - 1], dtype=torch.int32)
    table = loaded.module.model.embed_tokens.weight
    wanted = torch.stack([image[2], table[5], image[0], image[2], table[vocab - 1]])
    assert torch.equal(loaded.module.embed(ids, image), wanted)


def test_later_tokens_never_change_earlier_logits(decoder):
    config = decoder.config
    ids = random_ids(10, config.text.vocab_size, seed=8)
    other = torch.cat([ids[:6], random_ids(4, config.text.vocab_size, seed=9)])
    first = decoder.module(ids, no_image(config), empty_cache(config))[0]
    second = decoder.module(other, no_image(config), empty_cache(config))[0]
    close(first[:6], second[:6], 2e-5)
    assert (first[6:] - second[6:]).abs().max() > 0.1


def test_bfloat16_follows_transformers(tmp_path):
    """In bfloat16 our error against float32 is no larger than transformers' own."""
    exact = load_random_component(tmp_path / "a", "decoder")
    rough = load_random_component(tmp_path / "b", "decoder", torch.bfloat16)
    ids = random_ids(30, 320, seed=10)
    past = empty_cache(exact.config)
    wanted = exact.module(ids, no_image(exact.config), past)[0]
    ours = rough.module(
        ids, no_image(exact.config).bfloat16(), [rows.bfloat16() for rows in past]
    )[0]
    model = llama(exact)
    inverse = model.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    model.model.rotary_emb.inv_freq = inverse  # float32, as transformers loads it
    theirs = model(ids.long().unsqueeze(0)).logits[0].float()
    error, reference = (ours - wanted).std(), (theirs - wanted).std()
    assert 0 < error < 1.2 * reference
    assert reference < 0.05


# ---------------------------------------------------------------- full-size geometries


@pytest.mark.parametrize(
    ("name", "billions"), [("v2-1.7b", 1.36), ("v2-3b", 2.70), ("v2-7b", 6.74)]
)
def test_published_geometries_against_transformers(name, billions):
    """Names and shapes of the full-size models, from config.json alone, on the meta device."""
    config = parse_config(published_config_json(name))
    shapes = expected_shapes(config)
    with torch.device("meta"):
        decoder = build_component("decoder", config)
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=config.text.hidden_size,
                intermediate_size=config.text.intermediate_size,
                num_hidden_layers=config.text.num_hidden_layers,
                num_attention_heads=config.text.num_attention_heads,
                vocab_size=32000,
            )
        )
    assert isinstance(decoder, LlamaDecoder)
    assert round(count_parameters(decoder) / 1e9, 2) == billions
    assert shapes["decoder"] == {k: tuple(v.shape) for k, v in theirs.named_parameters()}
    assert tuple(shapes) == COMPONENTS


def test_published_vision_tower_against_transformers():
    config = PRESETS["v2-1.7b"]
    with torch.device("meta"):
        theirs = clip(config)
    prefix = clip_names(theirs)
    wanted = {
        name.removeprefix(prefix): tuple(value.shape)
        for name, value in theirs.named_parameters()
        if "layers.23." not in name and "post_layernorm" not in name
    }
    assert expected_shapes(config)["vision_encoder"] == wanted
    assert len([name for name in wanted if name.endswith("fc1.weight")]) == 23


@pytest.mark.parametrize("name", PRESETS)
def test_helper_writes_the_published_names_at_full_size(name):
    shapes = published_shapes(PRESETS[name])
    wanted = expected_shapes(PRESETS[name])
    prefixes = (PUBLISHED_VISION_PREFIX, "model.mm_projector.", "")
    for component, prefix in zip(COMPONENTS, prefixes, strict=True):
        for parameter, shape in wanted[component].items():
            assert shapes[prefix + parameter] == shape
