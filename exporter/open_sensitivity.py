"""From settings to a graph whose layers can be measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mvlm_export.calibration.feeds import sample_warnings
from mvlm_export.engines.errors import InputError

from .compile_inputs import model_quantizer, read_inputs
from .graphs import bind_weights, capture_graph
from .sensitivity import GraphSensitivity, SensitivityOptions, require_mixable
from .settings import ResolvedSettings

if TYPE_CHECKING:
    from .parity import Listener


def open_sensitivity(
    resolved: ResolvedSettings,
    graph: str,
    options: SensitivityOptions,
    folder: Path,
    listener: Listener,
) -> tuple[GraphSensitivity, list[str]]:
    """Read a checkpoint and samples as a compile does, and capture one graph.

    Args:
        graph: its name.
        folder: keeps figures; made if it is missing.

    Returns:
        The graph, and sentences on what makes the samples poor ones.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        InputError: samples or settings that cannot be used.
        MvlmError: PyTorch cannot export the graph.
    """
    recipe = resolved.recipe
    if recipe.has_float_layers:
        raise InputError(
            f"The recipe {recipe.name!r} quantizes no layer, so it says nothing of how to. "
            "Start from int4."
        )
    require_mixable(graph, recipe, options)
    folder.mkdir(parents=True, exist_ok=True)
    listener.stage("Reading the checkpoint")
    inputs = read_inputs(resolved, folder, listener, calibrates=True)
    quantizer = model_quantizer(resolved, inputs, listener)
    assert quantizer is not None
    listener.stage(f"Capturing {graph}")
    captured = bind_weights(capture_graph(graph, inputs.config), inputs.reader(graph))
    opened = GraphSensitivity(quantizer, graph, captured, options, folder)
    return opened, sample_warnings(inputs.calibration)
