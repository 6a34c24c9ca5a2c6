"""TensorRT's complaints as compiler messages: which node, what TensorRT said, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import EngineError
from .trt_api import LogRecord, TrtObject, without_noise

# First match wins; patterns are TensorRT's own words (10.1 to 11, TensorRT-RTX 1.7).
_CURES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), cure)
    for pattern, cure in (
        (
            r"must have (the )?same (input )?types|must all be of the same type"
            r"|must have identical types|of same types",
            "Networks are strongly typed: give both sides one type with a Cast (FP32 islands "
            "in an FP16 graph need a Cast on each edge in and out).",
        ),
        (
            r"non-zero zero point|shiftIsAllZeros",
            "Quantize symmetrically: leave the zero point out, and write asymmetric INT4 "
            "weights as a block-sum correction (the INT4 recipe does).",
        ),
        (
            r"Scale coefficients must all be positive",
            "Give every scale a positive value; a block of zeros takes scale 1.",
        ),
        (
            r"CausalMaskKind|is_causal",
            "Give the mask as an input and leave is_causal 0: TensorRT's causal mask is "
            "aligned to the first key, which is wrong once there is a past.",
        ),
        (
            r"Attention nodes with one output",
            "Concatenate past and new keys outside Attention and use its first output alone.",
        ),
        (
            r"plugin not found|failed to load .* plugin|no importer",
            "This TensorRT has no such operator: lower it to standard ONNX operators, or "
            "correct the operator's name.",
        ),
        (
            r"Failed to open file",
            "Keep the weight file (.onnx.data) beside the .onnx file, under its own name.",
        ),
        (
            r"Failed to import initializer",
            "Its element type is not one TensorRT reads (UINT4, for one; use INT4), or its "
            "data is missing or too short.",
        ),
        (
            r"data ?type: (STRING|COMPLEX)|Failed to convert ONNX dat[ea] type",
            "Remove it from the graph: TensorRT has no such type. Use FP16, FP32, BF16, "
            "INT64, INT32, INT8, INT4 or BOOL.",
        ),
        (
            r"Failed to parse the ONNX model",
            "The file is damaged or is no ONNX file: compile it again.",
        ),
        (
            r"Input file cannot be found",
            "Check the path: the file was there a moment ago.",
        ),
        (
            r"Node input was not registered",
            "The node reads a tensor that nothing before it makes: sort the nodes "
            "topologically, and check the graph with onnx.checker.",
        ),
        (
            r"no optimization profile has been defined",
            "Give at least one profile: the graph has dynamic dimensions.",
        ),
        (
            r"contradictory IOptimizationProfile|different constant values",
            "Inputs that share a dimension name must have one range: check the names.",
        ),
        (
            r"violate shape constraints|badreshape",
            "The graph cannot take these shapes: check the profile's ranges, and the Reshape "
            "that is named for sizes frozen at export.",
        ),
        (
            r"not supported by a dedicated kernel|IAttention::setDecomposable",
            "TensorRT has no kernel for an Attention operator of these shapes and types: "
            "lower it to MatMul, Softmax, MatMul, as the targets with the append cache do.",
        ),
        (
            r"output tensor must be a network output",
            "A cache that is written in place must be an output of the graph: export it so.",
        ),
        (
            r"HW-specific datatypes",
            "Take the type out for this GPU: Ampere (Orin, SM86) has no FP8.",
        ),
        (
            r"out of memory|insufficient memory|bad_alloc|Cuda Runtime \(out of memory\)",
            "Close what else uses memory, add swap, or choose the INT4 recipe.",
        ),
        (
            r"CUDA driver version is insufficient|no CUDA-capable device|CUDA initialization",
            "An engine is built on the machine with the GPU: run `mvlm doctor` there.",
        ),
    )
)
# Descriptions that are a bare C++ condition and tell a reader nothing.
_MEANINGLESS = {"", "false"}
_GENERIC_CURE = "Compile for this very target: its checks name what it cannot take."


def find_cure(text: str, default: str = _GENERIC_CURE) -> str:
    """The first cure whose pattern is in TensorRT's text."""
    return next((cure for pattern, cure in _CURES if pattern.search(text)), default)


