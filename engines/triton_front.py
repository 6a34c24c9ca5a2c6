"""The model ``mvlm`` of a Triton repository: encoded pictures and a prompt to streamed text.

`mvlm triton` copies this file into the repository as ``mvlm/1/model.py``, where Triton's
Python backend loads it. So its imports are absolute, and it needs the package's public names
alone. The module ``triton_python_backend_utils`` exists inside Triton only; ``initialize``
imports it.

Every instance is a process of its own with a runtime of its own: instances share nothing, and
each answers one request at a time.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mvlm_export.engines import VLM, AnswerStream, MvlmError, SamplingParams
from mvlm_export.engines.errors import InputError


@dataclass(frozen=True)
class FrontTensor:
    """An input or output of the model.

    Attributes:
        data_type: by Triton's name.
        size: elements, -1 for any number.
    """

    name: str
    data_type: str
    size: int = 1
    optional: bool = False


PICTURES, PROMPT = "image", "prompt"
SETTINGS = (
    FrontTensor("max_tokens", "TYPE_INT32", optional=True),
    FrontTensor("temperature", "TYPE_FP64", optional=True),
    FrontTensor("top_k", "TYPE_INT32", optional=True),
    FrontTensor("top_p", "TYPE_FP64", optional=True),
    FrontTensor("min_p", "TYPE_FP64", optional=True),
    FrontTensor("repetition_penalty", "TYPE_FP64", optional=True),
    FrontTensor("seed", "TYPE_INT64", optional=True),
    FrontTensor("draft_tokens", "TYPE_INT32", optional=True),
    FrontTensor("stop", "TYPE_STRING", -1, optional=True),
)
"""Inputs that are fields of ``SamplingParams``; one that is not sent has its default."""

INPUTS = (
    FrontTensor(PICTURES, "TYPE_STRING", -1, optional=True),
    FrontTensor(PROMPT, "TYPE_STRING"),
    *SETTINGS,
)
OUTPUTS = (
    FrontTensor("text", "TYPE_STRING"),
    FrontTensor("final", "TYPE_BOOL"),
    FrontTensor("finish_reason", "TYPE_STRING"),
    FrontTensor("timings", "TYPE_STRING"),
)
"""Of every response; the last one alone has a reason and timings, and it has no text."""

_FLAGS = {"true": True, "false": False}


def _as_flag(text: str) -> bool:
    if text not in _FLAGS:
        raise InputError(f"{text!r} is neither true nor false; correct it in config.pbtxt.")
    return _FLAGS[text]


def _as_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{text!r} is no number from 1 on; correct it in config.pbtxt.")
    return int(text)


LOADING: Mapping[str, Callable[[str], Any]] = {
    "provider": str,
    "threads": _as_count,
    "verify": _as_flag,
    "use_prefix": _as_flag,
}
"""Parameters of config.pbtxt that are keywords of ``VLM.load``, and how each is read."""

BUNDLE = "bundle"
"""Parameter with the bundle's path; a relative one begins at the model's folder."""

_DATA_URL = b"data:"


class TritonPythonModel:
    """What Triton's Python backend drives: ``initialize``, ``execute`` and ``finalize``."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle that config.pbtxt names.

        Args:
            args: Triton's; ``model_config`` is JSON, ``model_repository`` the model's folder.

        Raises:
            TritonModelException: the bundle cannot be opened; the server shows the message.
        """
        import triton_python_backend_utils

        self._triton: ModuleType = triton_python_backend_utils
        found: dict[str, Any] = json.loads(args["model_config"]).get("parameters", {})
        parameters = {key: value["string_value"] for key, value in found.items()}
        try:
            self._vlm: VLM | None = _open(parameters, Path(args["model_repository"]))
        except MvlmError as error:
            raise self._triton.TritonModelException(str(error)) from error

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer requests one after another, each text by text (decoupled policy)."""
        for request in requests:
            self._answer(request)

    def finalize(self) -> None:
        """Let go of the bundle."""
        self._vlm = None

    def _answer(self, request: Any) -> None:  # noqa: ANN401
        """Send an answer's responses, or an error; the last one closes the request."""
        sender = request.get_response_sender()
        last = self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            with self._ask(request) as stream:
                for delta in stream:
                    if sender.is_cancelled():
                        break
                    sender.send(self._response(delta))
                else:
                    sender.send(self._last_response(stream), flags=last)
                    return
        except MvlmError as error:
            code = "INVALID_ARG" if isinstance(error, InputError) else "INTERNAL"
            sender.send(self._error(str(error), code), flags=last)
            return
        sender.send(self._error("The client cancelled the request.", "CANCELLED"), flags=last)

    def _ask(self, request: Any) -> AnswerStream:  # noqa: ANN401
        if self._vlm is None:
            raise InputError("The model was unloaded; load it again.")
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if PROMPT not in inputs:  # Triton counts inputs alone where some are optional
            raise InputError(f"The request has no {PROMPT}; send one text as {PROMPT}.")
        pictures = [_picture(item) for item in _texts(inputs.get(PICTURES))]
        (prompt,) = _decoded(PROMPT, inputs[PROMPT])
        return self._vlm.stream(pictures, prompt, SamplingParams(**_settings(inputs)))

    def _response(
        self, text: str, final: bool = False, reason: str = "", timings: str = ""
    ) -> Any:  # noqa: ANN401
        values: tuple[str | bool, ...] = (text, final, reason, timings)
        tensors = [
            self._triton.Tensor(output.name, _array(value))
            for output, value in zip(OUTPUTS, values, strict=True)
        ]
        return self._triton.InferenceResponse(output_tensors=tensors)

    def _last_response(self, stream: AnswerStream) -> Any:  # noqa: ANN401
        answer = stream.answer
        timings = json.dumps(answer.timings.to_json())
        return self._response("", True, answer.finish_reason, timings)

    def _error(self, message: str, code: str) -> Any:  # noqa: ANN401
        error = self._triton.TritonError(message, getattr(self._triton.TritonError, code))
        return self._triton.InferenceResponse(error=error)


