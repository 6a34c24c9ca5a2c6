"""A tiny model with random weights, compiled to a real bundle once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import nn

from mvlm_export.engines.bundle import TOKENIZER, Bundle, BundleWriter
from mvlm_export.engines.image_processor import ImageProcessorConfig
from mvlm_export.engines.manifest import Manifest
from mvlm_export.engines.vlm import VLM
from mvlm_export.exporter.assemble import graph_spec, model_spec
from mvlm_export.exporter.config import ModelConfig, TextConfig, VisionConfig
from mvlm_export.exporter.graphs import export_graph
from mvlm_export.exporter.models.components import COMPONENTS, build_component
from mvlm_export.passes.base import Pass
from mvlm_export.passes.lowering.use_group_query_attention import UseGroupQueryAttention
from mvlm_export.passes.lowering.use_tensor_scatter import UseTensorScatter
from mvlm_export.passes.transformer.merge_qkv import MergeQkv

from .bundles import add_next_token, derive_bundle
from .tokenizer_files import write_tokenizer

CONFIG = ModelConfig(
    vision=VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    ),
    text=TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ),
)


@dataclass(frozen=True)
class TinyModel:
    """A bundle and the PyTorch modules it was made from, in float32."""

    config: ModelConfig
    modules: dict[str, nn.Module]
    path: Path

    @torch.no_grad()
    def embed(self, pixels: np.ndarray) -> torch.Tensor:
        features = self.modules["vision_encoder"](torch.from_numpy(pixels))
        return self.modules["projector"](features).flatten(0, 1)

    @torch.no_grad()
    def full_run(
        self, ids: np.ndarray, embeds: torch.Tensor | None = None
    ) -> list[np.ndarray]:
        """Logits [S, V] and cache rows of a run over the whole sequence, without a cache."""
        text = self.config.text
        none = torch.zeros(0, text.num_key_value_heads, text.head_dim)
        rows = torch.zeros(1, text.hidden_size) if embeds is None else embeds
        past = [none] * (2 * text.num_hidden_layers)
        outputs = self.modules["decoder"](torch.from_numpy(ids), rows, past)
        return [output.numpy() for output in outputs]

    def greedy(
        self, ids: np.ndarray, count: int, embeds: torch.Tensor | None = None
    ) -> list[int]:
        """Greedy ids, the whole sequence run anew for each, up to ``</s>``."""
        answer: list[int] = []
        while len(answer) < count and (not answer or answer[-1] != 2):
            sequence = np.concatenate([ids, np.array(answer, np.int32)]).astype(np.int32)
            answer.append(int(self.full_run(sequence, embeds)[0][-1].argmax()))
        return answer


def random_modules(config: ModelConfig) -> dict[str, nn.Module]:
    """Weights large enough that what is generated depends on the prompt and the picture."""
    torch.manual_seed(7)
    modules = {}
    for name in COMPONENTS:
        module = build_component(name, config).eval().requires_grad_(False)
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
        modules[name] = module
    decoder = modules["decoder"]
    decoder.get_submodule("model.embed_tokens").weight.normal_()
    return modules


def build(
    config: ModelConfig, path: Path, modules: dict[str, nn.Module] | None = None
) -> TinyModel:
    modules = modules or random_modules(config)
    with BundleWriter(path) as writer:
        graphs = {}
        for name in COMPONENTS:
            weights = dict(modules[name].named_parameters())
            export_graph(name, config, weights.__getitem__, writer.folder / name)
            graphs[name] = graph_spec(writer.folder, name, "float32")
        write_tokenizer(writer.folder / TOKENIZER)
        processor = ImageProcessorConfig(config.vision.image_size)
        model = model_spec("tiny", config, processor, "v1")
        writer.seal(Manifest(model, "cpu", "fp32", graphs))
        writer.commit()
    return TinyModel(config, modules, path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Float32, 4 heads over 2 KV heads, 4 rows an image, 512 positions."""
    return build(CONFIG, tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def tiny_half(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Float16, as many KV heads as heads."""
    module = pytest.importorskip("mvlm_export.passes.lowering.convert_to_float16")
    config = replace(CONFIG, text=replace(CONFIG.text, num_key_value_heads=4))
    folder = tmp_path_factory.mktemp("half")
    wide = build(config, folder / "wide")
    edits = dict.fromkeys(COMPONENTS, module.ConvertToFloat16(["logits"]).apply)
    path = derive_bundle(wide.path, folder / "bundle", edits, "float16", prefix=True)
    return replace(wide, path=path)


@pytest.fixture(scope="session")
def tiny_prefix(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The tiny bundle with its prompt prefix."""
    path = tmp_path_factory.mktemp("prefix") / "bundle"
    return replace(tiny, path=derive_bundle(tiny.path, path, prefix=True))


@pytest.fixture(scope="session")
def tiny_fixed(
    tiny: TinyModel, tiny_prefix: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> TinyModel:
    """The tiny bundle with a fixed cache, a prompt prefix and the choice in the graph."""
    path = tmp_path_factory.mktemp("fixed") / "bundle"

    def edit(graph: gs.Graph) -> None:
        UseTensorScatter(CONFIG.text.max_position_embeddings).apply(graph)
        add_next_token(graph)

    edits, prefix = {"decoder": edit}, tiny_prefix.path
    derived = derive_bundle(tiny.path, path, edits, prefix=prefix, kv_form="fixed")
    return replace(tiny, path=derived)


@pytest.fixture(scope="session")
def repeating(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """What it says depends little on what stands before the last token, so it runs in circles.

    And now and then it leaves them: some guesses of what follows are right and some wrong.
    """
    modules = random_modules(CONFIG)
    for name, parameter in modules["decoder"].named_parameters():
        if "o_proj" in name:
            parameter.mul_(0.1)
    return build(CONFIG, tmp_path_factory.mktemp("repeating") / "bundle", modules)


CHOICES = 6
"""Rows that a bundle of ``choosing`` gives the choice of."""

LOWERED: dict[str, list[Pass]] = {
    "append": [],
    "tensor-scatter": [UseTensorScatter(CONFIG.text.max_position_embeddings)],
    "group-query-attention": [
        MergeQkv(),
        UseGroupQueryAttention(CONFIG.text.max_position_embeddings),
    ],
}
"""Passes to each form of the decoder's cache."""


@pytest.fixture(scope="session", params=LOWERED)
def choosing(
    request: pytest.FixtureRequest,
    repeating: TinyModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> TinyModel:
    """``repeating`` with the choice behind each of the last rows, in each form of cache."""

    def edit(graph: gs.Graph) -> None:
        for rewrite in LOWERED[request.param]:
            assert rewrite.apply(graph).rewritten == CONFIG.text.num_hidden_layers
        add_next_token(graph, CHOICES)

    path = tmp_path_factory.mktemp(request.param) / "bundle"
    form = "fixed" if LOWERED[request.param] else "append"
    fields = {"kv_form": form, "logits_rows": CHOICES}
    return replace(
        repeating, path=derive_bundle(repeating.path, path, {"decoder": edit}, **fields)
    )


@pytest.fixture(scope="session")
def vlm(tiny: TinyModel) -> VLM:
    return VLM.load(tiny.path, threads=1)


@pytest.fixture
def altered(tiny: TinyModel) -> Callable[..., Bundle]:
    """The tiny bundle with fields of its manifest or of its model changed in memory."""

    def alter(model: dict[str, object] | None = None, **changes: object) -> Bundle:
        bundle = Bundle.load(tiny.path, verify=False)
        spec = replace(bundle.manifest.model, **(model or {}))
        return Bundle(bundle.path, replace(bundle.manifest, model=spec, **changes))

    return alter
