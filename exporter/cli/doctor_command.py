"""``mvlm doctor``: what this machine can compile, build and run, and why not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from .console import human_bytes, print_json, print_line, print_table

if TYPE_CHECKING:
    from mvlm_export.engines.doctor import Ability, DoctorReport, Machine, TargetVerdict
    from mvlm_export.engines.jetson import Jetson
    from mvlm_export.engines.jetson_power import Power

_MODULE_SIZE = re.compile(r" \d+GB( \(Super\))?")

EXAMPLES = """\b
Examples:
  mvlm doctor
  mvlm doctor --json > machine.json
"""


@click.command("doctor", epilog=EXAMPLES)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(as_json: bool) -> None:
    """Say what this machine can compile, build and run, and what mends the rest."""
    from mvlm_export.engines.doctor import examine

    report = examine()
    if as_json:
        print_json(report.to_json())
        return
    print_table("This machine", ("", ""), machine_rows(report.machine))
    columns = ("target", "for", "compile", "build", "run")
    print_table("What it can do", columns, verdict_rows(report))
    for line in (*speed_lines(report.machine), *reasons(report)):
        print_line(line)


def _word(ability: Ability) -> str:
    return "yes" if ability.ok else "no"


def verdict_rows(report: DoctorReport) -> list[tuple[str, ...]]:
    """A row for the targets of each series."""
    rows = []
    for verdicts in by_series(report):
        first = verdicts[0]
        names = ", ".join(verdict.target for verdict in verdicts)
        title = first.title if len(verdicts) == 1 else _MODULE_SIZE.sub("", first.title)
        words = map(_word, (first.compile, first.build, first.run))
        rows.append((names, title, *words))
    return rows


def by_series(report: DoctorReport) -> list[list[TargetVerdict]]:
    """The verdicts of each series together, in their order."""
    found: dict[str, list[TargetVerdict]] = {}
    for verdict in report.targets:
        found.setdefault(verdict.series, []).append(verdict)
    return list(found.values())


def machine_rows(machine: Machine) -> list[tuple[str, str]]:
    """The facts, two columns."""
    rows = [
        ("Python", machine.python),
        ("system", f"{machine.os}, {machine.architecture}"),
        ("GPU", machine.gpu.name or f"none ({machine.gpu.problem})"),
        ("disk free", human_bytes(machine.disk_free)),
    ]
    if machine.jetson is not None:
        rows[2:2] = jetson_rows(machine.jetson)
    if machine.memory_total is not None and machine.memory_available is not None:
        free = human_bytes(machine.memory_available)
        rows.insert(-1, ("memory", f"{human_bytes(machine.memory_total)}, {free} free"))
    rows += [(name, version or "-") for name, version in machine.packages.items()]
    rows.append(("ONNX Runtime", ", ".join(machine.providers) or "-"))
    return rows


def jetson_rows(jetson: Jetson) -> list[tuple[str, str]]:
    """Board, module, JetPack, power mode and clocks."""
    part = f", {jetson.part}" if jetson.part else ""
    linux = f"Jetson Linux {jetson.l4t}" if jetson.l4t else "unknown Jetson Linux"
    jetpack = jetson.jetpack_release or jetson.jetpack or "unknown"
    rows = [("Jetson", jetson.model)]
    if jetson.module is not None:
        rows.append(("module", f"{jetson.module}{part} (--target {jetson.target})"))
    rows.append(("JetPack", f"{jetpack} ({linux})"))
    return rows if jetson.power is None else rows + power_rows(jetson.power)


def power_rows(power: Power) -> list[tuple[str, str]]:
    """Power mode and clocks, those that can be read."""
    rows = []
    if power.mode is not None:
        rows.append(("power mode", f"{power.mode.name} (mode {power.mode.number})"))
    if power.gpu is not None:
        low, high, now = (
            _mhz(f) for f in (power.gpu.lowest, power.gpu.highest, power.gpu.current)
        )
        rows.append(("GPU clock", f"{low} to {high} MHz, now {now}"))
    if power.memory_clock is not None:
        rows.append(("memory clock", f"{_mhz(power.memory_clock)} MHz"))
    return rows


def _mhz(hertz: int) -> str:
    return f"{hertz / 1e6:.0f}"


def speed_lines(machine: Machine) -> list[str]:
    """Whether a Jetson runs as fast as it can, and what makes it; nothing off Jetson."""
    power = None if machine.jetson is None else machine.jetson.power
    if power is None or power.full_speed is None:
        return []
    if power.full_speed:
        return ["speed: yes, it runs in its fastest mode with its clocks at their highest."]
    fastest = power.fastest
    why = "its clocks follow the load"
    if fastest is not None and power.mode is not None and power.mode.speed < fastest.speed:
        why = f"its fastest mode is {fastest.name}"
    return [f"speed: no, {why}. Cure: {' && '.join(power.advice)}."]


def reasons(report: DoctorReport) -> list[str]:
    """Each different verdict once, with the targets it holds for; a no with its cure.

    A series is named by its first target.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for verdict, *_ in by_series(report):
        for deed in ("compile", "build", "run"):
            ability: Ability = getattr(verdict, deed)
            cure = "" if ability.ok or not ability.cure else f" Cure: {ability.cure}."
            text = f"{_word(ability)}, {ability.reason.rstrip('.')}.{cure}"
            found.setdefault((deed, text), []).append(verdict.target)
    return [f"{deed} {', '.join(targets)}: {text}" for (deed, text), targets in found.items()]
