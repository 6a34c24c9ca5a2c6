"""Fit a checkpoint's tensors to the model before anything long is started.

The names and shapes that are wanted come from the modules themselves, built on the meta
device; where they stand in a checkpoint comes from the published layout. Every tensor of the
checkpoint is either used or ignored for a stated reason; anything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mvlm_export.engines.errors import CheckpointError

from .checkpoint import Checkpoint
from .config import ModelConfig
from .models.components import COMPONENTS, build_component
from .models.llama import LlamaDecoder, rotary_tables

WeightMap = Mapping[str, Mapping[str, str]]
"""Component -> name of a parameter in its module -> name of the tensor in the checkpoint."""

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, tensor name)``."""

FLOAT16_MAX = 65504.0
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

_PREFIXES = {
    "vision_encoder": (
        "model.vision_tower.vision_tower.vision_model.",
        "model.vision_tower.vision_tower.",
        "model.vision_tower.vision_model.",
        "vision_tower.vision_tower.vision_model.",
        "vision_tower.vision_model.",
        "model.vision_tower.",
        "vision_tower.",
    ),
    "projector": ("model.mm_projector.", "mm_projector."),
    "decoder": ("",),
}
"""Where a component's tensors may stand; the published place comes first."""

_IGNORABLE = (
    (re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$"),
     "rotary tables are computed from rope_theta"),
    (re.compile(r"vision_tower\..*embeddings\.position_ids$"), "a buffer that counts 0, 1, 2"),
    (re.compile(r"vision_tower\..*post_layernorm\.(weight|bias)$"),
     "the vision tower's last norm comes after the features are taken"),
)  # fmt: skip
_VISION_LAYER = re.compile(r"vision_tower\..*encoder\.layers\.(\d+)\.")
_LISTED = 10


def expected_shapes(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Component -> parameter name -> shape; a tied ``lm_head`` is not listed.

    Raises:
        CheckpointError: the sizes are beyond what a tensor can have.
    """
    try:
        with torch.device("meta"):
            modules = {name: build_component(name, config) for name in COMPONENTS}
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"No model can be built of the sizes that config.json gives ({reason}): take the "
            "file as the model's authors publish it."
        ) from error
    return {
        name: {key: tuple(value.shape) for key, value in module.named_parameters()}
        for name, module in modules.items()
    }


@dataclass(frozen=True)
class ShapeMismatch:
    """A tensor whose shape is not the model's."""

    name: str
    expected: tuple[int, ...]
    found: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} (expected {list(self.expected)}, found {list(self.found)})"


