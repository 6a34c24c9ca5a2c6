"""English prose for a language model: calibration and evaluation texts that share no document.

Evaluated is on every other description of scikit-learn's data sets and on the Apache licence;
calibrated on the other descriptions and on docstrings of scikit-learn's modules.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from wheels import Wheel

SCIKIT_LEARN = Wheel(
    "scikit-learn==1.9.1",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
)
_DOCUMENTED_MODULES = (
    "linear_model/_logistic.py",
    "ensemble/_forest.py",
    "pipeline.py",
    "model_selection/_search.py",
)


def descriptions(folder: Path, odd: bool) -> str:
    """Every other description of a data set, in alphabetical order, as one text."""
    names = SCIKIT_LEARN.members(folder, "sklearn/datasets/descr/", ".rst")
    return "\n".join(_plain(SCIKIT_LEARN.read(folder, name)) for name in names[int(odd) :: 2])


def docstrings(folder: Path) -> str:
    """What scikit-learn's modules say of their classes and functions, as one text."""
    return "\n".join(
        _plain(text.encode())
        for name in _DOCUMENTED_MODULES
        for text in _docstrings_of(SCIKIT_LEARN.read(folder, f"sklearn/{name}"))
    )


def one_text(wheel: Wheel, folder: Path, member: str) -> str:
    """A text file of any wheel."""
    return _plain(wheel.read(folder, member))


def _docstrings_of(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
            text = ast.get_docstring(node)
            if text is not None:
                yield text


def _plain(content: bytes) -> str:
    """Text on one line: how it was broken and indented says nothing of the language."""
    return re.sub(r"\s+", " ", content.decode("utf-8")).strip()
