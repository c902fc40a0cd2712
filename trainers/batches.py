"""Which images each step sees, and fetching them ahead of it."""

from __future__ import annotations

import contextlib
import signal
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Steps

from ccn_deploy.data.dataset import Dataset, Images, Labels
from ccn_deploy.data.files import printable
from ccn_deploy.errors import (
    CcnDeployError,
    EnvironmentUnfitError,
    InputError,
    UnreadableImageError,
    one_line,
)
from ccn_deploy.workers import end_with_parent

AHEAD = 4
"""Batches fetched while a step runs, on as many threads; decoding files is what this hides."""


@dataclass(frozen=True)
class Batch:
    """One process's share of the images of a step.

    Attributes:
        images: float32 [n, C, H, W] in [0, 1].
        labels: int64 [n].
        indices: Their places in the data set, int64 [n].
        size: Images of this step over all processes, read or not, at least 1. One that cannot be
            read counts as nothing: the sum over the others is still divided by this.
        share: How many are this process's and could be read. 0 when there are fewer images than
            processes, or none could be read; ``images`` then holds one that must not count, so
            that every process takes part in every step.
        skipped: What is wrong with each that could not be read.
    """

    images: Images
    labels: Labels
    indices: NDArray[np.int64]
    size: int
    share: int
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        workers: Processes that do it; 0 for threads of this one.
        strict: Whether a file that cannot be read as an image is an error.
    """

    workers: int = 0
    strict: bool = False


class Read(NamedTuple):
    """Images that could be read, float32 [n, C, H, W], their indices, and what others lack."""

    images: Images
    indices: NDArray[np.int64]
    skipped: tuple[str, ...]


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Return the indices of every step of an epoch: a permutation drawn from (seed, epoch).

    The last batch holds the remainder. Nothing else enters: an epoch can be replayed alone.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


def read_images(dataset: Dataset, indices: NDArray[np.int64]) -> Read:
    """Read images, leaving out those whose files are damaged."""
    with contextlib.suppress(UnreadableImageError):
        return Read(dataset.images(indices), indices, ())
    found, kept, skipped = [np.empty((0, *dataset.input_shape), np.float32)], [], []
    for index in indices:
        try:
            found.append(dataset.images([index]))
            kept.append(index)
        except UnreadableImageError as error:
            skipped.append(error.what)
    return Read(np.concatenate(found), np.array(kept, dtype=np.int64), tuple(skipped))


def first_images(dataset: Dataset, indices: Iterable[int], most: int) -> Images:
    """Return the first images that can be read: float32 [n, C, H, W], n from 1 to ``most``.

    Raises:
        InputError: None can be.
    """
    found: list[Images] = []
    why = ""
    for index in indices:
        try:
            found.append(dataset.images([index]))
        except UnreadableImageError as error:
            why = error.what
        if len(found) == most:
            break
    if not found:
        raise InputError(
            f"No image of {printable(dataset.name)} ({dataset.split}) can be read: {why}",
            "Get the files again.",
        )
    return np.concatenate(found)


def fetch_ahead(
    dataset: Dataset,
    batches: Sequence[NDArray[np.int64]],
    rank: int = 0,
    world: int = 1,
    reading: Reading = Reading(),
) -> Generator[Batch, None, None]:
    """Yield this process's share of each batch, in order, fetching the next ones meanwhile.

    The batches are the same, bit for bit, whoever reads them.

    Raises:
        InputError: A file that cannot be opened or used; where reading is strict, or none can be
            read, also one that is damaged.
        EnvironmentUnfitError: A worker process ended before its time.
    """
    shares = _Shares(dataset, batches, rank, world, reading.strict)
    fetched = _by_processes(shares, reading.workers) if reading.workers else _by_threads(shares)
    with contextlib.closing(fetched):
        yield from fetched


@dataclass(frozen=True)
class _Shares:
    """One process's share of each batch, by the number of the batch."""

    dataset: Dataset
    batches: Sequence[NDArray[np.int64]]
    rank: int
    world: int
    strict: bool

    def fetch(self, step: int) -> Batch:
        indices, dataset = self.batches[step], self.dataset
        mine = indices[self.rank :: self.world]
        read = Read(dataset.images(mine), mine, ()) if self.strict else read_images(dataset, mine)
        images, seen, share = read.images, read.indices, len(read.indices)
        if not share:
            images = first_images(dataset, chain(indices, range(len(dataset))), 1)
            seen = indices[:1]
        return Batch(images, dataset.labels[seen], seen, len(indices), share, read.skipped)


