"""Tables of ``mvlm sensitivity``: every layer, and mixes beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .console import human_bytes, print_line, print_table

if TYPE_CHECKING:
    from mvlm_export.calibration.layer_rounding import Candidate

    from ..sensitivity import BudgetChoice, LayerOptions

_LOSSES = {"decoder": "KL of each layer alone, nats a token"}
_OTHER = "Squared error of the output, each layer alone, relative to its size"


def print_layers(
    graph: str, layers: Sequence[LayerOptions], choice: BudgetChoice | None
) -> None:
    """Each layer: its loss at each candidate, its bytes, and what was chosen."""
    lossy = lossy_candidates(layers)
    rows = []
    for layer in layers:
        options = {option.candidate: option for option in layer.options}
        row = [layer.name]
        row += [f"{options[c].loss:.2e}" if c in options else "-" for c in lossy]
        whole = max(option.bytes for option in layer.options)
        if choice is None:
            row.append(human_bytes(whole) if whole else "-")
        else:
            chosen = options[choice.chosen[layer.name]]
            row += [str(chosen.candidate), human_bytes(chosen.bytes)]
        rows.append(row)
    behind = ["bytes in float"] if choice is None else ["chosen", "bytes"]
    columns = ["layer", *(str(candidate) for candidate in lossy), *behind]
    print_table(_LOSSES.get(graph, _OTHER), columns, rows)


def print_choice(
    layers: Sequence[LayerOptions], result: dict[str, Any], choice: BudgetChoice
) -> None:
    """The chosen mix beside those that store every layer alike, predicted and measured."""
    found = result["choice"]
    measured = found.get("alike", {})
    rows = []
    for candidate in _candidates(layers):
        options = [
            next((o for o in layer.options if o.candidate == candidate), layer.options[-1])
            for layer in layers
        ]
        size = result["fixed_bytes"] + sum(option.bytes for option in options)
        loss = sum(option.loss for option in options)
        rows.append(_mix(f"all {candidate}", size, loss, measured.get(str(candidate))))
    mix = choice.mix
    title = f"the mix for {choice.budget}"
    rows.append(_mix(title, mix.bytes, mix.loss, found.get("measured_loss")))
    print_table("Decoder", ("layers", "bytes", "KL predicted", "KL measured"), rows)
    counts = Counter(str(candidate) for candidate in choice.chosen.values())
    listed = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    print_line(f"Chosen: {listed}; {_bound(choice)}.")
    if "measured_recipe_loss" in found:
        method = choice.recipe.decoder.method
        print_line(
            f"KL measured of the mix as mvlm-export rounds it ({method}): "
            f"{found['measured_recipe_loss']:.2e} nats a token."
        )


def _mix(title: str, size: int, loss: float, measured: float | None) -> list[str]:
    shown = "" if measured is None else f"{measured:.2e}"
    return [title, human_bytes(size), f"{loss:.2e}", shown]


def _bound(choice: BudgetChoice) -> str:
    bound = choice.mix.bound
    if choice.budget.bytes is not None:
        return f"no mix within the budget is predicted below {bound:.2e} nats"
    return f"no mix within the budget is smaller than {human_bytes(bound)}"


def lossy_candidates(layers: Sequence[LayerOptions]) -> list[Candidate]:
    """What layers may become other than float."""
    return [candidate for candidate in _candidates(layers) if not candidate.is_float]


def _candidates(layers: Sequence[LayerOptions]) -> list[Candidate]:
    """All that some layer may become, in the order they are listed."""
    found = {option.candidate: None for layer in layers for option in layer.options}
    return sorted(found, key=lambda candidate: candidate.is_float)
