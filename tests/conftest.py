"""Shared by every test: slow, GPU and network tests run only when asked for."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

OPT_IN = ("slow", "gpu", "network")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("-m") or ""
    for item in items:
        for marker in OPT_IN:
            if marker in item.keywords and marker not in asked:
                item.add_marker(pytest.mark.skip(reason=f"run by hand: pytest -m {marker}"))
