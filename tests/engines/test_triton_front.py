"""The front model of a Triton repository: true requests, true bundle, Triton stood in for."""

import base64
import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from mvlm_export.engines import triton_front
from mvlm_export.engines.sampling import SamplingParams
from mvlm_export.engines.triton_front import INPUTS, OUTPUTS, SETTINGS, TritonPythonModel

from . import triton_stand_in as triton

TYPES = {tensor.name: triton.TYPES[tensor.data_type] for tensor in INPUTS}


def png(seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def request(cancel_after=None, **values):
    inputs = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        items = [item.encode() if isinstance(item, str) else item for item in items]
        inputs.append(triton.Tensor(name, np.array(items, TYPES[name])))
    return triton.InferenceRequest(inputs, cancel_after)


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton.module())


def started(folder, **parameters):
    model = TritonPythonModel()
    model.initialize(triton.initialize_arguments(folder, parameters))
    return model


@pytest.fixture
def model(backend, tiny, tmp_path):
    front = started(tmp_path, bundle=str(tiny.path), threads="1", verify="false")
    yield front
    front.finalize()


def rows(response):
    """A response's values by output name, read as a client would."""
    assert not response.has_error(), response.error().message()
    values = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    assert {name: array.dtype.type for name, array in values.items()} == {
        output.name: triton.TYPES[output.data_type] for output in OUTPUTS
    }
    assert all(array.shape == (1,) for array in values.values())
    found = {name: array[0] for name, array in values.items()}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}


def answers(front, asked):
    assert front.execute([asked]) is None
    assert asked.sender.closed
    return [rows(response) for response in asked.sender.sent]


def failure(front, asked):
    """The error that the last response carries; nothing but text may come before."""
    front.execute([asked])
    assert asked.sender.closed
    assert not any(response.has_error() for response in asked.sender.sent[:-1])
    error = asked.sender.sent[-1].error()
    return error.code(), error.message()


def test_text_is_streamed_as_the_runtime_streams_it(model, vlm):
    asked = request(image=png(), prompt="what is this?", max_tokens=12)
    *deltas, last = answers(model, asked)
    stream = vlm.stream(png(), "what is this?", max_tokens=12)
    assert [row["text"] for row in deltas] == list(stream)
    assert len(deltas) > 1
    blank = {"final": False, "finish_reason": "", "timings": ""}
    assert all({**row, "text": ""} == {**blank, "text": ""} for row in deltas)
    assert (last["text"], last["final"]) == ("", True)
    assert last["finish_reason"] == stream.answer.finish_reason
    timings = json.loads(last["timings"])
    assert set(timings) == set(stream.answer.timings.to_json())
    assert timings["images"] == 1
    assert timings["decode_tokens"] == stream.answer.timings.decode_tokens


CASES = {
    "no picture": {},
    "two pictures": {"image": [png(1), png(2)]},
    "sampled": {"image": [png()], "temperature": 0.9, "seed": 5, "top_k": 20, "top_p": 0.9},
    "penalised": {"min_p": 0.05, "repetition_penalty": 1.3, "temperature": 0.7, "seed": 1},
    "stopped": {"stop": ["e", "a"]},
}


@pytest.mark.parametrize("case", CASES)
def test_settings_reach_the_sampler(model, vlm, case):
    values = CASES[case] | {"prompt": "what do you see?", "max_tokens": 10}
    *deltas, last = answers(model, request(**values))
    settings = {key: value for key, value in values.items() if key not in ("image", "prompt")}
    expected = vlm.generate(values.get("image"), values["prompt"], **settings)
    assert "".join(row["text"] for row in deltas) == expected.text
    assert last["finish_reason"] == expected.finish_reason


def test_several_requests_of_one_call_are_each_answered(model, vlm):
    asked = [request(prompt=text, max_tokens=4) for text in ("one", "two", "three")]
    model.execute(asked)
    for each, text in zip(asked, ("one", "two", "three"), strict=True):
        got = "".join(rows(response)["text"] for response in each.sender.sent)
        assert got == vlm.generate(None, text, max_tokens=4).text
        assert each.sender.closed


def test_a_data_address_is_a_picture(model):
    address = "data:image/png;base64," + base64.b64encode(png()).decode()
    by_address = answers(model, request(image=address, prompt="what?", max_tokens=6))
    by_bytes = answers(model, request(image=png(), prompt="what?", max_tokens=6))
    assert [row["text"] for row in by_address] == [row["text"] for row in by_bytes]