def _shorten(items: Sequence[object]) -> str:
    more = len(items) - _LISTED
    return ", ".join(map(str, items[:_LISTED])) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class PreflightReport:
    """How a checkpoint fits the model.

    Attributes:
        weight_map: where each parameter's values are.
        missing: published names of tensors that the model needs and the checkpoint lacks.
        misshapen: tensors whose shape is not the model's.
        unknown: tensors with no place in the model and no known reason to be ignored.
        ignored: tensors that are not used, with the reason.
        wrong_dtypes: used tensors that are not bfloat16, float16 or float32.
        problems: other contradictions, each a sentence with its cure.
        notes: what is worth knowing and does no harm.
        allow_unknown: whether ``unknown`` is let pass.
    """

    folder: Path
    weight_map: WeightMap
    missing: tuple[str, ...] = ()
    misshapen: tuple[ShapeMismatch, ...] = ()
    unknown: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    wrong_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    allow_unknown: bool = False

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence a kind of failure, with what to do; empty when all is well."""
        found = list(self.problems)
        if self.missing:
            found.append(
                f"{len(self.missing)} tensors are missing: {_shorten(self.missing)}. Check "
                "that the download is complete and that config.json (num_hidden_layers, "
                "mm_projector_type) is this checkpoint's own."
            )
            found += self._explain_missing()
        if self.misshapen:
            found.append(
                f"{len(self.misshapen)} tensors have another shape than config.json implies: "
                f"{_shorten(self.misshapen)}. Correct config.json or give the checkpoint that "
                "it belongs to."
            )
        if self.unknown and not self.allow_unknown:
            found.append(
                f"{len(self.unknown)} tensors have no place in the model: "
                f"{_shorten(self.unknown)}. If config.json names the right model, they may "
                "change its answers; give --allow-unknown to leave them out knowingly."
            )
        if self.wrong_dtypes:
            listed = [f"{name} ({dtype})" for name, dtype in self.wrong_dtypes.items()]
            found.append(
                f"{len(listed)} tensors are not bfloat16, float16 or float32: "
                f"{_shorten(listed)}. Give the checkpoint as it was before quantisation."
            )
        return tuple(found)

    def _explain_missing(self) -> list[str]:
        if self.weight_map.get("vision_encoder"):
            return []
        prefix = _PREFIXES["vision_encoder"][0]
        if not any(name.startswith(prefix) for name in self.missing):
            return []
        return [
            "The checkpoint holds no vision tower at all: the published MobileVLM V2 "
            f"checkpoints have it under {prefix}*; LLaVA-style ones leave it out and must be "
            "saved together with their tower."
        ]

    @property
    def ok(self) -> bool:
        return not self.failures

    def raise_if_failed(self) -> None:
        """Raise one CheckpointError that names everything that does not fit."""
        if not self.ok:
            lines = "\n".join(f"- {failure}" for failure in self.failures)
            raise CheckpointError(f"{self.folder} does not fit its config.json:\n{lines}")


def _choose_prefix(component: str, wanted: Mapping[str, object], names: set[str]) -> str:
    """The prefix under which most of the wanted stand (the published one on ties)."""
    prefixes = _PREFIXES[component]
    return max(prefixes, key=lambda prefix: sum(prefix + name in names for name in wanted))


def _reason_to_ignore(name: str, config: ModelConfig, vision_prefix: str) -> str | None:
    for pattern, reason in _IGNORABLE:
        if pattern.search(name):
            return reason
    if name == "lm_head.weight" and config.text.tie_word_embeddings:
        return "tied to model.embed_tokens.weight"
    layer = _VISION_LAYER.match(name.removeprefix("model."))
    if layer and name.startswith(vision_prefix):
        index, used = int(layer.group(1)), config.vision_layers_used
        if used <= index < config.vision.num_hidden_layers:
            return f"vision layer {index} comes after the features are taken (layer {used})"
    return None


def _check_vocabulary(
    checkpoint: Checkpoint, config: ModelConfig, tokenizer_vocab: int | None
) -> tuple[list[str], list[str]]:
    """Problems and notes about embedding rows, vocabulary size, tokenizer and tied heads."""
    problems, notes = [], []
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    rows = config.text.vocab_size
    if table in checkpoint and len(checkpoint.info(table).shape) == 2:
        rows = checkpoint.info(table).shape[0]
    if rows != config.text.vocab_size:
        problems.append(
            f"{table} has {rows} rows, but config.json says vocab_size "
            f"{config.text.vocab_size}: set vocab_size to {rows} if the weights are right."
        )
    if tokenizer_vocab is not None and tokenizer_vocab > rows:
        problems.append(
            f"The tokenizer knows {tokenizer_vocab} tokens, but {table} has {rows} rows: its "
            "last tokens would read beyond the table; give the tokenizer of this checkpoint."
        )
    elif tokenizer_vocab is not None and tokenizer_vocab < rows:
        notes.append(
            f"{table} has {rows - tokenizer_vocab} more rows than the tokenizer has tokens; "
            "no text is encoded as one of them, and one that is generated reads as U+FFFD."
        )
    tied = config.text.tie_word_embeddings and table in checkpoint and head in checkpoint
    if tied and not torch.equal(checkpoint.load(table), checkpoint.load(head)):
        problems.append(
            f"config.json ties {head} to {table} (tie_word_embeddings), but the checkpoint "
            "holds different values for both: set tie_word_embeddings to false."
        )
    return problems, notes


def preflight(
    checkpoint: Checkpoint,
    config: ModelConfig,
    tokenizer_vocab: int | None = None,
    *,
    allow_unknown: bool = False,
) -> PreflightReport:
    """Map the checkpoint's tensors to parameters and list everything that does not fit.

    Reads names, shapes and dtypes alone (and both tables of a tied head).

    Args:
        tokenizer_vocab: number of tokens the tokenizer knows, None when there is none yet.
        allow_unknown: let tensors pass that have no place in the model.
    """
    names = set(checkpoint.names)
    weight_map: dict[str, dict[str, str]] = {}
    prefixes: dict[str, str] = {}
    missing, misshapen, wrong_dtypes = [], [], {}
    for component, shapes in expected_shapes(config).items():
        prefix = prefixes[component] = _choose_prefix(component, shapes, names)
        weight_map[component] = {}
        for parameter, shape in shapes.items():
            name = prefix + parameter
            if name not in names:
                missing.append(name)
                continue
            info = checkpoint.info(name)
            weight_map[component][parameter] = name
            if info.shape != shape:
                misshapen.append(ShapeMismatch(name, shape, info.shape))
            if info.dtype not in FLOATS:
                wrong_dtypes[name] = info.dtype
    used = {name for mapping in weight_map.values() for name in mapping.values()}
    rest = [name for name in checkpoint.names if name not in used]
    reasons = {
        name: _reason_to_ignore(name, config, prefixes["vision_encoder"]) for name in rest
    }
    problems, notes = _check_vocabulary(checkpoint, config, tokenizer_vocab)
    notes += [
        f"{path.name} is in PyTorch's old format, which cannot be memory-mapped: it is read "
        "whole; save it again as safetensors to need less memory."
        for path in checkpoint.unmapped_files
    ]
    return PreflightReport(
        folder=checkpoint.folder,
        weight_map=weight_map,
        missing=tuple(missing),
        misshapen=tuple(misshapen),
        unknown=tuple(name for name, reason in reasons.items() if reason is None),
        ignored={name: reason for name, reason in reasons.items() if reason is not None},
        wrong_dtypes=wrong_dtypes,
        problems=tuple(problems),
        notes=tuple(notes),
        allow_unknown=allow_unknown,
    )


def _finite_range(tensor: Tensor) -> tuple[float, bool]:
    """Largest magnitude, and whether every value is finite (NaN goes through ``aminmax``)."""
    if tensor.numel() == 0:
        return 0.0, True
    low, high = (value.double() for value in torch.aminmax(tensor))
    largest = torch.maximum(low.abs(), high.abs())
    return float(largest), bool(torch.isfinite(largest))


def scan_values(
    checkpoint: Checkpoint, weight_map: WeightMap, progress: Progress | None = None
) -> dict[str, float]:
    """Largest magnitude of every used tensor, read one at a time.

    Raises:
        CheckpointError: when a used tensor holds NaN or infinity; all such tensors are named.
    """
    used = [name for mapping in weight_map.values() for name in mapping.values()]
    largest: dict[str, float] = {}
    broken: list[str] = []
    for done, name in enumerate(used, start=1):
        largest[name], finite = _finite_range(checkpoint.load(name))
        if not finite:
            broken.append(name)
        if progress is not None:
            progress(done, len(used), name)
    if broken:
        raise CheckpointError(
            f"{len(broken)} tensors of {checkpoint.folder} hold NaN or infinity: "
            f"{_shorten(broken)}. The training or the conversion went wrong, or the download "
            "is damaged: get the weights again."
        )
    return largest


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = tensor.to(dtype)
    if tensor.dtype != dtype and not _finite_range(cast)[1]:
        raise CheckpointError(
            f"{name} does not fit {dtype}: it holds values beyond its range, or NaN. Use "
            "bfloat16 or float32 for this checkpoint."
        )
    return cast


def load_component(
    module: nn.Module,
    component: str,
    weight_map: WeightMap,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> nn.Module:
    """Give ``module`` (built on any device, meta too) the checkpoint's weights, on the CPU.

    Tensors that have ``dtype`` already stay views of the mapped file; parameters need no
    gradient. Rotary tables are computed anew, in float32.

    Raises:
        CheckpointError: when a parameter has no tensor, a wrong shape, or values that
            ``dtype`` cannot hold.
    """
    mapping = weight_map[component]
    parameters = dict(module.named_parameters())
    for done, (parameter, old) in enumerate(parameters.items(), start=1):
        name = mapping.get(parameter)
        if name is None or checkpoint.info(name).shape != tuple(old.shape):
            raise CheckpointError(
                f"The {component}'s parameter {parameter} {list(old.shape)} has no fitting "
                f"tensor in {checkpoint.folder}: run preflight first, which says why."
            )
        path, _, leaf = parameter.rpartition(".")
        values = _cast(checkpoint.load(name), dtype, name)
        setattr(module.get_submodule(path), leaf, nn.Parameter(values, requires_grad=False))
        if progress is not None:
            progress(done, len(parameters), name)
    if isinstance(module, LlamaDecoder):
        if module.config.tie_word_embeddings:
            module.lm_head.weight = module.model.embed_tokens.weight
        with torch.device("cpu"):
            module.rotary_cos, module.rotary_sin = rotary_tables(module.config)
    return module
