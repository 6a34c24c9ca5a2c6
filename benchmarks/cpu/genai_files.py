"""ONNX Runtime GenAI's graph of a checkpoint's decoder, by its own builder.

Runs in the GenAI environment: ``python genai_files.py HF FOLDER BLOCK SYMMETRIC``.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import onnx

NOT_READ_WHOLE = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")
"""Operators that read rows of a table, not all of it: tokens, and rotary positions."""


def build(source: Path, folder: Path, block: int, symmetric: bool) -> None:
    """The builder's command line: int4 for the CPU, logits of the last row alone.

    Accuracy level 4 means integer products.
    """
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(source), "-o", str(folder), "-p", "int4", "-e", "cpu"]
    command += ["-c", str(folder / "cache"), "--extra_options"]
    command += [f"block_size={block}", f"is_symmetric={'true' if symmetric else 'false'}"]
    command += ["accuracy_level=4", "prune_lm_head=true"]
    subprocess.run(command, check=True)


def weights_read(path: Path) -> int:
    """Bytes of all weights that a decode step reads whole."""
    graph = onnx.load(str(path), load_external_data=False).graph
    tables = {
        name for node in graph.node if node.op_type in NOT_READ_WHOLE for name in node.input
    }
    return sum(_bytes(tensor) for tensor in graph.initializer if tensor.name not in tables)


def _bytes(tensor: onnx.TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def cache_facts(folder: Path) -> dict[str, int]:
    """Heads and width of one layer's cache, and the bytes that one token adds to all."""
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    heads, width = decoder["num_key_value_heads"], decoder["head_size"]
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    kinds = [
        onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in graph.input
        if value.name.startswith("past_key_values.")
    ]
    size = sum(kind.itemsize for kind in kinds)
    return {"heads": heads, "width": width, "kv_row_bytes": size * heads * width}


def main() -> None:
    """Build, and note the sizes."""
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    build(source, folder, int(sys.argv[3]), sys.argv[4] == "true")
    packages = ("onnxruntime", "onnxruntime-genai")
    sizes = {
        "weights_read": weights_read(folder / "model.onnx"),
        **cache_facts(folder),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    (folder / "sizes.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main()
