"""Does a graph fit a target? Checked on any host, before anyone walks over to the device.

A parse by TensorRT-RTX does not prove that TensorRT 10.3 reads a graph: RTX knows operators
that 10.3 does not. So opset, IR version, operators, element types, Q/DQ forms and external
data are compared with the target's record and its parser's operators. Weights stay on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.targets import Target

from .conformance_weights import WeightReader, check_external_data, check_quantization
from .tensorrt_ops import OP_SETS, REPLACEMENTS, OpSet

_STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
# Attributes that name an element type, by operator: they make tensors no input declares.
_DTYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype"})
_DTYPE_CURES = {
    "DOUBLE": "Store or cast it as FLOAT.",
    "UINT4": "Use INT4 with symmetric scales.",
    "STRING": "Take text out of the graph; the tokenizer does it.",
    "UINT8": "Cast it at the graph's input or output; quantize to INT8.",
}
_SHOWN_GROUPS = 12


@dataclass(frozen=True)
class Violation:
    """One thing that does not fit.

    Attributes:
        rule: "opset", "ir", "domain", "op", "form", "dtype", "quantization" or "data".
        node: name of the node or tensor; "" for the model itself.
        op: operator; "" if it is no node.
        what: what does not fit.
        cure: what to do.
    """

    rule: str
    node: str
    op: str
    what: str
    cure: str

    def __str__(self) -> str:
        place = " ".join(
            part for part in (self.op, repr(self.node) if self.node else "") if part
        )
        return f"{place or 'model'}: {self.what}. {self.cure}"


@dataclass(frozen=True)
class ConformanceReport:
    """What a graph was compared with, and what does not fit.

    Attributes:
        model: path or name of the graph.
        target: title of the target.
        nodes: nodes looked at, those of subgraphs included.
        violations: in the graph's order.
    """

    model: str
    target: str
    nodes: int
    violations: tuple[Violation, ...]

    @property
    def ok(self) -> bool:
        return not self.violations

    def raise_if_failed(self) -> None:
        """Raise with every kind of violation, each with its first node.

        Raises:
            EngineError: there are violations.
        """
        if self.ok:
            return
        groups: dict[tuple[str, str, str], list[Violation]] = {}
        for violation in self.violations:
            groups.setdefault((violation.op, violation.what, violation.cure), []).append(
                violation
            )
        lines = [
            f"  {group[0]}" + (f" ({len(group)} nodes alike)" if len(group) > 1 else "")
            for group in list(groups.values())[:_SHOWN_GROUPS]
        ]
        if len(groups) > _SHOWN_GROUPS:
            lines.append(f"  and {len(groups) - _SHOWN_GROUPS} more kinds")
        count = len(self.violations)
        raise EngineError(
            f"{self.model} does not fit {self.target}; {count} "
            f"violation{'s' if count > 1 else ''}:\n" + "\n".join(lines)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for report.json."""
        return {**asdict(self), "violations": [asdict(v) for v in self.violations]}


def check_conformance(
    model: str | Path | onnx.ModelProto, target: Target, folder: Path | None = None
) -> ConformanceReport:
    """Compare a model with a target.

    Args:
        model: a file, or a model in memory; external data is not loaded.
        target: what it must fit.
        folder: where the external data of a model in memory lies; None skips its check.

    Raises:
        EngineError: the file is missing or is no ONNX file.
    """
    if isinstance(model, onnx.ModelProto):
        proto, name = model, model.graph.name or "the model"
    else:
        path = Path(model)
        proto, name, folder = _load(path), str(path), path.parent
    checker = _Checker(proto, target, folder)
    violations = tuple(checker.run())
    return ConformanceReport(name, target.title, checker.nodes, violations)


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise EngineError(f"Cannot read {path}: {error}. Compile the model first.") from error
    except DecodeError as error:
        raise EngineError(
            f"{path} is no ONNX file ({error}). Give the .onnx file, or compile again."
        ) from error
    if not model.HasField("graph"):
        raise EngineError(f"{path} holds no graph. Compile again.")
    return model


