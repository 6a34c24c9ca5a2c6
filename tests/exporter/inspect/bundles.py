"""Graphs and bundles to inspect, and the command as a user types it."""

import json

import numpy as np
import onnx

from mvlm_export.engines.bundle import BundleWriter
from mvlm_export.exporter.cli.errors import run_command
from mvlm_export.exporter.cli.main import mvlm
from mvlm_export.passes.graph_io import save_graph
from tests.engines.manifests import tiny_manifest
from tests.passes.graphs import parse_graph

ENCODER = """
<ir_version: 10, opset_import: ["" : 20]>
encoder (float[B,3,4,4] pixel_values) => (float[B,2,2,2] image_features)
{ image_features = Conv<kernel_shape=[2,2], strides=[2,2]>(pixel_values, kernel) }
"""
PROJECTOR = """
<ir_version: 10, opset_import: ["" : 20]>
projector (float[B,4,2] image_features) => (float[B,4,8] image_embeds)
{ image_embeds = MatMul(image_features, w) }
"""
DECODER = """
<ir_version: 10, opset_import: ["" : 20]>
decoder (float[S,8] x, float[T,8] past) => (float[S,10] logits, float[N,8] all)
{ all = Concat<axis=0>(past, x)
  keys = Transpose<perm=[1,0]>(all)
  scores = MatMul(x, keys)
  mixed = MatMul(scores, all)
  logits = MatMul(mixed, head) }
"""
WEIGHTS = {
    "vision_encoder": {"kernel": np.zeros((2, 3, 2, 2), np.float32)},
    "projector": {"w": np.zeros((2, 8), np.float32)},
    "decoder": {"head": np.zeros((8, 10), np.float32)},
}
TEXTS = {"vision_encoder": ENCODER, "projector": PROJECTOR, "decoder": DECODER}
PASSES = {
    "projector": [
        {
            "name": "fold-peg-skip",
            "summary": "...",
            "matched": 2,
            "rewritten": 1,
            "refusals": [{"node": "Add 'add_41'", "reason": "the weight 'w' is shared"}],
            "nodes": [12, 11],
            "initializers": [8, 8],
            "bytes": [2000, 1000],
            "seconds": 0.1,
        },
        {"name": "merge-linears", "matched": 0, "rewritten": 0, "refusals": []},
    ]
}


def type_mvlm(*arguments):
    return run_command(mvlm, ["inspect", *map(str, arguments)], "mvlm")


def write_bundle(path, decoder=DECODER, **changes):
    with BundleWriter(path, overwrite=True) as writer:
        for name, text in {**TEXTS, "decoder": decoder}.items():
            weights = WEIGHTS[name] if text is TEXTS[name] else {}
            save_graph(parse_graph(text, **weights), writer.folder / name / "model.onnx")
        (writer.folder / "tokenizer").mkdir()
        (writer.folder / "tokenizer" / "tokenizer.model").write_bytes(b"words")
        np.savez(writer.folder / "prefix.npz", ids=np.arange(7, dtype=np.int32))
        writer.seal(tiny_manifest(**changes))
        return writer.commit().path


def output(capsys, *arguments):
    assert type_mvlm(*arguments) == 0
    return capsys.readouterr().out


def output_json(capsys, *arguments):
    return json.loads(output(capsys, *arguments, "--json"))


def prefill_macs(new, past):
    return new * (past + new) * 8 * 2 + new * 8 * 10


FIXED = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
decoder (float[1,S,8] x, int64[1] past_length, float[1,1,64,8] KEY, float[1,1,64,8] VALUE,
         int32[1] filled, int32 total)
    => (float[1,S,8] y, float[1,1,64,8] NEW_KEY, float[1,1,64,8] NEW_VALUE)
{ y, NEW_KEY, NEW_VALUE = com.microsoft.GroupQueryAttention
      <num_heads = 1, kv_num_heads = 1> (x, x, x, KEY, VALUE, filled, total) }
"""
NAMES = {"KEY": "past_key_values.0.key", "VALUE": "past_key_values.0.value"}


def name_cache(model):
    """Names with dots, which the textual form has no place for."""
    values = (*model.graph.input, *model.graph.output)
    for value in values:
        value.name = NAMES.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [NAMES.get(name, name) for name in node.input]
    return model


def write_model(path, text):
    onnx.save(name_cache(onnx.parser.parse_model(text)), path)
    return path
