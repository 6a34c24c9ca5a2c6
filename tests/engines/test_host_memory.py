"""Memory that is taken as it is written."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.host_memory import zeros_on_demand
from mvlm_export.engines.kv_cache import CacheShape, HostKvCache

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MB = 1 << 20


def resident() -> int:
    """Bytes of this process's own memory that are there."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("shape", [(3, 4), (5,), (0, 4), (2, 3, 1000)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_zeros_that_can_be_written(shape: tuple[int, ...], dtype: str) -> None:
    array = zeros_on_demand(shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert array.flags.c_contiguous and not array.any()
    array[...] = 7
    assert (array == 7).all()


def test_arrays_are_apart() -> None:
    first, second = (zeros_on_demand((64,), "float32") for _ in range(2))
    first[...] = 1
    assert not second.any()


@linux
@pytest.mark.parametrize("form", ["fixed", "append"])
def test_a_cache_takes_the_memory_of_its_rows(form: str) -> None:
    """The first rows of each of 64 heads, of 256 MB; by pages of 2 MB that would be all."""
    shape = CacheShape(layers=2, heads=64, head_dim=128, capacity=2048, dtype="float32")
    shape = replace(shape, form=form)
    before = resident()
    cache = HostKvCache(shape)
    rows = np.ones(shape.rows(8), np.float32)
    for tensor in range(shape.tensors):
        cache.write_rows(tensor, 0, rows)
    assert shape.total_bytes == 256 * MB
    assert resident() - before < 16 * MB
    cache.advance(8)
    assert (cache.read_rows(3, 0, 8) == 1).all()


@linux
def test_what_cannot_be_had_is_said() -> None:
    with pytest.raises(EngineError, match=r"memory cannot be had .* smaller --max-length"):
        zeros_on_demand((1 << 58,), "float32")