BAD = {
    "no picture": ({"image": b"xx", "prompt": "x"}, "not a picture that Pillow can read"),
    "empty picture": ({"image": b"", "prompt": "x"}, "empty"),
    "not base64": (
        {"image": "data:image/png;base64,?", "prompt": "x"},
        "base64 text is damaged",
    ),
    "other address": ({"image": "data:image/png,abc", "prompt": "x"}, "must be in base64"),
    "no prompt": ({"image": png()}, "The request has no prompt"),
    "not UTF-8": ({"prompt": b"\xff"}, "prompt is not UTF-8"),
    "stop not UTF-8": ({"prompt": "x", "stop": b"\xff"}, "stop is not UTF-8"),
    "no tokens": ({"prompt": "x", "max_tokens": 0}, "max_tokens is 0"),
    "cold": ({"prompt": "x", "temperature": -1.0}, "temperature is -1.0"),
    "negative seed": ({"prompt": "x", "seed": -1}, "seed is -1"),
    "too long": ({"prompt": "word " * 600}, "positions"),
    "marks and pictures": ({"image": png(), "prompt": "<image> <image>"}, "<image>"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_its_message(model, case):
    values, mention = BAD[case]
    code, message = failure(model, request(**values))
    assert code == triton.TritonError.INVALID_ARG
    assert mention in message


def test_a_bad_request_leaves_the_next_alone(model, vlm):
    bad, good = request(prompt=b"\xff"), request(prompt="well?", max_tokens=4)
    model.execute([bad, good])
    assert bad.sender.sent[-1].has_error()
    text = "".join(rows(response)["text"] for response in good.sender.sent)
    assert text == vlm.generate(None, "well?", max_tokens=4).text


def test_a_cancelled_request_ends_and_the_model_goes_on(model, vlm):
    asked = request(prompt="tell me all", max_tokens=50, cancel_after=2)
    code, message = failure(model, asked)
    assert (code, len(asked.sender.sent)) == (triton.TritonError.CANCELLED, 3)
    assert "cancelled" in message
    rows_after = answers(model, request(prompt="tell me all", max_tokens=6))
    expected = vlm.generate(None, "tell me all", max_tokens=6).text
    assert "".join(row["text"] for row in rows_after) == expected


def test_a_failing_graph_is_the_servers_fault(model, monkeypatch):
    def fail(*arguments):
        raise triton_front.MvlmError("the graph failed")

    monkeypatch.setattr(model._vlm, "encode_images", fail)
    code, message = failure(model, request(prompt="x"))
    assert (code, message) == (triton.TritonError.INTERNAL, "the graph failed")


def test_a_relative_bundle_begins_at_the_models_folder(backend, tiny, tmp_path):
    front = started(tmp_path, bundle=os.path.relpath(tiny.path, tmp_path), use_prefix="false")
    assert answers(front, request(prompt="x", max_tokens=1))[-1]["final"]


def test_instances_share_nothing(backend, tiny, tmp_path):
    first, second = (started(tmp_path, bundle=str(tiny.path)) for _ in range(2))
    first.finalize()
    assert failure(first, request(prompt="x"))[1].startswith("The model was unloaded")
    assert answers(second, request(prompt="x", max_tokens=1))[-1]["final"]


PARAMETERS = {
    "no bundle": ({}, "names no bundle"),
    "unknown": ({"bundle": "b", "speed": "9"}, "unknown parameter 'speed'"),
    "missing": ({"bundle": "nowhere"}, "does not exist"),
    "flag": ({"bundle": "b", "verify": "perhaps"}, "neither true nor false"),
    "count": ({"bundle": "b", "threads": "0"}, "no number from 1 on"),
    "provider": ({"bundle": "TINY", "provider": "tpu"}, "tpu"),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_bundle_that_cannot_be_opened_stops_the_load(backend, tiny, tmp_path, case):
    parameters, mention = PARAMETERS[case]
    found = {k: str(tiny.path) if v == "TINY" else v for k, v in parameters.items()}
    with pytest.raises(triton.TritonModelException, match=mention):
        started(tmp_path, **found)


def test_every_setting_is_a_field_of_the_sampling_parameters():
    known = set(SamplingParams.__dataclass_fields__)
    assert {tensor.name for tensor in SETTINGS} == known - {"ignore_eos"}
