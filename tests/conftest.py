"""Shared by every test: slow ones run only when asked for, property tests have no deadline.

Where ONNX Runtime is too old for the decoders of JetPack 7 or for 8-bit activations in
float16, tests that come to run such a graph are skipped: Python 3.10's newest is.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

from tests.ort_versions import HAS_ALL, is_too_old_for

os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("-m") or ""
    if "slow" not in asked:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="run by hand: pytest -m slow"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _skip_what_onnxruntime_lacks())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _skip_what_onnxruntime_lacks())


def _skip_what_onnxruntime_lacks() -> Generator[None, object, object]:
    try:
        return (yield)
    except Exception as error:
        if HAS_ALL or not is_too_old_for(error):
            raise
        pytest.skip("this ONNX Runtime is too old")
