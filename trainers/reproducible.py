"""Threads, determinism and random generators of a training, and putting them back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils import deterministic as fill


@contextlib.contextmanager
def reproducible(threads: int, device: torch.device) -> Iterator[None]:
    """Set threads and determinism for a training, and put everything back after it.

    Algorithms are held deterministic on a CPU, where it is free; on a GPU it costs, and some
    layers have no such kernel.
    """
    before = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    filling = fill.fill_uninitialized_memory  # type: ignore[attr-defined]
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.set_num_threads(threads)
        if not gpus:
            torch.use_deterministic_algorithms(True)
            fill.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.set_num_threads(before)
            torch.use_deterministic_algorithms(deterministic)
            fill.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
