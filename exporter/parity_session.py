"""One graph of a bundle in a plain ONNX Runtime session that gives every output back.

The runtime's own sessions give the last row of logits and keep the cache to themselves; parity
looks at all rows of both.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.ort_api import LOG_FATAL_ONLY, import_onnxruntime, ort_errors

Array = npt.NDArray[Any]


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
        options.log_severity_level = LOG_FATAL_ONLY
        options.enable_mem_pattern = False  # every step has another past length
        if threads is not None:
            options.intra_op_num_threads = threads
        path, providers = str(bundle.graph_path(name)), ["CPUExecutionProvider"]
        with ort_errors(self._ort, name, "load"):
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
        with ort_errors(self._ort, self.name, "run"):
            outputs: list[Array] = self._session.run(None, feeds)
        return outputs
