"""Bundles: a folder with everything a device needs, each file with its hash.

A bundle is written to a temporary folder beside its place and renamed when whole, so that an
interrupted compile leaves nothing half-made and an older bundle stays until the new is done.
What is added later has its own record and never touches the manifest: each folder of engines
has a ``build.json`` with the hashes of its plans, and ``report.json`` is not hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from .atomic_write import write_whole
from .errors import BundleError, InputError
from .manifest import Manifest

MANIFEST = "manifest.json"
REPORT = "report.json"
TOKENIZER = "tokenizer"
PREFIX = "prefix.npz"
ENGINES = "engines"
BUILD_FILE = "build.json"
_UNHASHED = frozenset({MANIFEST, REPORT})
_BLOCK = 1 << 22


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, data: object) -> None:
    """Write JSON, whole or not at all.

    Raises:
        EngineError: the disk is full or the folder cannot be written.
    """
    text = json.dumps(data, indent=2) + "\n"
    write_whole(path, memoryview(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BundleError: the file cannot be read or is no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} cannot be read ({error}). Compile the bundle again."
        ) from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} is not a JSON object. Compile the bundle again.")
    return data


def _files_of(folder: Path) -> Iterator[str]:
    """Files that the manifest vouches for: all but engines and what is not hashed."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in _UNHASHED and not name.startswith(f"{ENGINES}/"):
            yield name


def _is_plan(record: object) -> bool:
    """Whether a build record's entry names a file of its own folder and a hash."""
    if not isinstance(record, dict):
        return False
    name, digest = record.get("plan_path"), record.get("sha256")
    return isinstance(name, str) and Path(name).name == name and isinstance(digest, str)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest has been read."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str], verify: bool = True) -> Bundle:
        """Open a bundle.

        Args:
            verify: compare every file with its hash (reads the whole bundle once).

        Raises:
            BundleError: not a bundle, damaged, or of another schema version.
        """
        folder = Path(path)
        if not folder.exists():
            raise BundleError(
                f"{folder} does not exist. Make a bundle with `mvlm-export --output {folder}`."
            )
        file = folder / MANIFEST
        if not file.is_file():
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST}. Give the folder that "
                "`mvlm-export --output` wrote."
            )
        bundle = cls(folder, Manifest.from_json(read_json(file)))
        bundle._check_listing()
        if verify:
            bundle.verify()
        return bundle

    def _check_listing(self) -> None:
        """The manifest must vouch for each graph and the tokenizer, inside this folder."""
        graphs = [graph.file for graph in self.manifest.graphs.values()]
        data = [f"{name}.data" for name in graphs if (self.path / f"{name}.data").exists()]
        data += [PREFIX] if (self.path / PREFIX).exists() else []
        needed = [*graphs, *data, f"{TOKENIZER}/tokenizer.model"]
        unlisted = [name for name in needed if name not in self.manifest.files]
        if unlisted:
            raise BundleError(
                f"{self.path / MANIFEST} has no hash for {_listed(unlisted)}. "
                "Compile the bundle again."
            )
        root = self.path.resolve()
        names = [*self.manifest.files, *graphs]
        outside = [name for name in names if not (root / name).resolve().is_relative_to(root)]
        if outside:
            raise BundleError(
                f"{self.path / MANIFEST} names files outside the bundle: {_listed(outside)}. "
                "Do not use it; compile the bundle yourself."
            )

    def verify(self) -> None:
        """Compare every file of the manifest with its hash; plans have ``verify_engines``.

        Raises:
            BundleError: names the files that are missing or changed.
        """
        cure = "Copy the bundle again, or compile it again."
        self._compare(self.manifest.files, cure)

    def verify_engines(self) -> None:
        """Compare every plan with its hash.

        Raises:
            BundleError: names the plans that are missing or changed.
        """
        expected = {
            f"{ENGINES}/{key}/{plan['plan_path']}": plan["sha256"]
            for key, record in self.engines().items()
            for plan in record["plans"].values()
        }
        self._compare(expected, f"Build them again with `mvlm build {self.path}`.")

    def _compare(self, expected: Mapping[str, str], cure: str) -> None:
        missing = [name for name in expected if not (self.path / name).is_file()]
        if missing:
            raise BundleError(f"{self.path} is not whole: {_listed(missing)} missing. {cure}")
        changed = [
            name for name, digest in expected.items() if sha256_of(self.path / name) != digest
        ]
        if changed:
            raise BundleError(
                f"{self.path} is damaged: {_listed(changed)} differs from its recorded "
                f"hash. {cure}"
            )

    def graph_path(self, name: str) -> Path:
        """Absolute path of a graph's ``model.onnx``."""
        return (self.path / self.manifest.graphs[name].file).resolve()

    @property
    def tokenizer_path(self) -> Path:
        """Folder with ``tokenizer.model`` and its settings."""
        return self.path / TOKENIZER

    @property
    def prefix_path(self) -> Path | None:
        """Cache rows of the prompt prefix; None if the bundle has none."""
        return self.path / PREFIX if PREFIX in self.manifest.files else None

    def engines(self) -> dict[str, dict[str, Any]]:
        """Build records by engine folder; ``record["plans"]`` holds one a graph.

        Raises:
            BundleError: a record cannot be read.
        """
        records = {}
        for file in sorted((self.path / ENGINES).glob(f"*/{BUILD_FILE}")):
            if file.parent.name.startswith("."):
                continue  # a build that is under way, or was killed
            record = read_json(file)
            plans = record.get("plans")
            if not isinstance(plans, dict) or not all(map(_is_plan, plans.values())):
                raise BundleError(
                    f"{file} is not a build record. Remove {file.parent} and build again "
                    "with `mvlm build`."
                )
            records[file.parent.name] = record
        return records


