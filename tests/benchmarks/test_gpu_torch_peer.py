"""The PyTorch peer is the same model: it answers as the runtime does, token by token."""

import pytest
import torch
from torch_peer import StaticDecoder, TorchPeer

from mvlm_export.engines.bench import SECONDS, bench
from mvlm_export.engines.errors import InputError
from mvlm_export.engines.vlm import VLM
from mvlm_export.exporter.cli.bench_command import default_image
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.models.llama import LlamaDecoder
from mvlm_export.exporter.settings import CompileSettings, nano_checkpoint
from tests.exporter.conftest import Silent

QUESTION = "describe the picture."


def peer(tokens, compiled=False):
    return TorchPeer(
        nano_checkpoint(), default_image(), QUESTION, tokens, "cpu", "float32", compiled
    )


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    output = tmp_path_factory.mktemp("nano") / "bundle"
    compile_checkpoint(CompileSettings(output=output, parity=False), Silent())
    vlm = VLM.load(output, threads=1, reuse=False, use_prefix=False)
    return bench(vlm, default_image(), QUESTION, 40, runs=1, warmup=0)


def test_it_answers_as_the_runtime_does(ours):
    model = peer(40)
    first, second = model.answer(), model.answer()
    assert first["ids"] == second["ids"] == list(ours.ids)
    assert len(model.prompt) == ours.prompt_tokens
    assert set(SECONDS) <= set(first["seconds"])
    seconds = first["seconds"]
    assert seconds["total"] >= seconds["time_to_first_token"] + seconds["decode"]
    assert first["tokens_per_second"] == pytest.approx(40 / seconds["total"])
    assert first["decode_tokens_per_second"] == pytest.approx(39 / seconds["decode"])


def test_a_grouped_decoder_gives_the_same_tokens_as_the_definition(tiny):
    """Random weights, two key heads for four query heads, each token by way of the cache."""
    decoder, _ = tiny("decoder")
    assert isinstance(decoder, LlamaDecoder)
    text = decoder.config
    assert text.num_key_value_heads < text.num_attention_heads
    static = StaticDecoder(decoder, 64)
    torch.manual_seed(1)
    ids = torch.randint(0, text.vocab_size, (7,))
    embeds = torch.zeros(1, text.hidden_size)
    empty = [torch.zeros(0, text.num_key_value_heads, text.head_dim)]
    with torch.inference_mode():
        token = static.prefill(ids, embeds)
        for step in range(5):
            logits = decoder(ids, embeds, empty * 2 * text.num_hidden_layers)[0]
            assert int(token) == int(logits[-1].argmax()), step
            ids = torch.cat([ids, token])
            token = static.decode(token, torch.tensor([len(ids) - 1]))


def test_an_answer_that_has_no_room_is_refused():
    with pytest.raises(InputError, match="positions, but the model has"):
        peer(100_000)
