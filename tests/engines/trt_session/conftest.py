"""Bundles of every form with plans, and a device that is pretended."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..bundles import add_next_token, derive_bundle
from ..conftest import TinyModel
from ..plans import Device, pretend_device, with_plans
from ..test_nano_reuse import nano  # noqa: F401 - a fixture


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return pretend_device(monkeypatch)


@pytest.fixture(scope="session")
def sources(
    tiny: TinyModel,
    tiny_fixed: TinyModel,
    tiny_half: TinyModel,
    nano: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Bundles by what is special of their decoder; rows of nano alone are aligned."""
    folder = tmp_path_factory.mktemp("sources")
    edits = {"decoder": add_next_token}
    return {
        "append": tiny.path,
        "append-token": derive_bundle(tiny.path, folder / "token", edits),
        "half": tiny_half.path,
        "fixed": tiny_fixed.path,
        "nano": nano,
    }


@pytest.fixture(scope="session")
def plans(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same with the plans of a build."""
    folder = tmp_path_factory.mktemp("plans")
    return {name: with_plans(path, folder / name) for name, path in sources.items()}
