"""Pixels and settings against transformers' CLIP processor, bit for bit."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from mvlm_export.engines.errors import BundleError, CheckpointError, InputError
from mvlm_export.engines.image_processor import (
    ImageProcessorConfig,
    encoder_input,
    normalize,
    preprocess,
    preprocess_uint8,
)

from .pictures import ODD_PICTURES, picture, published_pixels

CLIP_JSON = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": {"shortest_edge": 336},
}


class TestEqualsTransformers:
    @pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
    @pytest.mark.parametrize(
        ("width", "height", "size"),
        [
            (336, 336, 336),
            (640, 480, 336),
            (480, 641, 336),
            (1001, 333, 336),
            (333, 1001, 336),
            (7, 5, 336),
            (1, 1, 336),
            (1, 1000, 32),
            (1000, 1, 32),
            (33, 32, 31),
            (2400, 1800, 336),
        ],
    )
    def test_shapes(self, width: int, height: int, size: int, aspect_ratio: str) -> None:
        pixels = picture(width, height)
        config = ImageProcessorConfig(image_size=size, aspect_ratio=aspect_ratio)
        ours = preprocess(pixels, config)
        assert ours.dtype == np.float32
        assert ours.shape == (1, 3, size, size)
        expected = published_pixels(Image.fromarray(pixels), aspect_ratio, size)
        np.testing.assert_array_equal(ours, expected)

    @pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
    @pytest.mark.parametrize("name", list(ODD_PICTURES))
    def test_odd_pictures(self, name: str, aspect_ratio: str) -> None:
        config = ImageProcessorConfig(image_size=28, aspect_ratio=aspect_ratio)
        rgb = Image.open(io.BytesIO(ODD_PICTURES[name])).convert("RGB")
        expected = published_pixels(rgb, aspect_ratio, 28)
        np.testing.assert_array_equal(preprocess(ODD_PICTURES[name], config), expected)

    def test_uint8_is_what_normalisation_starts_from(self) -> None:
        config = ImageProcessorConfig(image_size=40)
        pixels = preprocess_uint8(picture(50, 31), config)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (1, 3, 40, 40)
        assert pixels.flags.c_contiguous
        np.testing.assert_array_equal(
            normalize(pixels, config), preprocess(picture(50, 31), config)
        )

    def test_the_encoders_input_is_raw_or_normalised(self) -> None:
        config = ImageProcessorConfig(image_size=40, image_std=(0.2, 0.3, 0.4))
        pixels = preprocess_uint8(picture(50, 31), config)
        raw = encoder_input(pixels, config, "uint8")
        assert raw.dtype == np.uint8
        mean, std = (
            np.array(values, np.float32).reshape(1, 3, 1, 1)
            for values in (config.image_mean, config.image_std)
        )
        by_hand = (raw.astype(np.float32) / np.float32(255) - mean) / std
        for dtype in ("float32", "float16"):
            normalised = encoder_input(pixels, config, dtype)
            assert normalised.dtype == np.float32
            np.testing.assert_array_equal(normalised, preprocess(picture(50, 31), config))
            np.testing.assert_allclose(by_hand, normalised, rtol=1e-6, atol=1e-6)

    def test_bars_have_the_mean_colour(self) -> None:
        config = ImageProcessorConfig(image_size=4)
        assert config.pad_color == (122, 116, 104)
        pixels = preprocess_uint8(np.zeros((1, 4, 3), np.uint8), config)[0]
        assert pixels[:, 0].T.tolist() == [[122, 116, 104]] * 4
        assert pixels[:, 1].tolist() == np.zeros((3, 4)).tolist()
        assert pixels[:, 2:].reshape(3, -1).T.tolist() == [[122, 116, 104]] * 8


class TestConfig:
    @pytest.mark.parametrize(
        "change",
        [
            {"image_size": 0},
            {"image_mean": (0.5, 0.5)},
            {"image_mean": (0.5, float("nan"), 0.5)},
            {"image_std": (0.5, 0.0, 0.5)},
        ],
    )
    def test_refuses_nonsense(self, change: dict) -> None:
        with pytest.raises(InputError, match=next(iter(change))):
            ImageProcessorConfig(**change)

    def test_json_round_trip(self) -> None:
        config = ImageProcessorConfig(224, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "square")
        assert (
            ImageProcessorConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
        )

    @pytest.mark.parametrize(
        "change",
        [{"image_size": "x"}, {"image_std": [1, 1]}, {"image_mean": 3}, {"colour": 1}],
    )
    def test_damaged_json(self, change: dict) -> None:
        with pytest.raises(BundleError, match=r"(?i)export the bundle again"):
            ImageProcessorConfig.from_json({**ImageProcessorConfig().to_json(), **change})

    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"size": 336, "crop_size": 336},
            {"size": {"height": 336, "width": 336}},
            {"crop_size": {"shortest_edge": 336}},
            {
                "rescale_factor": 0.00392156862745098,
                "image_processor_type": "CLIPImageProcessor",
            },
            {"do_center_crop": False},
            {"do_pad": False, "resample": "bicubic"},
        ],
    )
    def test_forms_of_clips_own_file(self, change: dict) -> None:
        config = ImageProcessorConfig.from_preprocessor_config({**CLIP_JSON, **change})
        assert config == ImageProcessorConfig()

    def test_the_files_values_are_taken(self) -> None:
        changed = {
            "size": 224,
            "crop_size": 224,
            "image_mean": [0, 0.5, 1],
            "image_std": [1, 2, 3],
        }
        config = ImageProcessorConfig.from_preprocessor_config(
            {**CLIP_JSON, **changed}, "square"
        )
        assert config == ImageProcessorConfig(224, (0, 0.5, 1), (1, 2, 3), "square")

    def test_an_empty_file_means_clips_defaults(self) -> None:
        module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
        config = ImageProcessorConfig.from_preprocessor_config({})
        clip = module.CLIPImageProcessorPil()
        assert config.image_size == clip.size["shortest_edge"]
        assert list(config.image_mean) == list(clip.image_mean)
        assert list(config.image_std) == list(clip.image_std)

    def test_without_normalisation(self) -> None:
        data = {**CLIP_JSON, "do_normalize": False}
        config = ImageProcessorConfig.from_preprocessor_config(data)
        pixels = picture(336, 336)
        expected = (pixels / 255).astype(np.float32).transpose(2, 0, 1)[None]
        np.testing.assert_allclose(preprocess(pixels, config), expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"do_resize": False}, "do_resize"),
            ({"do_rescale": False}, "do_rescale"),
            ({"do_pad": True}, "do_pad"),
            ({"do_thumbnail": True}, "do_thumbnail"),
            ({"resample": 2}, "resample to 2"),
            ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
            ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor"),
            ({"size": {"shortest_edge": 256}}, "resizes to 256 but crops to 336"),
            ({"size": {"height": 336, "width": 224}}, "gives size as"),
            ({"size": {"longest_edge": 336}}, "gives size as"),
            ({"size": "336"}, "gives size as '336'"),
            ({"crop_size": 0}, "gives crop_size as 0"),
            ({"image_mean": [0.5]}, "cannot be used"),
            ({"image_std": [0, 0, 0]}, "image_std"),
        ],
    )
    def test_steps_that_are_not_done(self, change: dict, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            ImageProcessorConfig.from_preprocessor_config({**CLIP_JSON, **change})
        assert "preprocessor_config.json" in str(caught.value)

    @pytest.mark.parametrize(
        "change", [{"do_center_crop": False}, {"size": {"height": 336, "width": 336}}]
    )
    def test_steps_that_only_a_padded_square_allows(self, change: dict) -> None:
        with pytest.raises(CheckpointError, match="image_aspect_ratio 'square'"):
            ImageProcessorConfig.from_preprocessor_config({**CLIP_JSON, **change}, "square")
