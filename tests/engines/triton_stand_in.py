"""A stand-in for ``triton_python_backend_utils``, which exists inside Triton alone.

What the front model uses, with the checks and the order of calls that Triton's Python backend
holds (python_backend: ``src/pb_stub.cc``, ``src/pb_tensor.cc``, ``src/response_sender.cc``):
texts are bytes in object arrays, an input that was not sent is not there, and nothing may be
sent after the response with the final flag.
"""

from __future__ import annotations

import json
from types import ModuleType

import numpy as np

FINAL = 1
TYPES = {
    "TYPE_BOOL": np.bool_,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP64": np.float64,
    "TYPE_STRING": np.object_,
}


class Tensor:
    def __init__(self, name, array):
        if array.dtype.type not in TYPES.values():
            raise TypeError(f"Triton has no type for {array.dtype}")
        if array.dtype == np.object_ and not all(isinstance(x, bytes) for x in array.flat):
            raise TypeError("a text tensor holds bytes")
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED = range(6)
    ALREADY_EXISTS, CANCELLED = 6, 7

    def __init__(self, message, code=INTERNAL):
        self._message, self._code = message, code

    def message(self):
        return self._message

    def code(self):
        return self._code


class TritonModelException(Exception):
    pass


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self):
        return self._tensors

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class ResponseSender:
    """Keeps what was sent; ``cancel_after`` responses the client goes away."""

    def __init__(self, cancel_after=None):
        self.sent, self.closed, self._cancel_after = [], False, cancel_after

    def send(self, response=None, flags=0):
        if self.closed:
            raise RuntimeError("Unable to send response. Response sender has been closed.")
        if response is None and flags != FINAL:
            raise RuntimeError("Inference response must be provided when flags is 0.")
        if response is not None:
            self.sent.append(response)
        self.closed = flags == FINAL

    def is_cancelled(self):
        return self._cancel_after is not None and len(self.sent) >= self._cancel_after


class InferenceRequest:
    def __init__(self, inputs, cancel_after=None):
        self._inputs, self.sender = inputs, ResponseSender(cancel_after)

    def inputs(self):
        return self._inputs

    def get_response_sender(self):
        return self.sender


def module():
    """The module itself, for ``sys.modules``."""
    made = ModuleType("triton_python_backend_utils")
    made.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    for item in (Tensor, TritonError, TritonModelException, InferenceResponse):
        setattr(made, item.__name__, item)
    return made


def initialize_arguments(folder, parameters):
    """What Triton gives ``initialize``, as far as it is read."""
    config = {"parameters": {key: {"string_value": text} for key, text in parameters.items()}}
    return {"model_config": json.dumps(config), "model_repository": str(folder)}
