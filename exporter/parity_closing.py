"""What holds a session in parity, and lets it go when its comparison is done."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Generic, TypeVar

Session = TypeVar("Session")
Opened = TypeVar("Opened", bound="Closing[Any]")


class Closing(Generic[Session]):
    """Drops its session, and with it the graph's memory, at the end of a ``with`` block."""

    def __init__(self, session: Session) -> None:
        self._session: Session | None = session

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = None

    @property
    def _opened(self) -> Session:
        assert self._session is not None, "its block has ended"
        return self._session
