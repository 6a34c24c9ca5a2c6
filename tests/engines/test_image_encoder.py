"""Pictures are known again by their pixels, and a graph gets the pixels it takes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.image_encoder import (
    ImageCache,
    ImageEncoder,
    ImageRows,
    digest_pixels,
)
from mvlm_export.engines.image_processor import ImageProcessorConfig, preprocess
from mvlm_export.engines.ort_session import OrtBackend
from mvlm_export.engines.timings import PhaseClock
from mvlm_export.engines.vlm import VLM

from .bundles import ONE_THREAD, derive_bundle, take_raw_pixels
from .conftest import TinyModel
from .manifests import tiny_manifest

RANDOM = np.random.default_rng(11)
PICTURES = [RANDOM.integers(0, 255, (40, 30 + i, 3), dtype=np.uint8) for i in range(6)]


class CountingBackend:
    """Graphs that note what they get; the image rows are the mean pixel."""

    def __init__(self) -> None:
        self.pixels: list[np.ndarray] = []
        self.projected = 0

    def open_graph(self, name: str) -> SimpleNamespace:
        run = self.see if name == "vision_encoder" else self.project
        return SimpleNamespace(name=name, run=run)

    def see(self, pixels: np.ndarray) -> np.ndarray:
        self.pixels.append(pixels)
        return pixels

    def project(self, features: np.ndarray) -> np.ndarray:
        self.projected += 1
        return np.full((1, 4, 8), features.mean(dtype=np.float64), np.float32)


def encoder(images: int = 4, dtype: str = "float32") -> tuple[ImageEncoder, CountingBackend]:
    manifest, backend = tiny_manifest(), CountingBackend()
    graph = manifest.graphs["vision_encoder"]
    inputs = (replace(graph.inputs[0], dtype=dtype),)
    graphs = {**manifest.graphs, "vision_encoder": replace(graph, inputs=inputs)}
    manifest = replace(manifest, graphs=graphs)
    return ImageEncoder(manifest, backend, ImageCache(images)), backend  # type: ignore[arg-type]


def test_a_picture_seen_lately_is_not_encoded_again() -> None:
    images, backend = encoder()
    clock = PhaseClock()
    first = images.encode(PICTURES[:2], clock)
    again = images.encode([PICTURES[1], PICTURES[2], PICTURES[1]], clock)
    assert (first.reused, again.reused) == (0, 2)
    assert len(backend.pixels) == backend.projected == 3
    np.testing.assert_array_equal(again.embeds[:4], first.embeds[4:])
    np.testing.assert_array_equal(again.embeds[8:], first.embeds[4:])
    assert again.digests[0] == again.digests[2] == first.digests[1] != first.digests[0]


def test_the_pixels_decide_not_the_file() -> None:
    images, backend = encoder()
    buffers = [io.BytesIO(), io.BytesIO()]
    for buffer, kind in zip(buffers, ("PNG", "BMP"), strict=True):
        Image.fromarray(PICTURES[0]).save(buffer, kind)
    rows = images.encode([PICTURES[0], *(b.getvalue() for b in buffers)], PhaseClock())
    assert rows.reused == 2
    changed = np.clip(PICTURES[0].astype(int) + 1, 0, 255).astype(np.uint8)
    assert images.encode([changed], PhaseClock()).reused == 0
    assert len(backend.pixels) == 2


def test_digests_tell_sizes_and_single_values_apart() -> None:
    pixels = np.zeros((1, 3, 4, 6), np.uint8)
    other = pixels.copy()
    other[0, 2, 3, 5] = 1
    found = {digest_pixels(array) for array in (pixels, other, pixels.reshape(1, 3, 6, 4))}
    assert len(found) == 3
    strided = np.repeat(pixels, 2, axis=3)[..., ::2]
    assert digest_pixels(strided) == digest_pixels(pixels)


def test_the_pictures_longest_unused_go() -> None:
    cache = ImageCache(images=2)
    rows = np.zeros((4, 8), np.float32)
    for name in "ab":
        cache.put(name, rows)
    assert cache.get("a") is rows
    cache.put("c", rows)
    assert [name for name in "abc" if cache.get(name) is not None] == ["a", "c"]
    cache.put("c", rows)
    assert len(cache) == 2


def test_bytes_are_bounded() -> None:
    rows = np.zeros((4, 8), np.float32)
    cache = ImageCache(images=9, max_bytes=2 * rows.nbytes)
    for name in "abc":
        cache.put(name, rows)
    assert [name for name in "abc" if cache.get(name) is not None] == ["b", "c"]
    cache.put("large", np.zeros((99, 8), np.float32))
    assert len(cache) == 0
    cache.put("a", rows)
    assert cache.get("a") is rows


def test_nothing_is_kept_without_room_for_an_image() -> None:
    images, backend = encoder(images=0)
    assert [images.encode(PICTURES[:1], PhaseClock()).reused for _ in range(2)] == [0, 0]
    assert len(backend.pixels) == 2


def test_a_failed_picture_is_not_kept() -> None:
    images, backend = encoder()
    backend.project = lambda features: np.zeros((1, 3, 8), np.float32)  # type: ignore[method-assign]
    images._projector.run = backend.project
    for _ in range(2):
        with pytest.raises(EngineError, match="gave 3 rows for an image"):
            images.encode(PICTURES[:1], PhaseClock())
    assert len(backend.pixels) == 2


def test_rows_of_several_turns() -> None:
    nothing = ImageRows(np.zeros((1, 8), np.float32))
    one = ImageRows(np.ones((4, 8), np.float32), ("a",), 0)
    two = ImageRows(np.full((4, 8), 2, np.float32), ("b",), 1)
    assert nothing.followed_by(nothing).embeds.shape == (1, 8)
    both = nothing.followed_by(one).followed_by(two)
    assert (both.embeds[:, 0].tolist(), both.digests) == ([1] * 4 + [2] * 4, ("a", "b"))
    later = both.followed_by(nothing)
    assert (len(later.embeds), later.digests, later.reused) == (8, ("a", "b"), 0)
    assert both.reused == 1


def test_the_manifest_says_which_pixels_the_encoder_takes() -> None:
    config = ImageProcessorConfig(image_size=16)
    for dtype in ("uint8", "float32", "float16"):
        images, backend = encoder(dtype=dtype)
        images.encode(PICTURES[:1], PhaseClock())
        (pixels,) = backend.pixels
        assert pixels.dtype == ("uint8" if dtype == "uint8" else "float32")
        assert pixels.shape == (1, 3, 16, 16)
        if dtype != "uint8":
            np.testing.assert_array_equal(pixels, preprocess(PICTURES[0], config))


def test_an_encoder_of_raw_pixels_says_the_same(
    tiny: TinyModel, vlm: VLM, tmp_path: Path
) -> None:
    path = derive_bundle(tiny.path, tmp_path / "raw", {"vision_encoder": take_raw_pixels})
    raw = VLM.load(path, threads=1)
    assert raw.bundle.manifest.pixel_dtype == "uint8"
    np.testing.assert_allclose(
        raw.embed_images(PICTURES[:2]), vlm.embed_images(PICTURES[:2]), atol=1e-4
    )
    answers = [v.generate(PICTURES[0], "What is it?", max_tokens=8) for v in (raw, vlm)]
    assert answers[0].ids == answers[1].ids


def test_pixels_that_the_graph_does_not_take(tiny: TinyModel, tmp_path: Path) -> None:
    path = derive_bundle(tiny.path, tmp_path / "raw", {"vision_encoder": take_raw_pixels})
    raw = OrtBackend(Bundle.load(path), ONE_THREAD).open_graph("vision_encoder")
    with pytest.raises(EngineError, match="takes uint8, but float32 was given"):
        raw.run(np.zeros((1, 3, 32, 32), np.float32))
    plain = OrtBackend(Bundle.load(tiny.path), ONE_THREAD).open_graph("vision_encoder")
    with pytest.raises(EngineError, match="takes float32, but uint8 was given"):
        plain.run(np.zeros((1, 3, 32, 32), np.uint8))
