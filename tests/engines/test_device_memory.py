"""The GPU's memory and the cache in it, over CUDA's functions on host memory."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from mvlm_export.engines.cuda_api import CudaRuntime
from mvlm_export.engines.device_cache import DeviceKvCache
from mvlm_export.engines.device_memory import ALIGNMENT, CudaMemory, align
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.kv_cache import CacheShape, HostKvCache, KvForm

from .fake_cuda import FakeCuda, cudaError_t


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def memory(fake: FakeCuda) -> CudaMemory:
    return CudaMemory(CudaRuntime(fake))


def read(memory: CudaMemory, address: int, size: int) -> bytes:
    array = np.zeros(size, np.uint8)
    memory.download(array, address)
    memory.synchronize()
    return array.tobytes()


def test_sizes_are_rounded_up_to_what_tensorrt_takes() -> None:
    assert [align(size) for size in (0, 1, 256, 257)] == [0, 256, 256, 512]


def test_copies_there_within_and_back(memory: CudaMemory) -> None:
    buffer = memory.allocate(1000)
    assert buffer.address % ALIGNMENT == 0
    data = np.arange(100, dtype=np.uint8)
    memory.upload(buffer.address, data)
    memory.zero(buffer.address + 10, 5)
    memory.copy(buffer.address + 200, buffer.address + 5, 20)
    expected = data.copy()
    expected[10:15] = 0
    assert read(memory, buffer.address, 100) == expected.tobytes()
    assert read(memory, buffer.address + 200, 20) == expected[5:25].tobytes()


def test_rows_go_a_pitch_apart(memory: CudaMemory) -> None:
    buffer = memory.allocate(300)
    memory.zero(buffer.address, 300)
    rows = np.arange(1, 13, dtype=np.uint8).reshape(3, 4)
    memory.upload(buffer.address, rows, 100)
    whole = np.frombuffer(read(memory, buffer.address, 300), np.uint8).reshape(3, 100)
    np.testing.assert_array_equal(whole[:, :4], rows)
    assert not whole[:, 4:].any()
    back = np.zeros_like(rows)
    memory.download(back, buffer.address, 100)
    memory.synchronize()
    np.testing.assert_array_equal(back, rows)
    for empty in (rows[:0], rows[:, :0]):
        memory.upload(buffer.address, empty, 100)
        memory.download(empty, buffer.address, 100)


def test_staging_arrays_are_page_locked_and_given_back(
    fake: FakeCuda, memory: CudaMemory
) -> None:
    array = memory.allocate_staging([2, 3], "float16")
    assert (array.shape, array.dtype) == ((2, 3), np.float16)
    part = array[1:, :2]
    del array
    gc.collect()
    assert list(fake._host.blocks) == [part.ctypes.data - 6]  # the view keeps it
    part[...] = 2.0
    del part
    gc.collect()
    assert not fake._host.blocks


def test_memory_goes_with_its_last_reference(fake: FakeCuda, memory: CudaMemory) -> None:
    buffer = memory.allocate(10)
    assert len(fake._device.blocks) == 1
    del buffer
    assert not fake._device.blocks


def test_too_much_memory(fake: FakeCuda, memory: CudaMemory) -> None:
    fake._limit = 1000
    memory.allocate(600)
    with pytest.raises(EngineError, match="cudaMalloc failed with cudaErrorMemoryAllocation"):
        memory.allocate(1100)


def test_a_fault_of_queued_work_comes_with_the_wait(memory: CudaMemory) -> None:
    buffer = memory.allocate(256)
    memory.zero(buffer.address, 257)
    with pytest.raises(EngineError, match="Synchronize failed with cudaErrorIllegalAddress"):
        memory.synchronize()


def test_without_a_driver(fake: FakeCuda) -> None:
    fake._fail("cudaStreamCreateWithFlags", cudaError_t.cudaErrorInsufficientDriver)
    with pytest.raises(EngineError, match="no NVIDIA driver here, or cuda-python is newer"):
        CudaMemory(CudaRuntime(fake))


def test_captured_work_runs_when_it_is_launched(fake: FakeCuda, memory: CudaMemory) -> None:
    buffer, value = memory.allocate(256), np.zeros(1, np.uint8)
    work = memory.capture(lambda: memory.upload(buffer.address, value))
    memory.synchronize()
    assert read(memory, buffer.address, 1) == b"\xff"  # as it was allocated
    for number in (3, 4):
        value[0] = number
        work.launch()
        assert read(memory, buffer.address, 1) == bytes([number])
    del work
    gc.collect()
    assert not any(fake._graphs.values())


@pytest.mark.parametrize(
    "step", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]
)
def test_work_that_cannot_be_captured_leaves_the_stream_usable(
    fake: FakeCuda, memory: CudaMemory, step: str
) -> None:
    buffer, value = memory.allocate(256), np.full(1, 9, np.uint8)
    memory.zero(buffer.address, 1)
    fake._fail(step, cudaError_t.cudaErrorUnknown)
    with pytest.raises(EngineError, match=f"{step} failed"):
        memory.capture(lambda: memory.upload(buffer.address, value))
    assert read(memory, buffer.address, 1) == b"\0"
    memory.upload(buffer.address, value)
    assert read(memory, buffer.address, 1) == b"\x09"


def test_an_error_while_capturing_ends_the_capture(memory: CudaMemory) -> None:
    with pytest.raises(EngineError, match="cudaErrorStreamCaptureUnsupported"):
        memory.capture(lambda: memory.allocate(8) and None)
    memory.allocate(8)


# The cache.


@pytest.mark.parametrize("form", ["append", "fixed"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_the_cache_are_as_on_the_host(
    memory: CudaMemory, form: KvForm, dtype: str
) -> None:
    shape = CacheShape(layers=2, heads=3, head_dim=5, capacity=7, dtype=dtype, form=form)
    device, host = DeviceKvCache(shape, memory), HostKvCache(shape)
    rows = np.random.default_rng(0).normal(size=shape.rows(6)).astype(dtype)
    for cache in (device, host):
        for tensor in range(4):
            cache.write_rows(tensor, 1, rows[1:] + tensor)
            cache.write_rows(tensor, 0, rows[:1] + tensor)
        cache.advance(6)
    starts = [device.past_address(tensor) for tensor in range(4)]
    assert all(start % ALIGNMENT == 0 for start in starts)
    whole = read(memory, starts[0], 3 * 5 * 7 * np.dtype(dtype).itemsize)
    if form == "fixed":
        assert whole == host._memory[0].tobytes()  # type: ignore[attr-defined]
    for tensor in range(4):
        np.testing.assert_array_equal(device.read_rows(tensor, 0, 6), rows + tensor)
        np.testing.assert_array_equal(
            device.read_rows(tensor, 2, 4), host.read_rows(tensor, 2, 4)
        )
    assert device.read_rows(0, 3, 3).shape == (0, 3, 5)
    with pytest.raises(EngineError, match="it holds 6"):
        device.read_rows(0, 0, 7)
    with pytest.raises(EngineError, match="do not fit at position 6"):
        device.write_rows(0, 6, rows[:2])


def test_a_new_cache_of_the_fixed_form_is_zero(memory: CudaMemory) -> None:
    """A NaN behind the filled rows would come through the mask."""
    shape = CacheShape(1, 2, 4, 8, "float32", "fixed")
    cache = DeviceKvCache(shape, memory)
    cache.advance(8)
    assert not cache.read_rows(1, 0, 8).any()
    cache.write_rows(1, 0, np.full(shape.rows(8), np.nan, np.float32))
    cache.truncate(3)
    cache.clear_behind()
    cache.advance(5)
    rows = cache.read_rows(1, 0, 8)
    assert np.isnan(rows[:3]).all()
    assert not rows[3:].any()


def test_a_cache_gives_its_memory_back(fake: FakeCuda, memory: CudaMemory) -> None:
    cache = DeviceKvCache(CacheShape(1, 2, 4, 8, "float32"), memory)
    assert sum(map(len, fake._device.blocks.values())) == 2 * 256
    del cache
    assert not fake._device.blocks
