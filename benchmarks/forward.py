"""Inference: by network, by runtime, by lowering."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.subjects import DEFENSES, ONE_THREAD, Subjects, untrained
from benchmarks.tables import Row, ratios
from benchmarks.timing import Work, compare
from ccn_deploy.bundle import Bundle
from ccn_deploy.runtimes import open_runtime

DIGITS = tuple("0123456789")


def forward(subjects: Subjects, rounds: int) -> Iterator[str]:
    """Logits of a batch, by network and by runtime."""
    return ratios(_passes(subjects, rounds))


def _passes(subjects: Subjects, rounds: int) -> Iterator[Row]:
    for batch in (1, 64):
        images = subjects.images[:batch]
        repeat = 200 // batch + 1
        works = {
            (defense, name): _repeat(subjects.bundles[defense], name, images, repeat)
            for defense in DEFENSES
            for name in ("torch", "onnxruntime-cpu")
        }
        what = f"forward, {repeat} times batch {batch}"
        for name, title in (("torch", "PyTorch"), ("onnxruntime-cpu", "ONNX Runtime")):
            ratio = compare(works["ccn", name], works["sm", name], rounds=rounds)
            yield what, title, "CCN", "SM", ratio
        for defense in DEFENSES:
            ratio = compare(
                works[defense, "torch"], works[defense, "onnxruntime-cpu"], rounds=rounds
            )
            yield what, defense.upper(), "PyTorch", "ONNX Runtime", ratio


def lowerings(subjects: Subjects, rounds: int) -> Iterator[str]:
    """What a CCN costs on ONNX Runtime in the default graph and in the one for its CPU provider."""
    return ratios(_lowerings(subjects, rounds))


def _lowerings(subjects: Subjects, rounds: int) -> Iterator[Row]:
    noise = np.random.default_rng(0).random((16, 3, 32, 32), dtype=np.float32)
    for title, architecture, images, repeat in (
        ("MNIST network, batch 64", "mnist-cnn", subjects.images[:64], 4),
        ("VGG11 for CIFAR-10, batch 16", "vgg11-cifar10", noise, 1),
    ):
        works: dict[tuple[str, str | None], Callable[[], None]] = {}
        for defense, optimize in (("sm", None), ("ccn", None), ("ccn", "onnxruntime-cpu")):
            bundle = untrained(
                architecture,
                defense,
                subjects.scratch / f"{architecture}-{defense}-{optimize}",
                DIGITS,
                gradient=False,
                optimize=optimize,
            )
            works[defense, optimize] = _repeat(bundle, "onnxruntime-cpu", images, repeat)
        for optimize, name in ((None, "default graph"), ("onnxruntime-cpu", "optimised graph")):
            ratio = compare(works["ccn", optimize], works["sm", None], rounds=3 * rounds)
            yield title, "CCN, SM", f"CCN, {name}", "SM", ratio


def _repeat(bundle: Bundle, name: str, images: np.ndarray, repeat: int) -> Work:
    runtime = open_runtime(bundle, name, options=ONE_THREAD)

    def call() -> None:
        for _ in range(repeat):
            runtime.logits(images)

    return call
