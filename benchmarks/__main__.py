"""Measure, and print the tables of ``docs/benchmarks.md``."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.attacks import attacks
from benchmarks.audit import audit, pgds
from benchmarks.forward import forward, lowerings
from benchmarks.gradients import gradients, rules
from benchmarks.memory import memory
from benchmarks.others import others
from benchmarks.peers.libraries import PACKAGES
from benchmarks.reading import reading
from benchmarks.serving import serving
from benchmarks.subjects import Subjects, make_subjects
from benchmarks.training import training

Section = Callable[[Subjects, int], Iterator[str]]

SECTIONS: dict[str, Section] = {
    "training": training,
    "forward": forward,
    "lowerings": lowerings,
    "serving": serving,
    "gradients": gradients,
    "rules": rules,
    "others": others,
    "attacks": attacks,
    "memory": memory,
    "reading": reading,
    "pgd": pgds,
    "audit": audit,
    "bounded": peers.bounded,
    "deepfool": peers.deepfool,
    "cw": peers.cw,
}

PEERS = ("bounded", "deepfool", "cw")
"""What ``--only peers`` stands for."""


def main() -> None:
    """Train the two networks, run the sections, print each table as it grows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="runs of each program at most")
    parser.add_argument("--only", help=f"some of: {', '.join(SECTIONS)}, peers (the last three)")
    parser.add_argument("--bundles", type=Path, help="a directory with the bundles sm and ccn")
    parser.add_argument("--samples", type=int, default=100, help="images of pgd and audit")
    parser.add_argument("--keep", type=Path, help="a directory by which a killed audit goes on")
    options = parser.parse_args()
    try:
        chosen = _chosen(options.only)
    except KeyError as error:
        parser.error(f"no section {error}; there are: {', '.join(SECTIONS)}, peers")

    print(_machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        subjects = make_subjects(Path(scratch), options.bundles, options.samples, options.keep)
        torch.set_num_threads(1)
        for name in chosen:
            section = SECTIONS[name]
            print(f"\n## {name}\n\n{(section.__doc__ or '').strip()}\n", flush=True)
            started = time.perf_counter()
            for line in section(subjects, options.rounds):
                print(line, flush=True)
            print(f"\n{time.perf_counter() - started:.0f} seconds.", flush=True)


def _chosen(only: str | None) -> list[str]:
    """Return the sections in the order of :data:`SECTIONS`.

    Raises:
        KeyError: There is no such section.
    """
    if only is None:
        return list(SECTIONS)
    wanted = {name.strip() for name in only.split(",")}
    if "peers" in wanted:
        wanted = wanted - {"peers"} | set(PEERS)
    for name in sorted(wanted):
        SECTIONS[name]
    return [name for name in SECTIONS if name in wanted]


def _machine() -> str:
    names = ("torch", "onnxruntime", "numpy", *PACKAGES.values())
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    return f"{_processor()}, {os.cpu_count()} cores, one thread used; {versions}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