class BundleWriter:
    """Writes a bundle in a temporary folder; use as a context manager.

        with BundleWriter(path, overwrite=True) as writer:
            ... write files below writer.folder ...
            bundle = writer.seal(manifest)      # hashed; may be opened and added to
            bundle = writer.commit()            # moved into place

    Leaving the block without ``commit`` (an error, Ctrl-C) removes the temporary folder.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path = path.resolve()
        self.overwrite = overwrite
        self.folder = self.path
        self._made: list[Path] = []
        self._manifest: Manifest | None = None
        self._committed = False

    def __enter__(self) -> BundleWriter:
        self._check_place()
        try:
            self._make_parents()
            made = tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        except OSError as error:
            self._remove_parents()
            raise InputError(
                f"Cannot write the bundle to {self.path}: {error.strerror or error}. "
                "Choose another --output."
            ) from error
        self.folder = Path(made)
        self.folder.chmod(0o755)
        return self

    def _check_place(self) -> None:
        if self.path == Path.cwd() or os.path.ismount(self.path):
            raise InputError(
                f"{self.path} is the working folder or a mount point, which cannot be "
                "replaced as a whole. Choose a folder inside it as --output."
            )
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError(f"{self.path} is a file. Choose another --output.")
        is_bundle = (self.path / MANIFEST).is_file()
        if any(self.path.iterdir()) and not is_bundle:
            raise InputError(
                f"{self.path} holds other files and is not a bundle, so it is left alone. "
                "Choose another --output."
            )
        if is_bundle and not self.overwrite:
            raise InputError(
                f"{self.path} already holds a bundle. Add --overwrite to replace it, or "
                "choose another --output."
            )

    def _make_parents(self) -> None:
        for parent in reversed(self.path.parents):
            if not parent.exists():
                parent.mkdir()
                self._made.append(parent)

    def _remove_parents(self) -> None:
        for parent in reversed(self._made):
            with suppress(OSError):
                parent.rmdir()

    def seal(self, manifest: Manifest) -> Bundle:
        """Hash every file and write the manifest; the bundle can be used where it is."""
        files = {name: sha256_of(self.folder / name) for name in _files_of(self.folder)}
        self._manifest = replace(manifest, files=files)
        write_json(self.folder / MANIFEST, self._manifest.to_json())
        return Bundle(self.folder, self._manifest)

    def commit(self) -> Bundle:
        """Move the sealed bundle into place; an older one there is replaced.

        Raises:
            BundleError: ``seal`` was not called.
        """
        if self._manifest is None:
            raise BundleError("The bundle was not sealed, so it cannot be put into place.")
        replace_folder(self.folder, self.path)
        self._committed = True
        return Bundle(self.path, self._manifest)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._committed:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._remove_parents()


def replace_folder(new: Path, place: Path) -> None:
    """Rename ``new`` to ``place``; what was there stays if that fails, and goes if not."""
    if not place.exists():
        new.rename(place)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{place.name}.old.", dir=place.parent))
    kept = aside / place.name
    try:
        place.rename(kept)
        new.rename(place)
    except BaseException:
        if kept.exists() and not place.exists():
            kept.rename(place)
        raise
    finally:
        if place.exists():
            shutil.rmtree(aside, ignore_errors=True)
