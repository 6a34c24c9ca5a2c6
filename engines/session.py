"""What a backend must offer so that ``VLM`` can run a bundle on it.

A backend opens graphs that take one tensor and give one (vision encoder, projector), and one
decoder whose weights serve any number of caches. Arrays at this border are numpy's; everything
that is large and lives long (weights, cache) stays inside the backend, on its own device: a
cache is created by the decoder that will use it, in that decoder's memory, and is addressed
through :class:`KvCache`, so a TensorRT decoder gives ``past_address`` and ``new_address``
to its execution context exactly as ONNX Runtime's IO binding takes them. Which form the cache
has (``manifest.kv_form``) is the cache's own knowledge: nothing above it asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import EngineError, InputError
from .kv_cache import KvCache

FloatArray = npt.NDArray[np.floating[Any]]
Float32Array = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int32]
PixelArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BackendOptions:
    """How to run.

    Attributes:
        provider: the device kind, in the backend's own terms (``cpu``, ``cuda``).
        threads: CPU threads for one operator; None means the backend's default.
    """

    provider: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InputError(
                f"threads is {self.threads}; give 1 or more, or None for the default."
            )


def not_finite(what: str) -> EngineError:
    """The error for a decoder whose numbers overflowed; ``what`` it gave that shows it."""
    return EngineError(
        f"The decoder gave {what}, so its logits are not finite: its numbers overflowed. Run "
        "`mvlm parity` on the bundle, or compile it again with --recipe fp32."
    )


class GraphSession(Protocol):
    """A graph with one input and one output, such as the vision encoder."""

    @property
    def name(self) -> str:
        """The graph's name in the bundle."""

    def run(self, array: FloatArray | PixelArray) -> FloatArray:
        """Output of the graph for ``array``; floats are cast to the graph's dtype.

        Raises:
            EngineError: the graph cannot run on this input.
        """


class DecoderSession(Protocol):
    """The decoder: appends rows to a cache and gives the logits of the last one."""

    @property
    def chooses_greedily(self) -> bool:
        """True if the graph gives the likeliest id itself: :meth:`append_greedy` works."""

    @property
    def most_choices(self) -> int:
        """Most ids that :meth:`append_choices` takes; 0 or 1 where it serves for nothing."""

    def new_cache(self) -> KvCache:
        """An empty cache of ``max_positions`` rows in this decoder's memory."""

    def append(self, cache: KvCache, ids: IdArray, image_embeds: FloatArray) -> Float32Array:
        """Run ``ids`` behind what the cache holds and keep their keys and values there.

        Args:
            cache: one that ``new_cache`` of this session made; its length grows by S.
            ids: [S], S >= 1; an id >= vocab_size names a row of ``image_embeds``.
            image_embeds: [I, D], I >= 1; rows that no id names are ignored.

        Returns:
            Logits [V] of the last row, the caller's own copy.

        Raises:
            EngineError: no room in the cache, or the graph failed; the cache is as before.
        """

    def append_greedy(self, cache: KvCache, ids: IdArray, image_embeds: FloatArray) -> int:
        """As :meth:`append`, but the likeliest next id; the logits stay where they are.

        Logits that are not finite are noticed only if the graph then gives an id outside the
        vocabulary, as those of this package do. That is why the first token of an answer is
        always chosen from logits.

        Raises:
            EngineError: as :meth:`append`, or the id is none of the vocabulary.
        """

    def append_choices(
        self, cache: KvCache, ids: IdArray, image_embeds: FloatArray
    ) -> list[int]:
        """As :meth:`append_greedy`, for every id: the likeliest next one behind each.

        What serves to verify a drafted continuation: rows of ids that turn out wrong are cut
        off with ``cache.truncate``.

        Args:
            ids: ``most_choices`` at most.
        """


class Backend(Protocol):
    """Opens the graphs of one bundle."""

    def open_graph(self, name: str) -> GraphSession:
        """A graph with one input and one output."""

    def open_decoder(self) -> DecoderSession:
        """The decoder."""
