"""``mvlm doctor``: what this machine can compile, build and run, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .console import human_bytes, print_json, print_line, print_table

if TYPE_CHECKING:
    from mvlm_export.engines.doctor import Ability, DoctorReport, Machine

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
    rows = [
        (verdict.target, verdict.title, *map(_word, abilities))
        for verdict in report.targets
        for abilities in [(verdict.compile, verdict.build, verdict.run)]
    ]
    columns = ("target", "for", "compile", "build", "run")
    print_table("What it can do", columns, rows)
    for line in reasons(report):
        print_line(line)


def _word(ability: Ability) -> str:
    return "yes" if ability.ok else "no"


def machine_rows(machine: Machine) -> list[tuple[str, str]]:
    """The facts, two columns."""
    rows = [
        ("Python", machine.python),
        ("system", f"{machine.os}, {machine.architecture}"),
        ("GPU", machine.gpu.name or f"none ({machine.gpu.problem})"),
        ("disk free", human_bytes(machine.disk_free)),
    ]
    if machine.jetson is not None:
        rows.insert(2, ("Jetson", machine.jetson.model))
    if machine.memory_total is not None and machine.memory_available is not None:
        free = human_bytes(machine.memory_available)
        rows.insert(-1, ("memory", f"{human_bytes(machine.memory_total)}, {free} free"))
    rows += [(name, version or "-") for name, version in machine.packages.items()]
    rows.append(("ONNX Runtime", ", ".join(machine.providers) or "-"))
    return rows


def reasons(report: DoctorReport) -> list[str]:
    """Each different verdict once, with the targets it holds for; a no with its cure."""
    found: dict[tuple[str, str], list[str]] = {}
    for verdict in report.targets:
        for deed in ("compile", "build", "run"):
            ability: Ability = getattr(verdict, deed)
            cure = "" if ability.ok or not ability.cure else f" Cure: {ability.cure}."
            text = f"{_word(ability)}, {ability.reason.rstrip('.')}.{cure}"
            found.setdefault((deed, text), []).append(verdict.target)
    return [f"{deed} {', '.join(targets)}: {text}" for (deed, text), targets in found.items()]
