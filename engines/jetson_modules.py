"""The Jetson Orin modules: memory, bandwidth and GPU of each, one frozen record a module.

Bandwidth and clocks are NVIDIA's: the module data sheets (AGX Orin DS-10662-001 v1.8, Orin NX
DS-10712-001 v1.7, Orin Nano DS-11105-001 v1.1), and for Super the MAXN_SUPER columns of the
Orin NX sheet and "JetPack 6.2 Brings Super Mode to Jetson Orin Nano and Jetson Orin NX
Modules". Bandwidth is bus width times twice the memory clock: 32 bytes at 3200 MHz is
204.8 GB/s, 16 bytes 102.4, 16 bytes at 2133 MHz 68, 8 bytes 34, and 8 bytes at 3200 MHz 51.

Products come from the GPU alone, as the deep-learning accelerators are not used here. An SM of
Orin does 4096 dense 8-bit operations a clock and 2048 in FP16. That gives what the data sheets
print for the GPU (half of the sparse figure): AGX 64GB 85.2 against 85 TOPS, AGX 32GB 53.3
against 54, NX 16GB 30.1 against 30, Super 38.4 against 38, Nano 8GB 20.5 against 20, Super
33.4 against 33.5, Nano 4GB 10.2 against 10, Super 16.7 against 17.
"""

from __future__ import annotations

from dataclasses import dataclass

AGX_ORIN, ORIN_NX, ORIN_NANO = "agx-orin", "orin-nx", "orin-nano"


@dataclass(frozen=True)
class JetsonModule:
    """One module in one of its two modes of clocks.

    Attributes:
        name: of the target made for it.
        title: the module, for people.
        series: modules that one bundle serves: each builds its own engines of the same graphs.
        memory_gb: as sold; LPDDR5 is counted in units of 2**30 bytes.
        bandwidth_gb_s: of its memory at the highest clock, GB/s, decimal.
        gpu_sms: streaming multiprocessors, of 128 CUDA cores each.
        gpu_ghz: highest clock of the GPU.
        parts: part numbers of the device tree, as in ``nvidia,p3768-0000+p3767-0003``.
        super_mode: whether these are the clocks of Super (MAXN_SUPER, JetPack 6.2 and newer),
            for which the board is flashed with a device tree that says so.
    """

    name: str
    title: str
    series: str
    memory_gb: float
    bandwidth_gb_s: float
    gpu_sms: int
    gpu_ghz: float
    parts: tuple[str, ...]
    super_mode: bool = False


_AGX_64 = ("p3701-0005", "p3701-0008")
# p3701-0000 is the first developer kit: 32 GB, but the GPU of the 64GB module.
_AGX_32 = ("p3701-0004", "p3701-0000")
_NX_16, _NX_8 = ("p3767-0000",), ("p3767-0001",)
_NANO_8, _NANO_4 = ("p3767-0003", "p3767-0005"), ("p3767-0004",)

# Part numbers: supported devices of the Jetson Linux Developer Guide's quick start.
JETSON_MODULES: tuple[JetsonModule, ...] = (
    JetsonModule("orin", "Jetson AGX Orin 64GB", AGX_ORIN, 64, 204.8, 16, 1.3, _AGX_64),
    JetsonModule("orin-32gb", "Jetson AGX Orin 32GB", AGX_ORIN, 32, 204.8, 14, 0.93, _AGX_32),
    JetsonModule("orin-nx", "Jetson Orin NX 16GB", ORIN_NX, 16, 102.4, 8, 0.918, _NX_16),
    JetsonModule(
        "orin-nx-super",
        "Jetson Orin NX 16GB (Super)",
        ORIN_NX,
        16,
        102.4,
        8,
        1.173,
        _NX_16,
        super_mode=True,
    ),
    JetsonModule("orin-nx-8gb", "Jetson Orin NX 8GB", ORIN_NX, 8, 102.4, 8, 0.765, _NX_8),
    JetsonModule(
        "orin-nx-8gb-super",
        "Jetson Orin NX 8GB (Super)",
        ORIN_NX,
        8,
        102.4,
        8,
        1.173,
        _NX_8,
        super_mode=True,
    ),
    JetsonModule(
        "orin-nano",
        "Jetson Orin Nano 8GB (Super)",
        ORIN_NANO,
        8,
        102.0,
        8,
        1.02,
        _NANO_8,
        super_mode=True,
    ),
    JetsonModule(
        "orin-nano-8gb", "Jetson Orin Nano 8GB", ORIN_NANO, 8, 68.0, 8, 0.625, _NANO_8
    ),
    JetsonModule(
        "orin-nano-4gb-super",
        "Jetson Orin Nano 4GB (Super)",
        ORIN_NANO,
        4,
        51.0,
        4,
        1.02,
        _NANO_4,
        super_mode=True,
    ),
    JetsonModule(
        "orin-nano-4gb", "Jetson Orin Nano 4GB", ORIN_NANO, 4, 34.0, 4, 0.625, _NANO_4
    ),
)
"""Within a series the larger memory comes first."""

ALIASES: dict[str, str] = {
    "orin-64gb": "orin",
    "orin-nx-16gb": "orin-nx",
    "orin-nx-16gb-super": "orin-nx-super",
    "orin-nano-super": "orin-nano",
    "orin-nano-8gb-super": "orin-nano",
}
"""Names in full of modules that have a shorter one."""


def module_of_part(part: str, super_mode: bool) -> JetsonModule | None:
    """The record of a part number; None if there is none.

    Args:
        super_mode: whether the device tree is Super's; without effect on a module that has no
            such mode.
    """
    return _nearest_mode([m for m in JETSON_MODULES if part in m.parts], super_mode)


def module_of_series(
    series: str, memory_bytes: int | None, super_mode: bool
) -> JetsonModule | None:
    """The record that a series and the memory that Linux sees point to.

    Linux sees less than the module has, as firmware keeps some: the smallest module that is
    not smaller counts, or the largest where nothing is known.
    """
    members = [m for m in JETSON_MODULES if m.series == series]
    sizes = sorted({m.memory_gb for m in members})
    seen = 0.0 if memory_bytes is None else memory_bytes / 2**30
    enough = [size for size in sizes if size >= seen]
    size = min(enough) if enough and memory_bytes is not None else max(sizes, default=0)
    return _nearest_mode([m for m in members if m.memory_gb == size], super_mode)


def _nearest_mode(found: list[JetsonModule], super_mode: bool) -> JetsonModule | None:
    exact = [module for module in found if module.super_mode == super_mode]
    return next(iter(exact or found), None)