class _Checker:
    """One comparison; ``nodes`` counts what was looked at."""

    def __init__(self, model: onnx.ModelProto, target: Target, folder: Path | None) -> None:
        self.model = model
        self.target = target
        self.folder = folder
        self.nodes = 0
        self.op_set: OpSet | None = OP_SETS[target.op_set] if target.op_set else None
        self.graphs = list(_walk_graphs(model.graph))
        constants = {t.name: t for graph in self.graphs for t in graph.initializer}
        constants |= {
            node.output[0]: attribute.t
            for graph in self.graphs
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
        self.weights = WeightReader(constants, folder)
        # Constant nodes with value_ints and its like hold no tensor but are constant too.
        self.constant_names = set(constants) | {
            node.output[0]
            for graph in self.graphs
            for node in graph.node
            if node.op_type == "Constant"
        }

    def run(self) -> Iterator[Violation]:
        yield from self._check_versions()
        for graph in self.graphs:
            yield from self._check_tensors(graph)
            for node in graph.node:
                self.nodes += 1
                yield from self._check_node(node)

    def _check_versions(self) -> Iterator[Violation]:
        target = self.target
        if self.model.ir_version > target.ir_ceiling:
            yield Violation(
                "ir",
                "",
                "",
                f"IR version {self.model.ir_version}, {target.title} reads up to "
                f"{target.ir_ceiling}",
                f"Save it with ir_version {target.ir_ceiling}.",
            )
        for entry in self.model.opset_import:
            standard = entry.domain in _STANDARD_DOMAINS
            if standard and entry.version > target.opset_ceiling:
                yield Violation(
                    "opset",
                    "",
                    "",
                    f"opset {entry.version}, {target.title} reads up to "
                    f"{target.opset_ceiling}",
                    "Export at opset 20 (21 for INT4).",
                )
        for function in self.model.functions:
            yield Violation(
                "domain",
                function.name,
                "",
                "a local function is defined in the model",
                "Inline it (onnx.inliner.inline_local_functions).",
            )

    def _check_tensors(self, graph: onnx.GraphProto) -> Iterator[Violation]:
        for value in [*graph.input, *graph.output]:
            yield from self._check_dtype(value.type.tensor_type.elem_type, value.name, io=True)
        for value in graph.value_info:
            yield from self._check_dtype(value.type.tensor_type.elem_type, value.name)
        for tensor in graph.initializer:
            yield from self._check_dtype(tensor.data_type, tensor.name)
            finding = None if self.folder is None else check_external_data(tensor, self.folder)
            if finding is not None:
                yield Violation("data", tensor.name, "", finding.what, finding.cure)
        for sparse in graph.sparse_initializer:
            yield Violation(
                "form",
                sparse.values.name,
                "",
                "a sparse initializer",
                "Store it dense.",
            )

    def _check_dtype(
        self, dtype: int, name: str, op: str = "", io: bool = False
    ) -> Iterator[Violation]:
        if dtype == onnx.TensorProto.UNDEFINED:
            return
        label = onnx.TensorProto.DataType.Name(onnx.TensorProto.DataType.ValueType(dtype))
        target = self.target
        if label in target.dtypes and (io or label not in target.io_only_dtypes):
            return
        where = " inside the graph" if label in target.dtypes else ""
        allowed = ", ".join(sorted(target.dtypes - target.io_only_dtypes))
        cure = _DTYPE_CURES.get(label, "")
        if label.startswith("FLOAT8"):
            cure = "Orin's GPU (Ampere) has no FP8: use the int8 recipe."
        yield Violation(
            "dtype",
            name,
            op,
            f"element type {label}{where}, which {target.title} does not take",
            cure or f"Use one of {allowed}.",
        )

    def _check_node(self, node: onnx.NodeProto) -> Iterator[Violation]:
        name, op = node.name or f"(makes {', '.join(node.output)})", node.op_type
        if node.domain not in _STANDARD_DOMAINS:
            if node.domain not in self.target.extra_domains:
                yield Violation(
                    "domain",
                    name,
                    op,
                    f"operator domain {node.domain!r}, unknown to {self.target.title}",
                    "Lower it to standard ONNX operators for this target.",
                )
            return
        for attribute in node.attribute:
            if attribute.name in _DTYPE_ATTRIBUTES:
                yield from self._check_dtype(attribute.i, name, op)
            elif attribute.type == onnx.AttributeProto.TENSOR:
                yield from self._check_dtype(attribute.t.data_type, name, op)
        if self.op_set is not None:
            if op not in self.op_set.ops:
                advice = REPLACEMENTS.get(op, "express it with operators the parser knows")
                yield Violation(
                    "op",
                    name,
                    op,
                    f"{self.op_set.title} has no importer for it",
                    f"{advice[0].upper()}{advice[1:]}.",
                )
                return
            for what, cure in _form_findings(node, self.op_set, self.constant_names):
                yield Violation("form", name, op, what, cure)
        yield from self._check_quantization(node, name)

    def _check_quantization(self, node: onnx.NodeProto, name: str) -> Iterator[Violation]:
        if not self.target.symmetric_quantization:
            return
        if node.op_type in _QUANTIZERS:
            for finding in check_quantization(node, self.weights):
                yield Violation("quantization", name, node.op_type, finding.what, finding.cure)
            return
        for source in node.input:
            tensor = self.weights.tensors.get(source)
            if tensor is not None and tensor.data_type == onnx.TensorProto.INT4:
                yield Violation(
                    "quantization",
                    name,
                    node.op_type,
                    f"reads INT4 weight {source!r} directly",
                    "Put a DequantizeLinear between them.",
                )


def _form_findings(
    node: onnx.NodeProto, op_set: OpSet, constants: set[str]
) -> Iterator[tuple[str, str]]:
    """(what, cure) for what the parser does not take of an operator that it knows."""
    given = {i: source for i, source in enumerate(node.input) if source}
    for index, label in op_set.constant_inputs.get(node.op_type, {}).items():
        if index in given and given[index] not in constants:
            yield (
                f"input {label!r} is computed, {op_set.title} needs a constant",
                "Fold it to an initializer.",
            )
    for index, label in op_set.absent_inputs.get(node.op_type, {}).items():
        if index in given:
            yield (
                f"input {label!r} is given, {op_set.title} ignores or refuses it",
                "Say the same with standard operators: concatenate past and new rows outside, "
                "and give a mask.",
            )
    attributes = {attribute.name: attribute for attribute in node.attribute}
    for label, reason in op_set.absent_attributes.get(node.op_type, {}).items():
        if label in attributes and onnx.helper.get_attribute_value(attributes[label]):
            yield (
                f"attribute {label!r} is set: in {op_set.title} {reason}",
                "Give an explicit mask as input instead.",
            )
    if node.op_type in op_set.single_output and any(node.output[1:]):
        yield (
            f"{op_set.title} makes its first output alone",
            "Leave the other outputs out and compute them beside it.",
        )


def _walk_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every graph inside its nodes (If, Loop, Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _walk_graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _walk_graphs(inner)
