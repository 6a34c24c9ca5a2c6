"""Pictures to the vision encoder's input, with numpy and Pillow only.

The steps and their order are those of the published pipeline, and the result is equal to it
bit for bit: RGB (:mod:`.load_image`), pad to a square with the mean colour, bicubic resize
with Pillow's antialiasing, divide by 255, normalise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import BundleError, CheckpointError, InputError
from .load_image import MAX_PIXELS, ImageSource, load_image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BICUBIC = 3
_KNOWN_STEPS = (
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
)
_SIZE_KEYS = ({"shortest_edge"}, {"height", "width"})


@dataclass(frozen=True)
class ImageProcessorConfig:
    """How a picture becomes ``pixel_values``.

    Attributes:
        image_size: side S of the square that the vision encoder sees, in pixels.
        image_mean: mean of each of R, G, B in 0..1.
        image_std: standard deviation of each of R, G, B in 0..1.
        aspect_ratio: ``pad`` adds bars of the mean colour to make a square; anything else
            resizes the shortest edge to S and crops the centre, as CLIP alone does.
    """

    image_size: int = 336
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    aspect_ratio: str = "pad"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise InputError(
                f"image_size is {self.image_size}, but a picture needs at least one pixel; "
                "give the side that the vision encoder was trained with, such as 336."
            )
        for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if len(values) != 3 or not all(np.isfinite(values)):
                raise InputError(
                    f"{name} is {values}, but a finite number each for R, G and B is needed; "
                    f"CLIP's own are {CLIP_MEAN if name == 'image_mean' else CLIP_STD}."
                )
        if min(self.image_std) <= 0:
            raise InputError(
                f"image_std is {self.image_std}, and pixels are divided by it; "
                "every entry must be above zero."
            )

    @property
    def pad_color(self) -> tuple[int, int, int]:
        """Colour of the bars, ``int(255 * mean)`` for each channel."""
        red, green, blue = (int(255 * value) for value in self.image_mean)
        return red, green, blue

    def to_json(self) -> dict[str, Any]:
        """The settings as a dict for a bundle's manifest."""
        return {
            "image_size": self.image_size,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "aspect_ratio": self.aspect_ratio,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageProcessorConfig:
        """Read what :meth:`to_json` wrote.

        Raises:
            BundleError: a key is missing or unknown, or a value cannot be used.
        """
        expected = set(cls().to_json())
        if set(data) != expected:
            raise BundleError(
                f"The image settings hold the keys {sorted(data)} instead of "
                f"{sorted(expected)}: another version wrote them, or they were edited; "
                "export the bundle again."
            )
        size = data["image_size"]
        if isinstance(size, bool) or not isinstance(size, int):
            raise BundleError(
                f"The bundle's image_size is {size!r}, not a whole number. Export the bundle "
                "again."
            )
        try:
            return cls(
                image_size=size,
                image_mean=_three_floats(data["image_mean"]),
                image_std=_three_floats(data["image_std"]),
                aspect_ratio=str(data["aspect_ratio"]),
            )
        except (TypeError, ValueError, InputError) as error:
            raise BundleError(
                f"The bundle's image settings cannot be used: {error} Export the bundle again."
            ) from error

    @classmethod
    def from_preprocessor_config(
        cls, data: Mapping[str, Any], aspect_ratio: str = "pad"
    ) -> ImageProcessorConfig:
        """Read the dict of a CLIP ``preprocessor_config.json``.

        Every step named there is honoured or refused. ``do_convert_rgb`` is always on: three
        channels are what the encoder takes.

        Args:
            data: the file's content; absent keys mean CLIP's defaults.
            aspect_ratio: ``image_aspect_ratio`` of the model's config.json.

        Raises:
            CheckpointError: a step is asked for that this pipeline does not have.
        """
        _refuse_unknown_steps(data)
        crops = bool(data.get("do_center_crop", True))
        size = _size_of(data, aspect_ratio, crops)
        normalises = bool(data.get("do_normalize", True))
        try:
            mean = _three_floats(data.get("image_mean", CLIP_MEAN))
            std = _three_floats(data.get("image_std", CLIP_STD))
            if not normalises:
                mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
            return cls(size, mean, std, aspect_ratio)
        except (TypeError, ValueError, InputError) as error:
            raise CheckpointError(
                f"preprocessor_config.json cannot be used: {error} "
                "Mend the file, or take it away to use CLIP's own settings."
            ) from error


def preprocess_uint8(
    image: ImageSource, config: ImageProcessorConfig, *, exif_orientation: bool = True
) -> npt.NDArray[np.uint8]:
    """Padded and resized pixels before normalisation, uint8 [1, 3, S, S] in 0..255.

    The input of an encoder into which mean and standard deviation have been folded.

    Raises:
        InputError: as :func:`load_image`, or the padded picture would be too large.
    """
    rgb = load_image(image, exif_orientation=exif_orientation)
    size = config.image_size
    if config.aspect_ratio == "pad":
        square = _expand_to_square(rgb, config.pad_color)
        resized = square.resize((size, size), Image.Resampling.BICUBIC)
    else:
        resized = _crop_center(_resize_shortest_edge(rgb, size), size)
    pixels: npt.NDArray[np.uint8] = np.asarray(resized, dtype=np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]


def normalize(
    pixels: npt.NDArray[np.uint8], config: ImageProcessorConfig
) -> npt.NDArray[np.float32]:
    """``(pixels / 255 - mean) / std``, uint8 [B, 3, S, S] -> float32 of the same shape.

    The division is rounded from float64 and the rest done in float32, as transformers does.
    """
    unit = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    mean = np.array(config.image_mean, np.float32).reshape(1, 3, 1, 1)
    std = np.array(config.image_std, np.float32).reshape(1, 3, 1, 1)
    return (unit - mean) / std


def encoder_input(
    pixels: npt.NDArray[np.uint8], config: ImageProcessorConfig, dtype: str
) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32]:
    """What a vision encoder takes whose ``pixel_values`` are of ``dtype``.

    Args:
        pixels: of :func:`preprocess_uint8`.
        dtype: ``uint8`` for an encoder into which mean and deviation have been folded: it gets
            the pixels as they are. Any other gets them normalised, in float32.
    """
    return pixels if dtype == "uint8" else normalize(pixels, config)


