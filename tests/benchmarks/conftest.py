"""The benchmarks are scripts, not a package: put their folder on the path."""

import sys
from pathlib import Path

import pytest

from mvlm_export.exporter.config import parse_config
from mvlm_export.exporter.graphs import bind_weights, capture_graph
from mvlm_export.exporter.models.components import build_component
from tests.helpers import tiny_config_json

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "gpu")]


@pytest.fixture(scope="session")
def tiny():
    """A small config; its modules with random weights, and their graphs."""
    import torch

    config = parse_config(tiny_config_json(num_key_value_heads=2, mm_vision_select_layer=-1))

    def make(name):
        torch.manual_seed(0)
        module = build_component(name, config).eval().requires_grad_(False)
        for parameter in module.parameters():
            if parameter.ndim == 1:  # norms and biases, which begin as ones and zeros
                parameter += 0.1 * torch.randn(len(parameter))
        weights = module.state_dict()
        graph = bind_weights(capture_graph(name, config), weights.__getitem__)
        return module, graph

    make.config = config
    return make
