"""Files cut into loads of a limited size, and put together again from a store.

For a machine that takes files only in transfers of limited size. A load is a folder with some
parts and the index of all of them, so the store that loads are received into knows what is
still missing whatever came first. Every part and every whole file has its SHA-256. This needs
the standard library alone: it runs before anything is installed.

    python parts.py receive LOAD STORE     copy a load into the store, and check it
    python parts.py join STORE FOLDER      write the whole files, once every load is there
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INDEX = "index.json"
LARGEST_LOAD = 60_000_000
"""Bytes of a load at most, and so of a part."""
_BLOCK = 1 << 20


class PartsError(Exception):
    """Loads are missing, damaged, or do not belong together; the message says what to do."""


@dataclass(frozen=True)
class Part:
    """A piece of a file.

    Attributes:
        name: of the part's file.
        load: number of the load that holds it, from 1.
    """

    name: str
    load: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Whole:
    """A file and its parts, in order."""

    name: str
    size: int
    sha256: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Index:
    """What all loads together hold.

    Attributes:
        loads: how many there are.
    """

    loads: int
    files: tuple[Whole, ...]

    def parts(self) -> Iterator[Part]:
        """Every part of every file."""
        for whole in self.files:
            yield from whole.parts

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index in a load or a store.

        Raises:
            PartsError: there is none, or it cannot be read.
        """
        path = folder / INDEX
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            files = tuple(
                Whole(f["name"], f["size"], f["sha256"], tuple(Part(**p) for p in f["parts"]))
                for f in values["files"]
            )
            return cls(values["loads"], files)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PartsError(
                f"{path} cannot be read as an index of loads ({error}). Give a folder that "
                "carry.py wrote, or one that such a load was received into."
            ) from error


def sha256_of(path: Path) -> str:
    """Of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def split(files: Iterable[Path], output: Path, load_bytes: int = LARGEST_LOAD) -> Index:
    """Write files as loads: each is filled to its limit, and a file is cut where it is full.

    Args:
        files: in the order in which they travel.
        output: a new folder; gets ``load-01``, ``load-02``, ...
        load_bytes: most bytes of parts in a load.

    Raises:
        PartsError: ``output`` is there, or the limit cannot be used.
    """
    if not 0 < load_bytes <= LARGEST_LOAD:
        raise PartsError(f"A load has 1 to {LARGEST_LOAD} bytes, not {load_bytes}.")
    if output.exists():
        raise PartsError(f"{output} is there already. Remove it, or choose another folder.")
    load, room, wholes = 1, load_bytes, []
    for path in files:
        parts: list[Part] = []
        left = path.stat().st_size
        with path.open("rb") as source:
            while left:
                if not room:
                    load, room = load + 1, load_bytes
                size = min(left, room)
                name = f"{path.name}.part-{len(parts) + 1:03d}"
                place = output / _load_name(load) / name
                parts.append(Part(name, load, size, _copy(source, place, size)))
                left, room = left - size, room - size
        wholes.append(Whole(path.name, path.stat().st_size, sha256_of(path), tuple(parts)))
    index = Index(load, tuple(wholes))
    for number in range(1, load + 1):
        _write_index(output / _load_name(number), index)
    return index


def receive(load: Path, store: Path) -> tuple[int, ...]:
    """Copy a load into a store, each part checked.

    Returns:
        The numbers of the loads that are still missing.

    Raises:
        PartsError: a part is damaged or missing, or the store has loads of another cut.
    """
    index = Index.read(load)
    if (store / INDEX).is_file() and Index.read(store) != index:
        raise PartsError(
            f"{load} and what was received into {store} were not cut together. Empty the "
            "store and receive every load of one cut."
        )
    here = [part for part in index.parts() if (load / part.name).is_file()]
    numbers = {part.load for part in here}
    for part in index.parts():
        if part.load in numbers:
            _check(load / part.name, part, f"Send load {part.load} again")
    store.mkdir(parents=True, exist_ok=True)
    for part in here:
        partial = store / f".{part.name}"
        shutil.copyfile(load / part.name, partial)
        partial.replace(store / part.name)
    _write_index(store, index)
    return missing_loads(store)


def missing_loads(store: Path) -> tuple[int, ...]:
    """Numbers of the loads that the store lacks parts of."""
    absent = {p.load for p in Index.read(store).parts() if not (store / p.name).is_file()}
    return tuple(sorted(absent))


def join(store: Path, folder: Path) -> list[Path]:
    """Write the whole files; those that are there and right stay.

    Raises:
        PartsError: a load is missing, or a part or file is damaged.
    """
    index, absent = Index.read(store), missing_loads(store)
    if absent:
        names = ", ".join(_load_name(number) for number in absent)
        raise PartsError(
            f"{store} lacks {names} of {index.loads} loads. Receive what is missing first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return [_join(whole, store, folder / whole.name) for whole in index.files]


def _join(whole: Whole, store: Path, path: Path) -> Path:
    if path.is_file() and sha256_of(path) == whole.sha256:
        return path
    partial = path.with_name(f".{path.name}")
    with partial.open("wb") as target:
        for part in whole.parts:
            _check(store / part.name, part, f"Receive load {part.load} again")
            with (store / part.name).open("rb") as source:
                shutil.copyfileobj(source, target, _BLOCK)
    if sha256_of(partial) != whole.sha256:
        partial.unlink()
        raise PartsError(f"{whole.name} is not the file that was cut. Cut and send it again.")
    return partial.replace(path)


def _load_name(number: int) -> str:
    return f"load-{number:02d}"


def _copy(source: Any, place: Path, size: int) -> str:  # noqa: ANN401 - an open binary file
    place.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with place.open("wb") as target:
        while size:
            block = source.read(min(size, _BLOCK))
            if not block:
                raise PartsError(f"{source.name} became shorter while it was cut. Cut again.")
            digest.update(block)
            target.write(block)
            size -= len(block)
    return digest.hexdigest()


def _check(path: Path, part: Part, cure: str) -> None:
    if not path.is_file():
        raise PartsError(f"The part {path} is not there. {cure}.")
    if path.stat().st_size != part.size or sha256_of(path) != part.sha256:
        raise PartsError(f"The part {path} is damaged: its SHA-256 is another. {cure}.")


def _write_index(folder: Path, index: Index) -> None:
    partial = folder / f".{INDEX}"
    partial.write_text(json.dumps(index.to_json(), indent=1), encoding="utf-8")
    partial.replace(folder / INDEX)


def main(arguments: list[str] | None = None) -> int:
    """Receive or join; 2 if it cannot be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("deed", choices=("receive", "join"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.deed == "receive":
            absent = receive(given.source, given.target)
            still = ", ".join(_load_name(n) for n in absent)
            print(f"Received. Missing: {still}" if absent else "Received. Every load is here.")
        else:
            files = join(given.source, given.target)
            print(f"{len(files)} files joined and checked in {given.target}")
    except PartsError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
