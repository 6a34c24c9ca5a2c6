"""Other projectors through the whole compile: parity passes, answers equal PyTorch's."""

import pytest

from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.settings import CompileSettings
from tests.engines.tokenizer_files import write_tokenizer
from tests.helpers import tiny_config_json, write_random_checkpoint

from .conftest import Silent

VARIANTS = {
    "v1": {"mm_projector_type": "ldpnet"},
    "mlp2x": {"mm_projector_type": "mlp2x_gelu"},
    "without-pool": {"mm_projector_type": "ldpnetv2_nopool"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_parity_and_greedy_tokens(changes, samples, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    write_random_checkpoint(checkpoint, tiny_config_json(vocab_size=512, **changes))
    write_tokenizer(checkpoint)
    settings = CompileSettings(
        output=tmp_path / "bundle",
        model=checkpoint,
        samples=samples,
        threads=1,
    )
    result = compile_checkpoint(settings, Silent())
    parity = result.parity
    assert parity is not None
    assert parity.passed, parity.failures
    answers = parity.end_to_end
    assert answers.equal + answers.ties == answers.samples
    done = {
        graph: {r["name"]: r["rewritten"] for r in records if r["rewritten"]}
        for graph, records in result.report["checks"]["passes"].items()
    }
    layers = result.bundle.manifest.model.num_layers
    assert done["decoder"]["merge-qkv"] == done["decoder"]["merge-gate-up"] == layers