@dataclass(frozen=True)
class ParserIssue:
    """One parser error.

    Attributes:
        node_index: place in ``graph.node``; -1 if no node is to blame.
        node_name: "" if the node has none.
        op: operator; "" if no node is to blame.
        code: TensorRT's code, "INVALID_NODE".
        text: TensorRT's words, without noise.
        cure: what to do.
    """

    node_index: int
    node_name: str
    op: str
    code: str
    text: str
    cure: str

    def __str__(self) -> str:
        label = f"{self.op} {self.node_name!r}" if self.node_name else self.op
        place = f"node {self.node_index}, {label}" if self.node_index >= 0 else "the file"
        return f"{place}: {self.text} ({self.code})\n    {self.cure}"


def read_parser_issues(
    parser: TrtObject, records: Sequence[LogRecord]
) -> tuple[ParserIssue, ...]:
    """All of a parser's errors; what it only told the log stands with those without a node."""
    logged = [without_noise(record.text) for record in records if record.is_error]
    causes = [line for line in logged if line and not line.startswith("ModelImporter.cpp")]
    return tuple(_read_issue(parser.get_error(i), causes) for i in range(parser.num_errors))


def _read_issue(error: TrtObject, causes: Sequence[str]) -> ParserIssue:
    text = without_noise(error.desc())
    text = re.sub(r"^Invalid Node - [^\n]*\n", "", text).replace("\n", " ")
    if text in _MEANINGLESS:
        text = "this TensorRT has no importer for the operator"
    if error.node() < 0:
        # "Failed to import initializer" alone hides whether a file or a type is at fault.
        extra = [cause.split(": ", 1)[-1] for cause in causes if cause not in text]
        text = "; ".join([*dict.fromkeys(extra), text]) if extra else text
    return ParserIssue(
        node_index=error.node(),
        node_name=error.node_name() if error.node() >= 0 else "",
        op=error.node_operator() if error.node() >= 0 else "",
        code=getattr(error.code(), "name", str(error.code())),
        text=text,
        cure=find_cure(text),
    )


_SHOWN = 8


def describe_parse_failure(path: Path, builder: str, issues: Sequence[ParserIssue]) -> str:
    """One message for a file that ``builder`` cannot parse: the issues, the rest counted."""
    if not issues:
        return f"{builder} cannot read {path} and gives no reason. {_GENERIC_CURE}"
    lines = [f"  {issue}" for issue in issues[:_SHOWN]]
    if len(issues) > _SHOWN:
        lines.append(f"  and {len(issues) - _SHOWN} more")
    return f"{builder} cannot read {path}:\n" + "\n".join(lines)


class BuildFailedError(EngineError):
    """A network was parsed, and no engine could be built from it.

    Attributes:
        errors: TensorRT's own words, distinct, without noise.
    """

    def __init__(self, message: str, errors: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.errors = tuple(errors)


def read_errors(records: Sequence[LogRecord]) -> tuple[str, ...]:
    """Distinct errors in order, noise filtered out."""
    texts = (without_noise(record.text) for record in records if record.is_error)
    return tuple(dict.fromkeys(text for text in texts if text))


def describe_build_failure(path: Path, builder: str, records: Sequence[LogRecord]) -> str:
    """One message for a network that ``builder`` cannot build: its errors and a cure."""
    errors = read_errors(records)
    raw = "\n".join(record.text for record in records if record.is_error)
    said = "\n  ".join(errors[:_SHOWN]) or "TensorRT gave no reason"
    cure = find_cure("\n".join(errors) or raw)
    return f"{builder} cannot build an engine from {path}:\n  {said}\n{cure}"
