"""Things that one thread at a time may use, lent to many threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from ccn_deploy.runtimes.base import already_closed

T = TypeVar("T")


class Pool(Generic[T]):
    """Lends an item to each thread that asks, making as many as are in use at once.

    The item that came back last goes out first, so a thread on its own always has the same one.
    One that an exception came through is not lent again: nobody knows what state it is in. Threads
    that end leave nothing behind.

    Args:
        name: Of what is closed by :meth:`close`, for the error.
        make: Makes an item; called by the thread that needs one more.
        release: Frees what an item holds.
        last: Called once, when the pool is closed and every item has been released.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], T],
        release: Callable[[T], None],
        last: Callable[[], None],
    ) -> None:
        self._name = name
        self._make, self._release, self._last = make, release, last
        self._lock = threading.Lock()
        self._idle: list[T] = []
        self._lent = 0
        self._closed = False

    @contextlib.contextmanager
    def borrow(self) -> Iterator[T]:
        """Lend an item for the length of a block.

        Raises:
            UsageError: The pool is closed.
        """
        with self._lock:
            if self._closed:
                raise already_closed(self._name)
            self._lent += 1
            item = self._idle.pop() if self._idle else None
        try:
            if item is None:
                item = self._make()
            try:
                yield item
            except BaseException:
                with contextlib.suppress(Exception):  # the error under way is the one to tell
                    self._release(item)
                raise
        except BaseException:
            with contextlib.suppress(Exception):
                self._settle(None)
            raise
        self._settle(item)

    def close(self) -> None:
        """Release idle items now and the others when they come back; twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle, self._idle = self._idle, []
            nobody = self._lent == 0
        with contextlib.ExitStack() as stack:  # goes on after an error, then raises it
            if nobody:
                stack.callback(self._last)
            for item in idle:
                stack.callback(self._release, item)

    def _settle(self, item: T | None) -> None:
        """Take an item back; None is one that is gone already."""
        with self._lock:
            self._lent -= 1
            closed, nobody = self._closed, self._lent == 0
            if item is not None and not closed:
                self._idle.append(item)
        if closed:
            with contextlib.ExitStack() as stack:
                if nobody:
                    stack.callback(self._last)
                if item is not None:
                    stack.callback(self._release, item)
