"""Which Jetson this is, read from the files that NVIDIA's Linux puts on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .jetson_modules import (
    AGX_ORIN,
    ORIN_NANO,
    ORIN_NX,
    JetsonModule,
    module_of_part,
    module_of_series,
)
from .jetson_power import Power, read_power
from .targets import Target

# L4T major release -> JetPack major version (NVIDIA's JetPack archive).
_JETPACK_OF_L4T = {32: 4, 34: 5, 35: 5, 36: 6, 38: 7, 39: 7}
# JetPack 6.1, the first with TensorRT 10 (10.3); JetPack 6.0 is R36.2 and R36.3, with 8.6.
_FIRST_WITH_TENSORRT_10 = (36, 4)
_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)")
# First match wins; the words are those of /proc/device-tree/model.
_SERIES_OF_MODEL = (("Orin Nano", ORIN_NANO), ("Orin NX", ORIN_NX), ("AGX Orin", AGX_ORIN))
# A module's number, as in "nvidia,p3768-0000+p3767-0005-super"; p3768 and p3737 are boards.
_PART = re.compile(r"p(?:3701|3767)-\d{4}")
_JETPACK_PACKAGE = "nvidia-jetpack"
_PACKAGE_VERSION = re.compile(r"^Version: (\d+(?:\.\d+)*)", re.MULTILINE)


@dataclass(frozen=True)
class Jetson:
    """One device.

    Attributes:
        model: "NVIDIA Jetson AGX Orin Developer Kit".
        l4t: release of Jetson Linux, "36.4.3"; None if the file is missing, as it is in many
            containers.
        jetpack: major version that goes with it; None if unknown.
        target: name of the target made for it; None if there is none (Xavier, Thor).
        module: "Jetson Orin Nano 8GB (Super)"; None where there is no target.
        part: number of the module in the device tree, "p3767-0005"; None if it names none.
        series: of the module; see :class:`.jetson_modules.JetsonModule`.
        jetpack_release: "6.2.1", where JetPack's package is installed; else None.
        power: how fast it is set to run; None if that was not looked for.
    """

    model: str
    l4t: str | None
    jetpack: int | None
    target: str | None
    module: str | None = None
    part: str | None = None
    series: str | None = None
    jetpack_release: str | None = None
    power: Power | None = None

    @property
    def has_tensorrt_10(self) -> bool | None:
        """Whether its JetPack came with TensorRT 10; None if the release is unknown."""
        if self.l4t is None:
            return None
        major, minor = (int(part) for part in self.l4t.split(".")[:2])
        return (major, minor) >= _FIRST_WITH_TENSORRT_10


def this_device_is(target: Target, root: Path = Path("/")) -> bool:
    """Whether this machine is a Jetson that can build and run a bundle for ``target``.

    The series of the module alone decides, since all of a series are given the same graphs;
    whether the software here can build them is for the builder to say.
    """
    jetson = read_jetson(root)
    return jetson is not None and jetson.target is not None and jetson.series == target.series


def read_jetson(root: Path = Path("/")) -> Jetson | None:
    """The Jetson whose files lie under ``root``; None on any other machine."""
    tree = root / "proc" / "device-tree"
    model = _read_text(tree / "model")
    release = _RELEASE.search(_read_text(root / "etc" / "nv_tegra_release"))
    words = " ".join(
        (_read_text(tree / "compatible"), _read_text(tree / "nvidia,dtsfilename"), model)
    )
    part = _PART.search(words)
    module = _find_module(model, words, part[0] if part else None, root)
    if "Jetson" not in model and module is None and release is None:
        return None
    return Jetson(
        model=model or "NVIDIA Jetson (unknown model)",
        l4t=f"{release[1]}.{release[2]}" if release else None,
        jetpack=_JETPACK_OF_L4T.get(int(release[1])) if release else None,
        target=module.name if module else None,
        module=module.title if module else None,
        part=part[0] if part else None,
        series=module.series if module else None,
        jetpack_release=_jetpack_release(root),
        power=read_power(root),
    )


def read_memory(root: Path) -> tuple[int | None, int | None]:
    """(total, available) bytes from /proc/meminfo; Nones where there is none."""
    lines = _read_text(root / "proc" / "meminfo").splitlines()
    table = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line}
    total, available = table.get("MemTotal"), table.get("MemAvailable")
    return (int(total) * 1024 if total else None, int(available) * 1024 if available else None)


def _find_module(model: str, words: str, part: str | None, root: Path) -> JetsonModule | None:
    """By the part number; where the tree names none, by the model's words and the memory."""
    super_mode = "-super" in words or model.endswith("Super")
    found = module_of_part(part, super_mode) if part else None
    series = next((name for text, name in _SERIES_OF_MODEL if text in model), None)
    if found is not None or series is None:
        return found
    return module_of_series(series, read_memory(root)[0], super_mode)


def _jetpack_release(root: Path) -> str | None:
    """Version of the package ``nvidia-jetpack``, in dpkg's list of what is installed."""
    text = _read_text(root / "var" / "lib" / "dpkg" / "status")
    for stanza in text.split("\n\n"):
        lines = stanza.splitlines()
        if f"Package: {_JETPACK_PACKAGE}" in lines and "Status: install ok installed" in lines:
            version = _PACKAGE_VERSION.search(stanza)
            return version[1] if version else None
    return None


def _read_text(path: Path) -> str:
    """A system file's text, its NULs as blanks; "" if it is not there."""
    try:
        return path.read_bytes().decode(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""
