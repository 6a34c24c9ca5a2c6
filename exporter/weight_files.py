"""Which files of a checkpoint folder hold its weights."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from mvlm_export.engines.errors import CheckpointError

from .config_fields import read_json

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights in one file; each may also come in shards, ``model-00001-of-00003.safetensors``,
with or without a ``<name>.index.json`` that lists them."""


def _list_shards(index: Path) -> tuple[dict[str, str], list[Path]]:
    """The index's tensor -> file map, and the shards in order."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} has no 'weight_map' that says which shard holds which tensor: download "
            "it again."
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index} puts {name} into {shard!r}, which is no file of that folder: "
                "download it again."
            )
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (index.parent / shard).exists()]
    if absent:
        raise CheckpointError(
            f"{index} names shards that are not in {index.parent}: {', '.join(absent)}. The "
            "download is incomplete; fetch them."
        )
    return weight_map, [index.parent / shard for shard in shards]


def _numbered_shards(folder: Path, name: str) -> list[Path]:
    """Shards numbered 1 to the count in their names, which no index lists; maybe none."""
    stem, suffix = name.rsplit(".", 1)
    pattern = re.compile(rf"{re.escape(stem)}-(\d+)-of-(\d+)\.{suffix}")
    sets: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            sets.setdefault(match[2], {})[int(match[1])] = path
    if not sets:
        return []
    if len(sets) > 1:
        raise CheckpointError(
            f"{folder} holds shards of more than one set (of {', '.join(sets)}): remove those "
            "that do not belong to this checkpoint."
        )
    ((count, shards),) = sets.items()
    numbers = range(1, int(count) + 1)
    absent = list(islice((number for number in numbers if number not in shards), 5))
    if absent:
        names = [f"{stem}-{n:0{len(count)}d}-of-{count}.{suffix}" for n in absent]
        raise CheckpointError(
            f"{folder} holds {len(shards)} shards of {int(count)}; {', '.join(names)} is not "
            "there. The download is incomplete; fetch the rest."
        )
    beyond = [path.name for number, path in shards.items() if number not in numbers]
    if beyond:
        raise CheckpointError(
            f"{folder} holds {beyond[0]}, whose number does not fit its count: remove or "
            "rename it."
        )
    return [shards[number] for number in numbers]


def find_weight_files(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """The weight files of a folder, safetensors first, and the index's map if there is one.

    Raises:
        CheckpointError: there are none, or shards of them are missing.
    """
    for name in SINGLE_FILES:
        if (folder / name).exists():
            return {}, [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            return _list_shards(index)
    for name in SINGLE_FILES:
        if shards := _numbered_shards(folder, name):
            return {}, shards
    found = sorted(entry.name for entry in folder.iterdir())
    if any(name.startswith("adapter_model") for name in found):
        raise CheckpointError(
            f"{folder} holds a LoRA adapter, not a whole model: merge it into its base model "
            "first and give the merged checkpoint."
        )
    raise CheckpointError(
        f"{folder} holds no weights: one of {', '.join(SINGLE_FILES)}, or shards of one of "
        f"them, is needed. It holds {', '.join(found[:10]) or 'nothing'}."
    )
