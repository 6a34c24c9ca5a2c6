"""Records of steps to one JSON and to tables of ratios."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

PEERS = ("torch-eager", "torch-compile")
PHASES = ("vision", "projector", "prefill", "time_to_first_token", "total")
REMARKS = ("stopped_early", "remark")
HEAD = ("", *(f"{name.replace('_', ' ')} ms" for name in PHASES), "decode tok/s", "tok/s")


def read_records(folder: Path) -> dict[str, Record]:
    """Records by step, in the order in which they were made."""
    records = [
        (path.stem, json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.json"))
    ]
    return dict(sorted(records, key=lambda item: str(item[1].get("date", ""))))


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell for cell in row)
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "  ".join([first.ljust(widths[0]), *cells]).rstrip()

    return "\n".join(line(row) for row in (head, *rows))


def compare(contestants: Mapping[str, Record]) -> str:
    """The table of one race: medians, and ratios of speed to each peer that ran."""
    peers = [peer for peer in PEERS if peer in contestants]
    head = [*HEAD, "memory MB"]
    for peer in peers:
        short = peer.removeprefix("torch-")
        head += [f"decode x {short}", f"all x {short}", f"ids as {short}"]
    rows = []
    for name, found in contestants.items():
        row = [name, *(f"{found['seconds'][phase] * 1e3:.1f}" for phase in PHASES)]
        row += [f"{found[key]:.1f}" for key in _SPEEDS]
        memory = found.get("device_bytes", found.get("host_peak_bytes"))
        row.append("" if memory is None else f"{memory / 1e6:.0f}")
        for peer in peers:
            other = contestants[peer]
            row += [f"{found[key] / other[key]:.2f}" for key in _SPEEDS]
            row.append(f"{same_beginning(found['ids'], other['ids'])}/{len(found['ids'])}")
        rows.append(row)
    return format_table(head, rows)


_SPEEDS = ("decode_tokens_per_second", "tokens_per_second")


def same_beginning(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers have in common from the start."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(ids, other, strict=False))
    return sum(1 for _ in pairs)


def report(records: Mapping[str, Record]) -> str:
    """All tables, and every failure word for word."""
    parts = []
    for step, record in records.items():
        device = record.get("device", "unknown device")
        lines = [f"== {step}: {device}, {record.get('date', 'no date')}"]
        if record.get("contestants"):
            lines.append(compare(record["contestants"]))
        lines += [f"{key}: {record[key]}" for key in REMARKS if key in record]
        for found in record.get("capabilities", []):
            lines.append(f"  {found['capability']}: {found['outcome']}")
        for key, found in record.items():
            if key.startswith("parity_") and found is not None:
                verdict = "passed" if found["passed"] else "; ".join(found["failures"])
                lines.append(f"{key.replace('_', ' of ')}: {verdict}")
        for attempt in record.get("attempts", []):
            if attempt["error"] is not None:
                lines.append(f"FAILED {attempt['what']} ({attempt['seconds']} s):")
                lines += [f"    {line}" for line in attempt["error"].splitlines()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
