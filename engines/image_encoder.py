"""Pictures to the decoder's image rows, and the rows of pictures seen lately.

A picture is known again by what the vision encoder sees of it: the sha256 of its raw pixels
after padding and resizing. The same picture from another file, or with other bytes around the
same pixels, is the same; another one never is.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .decoder_state import Digests
from .errors import EngineError
from .image_processor import ImageProcessorConfig, encoder_input, preprocess_uint8
from .load_image import ImageSource
from .manifest import Manifest
from .session import Backend, FloatArray, PixelArray
from .timings import PhaseClock

CACHED_IMAGES = 4
CACHED_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Rows of ``image_embeds`` and the pictures they are of.

    Attributes:
        embeds: [images * image_tokens, D]; one row of zeros where there is no image, as the
            decoder takes no empty tensor.
        digests: of each picture.
        reused: pictures whose rows were known already.
    """

    embeds: FloatArray
    digests: Digests = ()
    reused: int = 0

    def followed_by(self, other: ImageRows) -> ImageRows:
        """These rows and those of further pictures behind them; ``reused`` is the other's."""
        parts = [rows.embeds for rows in (self, other) if rows.digests]
        embeds = np.concatenate(parts) if parts else self.embeds
        return ImageRows(embeds, (*self.digests, *other.digests), other.reused)


class ImageCache:
    """Image rows by digest; the pictures longest unused go first.

    Args:
        images: most pictures kept; 0 keeps none.
        max_bytes: most bytes kept; one picture beyond that is not kept at all.
    """

    def __init__(self, images: int = CACHED_IMAGES, max_bytes: int = CACHED_BYTES) -> None:
        self._images, self._max_bytes = images, max_bytes
        self._rows: OrderedDict[str, FloatArray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, digest: str) -> FloatArray | None:
        """Rows of a picture, not to be written to; None if they are not here."""
        with self._lock:
            rows = self._rows.get(digest)
            if rows is not None:
                self._rows.move_to_end(digest)
            return rows

    def put(self, digest: str, rows: FloatArray) -> None:
        """Keep the rows of a picture, in place of others where there is no room."""
        with self._lock:
            self._bytes -= self._rows.pop(digest, rows[:0]).nbytes
            self._rows[digest] = rows
            self._bytes += rows.nbytes
            while len(self._rows) > self._images or self._bytes > self._max_bytes:
                self._bytes -= self._rows.popitem(last=False)[1].nbytes


def digest_pixels(pixels: PixelArray) -> str:
    """sha256 of raw pixels and their shape."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


class ImageEncoder:
    """Preprocessing, vision encoder and projector of a bundle.

    Whether the vision encoder gets raw or normalised pixels is the manifest's word: the dtype
    of its ``pixel_values``.

    Args:
        cache: where image rows are kept.
    """

    def __init__(self, manifest: Manifest, backend: Backend, cache: ImageCache) -> None:
        self._config = ImageProcessorConfig.from_json(manifest.model.image_processor)
        self._pixel_dtype = manifest.pixel_dtype
        self._image_tokens = manifest.model.image_tokens
        self._nothing = np.zeros((1, manifest.model.hidden_size), np.float32)
        self._vision = backend.open_graph("vision_encoder")
        self._projector = backend.open_graph("projector")
        self._cache = cache

    def no_image(self) -> ImageRows:
        """What the decoder takes where there is no image."""
        return ImageRows(self._nothing)

    def encode(self, sources: Sequence[ImageSource], clock: PhaseClock) -> ImageRows:
        """Rows of pictures, one after another; those known already are not computed.

        Raises:
            InputError: a picture cannot be read.
            EngineError: a graph failed, or gave another number of rows than the manifest says.
        """
        if not sources:
            return self.no_image()
        rows: list[FloatArray] = []
        digests: list[str] = []
        reused = 0
        for source in sources:
            with clock.phase("preprocess"):
                pixels = preprocess_uint8(source, self._config)
                digest = digest_pixels(pixels)
            known = self._cache.get(digest)
            reused += known is not None
            rows.append(self._run(pixels, digest, clock) if known is None else known)
            digests.append(digest)
        return ImageRows(np.concatenate(rows), tuple(digests), reused)

    def _run(self, pixels: PixelArray, digest: str, clock: PhaseClock) -> FloatArray:
        with clock.phase("preprocess"):
            values = encoder_input(pixels, self._config, self._pixel_dtype)
        with clock.phase("vision"):
            features = self._vision.run(values)
        with clock.phase("projector"):
            embeds: FloatArray = self._projector.run(features)[0]
        if len(embeds) != self._image_tokens:
            raise EngineError(
                f"The projector gave {len(embeds)} rows for an image, but the manifest "
                f"says {self._image_tokens}; compile the bundle again."
            )
        self._cache.put(digest, embeds)
        return embeds
