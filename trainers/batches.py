"""Which images each step sees, and fetching them ahead of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data.dataset import Dataset, Images, Labels

AHEAD = 4
"""Batches fetched while a step runs, on as many threads; decoding files is what this hides."""


@dataclass(frozen=True)
class Batch:
    """One process's share of the images of a step.

    Attributes:
        images: float32 [n, C, H, W] in [0, 1].
        labels: int64 [n].
        indices: Their places in the data set, int64 [n].
        size: Images of this step over all processes, at least 1.
        share: How many of those are this process's. 0 when there are fewer images than
            processes; ``images`` then holds one that must not count, so that every process takes
            part in every step.
    """

    images: Images
    labels: Labels
    indices: NDArray[np.int64]
    size: int
    share: int


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Return the indices of every step of an epoch: a permutation drawn from (seed, epoch).

    The last batch holds the remainder. Nothing else enters: an epoch can be replayed alone.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


def fetch_ahead(
    dataset: Dataset, batches: Sequence[NDArray[np.int64]], rank: int = 0, world: int = 1
) -> Generator[Batch, None, None]:
    """Yield this process's share of each batch, in order, fetching the next ones meanwhile."""

    def fetch(indices: NDArray[np.int64]) -> Batch:
        mine = indices[rank::world]
        seen = mine if len(mine) else indices[:1]
        return Batch(dataset.images(seen), dataset.labels[seen], seen, len(indices), len(mine))

    with ThreadPoolExecutor(AHEAD, thread_name_prefix="fetch") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for indices in batches:
                waiting.append(pool.submit(fetch, indices))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
