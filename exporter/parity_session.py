"""One graph of a bundle in a plain ONNX Runtime session that gives every output back.

The runtime's own sessions give the last row of logits and keep the cache to themselves; parity
looks at all rows of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import EngineError, MissingPackageError

Array = npt.NDArray[Any]

_ONLY_FATAL = 4


def import_onnxruntime() -> Any:  # noqa: ANN401
    """ONNX Runtime, imported when first needed.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError(
            f"Comparing a bundle with PyTorch needs ONNX Runtime ({error}); install it with "
            "`pip install mvlm-export[cpu]`."
        ) from error
    return onnxruntime


def _exceptions_of(ort: Any) -> tuple[type[Exception], ...]:  # noqa: ANN401
    """What ONNX Runtime raises: its own classes know no common base."""
    found = vars(ort.capi.onnxruntime_pybind11_state).values()
    own = (kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))
    return (RuntimeError, ValueError, *own)


class GraphRunner:
    """Use as a context manager: the graph's memory is given back at the end of the block.

    Raises:
        MissingPackageError: ONNX Runtime is not installed.
        EngineError: the graph cannot be loaded.
    """

    def __init__(self, bundle: Bundle, name: str, threads: int | None) -> None:
        self.name = name
        self._ort = import_onnxruntime()
        self._dtype = np.dtype(bundle.manifest.graphs[name].dtype)
        options = self._ort.SessionOptions()
        options.log_severity_level = _ONLY_FATAL  # what goes wrong is raised, with its text
        options.enable_mem_pattern = False  # every step has another past length
        if threads is not None:
            options.intra_op_num_threads = threads
        path, providers = str(bundle.graph_path(name)), ["CPUExecutionProvider"]
        with self._errors("load"):
            self._session = self._ort.InferenceSession(path, options, providers=providers)
        self._inputs = [item.name for item in self._session.get_inputs()]

    def __enter__(self) -> GraphRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = None

    def run(self, *values: Array) -> list[Array]:
        """Every output for the inputs in order; floats are cast to the graph's dtype.

        Raises:
            EngineError: the graph takes other inputs, or failed.
        """
        if len(values) != len(self._inputs):
            raise EngineError(
                f"The graph {self.name!r} takes {len(self._inputs)} inputs, but PyTorch's "
                f"component takes {len(values)}; compile the bundle again, or name the "
                "checkpoint it was made from."
            )
        feeds = {
            name: value.astype(self._dtype) if value.dtype.kind == "f" else value
            for name, value in zip(self._inputs, values, strict=True)
        }
        with self._errors("run"):
            outputs: list[Array] = self._session.run(None, feeds)
        return outputs

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except _exceptions_of(self._ort) as error:
            raise EngineError(
                f"ONNX Runtime cannot {doing} the graph {self.name!r}: {error} Check the "
                "bundle with `mvlm inspect`, or compile it again."
            ) from error
