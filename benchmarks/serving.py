"""What ``ccn_deploy.load`` costs beside a bare session: time a call, and memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import chain

import onnxruntime

import ccn_deploy
from benchmarks.resident import GRAPH
from benchmarks.subjects import DEFENSES, ONE_THREAD, Subjects, untrained
from benchmarks.tables import Row, ratios, table
from benchmarks.timing import compare
from ccn_deploy.bundle import Bundle

DIGITS = tuple("0123456789")
CALLS = 100
"""In a run: about 20 ms, within which the machine's speed hardly changes."""


def serving(subjects: Subjects, rounds: int) -> Iterator[str]:
    """One image through Model.predict, input checks included; memory after calls of 16 images."""
    return chain(ratios(_overhead(subjects, rounds)), [""], _memory(subjects))


def _overhead(subjects: Subjects, rounds: int) -> Iterator[Row]:
    image = subjects.images[:1]
    for defense in DEFENSES:
        bundle = subjects.bundles[defense]
        model = ccn_deploy.load(bundle, "onnxruntime-cpu", options=ONE_THREAD)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            bundle.path / GRAPH, options, providers=["CPUExecutionProvider"]
        )

        def ours(model: ccn_deploy.Model = model) -> None:
            for _ in range(CALLS):
                model.predict(image)

        def bare(session: onnxruntime.InferenceSession = session) -> None:
            for _ in range(CALLS):
                session.run(["logits"], {"images": image})

        ratio = compare(ours, bare, rounds=6 * rounds)
        yield (
            *(f"serving, {CALLS} times batch 1", defense.upper()),
            *("Model.predict", "bare InferenceSession", ratio),
        )


def _memory(subjects: Subjects) -> Iterator[str]:
    columns = ("memory of a process, batch 16", "load, predict", "bare InferenceSession", "ratio")
    return table(columns, _memory_rows(subjects))


def _memory_rows(subjects: Subjects) -> Iterator[tuple[str, ...]]:
    for title, architecture in (
        ("MNIST CCN", "mnist-cnn"),
        ("VGG11 CIFAR-10 CCN", "vgg11-cifar10"),
    ):
        path = subjects.scratch / f"serving-{architecture}"
        bundle = untrained(architecture, "ccn", path, DIGITS, gradient=False)
        ours, bare = (_resident(how, bundle) for how in ("load", "bare"))
        mebibytes = (f"{kibibytes / 1024:.0f} MiB" for kibibytes in (ours, bare))
        yield title, *mebibytes, f"**{ours / bare:.2f}**"


def _resident(how: str, bundle: Bundle) -> int:
    shape = map(str, (16, *bundle.card.input_shape))
    command = [sys.executable, "-m", "benchmarks.resident", how, str(bundle.path), *shape]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
