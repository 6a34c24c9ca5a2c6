"""``mvlm sensitivity``: what few bits cost in each layer, and a recipe within a budget."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mvlm_export.engines.bundle import write_json
from mvlm_export.engines.errors import InputError
from mvlm_export.engines.targets import TARGETS

from ..settings import CompileSettings, ResolvedSettings, budget_name, resolve_settings
from .console import StageProgress, print_json, print_line, print_settings
from .sensitivity_tables import lossy_candidates, print_choice, print_layers

if TYPE_CHECKING:
    from mvlm_export.calibration.budget import Budget

    from ..sensitivity import BudgetChoice, GraphSensitivity, LayerOptions

GRAPHS = ("decoder", "vision_encoder", "projector")

EXAMPLES = """\b
Examples:
  mvlm sensitivity                                   the nano model that comes along
  mvlm sensitivity --model MobileVLM_V2-1.7B --target orin --budget 900MB
  mvlm sensitivity --model MobileVLM_V2-1.7B --estimate --budget 0.01nats
  mvlm sensitivity --target cpu --budget 3MB --output mixed.json
  mvlm-export --target cpu --recipe mixed.json
  mvlm sensitivity --graph vision_encoder            8-bit weights and activations

\b
The KL of a layer is how far next-token distributions over the rows of true answers
go, in nats a token, when that layer alone is stored with fewer bits. A budget is
bytes of all the decoder's stored weights with their scales (350MB, 1.2GB, 500MiB), or
the sum of the layers' KL (0.01nats). The sum is a prediction: it takes the layers'
errors as uncorrelated. The KL of the whole mix is measured behind it.

\b
Bits: int4 with a scale for 128 or 32 rows, or float; for targets without engines
also int8, which TensorRT would turn into floats anew in every step.

