"""A bundle with a pass report."""

import pytest

from .bundles import PASSES, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "bundle"
    return write_bundle(path, checks={"passes": PASSES, "conformance": "passed"})


@pytest.fixture
def decoder(bundle):
    return bundle / "decoder" / "model.onnx"
