"""Dequantize the rows that are read of a token table, not all of it.

    Gather(DequantizeLinear(q, s), ids)
        = DequantizeLinear(Gather(q, ids), Gather(s, ids))                     int8
        = com.microsoft.GatherBlockQuantized(q, ids, s)                        int4 in blocks

with q [V, D] and s [V] or, in blocks along a row, [V, D / b]: a row has scales of its own, so
the numbers are the same to the last bit. ONNX Runtime does as the left side says: it keeps the
codes, and dequantizes all V rows in each run. TensorRT reads the left side row by row.

ONNX Runtime has no Gather of int4; its own operator takes them since 1.20, where one of 8 bits
came later (1.23) and, unlike Gather, gives zeros for an id that is no row. So 8 bits use
standard operators. (ContribOperators.md of ONNX Runtime.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.targets import ORT_DOMAIN

from ..base import Pass, PassResult, Tally
from ..editing import consumers, insert_node, replace_tensor
from ..matching import Match, any_, constant_problem, find_matches, op
from .use_matmul_nbits import zero_point_problem

_INT4, _INT8 = np.dtype(ml_dtypes.int4), np.dtype(np.int8)
_LEAST_BLOCK = 16
"""Of ONNX Runtime's operator, whose blocks are powers of two."""

_TABLE = op("DequantizeLinear", any_("codes"), any_("scales"), bind="dequantize")
_PATTERN = op("Gather", _TABLE, any_("ids"), bind="gather")


class DequantizeGatheredRows(Pass):
    """``Gather(DequantizeLinear(int8 or int4))`` to the other order."""

    name = "dequantize-gathered-rows"
    summary = "a quantized token table is dequantized row by row"
    opsets = range(13, 25)

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for match in find_matches(graph, _PATTERN):
            problem = _problem(graph, match)
            if problem is None:
                rows = _WRITERS[match["codes"].dtype](graph, match)
                replace_tensor(graph, match.root, rows)
                tally.rewrote()
            else:
                tally.refuse(match["gather"], problem)
        return tally.result()


def _gather_first(graph: gs.Graph, match: Match) -> gs.Variable:
    codes, scales, ids = match["codes"], match["scales"], match["ids"]
    read = [
        insert_node(
            graph,
            "Gather",
            [table, ids],
            shape=[*ids.shape, *table.shape[1:]],
            dtype=table.dtype,
            attrs={"axis": 0},
            stem=f"{table.name}.rows",
        )
        for table in (codes, scales)
    ]
    attrs = dict(match["dequantize"].attrs)
    if attrs.get("block_size", 0):
        attrs["axis"] = len(ids.shape)
    stem = f"{match.root.name}.dequantized"
    return insert_node(graph, "DequantizeLinear", read, match.root, attrs=attrs, stem=stem)


def _gather_blocks(graph: gs.Graph, match: Match) -> gs.Variable:
    return insert_node(
        graph,
        "GatherBlockQuantized",
        [match["codes"], match["ids"], match["scales"]],
        match.root,
        attrs={
            "bits": 4,
            "block_size": int(match["dequantize"].attrs["block_size"]),
            "gather_axis": 0,
            "quantize_axis": 1,
        },
        stem=f"{match.root.name}.dequantized",
        domain=ORT_DOMAIN,
    )


_WRITERS: Mapping[Any, Callable[[gs.Graph, Match], gs.Variable]] = {
    _INT8: _gather_first,
    _INT4: _gather_blocks,
}


def _problem(graph: gs.Graph, match: Match) -> str | None:
    """Why a match is left alone. Codes and scales may be shared, as they stay as they are."""
    codes, scales, ids = match["codes"], match["scales"], match["ids"]
    for table in (codes, scales):
        problem = constant_problem(graph, table, *consumers(table))
        if problem is not None:
            return problem
    if codes.dtype not in _WRITERS:
        return f"the table {codes.name!r} is {codes.dtype}, not int8 or int4"
    if len(codes.shape) != 2 or match["gather"].attrs.get("axis", 0) not in (0, -2):
        return f"what is read of {codes.name!r} are no rows of a table"
    if ids.shape is None:
        return f"the shape of the ids {ids.name!r} is not known"
    return _scale_problem(match) or zero_point_problem(match["dequantize"])


def _scale_problem(match: Match) -> str | None:
    codes, attrs = match["codes"], match["dequantize"].attrs
    axis, block = attrs.get("axis", 1) % 2, attrs.get("block_size", 0)
    if block:
        if axis != 1:
            return f"blocks of {codes.name!r} reach over more than one row"
        usable = block >= _LEAST_BLOCK and block & (block - 1) == 0
        if codes.dtype == _INT4 and not usable:
            return f"{codes.name!r} has blocks of {block}, no power of two from {_LEAST_BLOCK}"
        return None
    if axis != 0 or len(match["scales"].shape) != 1:
        return f"{codes.name!r} has no scale for each row"
    if codes.dtype == _INT4:
        return f"{codes.name!r} is int4 without blocks, which ONNX Runtime gathers no rows of"
    if len(match["ids"].shape) != 1:
        return f"the ids {match['ids'].name!r} are no vector"
    return None
