"""Small quantized bundles, and what goes wrong with them on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from mvlm_export.engines.bundle import MANIFEST, Bundle, sha256_of, write_json

Array = npt.NDArray[Any]


def change_tensor(
    bundle: Bundle,
    path: Path,
    graph: str,
    fits: Callable[[str], bool],
    change: Callable[[Array], Array],
) -> Bundle:
    """A copy of a bundle with one initializer changed, whole in every other way.

    Args:
        fits: says by its name which initializer; exactly one must.
        change: gives its new values.
    """
    shutil.copytree(bundle.path, path)
    file = path / graph / "model.onnx"
    model = onnx.load(str(file))
    (tensor,) = (t for t in model.graph.initializer if fits(t.name))
    values = change(onnx.numpy_helper.to_array(tensor))
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values), tensor.name))
    (path / graph / "model.onnx.data").unlink()
    onnx.save(model, str(file), save_as_external_data=True, location="model.onnx.data")
    manifest = json.loads((path / MANIFEST).read_text())
    for name in (f"{graph}/model.onnx", f"{graph}/model.onnx.data"):
        manifest["files"][name] = sha256_of(path / name)
    write_json(path / MANIFEST, manifest)
    return Bundle.load(path)
