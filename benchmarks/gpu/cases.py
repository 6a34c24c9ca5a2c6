"""What is measured, and the files of it in the work folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mvlm_export.calibration.recipe import INT4, GraphRecipe, Recipe, Rule
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.exporter.settings import nano_checkpoint

INT4_NEAREST = Recipe(
    "int4-nearest",
    decoder=GraphRecipe(INT4, "rtn", rules=(Rule("lm_head", WeightFormat(4, 32)),)),
)
"""The recipe ``int4`` by rounding to the nearest: the same bytes and kernels, and no
calibration, whose choice of integers changes no timing."""

FALLBACKS = {"cuda": "cuda", "cpu": "cpu"}
"""Target for ONNX Runtime, by device."""


@dataclass(frozen=True)
class Case:
    """A model and a recipe.

    Attributes:
        geometry: of a checkpoint with random weights; None for the nano model, as it is.
        recipe: "fp16" or "int4".
        parity: options of ``mvlm parity``, whose PyTorch side runs in float32 on the CPU.
    """

    name: str
    geometry: str | None
    recipe: str
    parity: tuple[str, ...] = ()

    def checkpoint(self, work: Path) -> Path:
        """Folder of the weights."""
        return nano_checkpoint() if self.geometry is None else work / self.geometry

    def bundle(self, work: Path, target: str) -> Path:
        """Folder of what is compiled."""
        return work / f"{self.name}-{target}"

    def recipe_argument(self, work: Path) -> str:
        """What ``--recipe`` takes; writes the recipe's file where there is one."""
        if self.recipe != "int4":
            return self.recipe
        path = work / f"{INT4_NEAREST.name}.json"
        path.write_text(json.dumps(INT4_NEAREST.to_json(), indent=2), encoding="utf-8")
        return str(path)


_LARGE = ("--limit", "1", "--max-tokens", "16")

CASES = {
    case.name: case
    for case in (
        Case("nano-fp16", None, "fp16"),
        Case("nano-int4", None, "int4"),
        Case("1.7b-fp16", "v2-1.7b", "fp16", _LARGE),
        Case("1.7b-int4", "v2-1.7b", "int4", _LARGE),
    )
}
