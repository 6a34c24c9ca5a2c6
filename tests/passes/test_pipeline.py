"""Whole pipelines: every expected count met, every pass verified, every variant."""

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from mvlm_export.engines.errors import InputError, PassError
from mvlm_export.engines.targets import get_target
from mvlm_export.passes.base import PassManager
from mvlm_export.passes.deferred import values_of
from mvlm_export.passes.pass_names import OPTIONAL, check_names, pass_names
from mvlm_export.passes.pipeline import (
    ModelFacts,
    PipelineOptions,
    build_pipeline,
    require_enabled,
)
from mvlm_export.passes.verify import IdRange, OrtVerifier
from tests.passes.graphs import (
    nano_config,
    nano_graph,
    random_feeds,
    run_graph,
    tiny_config,
    tiny_graph,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GRAPHS = ("vision_encoder", "projector", "decoder")
FORMS = {
    "cpu": get_target("cpu"),
    "orin": get_target("orin"),
    "orin-7": get_target("orin", 7),
    "rtx": get_target("rtx"),
    "cuda": get_target("cuda"),
    "cpu-append": replace(get_target("cpu"), kv_form="append"),
}


def facts_of(config) -> ModelFacts:
    kind = config.projector_type
    return ModelFacts(
        vision_layers=config.vision_layers_used,
        keeps_class_token=config.select_feature == "cls_patch",
        image_mean=MEAN,
        image_std=STD,
        pools=kind in ("ldpnetv2", "pw2_pool", "pw2_pool_pos"),
        has_peg=kind in ("ldpnetv2", "ldpnetv2_nopool"),
        ldp_blocks=2 if kind == "ldpnet" else 0,
        decoder_layers=config.text.num_hidden_layers,
        head_dim=config.text.head_dim,
        positions=config.text.max_position_embeddings,
    )


def run_pipeline(name, graph, config, target, dtype="float32", **options):
    steps = build_pipeline(name, facts_of(config), target, PipelineOptions(dtype, **options))
    ids = IdRange(config.text.vocab_size, rows=True)
    verifier = OrtVerifier({"input_ids": ids}, threads=1)
    return PassManager(steps, verifier=verifier).run(graph)


def counts(records):
    return {r.name: r.result.rewritten for r in records if r.result.rewritten}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", GRAPHS)
def test_nano(name, dtype):
    """Each pass changes the numbers by rounding alone; the counts are the pipeline's own."""
    records = run_pipeline(name, nano_graph(name), nano_config(), FORMS["orin"], dtype)
    assert all(r.verified is not None for r in records if r.result.rewritten)
    done = counts(records)
    if name == "decoder":
        assert done["merge-qkv"] == done["merge-gate-up"] == done["fold-query-scale"] == 4
        assert done["fold-rmsnorm-weight"] == 9
        assert done["keep-last-row"] == 1
    elif name == "projector":
        assert done["move-pool-before-pointwise"] == done["fold-peg-skip"] == 1
    else:
        assert done["merge-qkv"] == 4
        assert done["fold-layernorm-affine"] == 8
    assert ("convert-to-float16" in done) is (dtype == "float16")


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_decoder_forms(target, heads):
    changes = {"num_key_value_heads": heads}
    graph, config = tiny_graph("decoder", **changes), tiny_config(**changes)
    done = counts(run_pipeline("decoder", graph, config, FORMS[target]))
    lowered = {"orin-7": "use-tensor-scatter", "cpu": "use-group-query-attention"}
    for form, rewrite in lowered.items():
        assert done.get(rewrite, 0) == (2 if form == target else 0)
    names = [tensor.name for tensor in graph.inputs]
    assert ("past_length" in names) is (FORMS[target].kv_form == "fixed")
    assert graph.outputs[0].shape == [1, 320]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_head_dim_80(dtype):
    """The 3B model's, which NVIDIA's TensorRT Edge-LLM refuses."""
    changes = {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 2}
    graph, config = tiny_graph("decoder", **changes), tiny_config(**changes)
    assert (
        counts(run_pipeline("decoder", graph, config, FORMS["orin"], dtype))["merge-qkv"] == 2
    )


@pytest.mark.parametrize(
    "kind",
    [
        "ldpnetv2",
        "ldpnetv2_nopool",
        "ldpnet",
        "linear",
        "mlp2x_gelu",
        "pw2_pool",
        "pw2_pool_pos",
    ],
)
def test_projectors(kind):
    changes = {"mm_projector_type": kind}
    graph, config = tiny_graph("projector", **changes), tiny_config(**changes)
    done = counts(run_pipeline("projector", graph, config, FORMS["orin"], "float16"))
    facts = facts_of(config)
    assert done.get("move-pool-before-pointwise", 0) == facts.pools
    assert done.get("fold-peg-skip", 0) == facts.has_peg
    assert done.get("reshape-without-transposes", 0) == (kind == "ldpnet")


@pytest.mark.parametrize(
    "changes",
    [
        {"mm_vision_select_feature": "cls_patch", "mm_projector_type": "mlp2x_gelu"},
        {"vision_config": {"hidden_act": "gelu"}},
        {"mm_vision_select_layer": -1},
    ],
    ids=["class-token", "gelu", "last-layer"],
)
def test_vision_encoders(changes):
    graph, config = tiny_graph("vision_encoder", **changes), tiny_config(**changes)
    done = counts(run_pipeline("vision_encoder", graph, config, FORMS["orin"]))
    assert done["merge-qkv"] == config.vision_layers_used
    assert ("drop-vision-tail" in done) is (config.select_feature == "patch")
    assert graph.inputs[0].dtype == np.uint8


def test_optional_passes_run_when_asked_for():
    config = tiny_config()
    asked = {"choose-greedy-token", "use-skip-rms-norm"}
    without = counts(run_pipeline("decoder", tiny_graph("decoder"), config, FORMS["cuda"]))
    assert not asked & set(without)
    graph = tiny_graph("decoder")
    done = counts(
        run_pipeline("decoder", graph, config, FORMS["cuda"], enabled=frozenset(asked))
    )
    assert asked <= set(done)
    assert "next_token" in [tensor.name for tensor in graph.outputs]
    pooled = counts(
        run_pipeline(
            "projector",
            tiny_graph("projector"),
            config,
            FORMS["cpu"],
            enabled=frozenset({"fuse-pool-into-depthwise"}),
        )
    )
    assert pooled["fuse-pool-into-depthwise"] == 1
    first_generation = {"mm_projector_type": "ldpnet"}
    blocks = counts(
        run_pipeline(
            "projector",
            tiny_graph("projector", **first_generation),
            tiny_config(**first_generation),
            FORMS["cpu"],
            enabled=frozenset({"move-block-to-channels-last"}),
        )
    )
    assert blocks["move-block-to-channels-last"] == 2


def test_a_disabled_pass_does_not_run():
    config = tiny_config()
    disabled = frozenset({"merge-qkv", "fold-pixel-normalization"})
    graph = tiny_graph("vision_encoder")
    records = run_pipeline("vision_encoder", graph, config, FORMS["cpu"], disabled=disabled)
    assert not disabled & {record.name for record in records}
    assert graph.inputs[0].dtype == np.float32


def test_a_missed_expectation_fails():
    """A projector whose pool has another stride than its kernel: nothing may be moved."""
    graph, config = tiny_graph("projector"), tiny_config()
    pool = next(node for node in graph.nodes if node.op == "AveragePool")
    pool.attrs["kernel_shape"] = [1, 1]
    with pytest.raises(PassError, match=r"move-pool-before-pointwise.*must make 1 rewrites"):
        run_pipeline("projector", graph, config, FORMS["cpu"])


@pytest.mark.parametrize("name", GRAPHS)
def test_equal_weights_are_not_shared_before_they_are_folded(name):
    """RMSNorms of ones, biases of zeros: byte for byte the same in every layer."""
    graph = tiny_graph(name)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and len(tensor.shape) == 1:
            values = values_of(tensor)
            if tensor.name.endswith("bias") and "norm" not in tensor.name:
                tensor.values = np.zeros_like(values)
            elif tensor.name.endswith("norm.weight"):
                tensor.values = np.ones_like(values)
    done = counts(run_pipeline(name, graph, tiny_config(), FORMS["orin"]))
    if name != "projector":
        assert done["merge-qkv"] == 2


@pytest.mark.parametrize(
    ("disabled", "enabled", "complaint"),
    [
        (["merge-qvk"], [], "Did you mean 'merge-qkv'"),
        ([], ["nonsense"], "There is no pass 'nonsense'"),
        ([], ["merge-qkv"], "runs anyway"),
        (["choose-greedy-token"], ["choose-greedy-token"], "both --disable-pass and --enable"),
    ],
)
def test_names_are_checked(disabled, enabled, complaint):
    with pytest.raises(InputError, match=complaint):
        check_names(disabled, enabled)


def test_an_enabled_pass_must_have_a_place():
    options = PipelineOptions("float32", enabled=frozenset({"use-skip-rms-norm"}))
    facts = facts_of(tiny_config())
    require_enabled(facts, FORMS["cpu"], options)
    with pytest.raises(InputError, match="'use-skip-rms-norm' is not for target 'orin'"):
        require_enabled(facts, FORMS["orin"], options)


def test_a_target_has_passes_of_its_own():
    own = FORMS["cpu"].own_passes
    config = tiny_config()
    done = counts(run_pipeline("decoder", tiny_graph("decoder"), config, FORMS["cpu"]))
    # The third is of the encoder and the projector, and of integers.
    assert own - set(done) == {"use-integer-matmul"}
    less = run_pipeline("decoder", tiny_graph("decoder"), config, FORMS["cpu"], disabled=own)
    assert not own & set(counts(less))


@pytest.mark.parametrize("new", [1, 3, 9])
def test_the_last_few_rows_of_logits(new):
    graph, config = tiny_graph("decoder"), tiny_config()
    run_pipeline("decoder", graph, config, FORMS["cpu"], logits_rows=4)
    assert graph.outputs[0].shape == ["R", 320]
    outputs = run_graph(graph, random_feeds(graph, {"S": new}, input_ids=320))
    rows = min(new, 4)
    assert outputs["logits"].shape == (rows, 320)
    chosen = outputs["logits"].argmax(axis=-1)
    np.testing.assert_array_equal(outputs["next_token"], chosen)


def test_every_pass_has_a_name_of_its_own_and_a_summary():
    names = pass_names()
    assert len(names) == len(set(names)) >= 25
    assert set(OPTIONAL) < set(names)
