"""Optimization profiles by dimension name, and those the three graphs need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import EngineError, InputError
from .kv_cache import KvForm

DimRange = tuple[int, int, int]
ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
WeightKind = Literal["fp16", "fp32", "int8", "int4"]

LONGEST_CHUNK = 1024
"""New tokens of one prefill call at most; the runtime runs a longer prompt in several
(``prompt_chunks``). Four images of 144 rows and their question fit. A plan's scratch grows
with it."""


@dataclass(frozen=True)
class ProfileSpec:
    """One optimization profile: (min, opt, max) for each named dimension.

    Attributes:
        name: what the runtime asks for ("prefill", "decode").
        dims: dimension name, as in the ONNX file's dim_param, to (min, opt, max).

    Raises:
        InputError: a range is not 0 <= min <= opt <= max.
    """

    name: str
    dims: Mapping[str, DimRange]

    def __post_init__(self) -> None:
        for dim, (low, opt, high) in self.dims.items():
            if not 0 <= low <= opt <= high:
                raise InputError(
                    f"Profile {self.name!r} gives dimension {dim!r} min {low}, opt {opt}, max "
                    f"{high}, but 0 <= min <= opt <= max must hold. Reorder the three numbers."
                )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for build.json."""
        return {"name": self.name, "dims": {dim: list(r) for dim, r in self.dims.items()}}


def decoder_profiles(
    max_length: int,
    image_rows: int,
    kind: WeightKind,
    max_image_rows: int | None = None,
    kv_form: KvForm = "append",
) -> tuple[ProfileSpec, ProfileSpec]:
    """The decoder's profiles, prefill (index 0) and decode (index 1).

    S is new tokens, T past tokens, I rows of ``image_embeds``. There is no T with a fixed
    cache: its tensors have ``max_length`` rows, and ``past_length`` is a value.

    A decode profile with S fixed at 1 gets the matrix-vector attention kernel, but makes
    TensorRT keep FP16, FP32 and INT8 weights twice (measured: 954 against 543 MB on four
    layers); a range 1..2 shares them. INT4 weights are shared either way, so they alone get
    S = 1.

    Prefill takes ``LONGEST_CHUNK`` new tokens at most: scratch is made for the profile's
    maxima together, and S up to ``max_length`` beside a past of as many rows is a call that
    cannot be. By the formula of ``memory_plan`` it would take 121.6 MB for 1.7B with 2048
    rows, and takes 69.2 MB.

    The maxima contradict each other: S + T may exceed ``max_length`` within a profile, as
    TensorRT takes each dimension by itself (it warns "kMAX values are not self-consistent" at
    most). The rotary tables have ``max_length`` rows, so the caller keeps T + S <= max_length.

    ``image_embeds`` keeps at least one row: a prompt without image binds one row of zeros, as
    a gather from an empty tensor would read outside it.

    Args:
        max_length: rows of the KV cache, prompt and answer together.
        image_rows: rows of ``image_embeds`` to optimise for (144 an image for LDPv2).
        kind: how the decoder's weights are stored.
        max_image_rows: rows of ``image_embeds`` at most; None for ``image_rows``.
        kv_form: of the decoder's cache.

    Raises:
        InputError: ``max_length`` is below 2 or ``image_rows`` below 1.
    """
    if max_length < 2 or image_rows < 1:
        raise InputError(
            f"Decoder profiles need max_length >= 2 and image_rows >= 1, not {max_length} and "
            f"{image_rows}. Give the cache's rows and the tokens of at least one image."
        )
    past = max_length - 1
    rows = (1, image_rows, max(image_rows, max_image_rows or 0))
    decode_tokens = (1, 1, 1) if kind == "int4" else (1, 1, 2)
    seen: tuple[dict[str, DimRange], dict[str, DimRange]] = (
        {"T": (0, 0, past)},
        {"T": (0, min(max_length // 4, past), past)},
    )
    prefill_past, decode_past = seen if kv_form == "append" else ({}, {})
    prompt_tokens = (1, min(256, max_length), min(LONGEST_CHUNK, max_length))
    return (
        ProfileSpec("prefill", {"S": prompt_tokens, **prefill_past, "I": rows}),
        ProfileSpec("decode", {"S": decode_tokens, **decode_past, "I": rows}),
    )


def vision_profiles(max_batch: int = 1) -> tuple[ProfileSpec]:
    """The one profile of the vision encoder and the projector: 1 to ``max_batch`` images.

    Raises:
        InputError: ``max_batch`` is below 1.
    """
    if max_batch < 1:
        raise InputError(f"At least one image must fit: max_batch is {max_batch}, not >= 1.")
    return (ProfileSpec("images", {"B": (1, 1, max_batch)}),)


@dataclass(frozen=True)
class NetworkInput:
    """A network input: -1 in ``shape`` where the size is open, its name in ``dim_names``."""

    name: str
    shape: tuple[int, ...]
    dim_names: tuple[str | None, ...]

    @property
    def is_dynamic(self) -> bool:
        return -1 in self.shape


def map_profile(inputs: Sequence[NetworkInput], profile: ProfileSpec) -> dict[str, ShapeRange]:
    """The profile's (min, opt, max) shapes for each input with an open dimension.

    Raises:
        EngineError: an open dimension has no name or no range, or a range has no dimension.
    """
    shapes: dict[str, ShapeRange] = {}
    used: set[str] = set()
    for entry in inputs:
        if not entry.is_dynamic:
            continue
        axes = [_axis_range(entry, axis, profile) for axis in range(len(entry.shape))]
        used |= {name for name in entry.dim_names if name}
        low, opt, high = zip(*axes, strict=True)
        shapes[entry.name] = (low, opt, high)
    unknown = sorted(set(profile.dims) - used)
    if unknown:
        raise EngineError(
            f"Profile {profile.name!r} gives ranges for {', '.join(map(repr, unknown))}, but "
            f"no input has a dimension of that name; the graph's are: "
            f"{', '.join(sorted(used)) or 'none, every shape is fixed'}. Correct the profile, "
            "or export the graph with that axis dynamic."
        )
    return shapes


def _axis_range(entry: NetworkInput, axis: int, profile: ProfileSpec) -> DimRange:
    size, name = entry.shape[axis], entry.dim_names[axis]
    if size != -1:
        return (size, size, size)
    if not name:
        raise EngineError(
            f"Axis {axis} of input {entry.name!r} is dynamic but has no name, so no profile "
            "can give it a range. Name it in the ONNX file (dim_param)."
        )
    if name not in profile.dims:
        raise EngineError(
            f"Profile {profile.name!r} gives no range for dimension {name!r} (axis {axis} of "
            f"input {entry.name!r}); it has: {', '.join(profile.dims) or 'none'}. Add "
            f"{name!r}: (min, opt, max)."
        )
    return profile.dims[name]
