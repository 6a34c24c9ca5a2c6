"""Pictures in many forms, made from numbers alone; what the published code sees in them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image


def picture(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise over a gradient, uint8 [H, W, C]: no symmetry, every value."""
    rng = np.random.default_rng(seed)
    ramp = (
        np.add.outer(np.arange(height), np.arange(width))[..., None] * [1, 2, 3, 5][:channels]
    )
    noise = rng.integers(0, 120, (height, width, channels))
    return ((ramp + noise) % 256).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb_png(width: int = 31, height: int = 20) -> bytes:
    return encoded(Image.fromarray(picture(width, height)), "PNG")


def palette_with_transparency() -> bytes:
    image = Image.fromarray(picture(31, 20)).quantize(16)
    return encoded(image, "PNG", transparency=3)


def animation() -> bytes:
    frames = [Image.fromarray(picture(24, 17, seed=seed)).quantize(32) for seed in (1, 2, 3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


ODD_PICTURES = {
    "grey": encoded(Image.fromarray(picture(31, 20, 1)[..., 0]), "PNG"),
    "one-bit": encoded(Image.fromarray(picture(31, 20, 1)[..., 0]).convert("1"), "PNG"),
    "palette": encoded(Image.fromarray(picture(31, 20)).quantize(16), "PNG"),
    "palette-transparent": palette_with_transparency(),
    "rgb-transparent-colour": encoded(
        Image.fromarray(picture(31, 20)), "PNG", transparency=(1, 2, 3)
    ),
    "grey-alpha": encoded(Image.fromarray(picture(31, 20)).convert("LA"), "PNG"),
    "rgb-alpha": encoded(Image.fromarray(picture(31, 20, 4)), "PNG"),
    "cmyk-jpeg": encoded(Image.fromarray(picture(31, 20)).convert("CMYK"), "JPEG"),
    "jpeg": encoded(Image.fromarray(picture(31, 20)), "JPEG", quality=85),
    "bmp": encoded(Image.fromarray(picture(31, 20)), "BMP"),
    "tiff-ycbcr": encoded(
        Image.fromarray(picture(31, 20)).convert("YCbCr"),
        "TIFF",
        compression="tiff_adobe_deflate",
    ),
    "gif-animation": animation(),
}


def published_pixels(rgb: Image.Image, aspect_ratio: str, size: int) -> np.ndarray:
    """Pad by numpy as the published code does, then transformers' own CLIP processor."""
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    clip = module.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    pixels = np.asarray(rgb)
    if aspect_ratio == "pad":
        height, width, _ = pixels.shape
        side = max(width, height)
        square = np.empty((side, side, 3), np.uint8)
        square[:] = [int(mean * 255) for mean in clip.image_mean]
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        pixels = square
    return np.stack(clip(Image.fromarray(pixels))["pixel_values"])
