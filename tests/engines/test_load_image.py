"""Any source to RGB: forms, orientation, and failures by message."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.image_processor import ImageProcessorConfig, preprocess
from mvlm_export.engines.load_image import load_image

from .pictures import ODD_PICTURES, animation, encoded, picture, published_pixels, rgb_png

ORIENTATION = 0x0112


class TestSources:
    def test_every_source_gives_the_same(self, tmp_path: Path) -> None:
        data, pixels = rgb_png(), picture(31, 20)
        path = tmp_path / "ä picture.png"
        path.write_bytes(data)
        with path.open("rb") as stream:
            loaded = [load_image(stream)]
        loaded += [load_image(source) for source in (path, str(path), data, bytearray(data))]
        loaded += [load_image(memoryview(data)), load_image(io.BytesIO(data))]
        loaded += [load_image(Image.fromarray(pixels)), load_image(pixels)]
        alpha = np.dstack([pixels, np.zeros((20, 31), np.uint8)])
        loaded += [load_image(alpha), load_image(np.asfortranarray(pixels))]
        for image in loaded:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), pixels)

    @pytest.mark.parametrize("shape", [(20, 31), (20, 31, 1)])
    def test_grey_arrays(self, shape: tuple[int, ...]) -> None:
        grey = picture(31, 20, 1)
        image = np.asarray(load_image(grey.reshape(shape)))
        np.testing.assert_array_equal(image, np.repeat(grey, 3, axis=2))

    def test_a_pillow_image_is_left_as_it_was(self) -> None:
        original = Image.fromarray(picture(9, 7))
        load_image(original).putpixel((0, 0), (1, 2, 3))
        np.testing.assert_array_equal(np.asarray(original), picture(9, 7))

    def test_sixteen_bit_grey_keeps_its_high_byte(self) -> None:
        values = np.array([[0, 255, 256], [0x8000, 0xFEFF, 0xFFFF]], np.uint16)
        data = encoded(Image.fromarray(values), "PNG")
        expected = [[0, 0, 1], [128, 254, 255]]
        for source in (data, Image.open(io.BytesIO(data)), Image.fromarray(values)):
            image = np.asarray(load_image(source))
            assert image[..., 0].tolist() == expected
            assert (image == image[..., :1]).all()

    def test_of_an_animation_the_first_frame(self) -> None:
        frame = Image.fromarray(picture(24, 17, seed=1)).quantize(32).convert("RGB")
        np.testing.assert_array_equal(np.asarray(load_image(animation())), np.asarray(frame))


class TestExifOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_files_are_turned_upright(self, orientation: int) -> None:
        """Against numpy's flips, by what each value says of row 0 and column 0."""
        pixels = picture(5, 3)
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
        upright = {
            1: pixels,
            2: pixels[:, ::-1],
            3: pixels[::-1, ::-1],
            4: pixels[::-1],
            5: pixels.transpose(1, 0, 2),
            6: np.rot90(pixels, -1),
            7: pixels[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(pixels),
        }[orientation]
        np.testing.assert_array_equal(np.asarray(load_image(data)), upright)
        as_stored = load_image(data, exif_orientation=False)
        np.testing.assert_array_equal(np.asarray(as_stored), pixels)

    def test_preprocess_passes_the_choice_on(self) -> None:
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        data = encoded(Image.fromarray(picture(64, 40)), "JPEG", exif=exif)
        config = ImageProcessorConfig(image_size=28)
        published = published_pixels(Image.open(io.BytesIO(data)).convert("RGB"), "pad", 28)
        as_stored = preprocess(data, config, exif_orientation=False)
        np.testing.assert_array_equal(as_stored, published)
        assert not np.array_equal(preprocess(data, config), published)

    def test_an_unknown_value_leaves_the_picture(self) -> None:
        exif = Image.Exif()
        exif[ORIENTATION] = 99
        data = encoded(Image.fromarray(picture(5, 3)), "PNG", exif=exif)
        np.testing.assert_array_equal(np.asarray(load_image(data)), picture(5, 3))


class TestFailures:
    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no file '.*cup\.png'.*check the path"):
            load_image(tmp_path / "cup.png")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a folder"):
            load_image(tmp_path)

    @pytest.mark.parametrize(
        "source", ["https://example.com/a.png", "data:image/png;base64,AA"]
    )
    def test_address(self, source: str) -> None:
        with pytest.raises(InputError, match="nothing is downloaded"):
            load_image(source)

    def test_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"")
        with pytest.raises(InputError, match=r"a\.png' is empty"):
            load_image(tmp_path / "a.png")

    @pytest.mark.parametrize("data", [b"hello, this is text", b"%PDF-1.7 ...", b"\x00" * 99])
    def test_not_a_picture(self, data: bytes) -> None:
        with pytest.raises(
            InputError, match=r"not a picture that Pillow can read.*JPEG or PNG"
        ):
            load_image(data)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
    def test_cut_short(self, kind: str) -> None:
        data = encoded(Image.fromarray(picture(80, 60)), kind)
        for length in np.linspace(1, len(data) * 0.9, 25).astype(int).tolist():
            with pytest.raises(InputError, match=r"damaged or cut short|not a picture"):
                load_image(data[:length])

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    def test_damaged_at_random(self) -> None:
        """Whatever is wrong with a file, no other error comes out."""
        rng = np.random.default_rng(0)
        for data in ODD_PICTURES.values():
            for _ in range(25):
                broken = bytearray(data)
                for place in rng.integers(0, len(data), 6).tolist():
                    broken[place] = int(rng.integers(256))
                try:
                    load_image(bytes(broken))
                except InputError as error:
                    assert "the bytes given" in str(error)

    @pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
    def test_a_damaged_avif(self) -> None:
        """Its reader raises RuntimeError, unlike the others."""
        data = encoded(Image.fromarray(picture(31, 20)), "AVIF")
        start = data.index(b"mdat") + 4
        with pytest.raises(InputError, match="damaged or cut short"):
            load_image(data[:start] + b"\xff" * (len(data) - start))

    def test_too_many_pixels(self) -> None:
        with pytest.raises(InputError, match=r"31 x 20 = .*million pixels.*scale it down"):
            load_image(rgb_png(31, 20), max_pixels=619)
        assert load_image(rgb_png(31, 20), max_pixels=620).size == (31, 20)

    def test_a_bomb_is_refused_by_message(self) -> None:
        """A 20000 x 20000 one-bit picture is 50 KB as a file and a gigabyte as RGB."""
        data = encoded(Image.new("1", (20000, 20000)), "PNG")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(InputError, match=r"too large to decode.*scale it down"):
                load_image(data)

    @pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
    def test_a_thread_would_need_a_huge_square(self, aspect_ratio: str) -> None:
        thread = np.zeros((1, 700_000, 3), np.uint8)
        config = ImageProcessorConfig(aspect_ratio=aspect_ratio)
        with pytest.raises(InputError, match=r"700000 x 1 pixels.*crop it"):
            preprocess(thread, config)

    @pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0)])
    def test_no_pixels(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match="nothing to look at"):
            load_image(np.zeros(shape, np.uint8))
        with pytest.raises(InputError, match="nothing to look at"):
            load_image(Image.new("RGB", (0, 5)))

    @pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.bool_, np.int64])
    def test_arrays_of_other_dtypes(self, dtype: type) -> None:
        with pytest.raises(InputError, match=f"holds {np.dtype(dtype)}, but pixels are uint8"):
            load_image(np.zeros((4, 4, 3), dtype))

    @pytest.mark.parametrize("shape", [(5,), (3, 20, 31), (20, 31, 2), (1, 20, 31, 3)])
    def test_arrays_of_other_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match="is not a picture") as caught:
            load_image(np.zeros(shape, np.uint8))
        assert ("channels come last" in str(caught.value)) == (shape == (3, 20, 31))

    @pytest.mark.parametrize(("mode", "kind"), [("I", "32-bit integers"), ("F", "floating")])
    def test_pixels_without_a_white(self, mode: str, kind: str) -> None:
        with pytest.raises(InputError, match=kind):
            load_image(encoded(Image.new(mode, (4, 4)), "TIFF"))

    def test_modes_without_rgb(self) -> None:
        with pytest.raises(InputError, match="mode La into RGB"):
            load_image(Image.new("La", (4, 4)))

    def test_text_streams_and_other_things(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"gives text.*'rb'"):
            load_image(io.StringIO("text"))
        closed = io.BytesIO(rgb_png())
        closed.close()
        with pytest.raises(InputError, match="open it anew"):
            load_image(closed)
        with pytest.raises(InputError, match="from a int"):
            load_image(7)
