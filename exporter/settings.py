"""What to compile, for what, and how: settings as given, and with every default filled in."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.jetson import this_device_is
from mvlm_export.engines.prompt import get_template
from mvlm_export.engines.targets import Target, get_target

if TYPE_CHECKING:
    from mvlm_export.calibration.budget import Budget
    from mvlm_export.calibration.recipe import CacheDtype, Recipe

ASSETS = Path(__file__).parent / "assets"


def nano_checkpoint() -> Path:
    """Folder of the nano model that comes with the package."""
    return ASSETS / "nano"


def default_samples() -> Path:
    """Folder of the pictures and questions that come with the package."""
    return ASSETS / "samples"


def default_calibration() -> Path:
    """Folder of the pictures, questions and answers that integers are chosen on."""
    return ASSETS / "calibration"


@dataclass(frozen=True)
class CompileSettings:
    """Settings of one compile.

    Attributes:
        output: bundle folder; None for MODEL-TARGET-RECIPE.bundle in the working folder.
        model: checkpoint folder; None for the nano model that comes with the package.
        recipe: a name of ``calibration.recipe.RECIPES`` or a JSON file; None for the target's
            default.
        kv_cache_dtype: ``int8`` for an 8-bit KV cache; None for the recipe's.
        calib_data: pictures, questions and answers that integers are chosen on; None for those
            of the package.
        calib_samples: how many of them are used.
        budget: bytes of the decoder's weights or nats of divergence, within which each
            layer's bits are chosen; None for the recipe's own.
        max_length: longest sequence; None for the checkpoint's own limit.
        template: prompt template.
        allow_unknown: let tensors pass that have no place in the model.
        stand_in: build the graphs with TensorRT-RTX as a check where the target's own engines
            cannot be built here and TensorRT-RTX is installed.
        parity: compare with PyTorch when done.
        samples: pictures and questions to compare on; None for those of the package.
        threads: threads of the comparison; None for all cores.
        disabled_passes: passes to leave out.
        enabled_passes: optional passes to run.
        dump_dir: gets each graph after each pass.
        verify_passes: run each graph before and after each pass, and bound the change.
    """

    output: Path | None = None
    model: Path | None = None
    target: str = "cpu"
    jetpack: int | None = None
    recipe: str | None = None
    kv_cache_dtype: CacheDtype | None = None
    calib_data: Path | None = None
    calib_samples: int = 64
    budget: str | None = None
    max_length: int | None = None
    template: str = "v1"
    overwrite: bool = False
    allow_unknown: bool = False
    stand_in: bool = True
    parity: bool = True
    samples: Path | None = None
    threads: int | None = None
    disabled_passes: tuple[str, ...] = ()
    enabled_passes: tuple[str, ...] = ()
    dump_dir: Path | None = None
    verify_passes: bool = False


@dataclass(frozen=True)
class ResolvedSettings:
    """Settings with every default filled in.

    Attributes:
        folder: the checkpoint, absolute.
        dtype: of what is not quantized, of cache and image tensors.
        builds_here: whether this machine builds the target's engines.
    """

    given: CompileSettings
    folder: Path
    output: Path
    target: Target
    recipe: Recipe
    dtype: str
    samples: Path
    calib_data: Path
    budget: Budget | None
    builds_here: bool

    @property
    def calibrates(self) -> bool:
        """Whether samples are needed to choose integers."""
        return self.recipe.needs_data or self.budget is not None

    def to_json(self) -> dict[str, Any]:
        """What decides the result, for the report and the screen."""
        given = self.given
        return {
            "model": str(self.folder),
            "target": self.target.name,
            "jetpack": self.target.jetpack,
            "recipe": self.recipe.name,
            "max_length": given.max_length,
            "template": given.template,
            "output": str(self.output),
            "overwrite": given.overwrite,
            "allow_unknown": given.allow_unknown,
            "stand_in": given.stand_in,
            "parity": given.parity,
            "samples": str(self.samples),
            "calib_data": str(self.calib_data) if self.calibrates else None,
            "calib_samples": given.calib_samples if self.calibrates else None,
            "budget": None if self.budget is None else str(self.budget),
            "threads": given.threads,
            "disabled_passes": ", ".join(given.disabled_passes) or None,
            "enabled_passes": ", ".join(given.enabled_passes) or None,
            "dump_dir": None if given.dump_dir is None else str(given.dump_dir),
            "verify_passes": given.verify_passes,
        }


def resolve_settings(settings: CompileSettings) -> ResolvedSettings:
    """Fill in the defaults.

    Raises:
        InputError: an unknown target, JetPack, recipe, template or pass; passes that
            contradict each other or the recipe; a dump folder that cannot be used.
    """
    target = get_target(settings.target, settings.jetpack)
    from mvlm_export.calibration.recipe import RECIPES, find_recipe

    recipe = find_recipe(settings.recipe or target.default_recipe)
    if settings.kv_cache_dtype is not None:
        recipe = recipe.with_kv_cache(settings.kv_cache_dtype)
    dtype = recipe.dtype or RECIPES[target.default_recipe].dtype
    assert dtype is not None
    get_template(settings.template)
    if settings.calib_samples < 1:
        raise InputError(f"--calib-samples is {settings.calib_samples}; give 1 or more.")
    folder = (settings.model or nano_checkpoint()).resolve()
    budget = _read_budget(settings.budget, recipe)
    name = recipe.name if budget is None else budget_name(recipe.name, budget)
    output = settings.output or Path(f"{folder.name}-{target.name}-{name}.bundle")
    _check_passes(settings, recipe.name, dtype)
    if settings.dump_dir is not None:
        _check_dump_dir(settings.dump_dir, output)
    builds_here = target.has_engines and (target.builds_on_host or this_device_is(target))
    return ResolvedSettings(
        given=settings,
        folder=folder,
        output=output,
        target=target,
        recipe=recipe,
        dtype=dtype,
        samples=settings.samples or default_samples(),
        calib_data=settings.calib_data or default_calibration(),
        budget=budget,
        builds_here=builds_here,
    )


def budget_name(recipe: str, budget: Budget) -> str:
    """What a recipe is called whose bits were chosen within a budget."""
    return f"{recipe}-{str(budget).replace(' ', '')}"


def _read_budget(text: str | None, recipe: Recipe) -> Budget | None:
    if text is None:
        return None
    from mvlm_export.calibration.budget import Budget

    budget = Budget.parse(text)
    if recipe.decoder.has_float_layers or recipe.decoder.activations:
        raise InputError(
            f"--budget chooses 4-bit weights for some of the decoder's layers, and the recipe "
            f"{recipe.name!r} has none that could be mixed. Add --recipe int4."
        )
    return budget


def _check_passes(settings: CompileSettings, recipe: str, dtype: str) -> None:
    if not (settings.disabled_passes or settings.enabled_passes):
        return
    from mvlm_export.passes.pass_names import check_names
    from mvlm_export.passes.pipeline import FLOAT16_PASS

    check_names(settings.disabled_passes, settings.enabled_passes)
    if dtype == "float16" and FLOAT16_PASS in settings.disabled_passes:
        raise InputError(
            f"The recipe {recipe} is made by the pass {FLOAT16_PASS!r}, which is disabled. "
            "Compile with --recipe fp32 instead."
        )


def _check_dump_dir(folder: Path, output: Path) -> None:
    dumps, bundle = folder.resolve(), output.resolve()
    if dumps == bundle or bundle in dumps.parents or dumps in bundle.parents:
        raise InputError(
            f"--dump-dir {folder} and the bundle {output} lie one in the other, and the "
            "bundle is put in place as a whole. Choose another folder for the dumps."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"--dump-dir {folder} cannot be written ({error.strerror or error}). Choose "
            "another folder."
        ) from error
