"""Shared by every test: slow ones run only when asked for, property tests have no deadline."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("-m") or ""
    if "slow" not in asked:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="run by hand: pytest -m slow"))
