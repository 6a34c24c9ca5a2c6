"""Decode steps recorded once and replayed, where every step is the same but for its values."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from .device_memory import CapturedWork, DeviceMemory
from .engine_runner import EngineRunner
from .errors import EngineError
from .kv_cache import KvCache

ATTEMPTS = 3
"""Recordings that may fail, as one may for a reason that passes (memory freed meanwhile)."""


class StepReplay:
    """Recorded steps, one for each cache, as its addresses are part of the record.

    TensorRT finishes what a new shape or address needs with the first run behind it, which
    must not be recorded (IExecutionContext::enqueueV3). So a cache's first step is queued as
    it is, a second one right behind it is recorded, and those that follow are replayed. A step
    that cannot be recorded is queued as it is; after ``ATTEMPTS`` of them no other is tried.

    Attributes:
        problem: why the step tried last could not be recorded; None if it could.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self.problem: str | None = None
        self._attempts = ATTEMPTS
        self._memory = memory
        self._recorded: weakref.WeakKeyDictionary[KvCache, CapturedWork] = (
            weakref.WeakKeyDictionary()
        )
        self._settled: weakref.ref[KvCache] | None = None

    def run(self, cache: KvCache, runner: EngineRunner, enqueue: Callable[[], None]) -> None:
        """Queue a step of ``cache``, by way of its record where there is one.

        Args:
            runner: what the step runs on; it is asked whether it can be recorded now.
            enqueue: queues the step; reads what differs from step to step from memory.
        """
        work = self._recorded.get(cache)
        settled = self._settled is not None and self._settled() is cache
        if work is None and settled and self._attempts and runner.can_be_captured:
            work = self._record(cache, enqueue)
        if work is not None:
            work.launch()
            return
        self._settled = None  # if this fails, nothing is known of the context
        enqueue()
        self._settled = weakref.ref(cache)

    def _record(self, cache: KvCache, enqueue: Callable[[], None]) -> CapturedWork | None:
        try:
            work = self._memory.capture(enqueue)
        except EngineError as error:
            self.problem = str(error)
            self._attempts -= 1
            return None
        self.problem = None
        self._recorded[cache] = work
        return work
