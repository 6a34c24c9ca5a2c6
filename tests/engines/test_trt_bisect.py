"""The node that a build fails at, found by building parts; and where the search must stop."""

from __future__ import annotations

import pytest

from mvlm_export.engines import trt_api, trt_bisect
from mvlm_export.engines.build_process import build_engine
from mvlm_export.engines.build_worker import Request
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_bisect import MAX_BUILDS, find_culprit
from mvlm_export.engines.trt_builder import (
    BuildOptions,
    ProfileSpec,
    decoder_profiles,
    open_job,
)
from mvlm_export.engines.trt_diagnostics import BuildFailedError
from mvlm_export.engines.trt_graph_cut import cut_after, find_nodes

from .fake_tensorrt_10_3 import CRASHES_AT
from .processes import offer_tensorrt_10_3
from .trt_graphs import (
    ROWS,
    RTX,
    leftovers,
    save_append_attention,
    save_bad_reshape,
    save_relu,
    save_scatter_attention,
    without_images,
)

PREFILL = ProfileSpec("prefill", {"S": (1, 1, 2)})
DECODE = ProfileSpec("decode", {"S": (1, 1, 1)})


def request_for(path, profiles, target=RTX):
    capability = (8, 6) if target is RTX else None
    plan = path.with_suffix(".plan")
    return Request(
        "build", path, plan, tuple(profiles), target, BuildOptions(), None, capability
    )


def failure_of(request):
    with pytest.raises(BuildFailedError) as caught:
        build_engine(
            request.onnx_path,
            request.plan_path,
            request.profiles,
            target=request.target,
            compute_capability=request.compute_capability,
        )
    return caught.value


def search(request, progress=None):
    return find_culprit(request, failure_of(request), progress)


def test_a_reshape_that_no_shape_fits(tmp_path):
    path = save_bad_reshape(tmp_path / "m.onnx")
    reports = []
    found = search(
        request_for(path, [ProfileSpec("p", {"S": (1, 2, 4)})]),
        lambda *report: reports.append(report),
    )
    assert (found.nodes, found.operator) == (("/layer1/bad_reshape",), "Reshape")
    assert (found.layer, found.before, found.profile) == ("SHUFFLE", "proj", None)
    assert found.builds == len(reports) <= 3
    assert [done for done, _, _ in reports] == list(range(found.builds))
    assert {total for _, total, _ in reports} == {MAX_BUILDS}
    assert "node '/layer1/bad_reshape' (Reshape)" in str(found)
    assert leftovers(tmp_path) == []


def test_attention_without_a_kernel_is_named_where_tensorrt_names_nothing(tmp_path):
    path = save_scatter_attention(tmp_path / "m.onnx")
    request = request_for(path, [PREFILL, DECODE])
    failure = failure_of(request)
    assert "/layer0/attn" not in str(failure)
    assert "lower it to MatMul, Softmax, MatMul" in str(failure)
    found = find_culprit(request, failure)
    assert (found.nodes, found.operator) == (("/layer0/attn",), "Attention")
    assert (found.before, found.profile) == ("mask", "decode")
    assert found.builds <= 8
    assert "with profile 'decode', the part up to 'mask' builds" in str(found)


def test_the_number_of_builds_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(trt_bisect, "MAX_BUILDS", 1)
    path = save_bad_reshape(tmp_path / "m.onnx")
    found = search(request_for(path, [ProfileSpec("p", {"S": (1, 2, 4)})]))
    assert found.builds == 1
    assert found.nodes == ("first", "proj", "/layer1/bad_reshape")
    assert "one of the 3 nodes 'first' to '/layer1/bad_reshape'" in str(found)
    assert "no part before it builds" in str(found)


def test_a_crash_is_found_like_an_error(tmp_path, monkeypatch):
    """A stand-in for TensorRT that ends its process by SIGSEGV at one node."""
    offer_tensorrt_10_3(tmp_path, monkeypatch)
    monkeypatch.setenv(CRASHES_AT, "block")
    path = save_relu(tmp_path / "m.onnx")
    request = request_for(path, decoder_profiles(2048, 144, "fp16"), get_target("orin"))
    found = search(request)
    assert (found.nodes, found.before, found.profile) == (("block",), "embed", "prefill")
    assert found.operator == ""
    assert "(TensorRT layer MATRIX_MULTIPLY)" in str(found)


@pytest.mark.parametrize(
    "text",
    [
        "Cuda Runtime (out of memory)",
        "std::bad_alloc",
        "crash: SIGKILL",
        "CUDA driver version is insufficient for CUDA runtime version",
    ],
)
def test_what_is_of_the_machine_is_not_searched(tmp_path, text):
    request = request_for(tmp_path / "absent.onnx", [])
    reports = []
    failure = BuildFailedError("no", (text,))
    assert find_culprit(request, failure, lambda *r: reports.append(r)) is None
    assert reports == []


def test_no_node_is_named_where_every_part_builds(tmp_path):
    request = request_for(save_relu(tmp_path / "m.onnx"), [PREFILL])
    assert find_culprit(request, BuildFailedError("no", ("a fault of the whole",))) is None


def test_a_part_that_fails_otherwise_is_not_the_fault(tmp_path):
    request = request_for(save_bad_reshape(tmp_path / "m.onnx"), [PREFILL])
    assert find_culprit(request, BuildFailedError("no", ("another fault",))) is None


# The cut itself


@pytest.fixture
def network(tmp_path):
    path = save_append_attention(tmp_path / "m.onnx")
    profiles = without_images(decoder_profiles(ROWS, 1, "fp16"))
    job = open_job(
        path,
        profiles,
        RTX,
        tracker=trt_api.ProgressTracker(None),
        compute_capability=(8, 6),
    )
    with job.log.collecting() as job.records:
        yield job, job._parse(job._create_builder())


def outputs_of(network):
    return {network.get_output(index).name for index in range(network.num_outputs)}


def test_nodes_come_in_the_order_of_the_computation(network):
    names = [node.name for node in find_nodes(network[1])]
    for earlier, later in (("q_proj", "scores"), ("keys", "scores"), ("softmax", "mixed")):
        assert names.index(earlier) < names.index(later)
    assert len(set(names)) == len(names) > 20


def test_a_part_has_what_the_rest_would_read_and_nothing_of_the_weights(network):
    _, parsed = network
    assert outputs_of(parsed) == {"y", "present_k", "present_v"}
    cut_after(parsed, "scores")
    outputs = outputs_of(parsed)
    assert {"scores", "present_k", "present_v"} <= outputs
    assert not {"y", "mixed", "w_q_output", "table_output"} & outputs


def test_an_unknown_node(network):
    with pytest.raises(trt_api.EngineError, match="no node 'absent'"):
        cut_after(network[1], "absent")


@pytest.mark.parametrize("node", ["past_rows", "seen", "v_split", "to32", "mixed"])
def test_parts_of_a_good_graph_build(network, node):
    job, parsed = network
    cut_after(parsed, node)
    assert job._build(job.alive[0], parsed) is not None
