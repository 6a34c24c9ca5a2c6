"""Which Jetson this is, read from the files that NVIDIA's Linux puts on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .targets import Target

# L4T major release -> JetPack major version (NVIDIA's JetPack archive).
_JETPACK_OF_L4T = {32: 4, 34: 5, 35: 5, 36: 6, 38: 7, 39: 7}
# JetPack 6.1, the first with TensorRT 10 (10.3); JetPack 6.0 is R36.2 and R36.3, with 8.6.
_FIRST_WITH_TENSORRT_10 = (36, 4)
_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)")
# First match wins; the words are those of /proc/device-tree/model.
_TARGET_OF_MODEL = (
    ("Orin Nano", "orin-nano"),
    ("Orin NX", "orin-nx"),
    ("AGX Orin", "orin"),
)


@dataclass(frozen=True)
class Jetson:
    """One device.

    Attributes:
        model: "NVIDIA Jetson AGX Orin Developer Kit".
        l4t: release of Jetson Linux, "36.4.3"; None if the file is missing, as it is in many
            containers.
        jetpack: major version that goes with it; None if unknown.
        target: name of the target made for it; None if there is none (Xavier, Thor).
    """

    model: str
    l4t: str | None
    jetpack: int | None
    target: str | None

    @property
    def has_tensorrt_10(self) -> bool | None:
        """Whether its JetPack came with TensorRT 10; None if the release is unknown."""
        if self.l4t is None:
            return None
        major, minor = (int(part) for part in self.l4t.split(".")[:2])
        return (major, minor) >= _FIRST_WITH_TENSORRT_10


def this_device_is(target: Target, root: Path = Path("/")) -> bool:
    """Whether this machine is the kind of Jetson that ``target``'s engines run on.

    The module alone decides; whether its software can build them is for the builder to say.
    """
    jetson = read_jetson(root)
    return jetson is not None and jetson.target == target.name


def read_jetson(root: Path = Path("/")) -> Jetson | None:
    """The Jetson whose files lie under ``root``; None on any other machine."""
    model = _read_text(root / "proc" / "device-tree" / "model")
    release = _RELEASE.search(_read_text(root / "etc" / "nv_tegra_release"))
    target = next((name for words, name in _TARGET_OF_MODEL if words in model), None)
    if "Jetson" not in model and target is None and release is None:
        return None
    l4t = f"{release[1]}.{release[2]}" if release else None
    jetpack = _JETPACK_OF_L4T.get(int(release[1])) if release else None
    return Jetson(model or "NVIDIA Jetson (unknown model)", l4t, jetpack, target)


def _read_text(path: Path) -> str:
    """A system file's text without the device tree's closing NUL; "" if it is not there."""
    try:
        return path.read_bytes().decode(errors="replace").rstrip("\0").strip()
    except OSError:
        return ""
