"""A TensorRT decoder over stand-ins, and ONNX Runtime's of the same bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.kv_cache import KvCache
from mvlm_export.engines.ort_session import OrtBackend, OrtDecoder
from mvlm_export.engines.trt_decoder import TrtDecoderSession

from ..bundles import ONE_THREAD
from ..conftest import CONFIG
from ..plans import Device

IDS = np.array([1, 40, 512, 513, 90, 515, 7, 300], np.int32)
EMBEDS = np.random.default_rng(1).normal(size=(4, CONFIG.text.hidden_size)).astype(np.float32)
WIDE = np.random.default_rng(2).normal(size=(4, 256)).astype(np.float32)
PREFILL, DECODE = 0, 1
FORMS = ["append", "append-token", "half", "fixed", "nano"]


def embeds_of(form: str) -> np.ndarray:
    return WIDE if form == "nano" else EMBEDS


def open_both(device: Device, path: Path) -> tuple[TrtDecoderSession, OrtDecoder]:
    bundle = Bundle.load(path, verify=False)
    return device.open(path).open_decoder(), OrtBackend(bundle, ONE_THREAD).open_decoder()


def rows_of(cache: KvCache) -> list[np.ndarray]:
    return [cache.read_rows(t, 0, cache.length) for t in range(cache.shape.tensors)]


def assert_same_rows(found: KvCache, expected: KvCache) -> None:
    assert found.length == expected.length
    for mine, theirs in zip(rows_of(found), rows_of(expected), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def contexts_of(device: Device) -> list:
    """Execution contexts of the engine loaded last, prefill and decode."""
    return device.engine()._contexts


def short_profiles(ids: int, rows: int, form: str) -> dict[str, list[dict]]:
    """Profiles of the tiny decoder for few ids and image rows at once."""
    past = {} if form == "fixed" else {"T": (0, 0, 511)}
    return {
        "decoder": [
            {"S": (1, ids, ids), "I": (1, rows, rows), **past},
            {"S": (1, 1, 1), "I": (1, rows, rows), **past},
        ]
    }
