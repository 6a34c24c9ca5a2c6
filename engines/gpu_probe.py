"""Is there an NVIDIA GPU here, and which: asked of the driver library, without any package."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

# CUdevice_attribute of cuda.h.
_CC_MAJOR, _CC_MINOR = 75, 76
_DRIVER_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@dataclass(frozen=True)
class GpuInfo:
    """The first GPU, or why there is none.

    Attributes:
        name: the driver's name of it; None without a GPU.
        compute_capability: (8, 7) for Orin; None without a GPU.
        problem: why no GPU can be used; None with one.
    """

    name: str | None
    compute_capability: tuple[int, int] | None
    problem: str | None

    @property
    def present(self) -> bool:
        return self.problem is None


def probe_gpu(library: str = _DRIVER_LIBRARY) -> GpuInfo:
    """Ask the CUDA driver for its first device; never raises.

    Args:
        library: the driver's shared library; tests give one that does not exist.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return GpuInfo(None, None, f"no NVIDIA driver ({library} is not installed)")
    status = driver.cuInit(0)
    if status != 0:
        return GpuInfo(None, None, f"the NVIDIA driver does not start (cuInit: {status})")
    device = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return GpuInfo(None, None, "the NVIDIA driver sees no GPU")
    name = ctypes.create_string_buffer(128)
    driver.cuDeviceGetName(name, len(name), device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CC_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CC_MINOR, device)
    return GpuInfo(name.value.decode(errors="replace"), (major.value, minor.value), None)
