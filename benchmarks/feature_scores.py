"""How near an encoder's features are to those of the float encoder, on real pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx_sessions import open_session
from photos import Pixels, normalize

FloatArray = npt.NDArray[np.float32]


def picture_features(model: Any, pixels: Pixels, threads: int | None = None) -> FloatArray:  # noqa: ANN401
    """Features float32 [B, patches, C], one picture at a time.

    Args:
        model: path or open session of an encoder of ours, with uint8 or float pixels.
        pixels: uint8 [B, 3, S, S].
        threads: of ONNX Runtime.
    """
    session = open_session(model, threads, rewritten=False)
    (spec,) = session.get_inputs()
    dtype = np.float16 if spec.type == "tensor(float16)" else np.float32
    rows = []
    for picture in pixels:
        given = picture[None]
        if spec.type != "tensor(uint8)":
            given = normalize(given).astype(dtype)
        rows.append(session.run(None, {spec.name: given})[0].astype(np.float32))
    return np.concatenate(rows)


@dataclass(frozen=True)
class FeatureScore:
    """How near features are to a reference's.

    Attributes:
        cosine: mean over all patches.
        worst: of the worst patch.
        error: ``||difference|| / ||reference||``.
    """

    cosine: float
    worst: float
    error: float


def compare_features(features: FloatArray, reference: FloatArray) -> FeatureScore:
    """Score features [B, patches, C] against others of the same pictures."""
    ours, theirs = (x.astype(np.float64) for x in (features, reference))
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    cosines = (ours * theirs).sum(-1) / norms
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    return FeatureScore(float(cosines.mean()), float(cosines.min()), float(error))


def feature_cosine(
    model: Any,  # noqa: ANN401
    reference: Any,  # noqa: ANN401
    pixels: Pixels,
    threads: int | None = None,
) -> FeatureScore:
    """Score an encoder against another on the same pictures.

    Args:
        model, reference: paths or open sessions.
        pixels: uint8 [B, 3, S, S].
        threads: of ONNX Runtime.

    Raises:
        EngineError: ONNX Runtime cannot load or run one.
    """
    ours, theirs = (picture_features(m, pixels, threads) for m in (model, reference))
    return compare_features(ours, theirs)