def _by_threads(shares: _Shares) -> Generator[Batch, None, None]:
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="fetch") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for step in range(len(shares.batches)):
                waiting.append(pool.submit(shares.fetch, step))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


_Sent = tuple[Tensor, Batch] | CcnDeployError
"""What a worker sends: images in shared memory and the rest, or an error as it is."""


@dataclass(frozen=True)
class _Worker(Steps[_Sent]):
    """What a worker process does for one step."""

    shares: _Shares

    def __len__(self) -> int:
        return len(self.shares.batches)

    def __getitem__(self, step: int) -> _Sent:
        try:
            batch = self.shares.fetch(step)
        except CcnDeployError as error:  # raised, it would come back wrapped in a traceback
            return error
        return torch.from_numpy(batch.images), replace(batch, images=batch.images[:0])


def _by_processes(shares: _Shares, workers: int) -> Generator[Batch, None, None]:
    with warnings.catch_warnings():  # that these are more than cores: they were asked for
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader: DataLoader[Any] = DataLoader(
            _Worker(shares),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=1,  # batches that each has ready: all of them together are in memory
            collate_fn=_as_sent,
            # torch's own watch misses a parent that is killed before the worker first looks at it.
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else a number is drawn from that of dropout
        )
        with _signals_kept():
            received = iter(loader)  # starts the workers
    try:
        while (sent := _next(received)) is not None:
            if isinstance(sent, CcnDeployError):
                raise sent
            images, batch = sent
            yield replace(batch, images=images.numpy())
    finally:
        del received  # which ends the workers; the traceback of an error would keep it


def _begin_worker(_: int) -> None:
    end_with_parent()


def _next(received: Iterator[_Sent]) -> _Sent | None:
    """Return what comes next, None at the end.

    Raises:
        EnvironmentUnfitError: A worker is gone, or batches cannot be received.
    """
    try:
        return next(received, None)
    except (RuntimeError, OSError, EOFError) as error:  # the latter two if it was just sending
        if str(error).startswith("Caught "):  # by torch, in a worker that goes on: no fault of it
            raise
        why = one_line(error)
    # Not in the handler above: the first error's traceback would keep the other workers alive.
    raise EnvironmentUnfitError(
        f"A process that reads images has stopped sending them: {why.rstrip('.')}.",
        "If it ran out of memory, or /dev/shm is small, use fewer --workers, or 0 for threads. "
        "The same command goes on from the last whole epoch.",
    )


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Let workers be started without losing Ctrl-C, and leave no handler of torch's here.

    Every process of a terminal gets Ctrl-C. In the middle of a fork Python may lose it, so it is
    put off; the workers inherit that they put it off, and are ended by this process.

    torch's handler of SIGCHLD would raise wherever this process happens to be, in the middle of a
    step; without it, a worker that is gone is noticed where its batch is waited for.
    """
    if threading.current_thread() is not threading.main_thread():  # others have no handlers
        yield
        return
    child = getattr(signal, "SIGCHLD", None)  # not on Windows
    of_child = None if child is None else signal.getsignal(child)
    interrupts: list[int] = []
    of_interrupt = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, of_interrupt)
        if child is not None and of_child is not None:
            signal.signal(child, of_child)
    if interrupts:
        signal.raise_signal(signal.SIGINT)


def _as_sent(sent: Any) -> Any:
    return sent
