"""``config.pbtxt`` of a Triton model: typed records, written as protobuf text.

The fields are those of Triton's ``ModelConfig`` (``model_config.proto``) that are used here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias


class Word(str):
    """The name of an enum's value, which is written without quotes."""

    __slots__ = ()


_Scalar: TypeAlias = "Word | str | int | bool | tuple[int, ...]"
_Message: TypeAlias = "list[tuple[str, _Scalar | _Message]]"

InstanceKind = Literal["KIND_CPU", "KIND_GPU"]


@dataclass(frozen=True)
class ConfigTensor:
    """One input or output.

    Attributes:
        data_type: by Triton's name, such as ``TYPE_FP16``.
        dims: sizes, -1 for an open one; without the batch where the model is batched.
        optional: an input that a request may leave out.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False

    def message(self) -> _Message:
        """Its fields."""
        fields: _Message = [
            ("name", self.name),
            ("data_type", Word(self.data_type)),
            ("dims", self.dims),
        ]
        return [*fields, ("optional", True)] if self.optional else fields


@dataclass(frozen=True)
class TritonConfig:
    """One model's configuration.

    Attributes:
        runs_on: the field and value that choose Triton's backend, such as
            ``("platform", "tensorrt_plan")``.
        max_batch_size: images that the server may put into one call; 0 for a model whose
            tensors have no batch axis of their own.
        kind: where an instance runs, by Triton's name; there is one on the CPU, or one a GPU.
        profiles: optimization profiles of a plan that an instance may choose from.
        parameters: texts for the backend, or for a Python model.
        decoupled: a request may have any number of responses.
    """

    name: str
    runs_on: tuple[Literal["platform", "backend"], str]
    inputs: tuple[ConfigTensor, ...]
    outputs: tuple[ConfigTensor, ...]
    kind: InstanceKind
    max_batch_size: int = 0
    profiles: tuple[int, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    decoupled: bool = False

    def to_text(self) -> str:
        """The text of ``config.pbtxt``."""
        return "".join(f"{line}\n" for line in _lines(self._message()))

    def _message(self) -> _Message:
        fields: _Message = [
            ("name", self.name),
            self.runs_on,
            ("max_batch_size", self.max_batch_size),
        ]
        fields += [("input", tensor.message()) for tensor in self.inputs]
        fields += [("output", tensor.message()) for tensor in self.outputs]
        if self.max_batch_size:
            fields.append(("dynamic_batching", []))
        profiles: _Message = [("profile", str(index)) for index in self.profiles]
        group: _Message = [("count", 1), ("kind", Word(self.kind)), *profiles]
        fields.append(("instance_group", group))
        if self.decoupled:
            fields.append(("model_transaction_policy", [("decoupled", True)]))
        fields += [
            ("parameters", [("key", key), ("value", [("string_value", text)])])
            for key, text in self.parameters.items()
        ]
        return fields


def _lines(message: _Message, indent: str = "") -> Iterator[str]:
    """Protobuf's text format: a field a line, messages in braces; a repeated field repeats."""
    for name, value in message:
        if isinstance(value, list):
            yield f"{indent}{name} {{"
            yield from _lines(value, f"{indent}  ")
            yield f"{indent}}}"
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: _Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return f'"{_escaped(value)}"' if type(value) is str else str(value)


def _escaped(text: str) -> str:
    """UTF-8 with all but plain ASCII, quotes and backslashes in octal, as any parser reads."""
    return "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in text.encode()
    )
