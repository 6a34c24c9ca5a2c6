"""How parity runs one graph of a bundle at a time, whatever runs it.

Two kinds implement :class:`ParityGraphs`. :class:`.parity_ort.OrtGraphs` asks ONNX Runtime for
every row of logits. :class:`SessionGraphs` has a backend's own sessions, those that answer
users: the decoder appends to its cache, gives the logits of the last row, and the new rows are
read back from where it left them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.backends import PLAN_BACKENDS, open_backend
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.kv_cache import KvCache
from mvlm_export.engines.session import Backend, BackendOptions, DecoderSession, GraphSession

from .parity_closing import Closing
from .parity_ort import OrtGraphs
from .reference import Step

Array = npt.NDArray[Any]


class ImageGraph(Protocol):
    """The vision encoder or the projector."""

    def run(self, array: Array) -> Array:
        """Its output for ``array``; floats are cast to the graph's dtype.

        Raises:
            EngineError: the graph takes another input, or failed.
        """


class ForcedDecoder(Protocol):
    """The decoder; what it gave for one call is in the past of the next, as in use."""

    def begin(self, embeds: Array) -> None:
        """Begin a sequence with nothing before it.

        Args:
            embeds: its image rows [I, D].
        """

    def step(self, ids: Array) -> Step:
        """One call, behind :meth:`begin` and the steps before.

        Args:
            ids: int32 [S].

        Returns:
            Logits [S, V], or those of the last rows alone, and of each cache tensor the new
            rows [S, H_kv, head_dim].

        Raises:
            EngineError: the graph takes or gives other tensors, or failed.
        """


class ParityGraphs(Protocol):
    """Opens graphs; each gives its memory back at the end of its ``with`` block."""

    def open_graph(self, name: str) -> AbstractContextManager[ImageGraph]:
        """The vision encoder or the projector.

        Raises:
            EngineError: it cannot be loaded.
        """

    def open_decoder(self) -> AbstractContextManager[ForcedDecoder]:
        """The decoder.

        Raises:
            EngineError: it cannot be loaded.
            BundleError: it is not of the manifest's model.
        """


def open_graphs(
    bundle: Bundle, name: str, threads: int | None
) -> tuple[Backend, ParityGraphs]:
    """A backend of ``engines.backends.BACKENDS``, and how its graphs are compared.

    Args:
        threads: of ONNX Runtime; plans run on the GPU.

    Raises:
        InputError: there is no such backend, or it has nothing to run of this bundle.
        MissingPackageError: its package is not installed.
        EngineError: it cannot run here.
    """
    if name in PLAN_BACKENDS:
        backend = open_backend(bundle, name, BackendOptions("cuda"))
        return backend, SessionGraphs(backend)
    backend = open_backend(bundle, name, BackendOptions("cpu", threads))
    return backend, OrtGraphs(bundle, threads)


class SessionGraphs:
    """The graphs of a backend, in the sessions that answer users."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def open_graph(self, name: str) -> SessionImageGraph:
        """As :meth:`ParityGraphs.open_graph`."""
        return SessionImageGraph(self._backend.open_graph(name))

    def open_decoder(self) -> SessionForcedDecoder:
        """As :meth:`ParityGraphs.open_decoder`."""
        return SessionForcedDecoder(self._backend.open_decoder())


class SessionImageGraph(Closing[GraphSession]):
    """A session of the vision encoder or the projector."""

    def run(self, array: Array) -> Array:
        """As :meth:`ImageGraph.run`."""
        return self._opened.run(array)


class SessionForcedDecoder(Closing[DecoderSession]):
    """A session of the decoder, with one cache for all sequences."""

    def __init__(self, session: DecoderSession) -> None:
        super().__init__(session)
        self._cache: KvCache | None = session.new_cache()
        self._embeds: Array = np.zeros((0, 0), np.float32)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._cache = None

    def begin(self, embeds: Array) -> None:
        """As :meth:`ForcedDecoder.begin`."""
        assert self._cache is not None, "its block has ended"
        self._cache.truncate(0)
        self._cache.clear_behind()  # NaN that a sequence left must not reach the next
        self._embeds = embeds

    def step(self, ids: Array) -> Step:
        """As :meth:`ForcedDecoder.step`."""
        cache = self._cache
        assert cache is not None, "its block has ended"
        start = cache.length
        logits = self._opened.append(cache, ids, self._embeds)
        rows = range(cache.shape.tensors)
        return Step(
            logits[np.newaxis], [cache.read_rows(t, start, cache.length) for t in rows]
        )
