"""The tiny bundle in other forms: its graphs rewritten, a prompt prefix added."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.bundle import PREFIX, TOKENIZER, Bundle, BundleWriter
from mvlm_export.engines.image_processor import CLIP_MEAN, CLIP_STD
from mvlm_export.engines.ort_session import OrtBackend
from mvlm_export.engines.prefix import PromptPrefix, save_prefix
from mvlm_export.engines.prompt import get_template, tokenize_constant_prefix
from mvlm_export.engines.session import BackendOptions
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.exporter.assemble import graph_spec
from mvlm_export.passes.decoder.choose_greedy_token import ChooseGreedyToken
from mvlm_export.passes.decoder.keep_last_row import KeepLastRow
from mvlm_export.passes.graph_io import load_graph, save_graph

ONE_THREAD = BackendOptions(threads=1)
Edit = Callable[[gs.Graph], Any]


def derive_bundle(
    source: Path,
    path: Path,
    edits: Mapping[str, Edit] | None = None,
    dtype: str = "float32",
    prefix: bool | Path = False,
    **fields: Any,
) -> Path:
    """Another bundle of the same weights.

    Args:
        edits: what is done to a graph, by its name; the other graphs are copied.
        dtype: of the graphs.
        prefix: ship the rows of the template's constant prefix; those of a bundle, by its
            path.
        fields: of the manifest.
    """
    manifest = replace(Bundle.load(source, verify=False).manifest, **fields)
    edits = edits or {}
    with BundleWriter(path) as writer:
        shutil.copytree(source / TOKENIZER, writer.folder / TOKENIZER)
        graphs = {}
        for name, spec in manifest.graphs.items():
            if name in edits:
                graph = load_graph(source / spec.file)
                edits[name](graph)
                save_graph(graph.cleanup().toposort(), writer.folder / spec.file)
            else:
                shutil.copytree(source / name, writer.folder / name)
            graphs[name] = graph_spec(writer.folder, name, dtype)
        manifest = replace(manifest, graphs=graphs)
        if isinstance(prefix, Path):
            shutil.copy(prefix / PREFIX, writer.folder)
        elif prefix:
            add_prefix(Bundle(writer.folder, manifest))
        writer.seal(manifest)
        writer.commit()
    return path


def add_prefix(bundle: Bundle) -> None:
    model = bundle.manifest.model
    tokenizer = LlamaTokenizer.from_folder(bundle.tokenizer_path)
    ids = tokenize_constant_prefix(get_template(model.template), tokenizer)
    decoder = OrtBackend(bundle, ONE_THREAD).open_decoder()
    cache = decoder.new_cache()
    decoder.append(cache, ids, np.zeros((1, model.hidden_size), np.float32))
    rows = [cache.read_rows(tensor, 0, len(ids)) for tensor in range(cache.shape.tensors)]
    save_prefix(bundle.path / PREFIX, PromptPrefix(ids, tuple(rows)))


def add_next_token(graph: gs.Graph, rows: int = 1) -> None:
    """The likeliest id after each of the last rows as a further output of a decoder."""
    KeepLastRow(count=rows).apply(graph)
    assert ChooseGreedyToken().apply(graph).rewritten == 1


def take_raw_pixels(graph: gs.Graph) -> None:
    """A vision encoder that rescales and normalises for itself."""
    (pixels,) = graph.inputs
    raw = gs.Variable("pixel_values", np.dtype(np.uint8), pixels.shape)
    pixels.name = "normalised"
    cast = gs.Variable("cast", np.dtype(np.float32), pixels.shape)
    centred = gs.Variable("centred", np.dtype(np.float32), pixels.shape)
    mean, std = (
        255 * np.array(c, np.float32).reshape(1, 3, 1, 1) for c in (CLIP_MEAN, CLIP_STD)
    )
    graph.inputs = [raw]
    graph.nodes += [
        gs.Node("Cast", "to_float", {"to": 1}, inputs=[raw], outputs=[cast]),
        gs.Node(
            "Sub", "minus_mean", inputs=[cast, gs.Constant("mean", mean)], outputs=[centred]
        ),
        gs.Node("Div", "by_std", inputs=[centred, gs.Constant("std", std)], outputs=[pixels]),
    ]
