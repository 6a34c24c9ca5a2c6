"""What to change so that a model fits: each proposal is planned anew before it is made.

One thing is changed, or where that does not do, the recipe together with the length or the
module. A proposal is made where its plan fits, or at least runs where the one at hand does
not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mvlm_export.calibration.recipe import RECIPES, Recipe
from mvlm_export.engines.memory_plan import Verdict
from mvlm_export.engines.targets import TARGETS, Target, get_target

from .config import PRESETS
from .estimate import ModelEstimate, estimate_model
from .geometry import ModelConfig

STEP = 64
"""Cache lengths that are proposed are multiples of this."""
SMALLER = ("int8", "int4")
"""Recipes that take less, in the order that they are proposed."""
_RANK: dict[Verdict, int] = {"too small": 0, "runs only": 1, "fits": 2, "unknown": 2}


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    name: str
    config: ModelConfig
    recipe: Recipe
    target: Target
    max_length: int | None = None

    def estimate(self) -> ModelEstimate:
        """Its estimate.

        Raises:
            InputError: see :func:`.estimate.estimate_model`.
        """
        return estimate_model(
            self.name, self.config, self.recipe, self.target, self.max_length
        )


@dataclass(frozen=True)
class Proposal:
    """Options to give instead, and the estimate with them."""

    options: str
    estimate: ModelEstimate

    @property
    def text(self) -> str:
        """One line for people."""
        plan = self.estimate.plan
        deed = "fits" if plan.verdict == "fits" else "runs, but cannot be built there"
        assert plan.available is not None
        return (
            f"{self.options}: {deed} ({plan.run_bytes / 1e9:.2f} GB to run, "
            f"{plan.build_bytes / 1e9:.2f} GB to build, of {plan.available / 1e9:.2f} GB)"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plan = self.estimate.plan
        return {
            "options": self.options,
            "verdict": plan.verdict,
            "run_bytes": plan.run_bytes,
            "build_bytes": plan.build_bytes,
            "available": plan.available,
        }


def propose(request: Request) -> tuple[Proposal, ...]:
    """Changes that help, none where all fits already or the device's memory is not known."""
    rank = _RANK[request.estimate().plan.verdict]
    if rank == _RANK["fits"]:
        return ()
    found = [proposal for proposal in _on_this_device(request, rank) if proposal is not None]
    fits_here = any(proposal.estimate.plan.verdict == "fits" for proposal in found)
    found += _larger_devices(request)
    return tuple(found if fits_here else [*found, *_smaller_model(request)])


def _on_this_device(request: Request, rank: int) -> Iterator[Proposal | None]:
    """A shorter cache, then each smaller recipe as it is or with a shorter cache."""
    yield _shortened(request, rank, [])
    for name in SMALLER:
        changed = replace(request, recipe=RECIPES[name])
        if _is_smaller(changed, request):
            plain = _if_better(changed, rank, [f"--recipe {name}"])
            yield plain or _shortened(changed, rank, [f"--recipe {name}"])


def _is_smaller(changed: Request, request: Request) -> bool:
    return changed.estimate().weight_bytes < request.estimate().weight_bytes


def _if_better(changed: Request, rank: int, options: list[str]) -> Proposal | None:
    estimate = changed.estimate()
    better = _RANK[estimate.plan.verdict] > rank
    return Proposal(" ".join(options), estimate) if better else None


def _shortened(request: Request, rank: int, options: list[str]) -> Proposal | None:
    """The longest cache that makes the verdict better: memory grows with its length."""
    least = -(-request.config.shortest_length // STEP)
    most = request.estimate().max_length // STEP
    for wanted in (_RANK["fits"], _RANK["runs only"]):
        reaches = _reaches(request, wanted)
        if wanted > rank and least <= most and reaches(least):
            length = STEP * _last(least, most, reaches)
            changed = replace(request, max_length=length)
            return _if_better(changed, rank, [*options, f"--max-length {length}"])
    return None


def _reaches(request: Request, wanted: int) -> Callable[[int], bool]:
    def holds(steps: int) -> bool:
        plan = replace(request, max_length=STEP * steps).estimate().plan
        return _RANK[plan.verdict] >= wanted

    return holds


def _last(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The last number of low..high for which ``holds``, which it does up to there alone."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _larger_devices(request: Request) -> list[Proposal]:
    """The smallest module as all was asked for, and a smaller one for a smaller recipe."""
    plain = _smallest_device(request, [])
    found = [] if plain is None else [plain]
    changed = replace(request, recipe=RECIPES[SMALLER[-1]])
    other = _smallest_device(changed, [f"--recipe {changed.recipe.name}"])
    if other is None or not _is_smaller(changed, request):
        return found
    memory = other.estimate.target.memory_bytes or 0
    if memory <= (request.target.memory_bytes or 0):
        return found
    if plain is None or memory < (plain.estimate.target.memory_bytes or 0):
        found.append(other)
    return found


def _smallest_device(request: Request, options: list[str]) -> Proposal | None:
    modules = [target for target in TARGETS.values() if target.memory_bytes is not None]
    for module in sorted(modules, key=lambda t: (t.memory_bytes or 0, t.bandwidth_gb_s or 0)):
        target = get_target(module.name, request.target.jetpack)
        changed = replace(request, target=target)
        if changed.estimate().plan.verdict == "fits":
            text = " ".join([*options, f"--target {target.name}"])
            return Proposal(text, changed.estimate())
    return None


def _smaller_model(request: Request) -> Iterator[Proposal]:
    """The largest published model that fits here, in the recipe that takes least."""
    recipe = RECIPES[SMALLER[-1]]
    limit = request.estimate().weight_bytes
    for name, config in reversed(PRESETS.items()):
        fitting = Request(name, config, recipe, request.target)
        estimate = fitting.estimate()
        smaller = name != request.name and estimate.weight_bytes < limit
        if smaller and estimate.plan.verdict == "fits":
            yield Proposal(f"--model {name} --recipe {recipe.name}", estimate)
            return
