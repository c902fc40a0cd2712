"""The memory of an evaluation, by the number of its images."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.subjects import ONE_THREAD, Subjects, untrained
from benchmarks.tables import table
from ccn_deploy.attacks import suite
from ccn_deploy.bundle import open_bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import DatasetNotFoundError
from ccn_deploy.robustness import RobustnessRequest, collect, judge

DATASET = "fashion-mnist"
SIZES = (1_000, 10_000)


def memory(subjects: Subjects, rounds: int) -> Iterator[str]:
    """FGSM on ONNX Runtime and its reference: peak of a process of its own for each size."""
    try:
        data = load_dataset(DATASET, "test")
    except DatasetNotFoundError as error:
        yield f"Not measured: {error}"
        return
    peaks: list[int] = []
    for size in SIZES:
        bundle = untrained("mnist-cnn", "ccn", subjects.scratch / f"{size}", data.class_names)
        command = [sys.executable, "-m", "benchmarks.memory", str(bundle.path), str(size)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(found.stdout))
    yield from table(
        ("images", "peak of memory", f"in that of {SIZES[0]}"),
        (
            (f"{size}", f"{peak / 1024:.0f} MiB", f"**{peak / peaks[0]:.2f}**")
            for size, peak in zip(SIZES, peaks, strict=True)
        ),
    )


def evaluate(bundle: Path, size: int) -> int:
    """Collect and judge as ``verify-robustness`` does; return this process's peak in KiB."""
    request = RobustnessRequest(
        dataset=load_dataset(DATASET, "test"),
        attacks=suite(["fgsm"], [0.1]),
        samples=size,
        options=ONE_THREAD,
    )
    judge(collect(open_bundle(bundle), request))
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("size", type=int)
    print(evaluate(**vars(parser.parse_args())))
