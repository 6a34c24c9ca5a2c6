"""Any picture to an RGB Pillow image, or an :class:`InputError` that says how to mend it.

What the published code does is ``Image.open(file).convert("RGB")``. Two departures, both where
that spoils the picture:

- EXIF orientation is applied to files (the published code shows a telephone's picture lying on
  its side); ``exif_orientation=False`` turns that off.
- 16-bit grey is scaled to 8 bits (Pillow's own conversion clips all above 255 to white).

Transparency is dropped as ``convert("RGB")`` does: the colours under it stay.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from .errors import InputError

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image"
    " | npt.NDArray[np.uint8]"
)

MAX_PIXELS = 178_956_970
"""Pixels a picture may have, also once padded to a square; Pillow refuses larger files too."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    LookupError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""What Pillow's readers raise on files that are cut short or malformed."""
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def load_image(
    source: ImageSource, *, exif_orientation: bool = True, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Any picture as an RGB Pillow image; of an animation, the first frame.

    Args:
        source: path, encoded bytes, binary file object, Pillow image, or uint8 array
            [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] with R, G, B first.
        exif_orientation: turn pictures read from a file, bytes or file object upright by their
            EXIF tag. The published inference code does not: switch it off to compare with it.
            Pillow images and arrays are taken as they are.
        max_pixels: refuse pictures with more pixels than this before decoding them.

    Raises:
        InputError: the source is missing, empty, damaged, too large, or not a picture.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the Pillow image", max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, name = bytes(source), "the bytes given"
    elif isinstance(source, (str, os.PathLike)):
        data, name = _read_path(source)
    elif hasattr(source, "read"):
        data, name = _read_stream(source)
    else:
        raise InputError(
            f"A picture cannot be read from a {type(source).__name__}; give a path, bytes, a "
            "binary file object, a Pillow image or a uint8 numpy array."
        )
    if not data:
        raise InputError(f"{name} is empty (0 bytes), so it holds no picture; give another.")
    return _decode(data, name, exif_orientation, max_pixels)


def _read_path(source: str | os.PathLike[str]) -> tuple[bytes, str]:
    text = os.fspath(source)
    if text.startswith(("http://", "https://", "data:")):
        raise InputError(
            f"'{text[:60]}' is an address, not a file, and nothing is downloaded here; "
            "save the picture and give its path."
        )
    path = Path(text)
    if path.is_dir():
        raise InputError(f"'{path}' is a folder, not a picture; name one file in it.")
    try:
        return path.read_bytes(), f"'{path}'"
    except FileNotFoundError as error:
        raise InputError(
            f"There is no file '{path}' (looked for from {Path.cwd()}); check the path."
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{path}' cannot be read: {error}; check the path and its permissions."
        ) from error


def _read_stream(stream: IO[bytes]) -> tuple[bytes, str]:
    name = f"the file object {getattr(stream, 'name', type(stream).__name__)}"
    try:
        data = stream.read()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name} cannot be read as bytes: {error}; open it anew with mode 'rb'."
        ) from error
    if not isinstance(data, bytes):
        raise InputError(f"{name} gives text, not bytes; open it with mode 'rb'.")
    return data, name


def _decode(data: bytes, name: str, exif_orientation: bool, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is not a picture that Pillow can read (it starts with {data[:8]!r}): "
            "convert it to JPEG or PNG."
        ) from error
    except _BOMB as error:
        raise _too_large(name, error) from error
    except _DAMAGE as error:
        raise _damaged(name, error) from error
    with image:
        rgb = _to_rgb(image, name, max_pixels)
        return _turn_upright(image, rgb, name) if exif_orientation else rgb


def _turn_upright(image: Image.Image, rgb: Image.Image, name: str) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGE as error:
        raise InputError(
            f"The EXIF data of {name} is damaged ({error}), so its orientation is unknown; "
            "save the picture anew, or pass exif_orientation=False to take it as it lies."
        ) from error
    turn = _UPRIGHT.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(image.size, name, max_pixels)
    try:
        image.load()
    except _BOMB as error:
        raise _too_large(name, error) from error
    except _DAMAGE as error:
        raise _damaged(name, error) from error
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _from_16_bit_grey(image)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise InputError(
            f"The pixels of {name} are {kind} (Pillow mode {image.mode}), and which value is "
            "white is not said; scale them to 0..255 and convert the picture to 8 bits."
        )
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise InputError(
            f"Pillow cannot turn {name} of mode {image.mode} into RGB ({error}); convert it "
            "first."
        ) from error


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    """The high byte of each pixel, which is how Pillow reads 16-bit colour."""
    wide = np.asarray(image).astype(np.int64)
    return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")


def _from_array(array: npt.NDArray[Any], max_pixels: int) -> Image.Image:
    name = f"the array of shape {list(array.shape)}"
    if array.dtype != np.uint8:
        raise InputError(
            f"{name} holds {array.dtype}, but pixels are uint8, 0..255; convert it, for "
            "example (array * 255).round().astype(numpy.uint8) when it runs from 0 to 1."
        )
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if not grey and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        hint = " (channels come last: try array.transpose(1, 2, 0))"
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        raise InputError(
            f"{name} is not a picture: [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] is needed"
            f"{hint if channels_first else ''}."
        )
    _check_size((array.shape[1], array.shape[0]), name, max_pixels)
    if grey:
        return Image.fromarray(array.reshape(array.shape[:2])).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(array[..., :3]))


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{name} is {width} x {height} pixels: there is nothing to look at.")
    if width * height > max_pixels:
        raise InputError(
            f"{name} is {width} x {height} = {width * height / 1e6:.0f} million pixels, above "
            f"the limit of {max_pixels / 1e6:.0f} million that protects memory; scale it down "
            "first (the model sees a few hundred pixels a side anyway)."
        )


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(
        f"{name} is damaged or cut short ({type(error).__name__}: {error}); copy it again or "
        "take another picture."
    )


def _too_large(name: str, error: Exception) -> InputError:
    return InputError(f"{name} is too large to decode: {error}; scale it down first.")
