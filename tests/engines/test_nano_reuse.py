"""The trained nano model says the same with every saving as without any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvlm_export.engines.bundle import BundleWriter
from mvlm_export.engines.manifest import Manifest
from mvlm_export.engines.vlm import VLM
from mvlm_export.exporter.assemble import copy_files, graph_spec, image_processor, model_spec
from mvlm_export.exporter.models.components import COMPONENTS
from mvlm_export.exporter.settings import nano_checkpoint
from mvlm_export.passes.graph_io import save_graph
from mvlm_export.passes.lowering.use_group_query_attention import UseGroupQueryAttention
from mvlm_export.passes.lowering.use_tensor_scatter import UseTensorScatter
from tests.passes.graphs import nano_config, nano_graph

from .bundles import Edit, add_next_token, derive_bundle, take_raw_pixels

IMAGES = Path(__file__).parents[2] / "examples" / "nano" / "images"
LOWERINGS = {
    "append": None,
    "tensor-scatter": UseTensorScatter,
    "group-query-attention": UseGroupQueryAttention,
}


def questions() -> list[tuple[Path, str]]:
    lines = (IMAGES / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    return [(IMAGES / sample["image"], sample["prompt"]) for sample in samples]


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model as captured, in float32: append form, normalised pixels."""
    folder, config = nano_checkpoint(), nano_config()
    path = tmp_path_factory.mktemp("nano") / "bundle"
    with BundleWriter(path) as writer:
        graphs = {}
        for name in COMPONENTS:
            (writer.folder / name).mkdir()
            save_graph(nano_graph(name), writer.folder / name / "model.onnx")
            graphs[name] = graph_spec(writer.folder, name, "float32")
        copy_files(folder, writer.folder)
        model = model_spec("nano", config, image_processor(folder, config), "v1")
        writer.seal(Manifest(model, "cpu", "fp32", graphs))
        writer.commit()
    return path


@pytest.fixture(scope="module")
def answers(nano: Path) -> list[tuple[int, ...]]:
    vlm = VLM.load(nano, threads=1, reuse=False)
    found = [vlm.generate(image, question).ids for image, question in questions()]
    assert len(set(found)) > 3
    return found


@pytest.mark.parametrize("form", list(LOWERINGS))
def test_answers_are_those_of_the_plain_bundle(
    nano: Path, answers: list[tuple[int, ...]], tmp_path: Path, form: str
) -> None:
    lowering = LOWERINGS[form]
    capacity = nano_config().text.max_position_embeddings

    def edit(graph):
        if lowering is not None:
            lowering(capacity).apply(graph)
        add_next_token(graph)

    edits: dict[str, Edit] = {"decoder": edit, "vision_encoder": take_raw_pixels}
    kv_form = "append" if lowering is None else "fixed"
    path = derive_bundle(nano, tmp_path / "bundle", edits, prefix=True, kv_form=kv_form)
    vlm = VLM.load(path, threads=1)
    asked = list(zip(questions(), answers, strict=True))
    saved = 0
    for (image, question), expected in asked + asked[::-1]:
        answer = vlm.generate(image, question)
        assert answer.ids == expected
        saved += answer.timings.cached_tokens
        assert answer.timings.prefix_tokens > 10
    assert saved > len(asked) * 2 * vlm.new_state().cache.length
    chat = vlm.chat()
    for (image, question), expected in asked[:3]:
        chat.reset()
        assert chat.ask(question, image).ids == expected
