"""Worker processes that tell how far they are."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any

Tell = Callable[..., None]
"""Given to a piece of work: what it is called with is heard by the process that waits."""

Piece = Callable[[Tell], object]
"""A piece of work, to be sent to another process; what it returns is left there."""


class Workers:
    """Processes that are started afresh and share out pieces of work.

    A context manager: at its end no piece is begun any more, and the processes end. They also end
    with this process, however it is killed.

    Args:
        count: How many at most.
    """

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._news: Any = context.SimpleQueue()
        self._pool = ProcessPoolExecutor(count, context, _begin, (self._news,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, pieces: Sequence[Piece], heard: Callable[..., None]) -> None:
        """Do all pieces, in order as far as there are processes.

        Args:
            pieces: What is to be done.
            heard: Called with the place of a piece and what it told, while this waits.

        Raises:
            Exception: What a piece raised.
        """
        waiting = {self._pool.submit(_do, place, piece) for place, piece in enumerate(pieces)}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.1)
            while not self._news.empty():
                place, said = self._news.get()
                heard(place, *said)
            for future in finished:
                future.result()


_news: Any = None
"""In a worker: the queue that what is told goes to."""


def _begin(news: Any) -> None:
    global _news  # noqa: PLW0603
    _news = news
    end_with_parent()


def end_with_parent() -> None:
    """Let this process, which ``multiprocessing`` started, end when the one that started it does.

    A parent that is killed outright can end nobody: its workers would wait for it for ever.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(place: int, piece: Piece) -> None:
    piece(lambda *said: _news.put((place, said)))
