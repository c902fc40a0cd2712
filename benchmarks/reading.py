"""Reading image files ahead of training: threads against worker processes, and their memory."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from benchmarks.subjects import Subjects
from benchmarks.tables import table
from ccn_deploy.data import Dataset, ModelInput, load_dataset
from ccn_deploy.trainers import Event, Stepped, TrainConfig, train
from ccn_deploy.trainers.batches import Reading, epoch_batches, fetch_ahead

FILES = 2_000
SIZES = (500, FILES)
BATCH = 32
WORKERS = (0, 1, 2, 4)
INPUT = ModelInput((3, 224, 224))
NETWORK = """
from torch import nn

def small(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
                         nn.Flatten(), nn.Linear(64, classes))
"""


def reading(subjects: Subjects, rounds: int) -> Iterator[str]:
    """JPEGs of 500x375 to 224x224, in batches of 32; the clock is that on the wall.

    Memory is the sum over the command and its workers, pages that they share counted once, largest
    of what is looked at after every step of an epoch with a small network.
    """
    tree = subjects.scratch / "jpegs"
    make_tree(tree, FILES)
    data = load_dataset(tree, "train", like=INPUT)
    speeds: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for _ in range(min(rounds, 3)):
        for workers in WORKERS:
            speeds[workers].append(_speed(data, workers))
    yield from table(
        ("read by", "images/s", "slowest and fastest"),
        (
            (_name(w), f"{statistics.median(found):.0f}", f"{min(found):.0f} to {max(found):.0f}")
            for w, found in speeds.items()
        ),
    )
    yield ""
    yield from table(
        ("read by", *(f"{size} images, {_decoded(size)} MB decoded" for size in SIZES), "ratio"),
        (_memory(tree, workers, subjects.scratch) for workers in (0, 2)),
    )


def make_tree(root: Path, count: int) -> None:
    """Write smooth noisy JPEGs of some 85 KB in two class folders."""
    from PIL import Image

    random = np.random.default_rng(0)
    for at in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        noisy = (pixels + random.normal(0, 14, pixels.shape)).clip(0, 255).astype(np.uint8)
        path = root / "ab"[at % 2] / f"{at:05}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


def _name(workers: int) -> str:
    return f"{workers} process{'es'[: 2 * (workers > 1)]}" if workers else "threads"


def _decoded(size: int) -> int:
    return round(size * 4 * np.prod(INPUT.input_shape) / 1e6)


def _speed(data: Dataset, workers: int) -> float:
    """Return images a second of reading all of them."""
    batches = epoch_batches(len(data), BATCH, 0, 0)
    started = time.perf_counter()
    for _ in fetch_ahead(data, batches, reading=Reading(workers)):
        pass
    return len(data) / (time.perf_counter() - started)


def _memory(tree: Path, workers: int, scratch: Path) -> tuple[str, ...]:
    peaks = []
    for size in SIZES:
        output = scratch / f"reading-{workers}-{size}"
        command = [sys.executable, "-m", "benchmarks.reading", tree, size, workers, output]
        found = subprocess.run(
            [str(part) for part in command], check=True, capture_output=True, text=True
        )
        peaks.append(float(found.stdout))
    shown = (f"{peak:.0f} MiB" for peak in peaks)
    return _name(workers), *shown, f"**{peaks[1] / peaks[0]:.2f}**"


def train_on(tree: Path, size: int, workers: int, output: Path) -> float:
    """Train an epoch on the first images; return the largest memory that was seen, in MiB."""
    mine, seen = psutil.Process(), [0.0]

    def look(event: Event) -> None:
        if isinstance(event, Stepped):
            found = [mine, *mine.children()]
            seen.append(sum(process.memory_full_info().pss for process in found) / 2**20)

    output.mkdir()
    (output / "network.py").write_text(NETWORK)
    whole = load_dataset(tree, "train", like=INPUT)
    data = dataclasses.replace(whole, labels=whole.labels[:size])
    test = dataclasses.replace(whole, labels=whole.labels[:BATCH], split="test")
    config = TrainConfig(
        dataset=data.name,
        network=f"{output / 'network.py'}:small",
        epochs=1,
        batch_size=BATCH,
        threads=1,
        workers=workers,
    )
    train(config, data, test, output / "run", watcher=look)
    return max(seen)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("tree", type=Path)
    parser.add_argument("size", type=int)
    parser.add_argument("workers", type=int)
    parser.add_argument("output", type=Path)
    print(train_on(**vars(parser.parse_args())))
