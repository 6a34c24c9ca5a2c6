"""The three graphs against the PyTorch modules they come from, in ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from mvlm_export.engines.errors import MvlmError
from mvlm_export.exporter import graphs
from mvlm_export.exporter.config import parse_config
from mvlm_export.exporter.graphs import capture_graph, export_graph
from mvlm_export.exporter.models.components import build_component
from tests.helpers import tiny_config_json

# Worst element of a few layers on inputs of order 1: float32 rounding.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def random_module(name, config):
    torch.manual_seed(0)
    module = build_component(name, config).eval().requires_grad_(False)
    for key, parameter in module.named_parameters():
        if "norm" not in key:
            parameter.normal_(std=0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return module


def exported(name, config, folder):
    module = random_module(name, config)
    weights = dict(module.named_parameters())
    path = export_graph(name, config, weights.__getitem__, folder)
    return module, path, onnxruntime.InferenceSession(str(path))


def run(session, *inputs):
    return session.run(
        None, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True))
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "mm_projector_type": "linear",
            "mm_vision_select_feature": "cls_patch",
            "vision_config": {"hidden_act": "gelu"},
        },
    ],
    ids=["patch-quick_gelu", "cls_patch-gelu"],
)
def test_vision_encoder(tmp_path, changes):
    config = parse_config(tiny_config_json(**changes))
    module, _, session = exported("vision_encoder", config, tmp_path)
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, 56, 56)
        (found,) = run(session, pixels.numpy())
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, module(pixels).numpy(), **CLOSE)


PROJECTORS = (
    "ldpnetv2",
    "ldpnetv2_nopool",
    "ldpnet",
    "linear",
    "mlp1x_gelu",
    "mlp2x_gelu",
    "pw2",
    "pw2_pool",
    "pw2_pool_pos",
)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_projector(tmp_path, kind):
    config = parse_config(tiny_config_json(mm_projector_type=kind))
    module, _, session = exported("projector", config, tmp_path)
    for batch in (1, 2):
        features = torch.randn(batch, config.image_feature_tokens, 32)
        (found,) = run(session, features.numpy())
        assert found.shape == (batch, config.image_tokens, 64)
        np.testing.assert_allclose(found, module(features).numpy(), **CLOSE)


def decoder_inputs(config, new, seen):
    text = config.text
    generator = np.random.default_rng(new * 100 + seen)
    ids = generator.integers(0, text.vocab_size + 3, new).astype(np.int32)
    ids[0] = text.vocab_size + 1
    images = generator.normal(size=(3, text.hidden_size)).astype(np.float32)
    shape = (seen, text.num_key_value_heads, text.head_dim)
    past = [
        generator.normal(size=shape).astype(np.float32)
        for _ in range(2 * text.num_hidden_layers)
    ]
    return ids, images, past


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
    ],
    ids=["heads-equal", "head-dim-80-gqa", "gqa", "tied"],
)
def test_decoder(tmp_path, changes):
    config = parse_config(tiny_config_json(**changes))
    module, _, session = exported("decoder", config, tmp_path)
    for new, seen in ((1, 0), (6, 0), (1, 9), (4, 3)):
        ids, images, past = decoder_inputs(config, new, seen)
        found = run(session, ids, images, *past)
        expected = module(
            torch.from_numpy(ids),
            torch.from_numpy(images).float(),
            [torch.from_numpy(row).float() for row in past],
        )
        assert found[0].dtype == np.float32
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs.numpy(), **CLOSE)


def test_weights_in_the_file_are_the_checkpoints(tmp_path):
    config = parse_config(tiny_config_json())
    module, path, _ = exported("decoder", config, tmp_path)
    model = onnx.load(str(path))
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, parameter in module.named_parameters():
        linear = name.endswith(("_proj.weight", "lm_head.weight"))
        expected = parameter.T if linear else parameter
        np.testing.assert_array_equal(arrays[name], expected.numpy())


def test_file_layout_and_names(tmp_path):
    config = parse_config(tiny_config_json())
    _, path, _ = exported("decoder", config, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 200_000
    model = onnx.load(str(path), load_external_data=False)
    assert [(i.domain, i.version) for i in model.opset_import] == [("", graphs.OPSET)]
    assert model.ir_version <= 10
    inputs = [value.name for value in model.graph.input]
    assert inputs[:4] == [
        "input_ids",
        "image_embeds",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    names = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert names["past_key_values.1.value"] == ["T", 4, 16]
    assert names["present.1.key"] == ["S", 4, 16]
    assert names["logits"] == ["S", 320]


def test_only_plain_operators(tmp_path):
    config = parse_config(tiny_config_json())
    nodes = capture_graph("decoder", config).structure.graph.node
    kinds = {node.op_type for node in nodes}
    assert not kinds & {"Attention", "RotaryEmbedding", "RMSNormalization", "GatherND", "Pow"}
    assert all(node.domain == "" for node in nodes)


def test_progress_reaches_its_total(tmp_path):
    config = parse_config(tiny_config_json())
    weights = dict(random_module("projector", config).named_parameters())
    seen = []
    export_graph(
        "projector",
        config,
        weights.__getitem__,
        tmp_path,
        lambda done, total, name: seen.append((done, total, name)),
    )
    total = seen[0][1]
    assert [done for done, _, _ in seen] == list(range(1, total + 1))
    assert {most for _, most, _ in seen} == {total}
    assert set(weights) <= {name for _, _, name in seen}


def test_weights_are_read_when_the_file_is_written(tmp_path):
    config = parse_config(tiny_config_json())
    weights = dict(random_module("projector", config).named_parameters())
    read = []

    def source(name):
        read.append(name)
        return weights[name]

    graph = graphs.bind_weights(capture_graph("projector", config), source)
    assert read == []
    graphs.write_graph(graph, tmp_path)
    assert sorted(read) == sorted(weights)


def test_a_fixed_axis_is_an_error(monkeypatch):
    real = graphs._image_signature

    def more_dynamic(name, config):
        signature = real(name, config)
        signature.dynamic_axes["image_features"][1] = "N"
        return signature

    monkeypatch.setattr(graphs, "_image_signature", more_dynamic)
    with pytest.raises(MvlmError, match="axis 1 of 'image_features'"):
        capture_graph("projector", parse_config(tiny_config_json()))


def refuse(*args, **kwargs):
    raise torch.onnx.OnnxExporterError("no decomposition for aten.x\nwith a long report")


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (refuse, r"projector: PyTorch .* \(no decomposition for aten\.x\)\. Install"),
        (lambda *args, **kwargs: None, r"it gave no graph.*lock file"),
    ],
    ids=["raises", "none"],
)
def test_what_pytorch_cannot_export(monkeypatch, export, message):
    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(MvlmError, match=message) as caught:
        capture_graph("projector", parse_config(tiny_config_json()))
    assert "long report" not in str(caught.value)
    assert torch.get_default_dtype() is torch.float32


def bound_projector():
    config = parse_config(tiny_config_json())
    weights = dict(random_module("projector", config).named_parameters())
    return graphs.bind_weights(capture_graph("projector", config), weights.__getitem__)


def test_a_graph_whose_shapes_contradict_each_other(tmp_path):
    """Valid node by node: only full shape inference sees it."""
    graph = bound_projector()
    graph.outputs[0].shape = ["B", 5, 7]
    with pytest.raises(MvlmError, match=r"projector: the graph is not valid ONNX"):
        graphs.write_graph(graph, tmp_path)


def test_a_graph_with_an_operator_that_does_not_exist(tmp_path):
    graph = bound_projector()
    graph.nodes[0].op = "NoSuchOperator"
    with pytest.raises(MvlmError, match=r"not valid ONNX.*NoSuchOperator"):
        graphs.write_graph(graph, tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MvlmError, match=r"cannot be written.*--output"):
        graphs.write_graph(bound_projector(), tmp_path / "file" / "projector")


def test_an_initializer_without_a_shape(monkeypatch):
    real = graphs._translate

    def spoil(*args):
        model = real(*args)
        next(iter(model.graph.initializers.values())).shape = None
        return model

    monkeypatch.setattr(graphs, "_translate", spoil)
    with pytest.raises(MvlmError, match=r"left the shape or dtype of .* open"):
        capture_graph("projector", parse_config(tiny_config_json()))
