"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .errors import EngineError


def write_whole(path: Path, data: memoryview) -> None:
    """Write beside ``path`` and rename: a reader sees the old file or the new one.

    Raises:
        EngineError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise EngineError(
            f"Cannot write {path} ({len(data)} bytes): {error}. Free some space or choose "
            "another folder."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
