"""Power mode and clocks of a Jetson, and what makes it run as fast as it can.

``nvpmodel`` keeps its modes in ``/etc/nvpmodel.conf`` and the number of the one that is set in
``/var/lib/nvpmodel/status`` (``pmode:0002``). A mode caps the clocks; below the caps they
follow the load until ``jetson_clocks`` sets each lowest clock to its highest. Numbers differ
by board (MAXN is 0 on an AGX Orin, MAXN_SUPER is 2 on an Orin Nano), so the fastest mode is
found by its caps and never by its number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_MODE = re.compile(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", re.MULTILINE)
_DEFAULT = re.compile(r"^<\s*PM_CONFIG\s+DEFAULT=(\d+)\s*>", re.MULTILINE)
_CAP = re.compile(r"^(GPU|EMC)\s+MAX_FREQ\s+(-?\d+)", re.MULTILINE)
_STATUS = re.compile(r"pmode:(\d+)")
_WATTS = re.compile(r"(\d+)W")
_GPU_NAMES = ("gpu", "ga10b")
"""In the name of its folder in ``/sys/class/devfreq``: ``17000000.gpu`` or ``.ga10b``."""


@dataclass(frozen=True)
class PowerMode:
    """One mode of ``nvpmodel``.

    Attributes:
        caps: highest clocks in Hz by ``GPU`` and ``EMC`` (memory); one that is missing is not
            capped.
    """

    number: int
    name: str
    caps: Mapping[str, int] = field(default_factory=dict)

    @property
    def speed(self) -> tuple[float, float, bool, int]:
        """Modes in their order: by the GPU's cap, the memory's, MAXN before others, watts."""
        watts = _WATTS.search(self.name)
        return (
            self.caps.get("GPU", math.inf),
            self.caps.get("EMC", math.inf),
            self.name.startswith("MAXN"),
            int(watts[1]) if watts else 0,
        )


@dataclass(frozen=True)
class GpuClock:
    """The GPU's clock in Hz: what it may go between, and where it is."""

    lowest: int
    highest: int
    current: int

    @property
    def locked(self) -> bool:
        """Whether it stays at its highest, as ``jetson_clocks`` makes it."""
        return self.lowest == self.highest


@dataclass(frozen=True)
class Power:
    """How fast a Jetson is set to run.

    Attributes:
        mode: the one that is set; None if it cannot be read.
        fastest: the mode that caps least; None likewise.
        gpu: None if it cannot be read.
        memory_clock: Hz of the memory controller; None if it cannot be read, as only root may.
        full_speed: whether mode and clock are the highest there are; None if that cannot be
            told from what can be read.
        advice: commands that make it so.
    """

    mode: PowerMode | None
    fastest: PowerMode | None
    gpu: GpuClock | None
    memory_clock: int | None
    full_speed: bool | None
    advice: tuple[str, ...]


def read_power(root: Path = Path("/")) -> Power:
    """Mode and clocks of the Jetson whose files lie under ``root``.

    What cannot be read is None; nothing is raised.
    """
    modes, default = parse_modes(_read(root / "etc" / "nvpmodel.conf"))
    status = _STATUS.search(_read(root / "var" / "lib" / "nvpmodel" / "status"))
    number = int(status[1]) if status else default
    fastest = max(modes.values(), key=lambda mode: mode.speed, default=None)
    mode = None if number is None else modes.get(number)
    gpu = _read_gpu(root / "sys" / "class" / "devfreq")
    emc = root / "sys" / "kernel" / "debug" / "bpmp" / "debug" / "clk" / "emc" / "rate"
    advice = _advice(mode, fastest, gpu)
    known = bool(advice) or (mode is not None and gpu is not None)
    return Power(mode, fastest, gpu, _number(emc), not advice if known else None, advice)


def parse_modes(text: str) -> tuple[dict[int, PowerMode], int | None]:
    """The modes in the text of ``nvpmodel.conf`` by number, and the one of the first start."""
    default = _DEFAULT.search(text)
    text = text[: default.start()] if default else text
    found = list(_MODE.finditer(text))
    ends = [*(match.start() for match in found), len(text)][1:]
    modes = {}
    for match, end in zip(found, ends, strict=True):
        # -1 caps nothing, nor does the memory's 0.
        caps = {
            name: int(value)
            for name, value in _CAP.findall(text[match.end() : end])
            if int(value) > 0
        }
        modes[int(match[1])] = PowerMode(int(match[1]), match[2], caps)
    return modes, int(default[1]) if default else None


def _advice(
    mode: PowerMode | None, fastest: PowerMode | None, gpu: GpuClock | None
) -> tuple[str, ...]:
    commands = []
    if mode is not None and fastest is not None and mode.speed < fastest.speed:
        commands.append(f"sudo nvpmodel -m {fastest.number}")
    if gpu is not None and (commands or not gpu.locked):
        commands.append("sudo jetson_clocks")
    return tuple(commands)


def _read_gpu(folder: Path) -> GpuClock | None:
    for place in sorted(folder.glob("*")):
        if any(name in place.name for name in _GPU_NAMES):
            values = [_number(place / f"{name}_freq") for name in ("min", "max", "cur")]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                return GpuClock(*known)
    return None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    """A system file's text; "" if it is not there or not for us to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
