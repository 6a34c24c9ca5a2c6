"""Find the ONNX node that TensorRT cannot build, by building parts of the graph.

A failed build often names nothing but TensorRT's own insides. The part of the graph up to
node k is what nodes 0 to k need (see :mod:`.trt_graph_cut`), so parts grow with k; the search
halves the nodes between a part that builds and one that fails in the same way, and ends at a
node whose part fails while the part before it builds. Each part is built in a process of its
own, so a crash is found like an error. Parts have other outputs than the whole, so TensorRT
fuses them otherwise: where a failure goes away in every part, no node is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .build_process import call_worker, part_request
from .build_worker import Request
from .errors import EngineError
from .onnx_nodes import read_operators
from .trt_diagnostics import BuildFailedError
from .trt_graph_cut import CutNode
from .trt_profiles import ProfileSpec

MAX_BUILDS = 16
"""Parts that are built at most: enough for two profiles and 16,000 nodes."""

Progress = Callable[[int, int, str], None]

# Failures of the machine: the node in hand when memory ran out is not to blame.
_OF_THE_MACHINE = re.compile(
    r"out of memory|insufficient memory|bad_alloc|CUDA driver|no CUDA-capable|"
    r"CUDA initiali[sz]ation|crash: (SIGKILL|SIGINT|SIGTERM)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Culprit:
    """Where a graph stops building.

    Attributes:
        nodes: ONNX names of what the failing part has and the largest good one lacks: one,
            unless the number of builds was used up.
        operator: ONNX operator of the last; "" if the file does not say.
        layer: TensorRT's kind of its last layer.
        before: the last node of the largest part that builds; None if none does.
        profile: with which alone the part fails; None for all together.
        builds: how many parts were built.
    """

    nodes: tuple[str, ...]
    operator: str
    layer: str
    before: str | None
    profile: str | None
    builds: int

    def __str__(self) -> str:
        kind = self.operator or f"TensorRT layer {self.layer}"
        if len(self.nodes) == 1:
            where = f"node {self.nodes[0]!r} ({kind})"
        else:
            where = (
                f"one of the {len(self.nodes)} nodes {self.nodes[0]!r} to {self.nodes[-1]!r}"
            )
        profile = f" with profile {self.profile!r}" if self.profile else ""
        good = (
            "no part before it builds"
            if self.before is None
            else f"the part up to {self.before!r} builds"
        )
        return (
            f"The fault lies at {where}: the graph up to there fails in the same way"
            f"{profile}, {good} (found by {self.builds} builds of parts). Look at that node's "
            "input shapes and types first, and at the pass that wrote it: `mvlm-export "
            "--dump-dir` shows the graph after each pass, --disable-pass leaves one out."
        )


def find_culprit(
    request: Request, failure: BuildFailedError, progress: Progress | None = None
) -> Culprit | None:
    """Search the node that a failed build fails at.

    Args:
        request: the build that failed.
        failure: how.
        progress: told of each part before it is built.

    Returns:
        None where no node is to blame (memory ran out, no GPU) or none can be named (every
        part builds).
    """
    if not failure.errors or any(_OF_THE_MACHINE.search(text) for text in failure.errors):
        return None
    return _Search(request, failure, progress).run()


class _Search:
    def __init__(
        self, request: Request, failure: BuildFailedError, progress: Progress | None
    ) -> None:
        self.request = request
        self.known = _signatures(failure.errors)
        self.progress = progress
        self.builds = 0

    def run(self) -> Culprit | None:
        try:
            listed = call_worker(replace(self.request, task="nodes"))
        except EngineError:
            return None  # it does not even parse twice: the first failure says more
        nodes = [CutNode(**entry) for entry in listed]
        profile = self._narrow_profiles()
        good, bad = self._halve(nodes)
        if bad == len(nodes):
            return None
        last = nodes[bad]
        operators = read_operators(self.request.onnx_path)
        return Culprit(
            nodes=tuple(node.name for node in nodes[good + 1 : bad + 1]),
            operator=operators.get(last.name, ""),
            layer=last.layer,
            before=nodes[good].name if good >= 0 else None,
            profile=profile,
            builds=self.builds,
        )

    def _narrow_profiles(self) -> str | None:
        """Go on with the one profile that fails alone, if there is one."""
        profiles: Sequence[ProfileSpec] = self.request.profiles
        if len(profiles) < 2:
            return None
        for profile in profiles:
            alone = replace(self.request, profiles=(profile,))
            if self._fails(alone, "", f"profile {profile.name}"):
                self.request = alone
                return profile.name
        return None

    def _halve(self, nodes: Sequence[CutNode]) -> tuple[int, int]:
        """(last node of a part that builds or -1, last node of one that fails, or all)."""
        good, bad = -1, len(nodes)
        while bad - good > 1 and self.builds < MAX_BUILDS:
            middle = (good + bad) // 2
            if self._fails(self.request, nodes[middle].name, f"{middle + 1} of {len(nodes)}"):
                bad = middle
            else:
                good = middle
        return good, bad

    def _fails(self, request: Request, node: str, label: str) -> bool:
        if self.progress is not None:
            self.progress(self.builds, MAX_BUILDS, f"finding the node: {label}")
        self.builds += 1
        try:
            call_worker(part_request(request, node))
        except BuildFailedError as error:
            # A part may fail in a way of its own, as one that lacks an output TensorRT wants.
            return bool(self.known & _signatures(error.errors))
        return False


def _signatures(errors: Sequence[str]) -> set[str]:
    """Errors without what differs from build to build: numbers and addresses."""
    return {re.sub(r"0x[0-9a-f]+|\d+", "#", text) for text in errors}