def preprocess(
    image: ImageSource, config: ImageProcessorConfig, *, exif_orientation: bool = True
) -> npt.NDArray[np.float32]:
    """``pixel_values`` float32 [1, 3, S, S] of a picture (all that :func:`load_image` takes).

    Raises:
        InputError: as :func:`preprocess_uint8`.
    """
    pixels = preprocess_uint8(image, config, exif_orientation=exif_orientation)
    return normalize(pixels, config)


def _check_expansion(rgb: Image.Image, size: tuple[int, int], how: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(
            f"The picture is {rgb.width} x {rgb.height} pixels, and {how} would make it "
            f"{size[0]} x {size[1]}, above the limit of {MAX_PIXELS / 1e6:.0f} million pixels "
            "that protects memory; crop it or scale it down first."
        )


def _expand_to_square(rgb: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Bars on both sides; an odd pixel left over goes to the right or below."""
    side = max(rgb.size)
    if rgb.width == rgb.height:
        return rgb
    _check_expansion(rgb, (side, side), "padding it to a square")
    square = Image.new("RGB", (side, side), color)
    square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    return square


def _resize_shortest_edge(rgb: Image.Image, size: int) -> Image.Image:
    """Shortest edge to ``size``, the other by ``int(size * long / short)``."""
    short, long = min(rgb.size), max(rgb.size)
    other = int(size * long / short)
    target = (size, other) if rgb.width <= rgb.height else (other, size)
    _check_expansion(rgb, target, f"scaling its shortest edge to {size}")
    return rgb.resize(target, Image.Resampling.BICUBIC)


def _crop_center(rgb: Image.Image, size: int) -> Image.Image:
    left, top = (rgb.width - size) // 2, (rgb.height - size) // 2
    return rgb.crop((left, top, left + size, top + size))


def _three_floats(values: Iterable[float]) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _refuse_unknown_steps(data: Mapping[str, Any]) -> None:
    """Steps that cannot be done, or cannot be left out, for a graph of fixed input size."""
    kind = str(
        data.get("image_processor_type") or data.get("feature_extractor_type") or "CLIP"
    )
    if not kind.startswith("CLIP"):
        raise _refused(f"is for a {kind}", "CLIP's processor is the one that MobileVLM uses")
    for step in ("do_resize", "do_rescale"):
        if not data.get(step, True):
            raise _refused(f"sets {step} to false", "the encoder needs that step")
    for step, wanted in data.items():
        if step.startswith("do_") and wanted and step not in _KNOWN_STEPS:
            raise _refused(f"asks for {step}", "there is no such step in CLIP's pipeline")
    if data.get("resample", _BICUBIC) not in (_BICUBIC, "bicubic"):
        raise _refused(f"sets resample to {data['resample']}", "only 3, bicubic, is done")
    factor = data.get("rescale_factor", 1 / 255)
    if not isinstance(factor, (int, float)) or abs(factor * 255 - 1) > 1e-6:
        raise _refused(f"sets rescale_factor to {factor}", "only 1/255 is done")


def _size_of(data: Mapping[str, Any], aspect_ratio: str, crops: bool) -> int:
    """The side S that both ``size`` and ``crop_size`` lead to."""
    size = data.get("size", {"shortest_edge": 224})
    side = _side(size, "size")
    exact = isinstance(size, Mapping) and "height" in size
    if aspect_ratio != "pad" and (exact or not crops):
        wish = "size as height and width" if exact else "do_center_crop false"
        raise _refused(
            f"gives {wish} with image_aspect_ratio '{aspect_ratio}'",
            "only the shortest edge and a centre crop make a square without distortion",
        )
    crop = _side(data.get("crop_size", side), "crop_size") if crops else side
    if crop != side:
        raise _refused(f"resizes to {side} but crops to {crop}", "both must be equal")
    return side


def _side(value: object, key: str) -> int:
    """The number in ``336``, ``{"shortest_edge": 336}``, ``{"height": 336, "width": 336}``."""
    sides = {value} if isinstance(value, int) else set()
    if isinstance(value, Mapping) and set(value) in _SIZE_KEYS:
        sides = set(value.values())
    if len(sides) == 1 and all(type(side) is int and side > 0 for side in sides):
        return int(sides.pop())
    raise _refused(
        f"gives {key} as {value!r}",
        "a number, {'shortest_edge': number}, or equal 'height' and 'width' are understood",
    )


def _refused(what: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"preprocessor_config.json {what}, but {why}; mend the file, or take it away to use "
        "CLIP's own settings."
    )
