from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mvlm_export.engines.errors import EngineError, MvlmError
from mvlm_export.engines.kv_cache import CacheShape, HostKvCache, KvCache, cache_names

SHAPE = CacheShape(layers=2, heads=3, head_dim=4, capacity=10, dtype="float32")
FIXED = replace(SHAPE, form="fixed")
BOTH = pytest.mark.parametrize("shape", [SHAPE, FIXED], ids=["append", "fixed"])


class BorrowedKvCache(KvCache):
    """A cache that knows addresses alone."""

    def read_rows(self, tensor: int, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError

    def write_rows(self, tensor: int, start: int, rows: np.ndarray) -> None:
        raise NotImplementedError


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_sizes() -> None:
    assert SHAPE.tensors == 4
    assert SHAPE.row_bytes == 3 * 4 * 4
    assert SHAPE.total_bytes == 4 * 10 * 48
    half = CacheShape(2, 3, 4, 10, "float16")
    assert half.row_bytes == 24
    assert half.rows(7) == (7, 3, 4)


def test_names_are_the_graphs() -> None:
    assert cache_names("past_key_values", 1) == [
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert cache_names("present", 2) == [
        "present.0.key",
        "present.0.value",
        "present.1.key",
        "present.1.value",
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_new_rows_lie_right_behind_the_past_and_become_it(dtype: str) -> None:
    cache = HostKvCache(CacheShape(2, 3, 4, 10, dtype))
    written = []
    for step, count in enumerate((4, 1, 3, 2)):
        for tensor in range(4):
            new = cache.new(tensor, count)
            assert new.shape == (count, 3, 4)
            assert new.dtype == dtype
            assert new.flags.c_contiguous
            past = cache.past(tensor)
            assert address(new) == address(past) + past.nbytes
            assert address(new) == cache.new_address(tensor)
            new[...] = 100 * step + tensor
        cache.advance(count)
        written += [100 * step] * count
        for tensor in range(4):
            assert address(cache.past(tensor)) == cache.past_address(tensor)
            assert cache.past(tensor)[:, 0, 0].tolist() == [w + tensor for w in written]
    assert cache.length == cache.capacity == 10


def test_buffers_of_tensors_do_not_overlap() -> None:
    cache = HostKvCache(SHAPE)
    starts = sorted(cache.past_address(tensor) for tensor in range(4))
    size = SHAPE.capacity * SHAPE.row_bytes
    assert all(b - a >= size for a, b in pairwise(starts))


@BOTH
def test_truncate_keeps_the_first_rows_and_reuses_the_rest(shape: CacheShape) -> None:
    cache = HostKvCache(shape)
    cache.new(0, 6)[...] = np.arange(6).reshape(6, 1, 1)
    cache.advance(6)
    before = cache.past_address(0)
    cache.truncate(2)
    assert cache.past(0)[:, 0, 0].tolist() == [0, 1]
    offset = 2 * SHAPE.row_bytes if shape is SHAPE else 0
    assert cache.new_address(0) == before + offset
    cache.new(0, 1)[...] = 9
    cache.advance(1)
    assert cache.past(0)[:, 0, 0].tolist() == [0, 1, 9]
    cache.truncate(0)
    assert cache.past(0).shape == (0, 3, 4)
    assert cache.past_address(0) == before != 0


def test_full_cache_is_refused_with_the_numbers() -> None:
    cache = HostKvCache(SHAPE)
    cache.advance(8)
    with pytest.raises(MvlmError, match="holds 8 of 10 positions, so 3 more cannot be added"):
        cache.advance(3)
    with pytest.raises(EngineError, match="so 3 more"):
        cache.new(0, 3)
    with pytest.raises(EngineError, match="so -1 more"):
        cache.require_room(-1)
    assert cache.length == 8
    cache.advance(2)
    cache.require_room(0)


@pytest.mark.parametrize("length", [-1, 6])
def test_truncate_cannot_grow(length: int) -> None:
    cache = HostKvCache(SHAPE)
    cache.advance(5)
    with pytest.raises(EngineError, match=f"holds 5 positions and cannot be cut to {length}"):
        cache.truncate(length)
    assert cache.length == 5


def test_any_memory_serves() -> None:
    """What TensorRT does: addresses of its own allocation, and no array."""
    memory = [np.zeros(SHAPE.rows(10), np.float32) for _ in range(4)]
    cache = BorrowedKvCache(SHAPE, [address(array) for array in memory], memory)
    cache.advance(3)
    assert cache.new_address(2) == address(memory[2][3:])
    with pytest.raises(EngineError, match="needs 4 buffers, but 3 were given"):
        BorrowedKvCache(SHAPE, [1, 2, 3], None)


def test_shapes_to_bind() -> None:
    append, fixed = HostKvCache(SHAPE), HostKvCache(FIXED)
    for cache in (append, fixed):
        cache.advance(4)
    assert (append.past_shape, append.new_shape(2)) == ((4, 3, 4), (2, 3, 4))
    assert fixed.past_shape == fixed.new_shape(2) == FIXED.buffer == (1, 3, 10, 4)
    assert fixed.new_address(1) == fixed.past_address(1)


def test_a_fixed_cache_is_head_major_in_memory() -> None:
    """What the graph sees at the address: heads, then positions."""
    cache = HostKvCache(FIXED)
    rows = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    cache.write_rows(2, 5, rows)
    memory = cache._memory[2]
    assert memory.shape == (1, 3, 10, 4)
    assert address(memory) == cache.past_address(2)
    np.testing.assert_array_equal(memory[0, :, 5:7], rows.transpose(1, 0, 2))
    assert np.count_nonzero(memory) == np.count_nonzero(rows)


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_read_back_as_they_were_written(shape: CacheShape, dtype: str) -> None:
    cache = HostKvCache(replace(shape, dtype=dtype))
    rows = np.random.default_rng(3).normal(size=(4, 10, 3, 4)).astype(dtype)
    for tensor in range(4):
        cache.write_rows(tensor, 0, rows[tensor, :3])
        cache.write_rows(tensor, 3, rows[tensor, 3:])
    assert cache.length == 0
    cache.advance(10)
    for tensor in range(4):
        np.testing.assert_array_equal(cache.past(tensor), rows[tensor])
        found = cache.read_rows(tensor, 2, 7)
        np.testing.assert_array_equal(found, rows[tensor, 2:7])
        found[...] = 0
        np.testing.assert_array_equal(cache.past(tensor), rows[tensor])


@BOTH
def test_rows_that_do_not_fit_are_refused(shape: CacheShape) -> None:
    cache = HostKvCache(shape)
    cache.advance(4)
    with pytest.raises(EngineError, match=r"Rows 2 to 5 .* but it holds 4"):
        cache.read_rows(0, 2, 5)
    wrong = [(8, (3, 3, 4), "float32"), (-1, (3, 3, 4), "float32"), (0, (3, 4, 3), "float32")]
    for start, size, dtype in [*wrong, (0, (3, 3, 4), "float16")]:
        with pytest.raises(EngineError, match=f"of {dtype} do not fit at position {start}"):
            cache.write_rows(0, start, np.zeros(size, dtype))


def test_a_fixed_cache_never_holds_what_masking_lets_pass() -> None:
    cache = HostKvCache(FIXED)
    assert not np.any(cache._memory[0])
    for tensor in range(4):
        cache.new(tensor, 10)[...] = np.nan
        cache.write_rows(tensor, 0, np.ones((3, 3, 4), np.float32))
    cache.advance(3)
    cache.clear_behind()
    for array in cache._memory:
        np.testing.assert_array_equal(array[0, :, :3], 1)
        np.testing.assert_array_equal(array[0, :, 3:], 0)
