"""Photographs that scikit-image and scikit-learn ship, cut into squares.

Calibration and evaluation share no photograph. Each gives its whole centre and smaller
squares at fixed places, so that the same pixels come out everywhere.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from english_texts import SCIKIT_LEARN
from PIL import Image
from wheels import Wheel

SCIKIT_IMAGE = Wheel(
    "scikit-image==0.26.0",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
)
CALIBRATION_PHOTOS = (
    "brick.png",
    "camera.png",
    "cell.png",
    "clock_motion.png",
    "coffee.png",
    "flower.jpg",
    "gravel.png",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
EVALUATION_PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "china.jpg",
    "coins.png",
    "grass.png",
    "hubble_deep_field.jpg",
    "page.png",
    "text.png",
)
_FROM_SCIKIT_LEARN = ("china.jpg", "flower.jpg")

_SQUARES = ((1.0, 0.5, 0.5), (0.7, 0.0, 0.0), (0.6, 1.0, 1.0), (0.8, 0.5, 0.2))
"""Side as a share of the shorter side, then where it stands between left and right, top and
bottom."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of R, G, B in 0..1; what DINOv2 was trained with."""

Pixels = npt.NDArray[np.uint8]


def squares(folder: Path, names: tuple[str, ...], each: int, size: int) -> Pixels:
    """Squares of photographs: uint8 [photos * each, 3, size, size], RGB.

    Args:
        folder: where the wheels are kept.
        names: of files.
        each: squares of one photograph, at most 4.
        size: side in pixels; bicubic.
    """
    cut = [
        _square(photo, *place, size)
        for photo in (_open(folder, name) for name in names)
        for place in _SQUARES[:each]
    ]
    return np.stack(cut)


def normalize(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Bytes [B, 3, S, S] as an encoder without folded normalisation takes them, float32."""
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels / 255 - mean) / std).astype(np.float32)


def _open(folder: Path, name: str) -> Image.Image:
    if name in _FROM_SCIKIT_LEARN:
        content = SCIKIT_LEARN.read(folder, f"sklearn/datasets/images/{name}")
    else:
        content = SCIKIT_IMAGE.read(folder, f"skimage/data/{name}")
    return Image.open(io.BytesIO(content)).convert("RGB")


def _square(photo: Image.Image, share: float, across: float, down: float, size: int) -> Pixels:
    side = round(min(photo.size) * share)
    left, top = round((photo.width - side) * across), round((photo.height - side) * down)
    box = (left, top, left + side, top + side)
    cut = photo.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(cut).transpose(2, 0, 1))
