"""What each recipe costs the nano models: bytes, divergence, answers to held-out questions.

Every recipe is compiled as a user would, and its bundle answers questions about scenes that
nothing was trained, calibrated or compared on. On some of them every answer is forced as well,
and next-token distributions are compared with PyTorch's.

    python benchmarks/recipes.py --work DIR
    python benchmarks/recipes.py --work DIR --model nano-outlier --recipe int4
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from mvlm_export.calibration.data import Sample, read_samples
from mvlm_export.calibration.recipe import RECIPES, Method, Recipe
from mvlm_export.engines.bundle import write_json
from mvlm_export.engines.vlm import VLM
from mvlm_export.exporter.accuracy import measure_accuracy
from mvlm_export.exporter.cli.console import human_bytes, print_table
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.parity_setup import NoListener
from mvlm_export.exporter.reference import ReferenceModel
from mvlm_export.exporter.settings import ASSETS, CompileSettings

EXAMPLE = Path(__file__).parent.parent / "examples" / "nano"
MODELS = ("nano", "nano-outlier")
FOLDS = ("fold-rmsnorm-weight", "fold-layernorm-affine")
"""They undo the twin's outliers; without them it is as hard as it was planted."""


@dataclass(frozen=True)
class Variant:
    """A recipe, and passes that are left out."""

    recipe: Recipe
    disabled: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the table says."""
        return self.recipe.name + (", folds off" if self.disabled else "")


def int4_by(method: Method) -> Recipe:
    """The recipe ``int4`` with another rounding."""
    recipe = RECIPES["int4"]
    decoder = replace(recipe.decoder, method=method)
    return replace(recipe, name=f"int4-{method}", decoder=decoder)


def plain_int8() -> Recipe:
    """Static W8A8 as it is mostly done: no scales of channels, ranges to the largest value."""
    recipe = RECIPES["int8"]
    graphs = {
        name: replace(recipe.graph(name), smooth=False, observer="min-max")
        for name in ("vision_encoder", "projector", "decoder")
    }
    return replace(recipe, name="int8-plain", **graphs)


VARIANTS: Sequence[Variant] = (
    Variant(RECIPES["fp32"]),
    Variant(RECIPES["fp16"]),
    Variant(RECIPES["int8"]),
    Variant(plain_int8()),
    *(Variant(int4_by(method)) for method in ("rtn", "awq", "gptq")),
    Variant(RECIPES["int4"]),
    Variant(RECIPES["int8-int4"]),
    *(Variant(RECIPES[name].with_kv_cache("int8")) for name in ("fp32", "int8-int4")),
    Variant(RECIPES["int8"], FOLDS),
    Variant(plain_int8(), FOLDS),
    Variant(int4_by("rtn"), FOLDS),
    Variant(RECIPES["int4"], FOLDS),
)


@dataclass(frozen=True)
class Row:
    """One bundle's figures.

    Attributes:
        bytes: of all weights with their scales.
        exact: share of the questions whose answer is exactly right.
        by_kind: the same by kind of question.
        kl, kl_p99: divergence from PyTorch in float32, nats a token of the forced answers.
        nll, reference_nll: of the true answers, nats a token, here and in PyTorch.
        top1: share of the forced tokens whose likeliest is PyTorch's.
    """

    model: str
    variant: str
    bytes: int
    exact: float
    by_kind: Mapping[str, float]
    kl: float
    kl_p99: float
    nll: float
    reference_nll: float
    top1: float


def held_out(folder: Path, count: int) -> list[Sample]:
    """Questions of the nano world, written once."""
    path = folder / f"questions-{count}"
    if not (path / "samples.jsonl").exists():
        sys.path.insert(0, str(EXAMPLE))
        import questions

        questions.write_questions(path, questions.held_out(count))
    return read_samples(path)


def measure(
    model: str, variant: Variant, samples: Sequence[Sample], work: Path, forced: int
) -> Row:
    """Compile a model for the CPU and let the bundle answer."""
    recipe_file = work / "recipe.json"
    write_json(recipe_file, variant.recipe.to_json())
    output = work / f"{model}.bundle"
    settings = CompileSettings(
        output=output,
        model=ASSETS / model,
        target="cpu",
        recipe=str(recipe_file),
        overwrite=True,
        parity=False,
        threads=1,
        disabled_passes=variant.disabled,
    )
    bundle = compile_checkpoint(settings, NoListener()).bundle
    asked, right = Counter[str](), Counter[str]()
    vlm = VLM.load(output, provider="cpu", threads=1)
    for sample in samples:
        kind = sample.kind or "other"
        answer = vlm.generate(sample.image, sample.prompt, max_tokens=40).text.strip()
        asked[kind] += 1
        right[kind] += answer == sample.answer
    del vlm
    reference = ReferenceModel.open(ASSETS / model)
    report = measure_accuracy(bundle, reference, samples[:forced], threads=1)
    tokens = report.tokens
    assert tokens.perplexity is not None and tokens.reference_perplexity is not None
    return Row(
        model,
        variant.name,
        sum(sum(kinds.values()) for kinds in report.weight_bytes.values()),
        right.total() / asked.total(),
        {kind: right[kind] / asked[kind] for kind in asked},
        tokens.kl_mean,
        tokens.kl_p99,
        math.log(tokens.perplexity),
        math.log(tokens.reference_perplexity),
        tokens.top1,
    )


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Bundles.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), default=MODELS)
@click.option("--recipe", "names", multiple=True, metavar="NAME", help="Default: all.")
@click.option("--questions", default=2000, show_default=True)
@click.option("--forced", default=300, show_default=True, help="Answers that are forced.")
@click.option("--json", "as_json", is_flag=True)
def main(
    work: Path,
    models: Sequence[str],
    names: Sequence[str],
    questions: int,
    forced: int,
    as_json: bool,
) -> None:
    """Compile the nano models by every recipe and let them answer."""
    work.mkdir(parents=True, exist_ok=True)
    samples, rows = held_out(work, questions), []

    def every() -> Iterator[Row]:
        for model in models:
            for variant in VARIANTS:
                fits = variant.disabled == () or model == "nano-outlier"
                if fits and (not names or variant.name in names):
                    yield measure(model, variant, samples, work, forced)

    for row in every():
        click.echo("  ".join(_cells(row)), err=True)
        rows.append(row)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print_table(
        f"{questions} held-out questions; {forced} answers forced",
        ("model", "recipe", "weights", "exact", "KL", "99 %", "NLL", "PyTorch's", "top-1"),
        [_cells(row) for row in rows],
    )
    kinds = list(rows[0].by_kind) if rows else []
    print_table(
        "Exact answers by kind of question",
        ("model", "recipe", *kinds),
        [(row.model, row.variant, *(f"{row.by_kind[k]:.1%}" for k in kinds)) for row in rows],
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        row.variant,
        human_bytes(row.bytes),
        f"{row.exact:.2%}",
        f"{row.kl:.1e}",
        f"{row.kl_p99:.1e}",
        f"{row.nll:.5f}",
        f"{row.reference_nll:.5f}",
        f"{row.top1:.2%}",
    )


if __name__ == "__main__":
    main()