def _open(parameters: Mapping[str, str], folder: Path) -> VLM:
    """The runtime that the parameters ask for; ``folder`` is the model's."""
    unknown = sorted(set(parameters) - {BUNDLE, *LOADING})
    if unknown or BUNDLE not in parameters:
        what = f"has the unknown parameter {unknown[0]!r}" if unknown else "names no bundle"
        raise InputError(
            f"{folder / 'config.pbtxt'} {what}; there are {', '.join((BUNDLE, *LOADING))}. "
            "Correct it, or write the repository again with `mvlm triton`."
        )
    keywords = {key: LOADING[key](text) for key, text in parameters.items() if key in LOADING}
    return VLM.load(folder / parameters[BUNDLE], **keywords)


def _array(value: str | bool) -> np.ndarray[Any, np.dtype[Any]]:
    """One element, as Triton takes it: texts are bytes in an object array."""
    if isinstance(value, bool):
        return np.array([value])
    return np.array([value.encode()], dtype=np.object_)


def _texts(array: np.ndarray[Any, np.dtype[Any]] | None) -> list[bytes]:
    return [] if array is None else [bytes(item) for item in array.reshape(-1)]


def _decoded(name: str, array: np.ndarray[Any, np.dtype[Any]]) -> Iterator[str]:
    for item in _texts(array):
        try:
            yield item.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 ({error}); send it as UTF-8.") from error


def _picture(item: bytes) -> bytes:
    """Encoded bytes of a picture, which may come as a ``data:...;base64,`` address (JSON)."""
    if not item.startswith(_DATA_URL):
        return item
    head, _, body = item.partition(b",")
    if not head.endswith(b";base64"):
        raise InputError("A picture's data: address must be in base64; send it so.")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise InputError(
            f"A picture's base64 text is damaged ({error}); encode the file again."
        ) from error


def _settings(inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> dict[str, Any]:
    """The ``SamplingParams`` that were sent."""
    return {
        tensor.name: list(_decoded(tensor.name, inputs[tensor.name]))
        if tensor.data_type == "TYPE_STRING"
        else inputs[tensor.name].reshape(-1)[0].item()
        for tensor in SETTINGS
        if tensor.name in inputs
    }
