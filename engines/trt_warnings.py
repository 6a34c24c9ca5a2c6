"""Which of TensorRT's warnings mean that the engine is not the graph, and which mean nothing.

A warning that fits neither table is kept in build.json and shown. Words are those of TensorRT
10.1 to 11 and TensorRT-RTX 1.7; those of the parser are in onnx-tensorrt's public source.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WarningRule:
    """Warnings of one kind.

    Attributes:
        pattern: of TensorRT's words.
        reason: why it must not, or why it may, pass.
        cure: what to do; "" for one that may pass.
    """

    pattern: re.Pattern[str]
    reason: str
    cure: str = ""


def _rule(pattern: str, reason: str, cure: str = "") -> WarningRule:
    return WarningRule(re.compile(pattern, re.IGNORECASE), reason, cure)


REFUSED = (
    _rule(
        r"Unused Input: *(?P<what>.*)",
        "TensorRT would ignore the input(s) {what}: the engine would not compute what the "
        "graph says.",
        "Remove an input that feeds nothing; where it feeds an operator (the lengths of "
        "Attention), say the same with standard operators.",
    ),
    _rule(
        r"layer ?norm\w* nodes in FP16|layer ?norm.*overflow",
        "A normalisation would run in FP16, where its sum of squares overflows.",
        "Put Casts to FP32 before and after it: the float16 pass leaves such islands.",
    ),
    _rule(
        r"issues when converted to (FP16|BF16|INT8|INT4)|"
        r"(weight|value|constant|initiali[sz]er)s?\b.*"
        r"(out(side)? of( the)? range|outside the range|clamped|infinit|overflow|\bNaN\b)",
        "Numbers of the graph do not fit the type that TensorRT stores them in, so it changes "
        "them.",
        "Compile again with float32 for what is named, or store it in a type that holds it.",
    ),
    _rule(
        r"(missing|no) scale and zero.?point|missing (dynamic range|calibration)",
        "A tensor of an integer layer has no scale, so TensorRT would choose its type itself.",
        "Give each side of the integer layer a QuantizeLinear or DequantizeLinear.",
    ),
    _rule(
        r"(fall(ing|s)? ?back|reverted|demoted|promoted) to "
        r"(FP32|FP16|BF16|TF32|INT8|float|half)",
        "TensorRT would run a layer in another type than the graph's.",
        "Write the type that is meant into the graph with a Cast.",
    ),
    _rule(
        r"(cast|convert)\w* (down )?(from )?(DOUBLE|FLOAT64)\b",
        "TensorRT has no float64 and would round it to float32.",
        "Compile without float64: cast before the graph is written.",
    ),
    _rule(
        r"(precision|accuracy) (loss|may|will|could|degrad)|"
        r"(loss of|reduced) (precision|accuracy)",
        "TensorRT itself says that numbers get worse.",
        "Write the type that is meant into the graph with a Cast.",
    ),
)
"""A build with such a warning fails."""

HARMLESS = (
    _rule(
        r"Make sure input .* has Int64 binding",
        "The runtime binds each input with the type the manifest gives.",
    ),
    _rule(
        r"kMAX values.*not self-consistent|kMAX .*profile .*not self-consistent",
        "S + T over all rows of the cache is possible by the profile alone; the caller keeps "
        "it within the cache.",
    ),
    _rule(
        r"INT64 weights.*cast down to INT32",
        "Indices and shapes alone are int64 in these graphs; one that does not fit has a "
        "warning of its own, which is refused.",
    ),
    _rule(
        r"timing cache",
        "Timings of another build are not used, so kernels are timed anew.",
    ),
    _rule(
        r"across different models of devices",
        "The plan's folder and key hold the GPU, so a plan of another is not loaded.",
    ),
    _rule(
        r"was linked against \w+ [\d.]+ but loaded",
        "Libraries of one JetPack or one pip release are made to work together.",
    ),
    _rule(
        r"lazy loading is not enabled",
        "It costs memory and start-up time and changes no number.",
    ),
    _rule(
        r"logger passed into .* differs",
        "TensorRT keeps the first logger of a process, which is this builder's.",
    ),
    _rule(
        r"Unable to determine GPU memory usage",
        "It concerns the build's own housekeeping.",
    ),
)
"""Such a warning may pass: it is kept, but not shown."""


def find_rule(text: str, rules: Sequence[WarningRule]) -> WarningRule | None:
    """The first rule that fits a warning."""
    return next((rule for rule in rules if rule.pattern.search(text)), None)


def describe_refused(warnings: Sequence[str]) -> str | None:
    """One message on the warnings that must not pass; None if there are none."""
    groups: dict[WarningRule, list[str]] = {}
    for text in warnings:
        if find_rule(text, HARMLESS) is not None:
            continue
        rule = find_rule(text, REFUSED)
        if rule is not None:
            groups.setdefault(rule, []).append(text)
    return "\n".join(_describe(rule, texts) for rule, texts in groups.items()) or None


def _describe(rule: WarningRule, texts: Sequence[str]) -> str:
    matches = [match for text in texts if (match := rule.pattern.search(text)) is not None]
    what = ", ".join(found.strip() for m in matches if (found := m.groupdict().get("what")))
    said = "".join(f'\n  TensorRT: "{text}"' for text in texts)
    return f"{rule.reason.format(what=what)} {rule.cure}{said}"


def notable_warnings(warnings: Sequence[str]) -> tuple[str, ...]:
    """Those that a person should see: all that are not known to be harmless."""
    return tuple(text for text in warnings if find_rule(text, HARMLESS) is None)