\b
Figures are kept: another --budget takes seconds, and an interrupted run goes on
where it ended. --estimate takes one gradient for each sample instead of a run for
each layer and precision; it holds for small errors.
"""


@click.command("sensitivity", epilog=EXAMPLES)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Checkpoint folder. Default: the nano model that comes along.",
)
@click.option(
    "--target",
    default="orin",
    show_default=True,
    metavar="NAME",
    help=f"What it is for: {', '.join(TARGETS)}.",
)
@click.option("--jetpack", type=int, help="JetPack of a Jetson target: 6 (default) or 7.")
@click.option(
    "--graph",
    type=click.Choice(GRAPHS),
    default=GRAPHS[0],
    show_default=True,
    help="Whose layers. A budget is for the decoder.",
)
@click.option(
    "--recipe",
    default="int4",
    show_default=True,
    metavar="NAME|FILE",
    help="Where to start: gives the rounding, and the recipes of the other graphs.",
)
@click.option(
    "--calib-data",
    type=click.Path(path_type=Path),
    help="Pictures, questions and answers: a folder with samples.jsonl, or LLaVA's "
    "conversation JSON. Default: those that come along.",
)
@click.option(
    "--calib-samples",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="How many of them.",
)
@click.option("--budget", metavar="SIZE|NATS", help="Choose a mix: 350MB, or 0.01nats.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for the recipe. Default: MODEL-TARGET-RECIPE-BUDGET.json in this folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file at --output.")
@click.option("--estimate", is_flag=True, help="By gradients: quick, for large models.")
@click.option(
    "--rounding",
    type=click.Choice(("fast", "recipe")),
    default="fast",
    show_default=True,
    help="How weights are rounded while layers are measured: by the best clip of each "
    "block, or by the recipe's own method.",
)
@click.option(
    "--keep-float",
    multiple=True,
    metavar="PATTERN",
    help="Layers that are not to be quantized, 'model.layers.0.*'; may be given again.",
)
@click.option(
    "--check/--no-check", default=True, show_default=True, help="Measure the chosen mix."
)
@click.option(
    "--figures",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that keeps figures. Default: .MODEL.sensitivity in this folder.",
)
@click.option("--max-length", type=int, help="Longest sequence, prompt and answer together.")
@click.option(
    "--template", default="v1", show_default=True, help="Prompt template: v1 or plain."
)
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def sensitivity(as_json: bool, **options: Any) -> None:
    """Measure what few bits cost in each layer, and choose a mix within a budget."""
    run = _Run(options)
    print_settings("mvlm sensitivity", run.settings())
    with StageProgress() as progress:
        result = run.measure(progress)
    if as_json:
        print_json(result)
    else:
        run.show(result)


class _Run:
    """One call of the command.

    Raises:
        InputError: options that cannot be used, before anything is read.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        from mvlm_export.calibration.budget import Budget

        self.given = options
        self.budget = None if options["budget"] is None else Budget.parse(options["budget"])
        _check_options(options)
        self.resolved = resolve_settings(_compile_settings(options))
        folder = self.resolved.folder
        self.figures: Path = options["figures"] or Path(f".{folder.name}.sensitivity")
        self.output = self._output()
        self.layers: list[LayerOptions] = []
        self.choice: BudgetChoice | None = None
        self.seconds: dict[str, float] = {}

    def _output(self) -> Path | None:
        if self.budget is None:
            return None
        resolved = self.resolved
        recipe = budget_name(resolved.recipe.name, self.budget)
        name = f"{resolved.folder.name}-{resolved.target.name}-{recipe}"
        path: Path = self.given["output"] or Path(f"{name}.json")
        if path.exists() and not self.given["overwrite"]:
            raise InputError(
                f"{path} exists. Add --overwrite, or name another file with --output."
            )
        return path

    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        given, resolved = self.given, self.resolved
        return {
            "model": str(resolved.folder),
            "target": resolved.target.name,
            "jetpack": resolved.target.jetpack,
            "graph": given["graph"],
            "recipe": resolved.recipe.name,
            "dtype": resolved.dtype,
            "calib_data": str(resolved.calib_data),
            "calib_samples": given["calib_samples"],
            "budget": None if self.budget is None else str(self.budget),
            "output": None if self.output is None else str(self.output),
            "losses": "estimated" if given["estimate"] else "measured",
            "rounding": given["rounding"] if given["graph"] == GRAPHS[0] else "int8",
            "keep_float": ", ".join(given["keep_float"]) or None,
            "figures": str(self.figures),
            "max_length": given["max_length"],
            "template": given["template"],
            "threads": given["threads"],
        }

    def measure(self, progress: StageProgress) -> dict[str, Any]:
        """All of it; what ``--json`` prints."""
        from ..open_sensitivity import open_sensitivity
        from ..sensitivity import SensitivityOptions

        given, resolved = self.given, self.resolved
        options = SensitivityOptions(
            given["rounding"] == "recipe",
            given["estimate"],
            tuple(given["keep_float"]),
        )
        opened, warnings = open_sensitivity(
            resolved, given["graph"], options, self.figures, progress
        )
        progress.stage("Estimating layers" if given["estimate"] else "Measuring layers")
        started = time.monotonic()
        self.layers = opened.measure()
        self.seconds["layers"] = round(time.monotonic() - started, 2)
        result: dict[str, Any] = {
            "settings": self.settings(),
            "warnings": warnings,
            "fixed_bytes": opened.fixed_bytes,
            "layers": [layer.to_json() for layer in self.layers],
        }
        if self.budget is not None:
            result["choice"] = self._choose(opened, self.budget, progress)
        result["seconds"] = self.seconds
        return result

    def _choose(
        self, opened: GraphSensitivity, budget: Budget, progress: StageProgress
    ) -> dict[str, Any]:
        self.choice = choice = opened.choose(self.layers, budget)
        assert self.output is not None
        write_json(self.output, choice.recipe.to_json())
        found = choice.to_json() | {"file": str(self.output)}
        if self.given["check"]:
            started = time.monotonic()
            progress.stage("Measuring the mix")
            found["measured_loss"] = opened.measure_mix(choice.chosen)
            progress.stage("Measuring all layers alike")
            found["alike"] = self._measure_alike(opened)
            progress.stage("Measuring it as mvlm-export makes it")
            found["measured_recipe_loss"] = opened.measure_recipe(choice.recipe)
            self.seconds["check"] = round(time.monotonic() - started, 2)
        return found

    def _measure_alike(self, opened: GraphSensitivity) -> dict[str, float]:
        """Loss with one candidate for every layer that can take it, by candidate."""
        found = {}
        for candidate in lossy_candidates(self.layers):
            alike = {
                layer.name: candidate
                for layer in self.layers
                if candidate in (option.candidate for option in layer.options)
            }
            found[str(candidate)] = opened.measure_mix(alike)
        return found

    def show(self, result: dict[str, Any]) -> None:
        """Tables, and the next command."""
        for warning in result["warnings"]:
            print_line(f"Note: {warning}")
        print_layers(self.given["graph"], self.layers, self.choice)
        if self.choice is None or self.output is None:
            if self.given["graph"] == GRAPHS[0]:
                print_line("Next: the same with --budget SIZE, such as --budget 350MB.")
            return
        print_choice(self.layers, result, self.choice)
        print_line(f"Recipe: {self.output}")
        print_line(f"Next: {_next_command(self.resolved, self.output)}")


def _check_options(options: dict[str, Any]) -> None:
    if options["budget"] is None and options["output"] is not None:
        raise InputError("--output gets the recipe of a budget: add --budget, such as 350MB.")
    if options["graph"] != GRAPHS[0] and options["budget"] is not None:
        raise InputError(
            f"--budget chooses a mix for the decoder; for the {options['graph']} there is a "
            "table only. Leave --budget or --graph out."
        )
    if options["graph"] != GRAPHS[0] and options["estimate"]:
        raise InputError(
            f"--estimate is for the decoder; the {options['graph']} is measured. Leave it out."
        )


def _compile_settings(options: dict[str, Any]) -> CompileSettings:
    return CompileSettings(
        output=options["output"],
        model=options["model"],
        target=options["target"],
        jetpack=options["jetpack"],
        recipe=options["recipe"],
        calib_data=options["calib_data"],
        calib_samples=options["calib_samples"],
        max_length=options["max_length"],
        template=options["template"],
        stand_in=False,
        parity=False,
        threads=options["threads"],
    )


def _next_command(resolved: ResolvedSettings, recipe: Path) -> str:
    given = resolved.given
    parts: list[object] = ["mvlm-export", "--target", resolved.target.name]
    for option, value in (
        ("--jetpack", given.jetpack),
        ("--model", given.model),
        ("--recipe", recipe),
        ("--calib-data", given.calib_data),
        ("--max-length", given.max_length),
        ("--template", None if given.template == "v1" else given.template),
    ):
        parts += [] if value is None else [option, value]
    return shlex.join(str(part) for part in parts)
