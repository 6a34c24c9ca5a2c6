"""The documents say what is: their commands exist, their example runs, their tables hold."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mvlm_export.engines.manifest import Manifest
from mvlm_export.exporter.cli.main import mvlm
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.settings import CompileSettings
from mvlm_export.exporter.tolerances import TOLERANCES
from tests.exporter.conftest import Silent

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "examples/nano/README.md",
]
SOURCES = [
    path
    for folder in ("engines", "passes", "calibration", "exporter")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES], ids=lambda path: path.name)
def test_commands_that_are_named_exist(path):
    named = set(re.findall(r"`mvlm ([a-z]+)", path.read_text(encoding="utf-8")))
    assert named <= set(mvlm.commands)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(path):
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert all((path.parent / link).exists() for link in links)
    roots = ("exporter", "engines", "passes", "examples", "tests", "docs", "calibration")
    named = re.findall(rf"`((?:{'|'.join(roots)})/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readmes_example_runs(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    settings = CompileSettings(output=tmp_path / "build" / "nano-cpu", parity=False)
    compile_checkpoint(settings, Silent())
    exec(code.group(1), {})
    output = capsys.readouterr().out
    assert output.startswith("at the bottom right ")
    assert "a red triangle at the top left" in output


def test_the_manifests_table_is_complete():
    text = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    table = text.split("## manifest.json")[1].split("##")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {field.name for field in fields(Manifest)}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_table_of_bounds_is_the_codes(dtype):
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = [row.split("|") for row in text.splitlines() if row.startswith("|")]
    header = next(row for row in rows if "float32" in "".join(row))
    column = [cell.strip() for cell in header].index(dtype)
    for field in fields(TOLERANCES[dtype]):
        (row,) = (row for row in rows if row[1].strip() == f"`{field.name}`")
        written = row[column].strip()
        value = float(written[:-1]) / 100 if written.endswith("%") else float(written)
        assert value == getattr(TOLERANCES[dtype], field.name)
