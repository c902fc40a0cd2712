"""Our attacks by where their gradients come from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.subjects import DEFENSES, ONE_THREAD, Subjects
from benchmarks.tables import Row, ratios
from benchmarks.timing import Work, compare
from ccn_deploy.attacks import AttackSpec, suite
from ccn_deploy.attacks.foolbox_model import foolbox_model, reference_model
from ccn_deploy.attacks.perform import perform
from ccn_deploy.runtimes import open_runtime
from ccn_deploy.runtimes.torch_runtime import load_reference

IMAGES = {"fgsm": 256, "pgd": 16, "deepfool": 16, "deepfool-fast": 16}


def attacks(subjects: Subjects, rounds: int) -> Iterator[str]:
    """Each attack on ONNX Runtime, with own and with reference gradients, and on PyTorch."""
    return ratios(_rows(subjects, max(3, rounds // 2)))


def _rows(subjects: Subjects, rounds: int) -> Iterator[Row]:
    for spec in suite(IMAGES, epsilons=(0.1,)):
        if not spec.clip:
            continue
        what = f"{spec.name}, {IMAGES[spec.name]} images"
        works = {defense: _works(subjects, defense, spec) for defense in DEFENSES}
        ratio = compare(works["ccn"]["native"], works["sm"]["native"], rounds=rounds)
        yield what, "ONNX Runtime, native", "CCN", "SM", ratio
        for defense, own in works.items():
            for other, title in (
                ("torch", "PyTorch"),
                ("reference", "ONNX Runtime, the reference's"),
            ):
                ratio = compare(own[other], own["native"], rounds=rounds)
                yield what, defense.upper(), title, "ONNX Runtime, native", ratio


def _works(subjects: Subjects, defense: str, spec: AttackSpec) -> dict[str, Work]:
    n = IMAGES[spec.name]
    images, labels = subjects.images[:n], subjects.labels[:n]
    bundle = subjects.bundles[defense]
    reference, runtime = load_reference(bundle), open_runtime(bundle, options=ONE_THREAD)
    models = {
        "torch": reference_model(reference),
        "reference": foolbox_model(runtime, reference, gradient="reference"),
        "native": foolbox_model(runtime, None, gradient="native"),
    }
    seeds = np.zeros((n, 1), dtype=np.int64)
    return {
        source: lambda model=model: perform(spec, model, images, labels, seeds=seeds)
        for source, model in models.items()
    }
