"""What a bundle holds beside its graphs, and what its manifest says of them."""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import onnx

from mvlm_export.engines.bundle import TOKENIZER
from mvlm_export.engines.errors import CheckpointError
from mvlm_export.engines.image_processor import ImageProcessorConfig
from mvlm_export.engines.manifest import GraphSpec, ModelSpec, TensorSpec
from mvlm_export.engines.tokenizer import TOKENIZER_FILES

from .checkpoint import Checkpoint
from .config_fields import read_json
from .geometry import ModelConfig
from .graphs import MODEL_FILE
from .saturation import may_saturate

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
COPIED = (CONFIG, "generation_config.json", PREPROCESSOR)
SAMPLED = 256
TOOLS = (
    "mvlm-export",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "tensorrt_rtx_cu13",
)


def image_processor(folder: Path, config: ModelConfig) -> ImageProcessorConfig:
    """The checkpoint's own ``preprocessor_config.json`` where it has one, else CLIP's.

    Raises:
        CheckpointError: the file cannot be used, or contradicts the vision tower.
    """
    aspect, size = config.image_aspect_ratio, config.vision.image_size
    path = folder / PREPROCESSOR
    if not path.is_file():
        return ImageProcessorConfig(image_size=size, aspect_ratio=aspect)
    processor = ImageProcessorConfig.from_preprocessor_config(read_json(path), aspect)
    if processor.image_size != size:
        raise CheckpointError(
            f"{path} makes pictures of {processor.image_size} pixels, the vision tower takes "
            f"{size}. Correct one of the two."
        )
    return processor


def copy_files(source: Path, bundle: Path) -> None:
    """Copy tokenizer and configuration files as the checkpoint has them."""
    (bundle / TOKENIZER).mkdir()
    for names, place in ((TOKENIZER_FILES, bundle / TOKENIZER), (COPIED, bundle)):
        for name in names:
            if (source / name).is_file():
                shutil.copyfile(source / name, place / name)


def model_spec(
    name: str, config: ModelConfig, processor: ImageProcessorConfig, template: str
) -> ModelSpec:
    """What the runtime must know of the model."""
    text = config.text
    return ModelSpec(
        name=name,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        max_positions=text.max_position_embeddings,
        image_tokens=config.image_tokens,
        stop_ids=text.stop_token_ids,
        template=template,
        image_processor=processor.to_json(),
    )


def graph_spec(bundle: Path, name: str, dtype: str) -> GraphSpec:
    """Read a written graph's inputs and outputs back from its file."""
    file = f"{name}/{MODEL_FILE}"
    graph = onnx.load(str(bundle / file), load_external_data=False).graph
    inputs, outputs = _tensor_specs(graph.input), _tensor_specs(graph.output)
    return GraphSpec(file, dtype, inputs, outputs, may_saturate(graph))


def _tensor_specs(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        specs.append(TensorSpec(value.name, dtype, shape))
    return tuple(specs)


def checkpoint_source(checkpoint: Checkpoint) -> dict[str, str]:
    """Where the weights came from, and a fingerprint to know them again by.

    The fingerprint is the sha256 of config.json and of each tensor's name, shape, and first
    ``SAMPLED`` values in float32: enough to tell fine-tuned weights from others, and read in a
    moment.
    """
    digest = hashlib.sha256((checkpoint.folder / CONFIG).read_bytes())
    for name in sorted(checkpoint.names):
        info = checkpoint.info(name)
        digest.update(f"{name} {info.shape}".encode())
        if info.dtype.is_floating_point:
            values = checkpoint.load(name).reshape(-1)[:SAMPLED].float()
            digest.update(values.numpy().tobytes())
    return {"path": str(checkpoint.folder.resolve()), "fingerprint": digest.hexdigest()}


def tool_versions() -> dict[str, str]:
    """Versions of what made the bundle."""
    versions = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
