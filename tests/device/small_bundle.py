"""A bundle of three graphs of a few nodes, written with the onnx package alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mvlm_export.engines.bundle import TOKENIZER, Bundle, BundleWriter
from mvlm_export.engines.manifest import GraphSpec
from tests.engines.manifests import MODEL, tiny_manifest
from tests.engines.tokenizer_files import write_tokenizer

TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
Node = tuple[str, list[str], str, dict[str, object]]


def decoder_nodes(spec: GraphSpec) -> list[Node]:
    """Every input counts in the outputs, or TensorRT would drop it."""
    past = [tensor.name for tensor in spec.inputs if tensor.name.startswith("past")]
    nodes: list[Node] = [
        ("Gather", ["table", "input_ids"], "embeds", {}),
        ("ReduceMean", ["image_embeds", "rows"], "image", {"keepdims": 1}),
        ("Add", ["embeds", "image"], "hidden", {}),
        ("MatMul", ["hidden", "to_row"], "row_2d", {}),
        ("Reshape", ["row_2d", "row_shape"], "row", {}),
    ]
    for name in past:
        nodes += [
            ("ReduceSum", [name, "rows"], f"{name}.sum", {"keepdims": 1}),
            ("Add", ["row", f"{name}.sum"], name.replace("past_key_values", "present"), {}),
        ]
    return [*nodes, ("MatMul", ["hidden", "head"], "logits", {})]


def nodes_of(name: str, spec: GraphSpec) -> list[Node]:
    if name == "decoder":
        return decoder_nodes(spec)
    source, result = spec.inputs[0].name, spec.outputs[0].name
    return [
        ("Reshape", [source, "patches"], "flat", {}),
        ("MatMul", ["flat", "weight"], result, {}),
    ]


def constants_of(name: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0).standard_normal
    width, heads, size = MODEL.hidden_size, MODEL.num_key_value_heads, MODEL.head_dim
    if name == "vision_encoder":
        return {"patches": np.array([0, 16, 48]), "weight": random((48, 6), np.float32)}
    if name == "projector":
        return {
            "patches": np.array([0, MODEL.image_tokens, 24]),
            "weight": random((24, width), np.float32),
        }
    return {
        "table": random((MODEL.vocab_size, width), np.float32),
        "rows": np.array([0]),
        "to_row": random((width, heads * size), np.float32),
        "row_shape": np.array([-1, heads, size]),
        "head": random((width, MODEL.vocab_size), np.float32),
    }


def write_graph(name: str, spec: GraphSpec, path: Path) -> None:
    nodes = [
        helper.make_node(op, inputs, [output], name=f"{output}_node", **attributes)
        for op, inputs, output, attributes in nodes_of(name, spec)
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, TYPES[t.dtype], t.shape) for t in tensors]
        for tensors in (spec.inputs, spec.outputs)
    )
    weights = [
        numpy_helper.from_array(value, key) for key, value in constants_of(name).items()
    ]
    graph = helper.make_graph(nodes, name, inputs, outputs, weights)
    imports = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir()
    onnx.save(model, path)


def write_small_bundle(path: Path, target: str = "rtx") -> Bundle:
    """For a target with the append cache, in float32."""
    manifest = tiny_manifest(target=target)
    with BundleWriter(path) as writer:
        for name, spec in manifest.graphs.items():
            write_graph(name, spec, writer.folder / spec.file)
        write_tokenizer(writer.folder / TOKENIZER)
        writer.seal(manifest)
        return writer.commit()
