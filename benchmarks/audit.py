"""The audit and the default PGD, by what they leave: beside pyautoattack, and beside each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.noise import trained_on_noise
from benchmarks.subjects import DATASET, DEFENSES, ONE_THREAD, Subjects, trained
from benchmarks.tables import table
from ccn_deploy.attacks import AttackSpec, suite
from ccn_deploy.attacks.foolbox_model import NativeModel
from ccn_deploy.attacks.passes import QueryCounter
from ccn_deploy.attacks.perform import perform
from ccn_deploy.attacks.spec import TRANSFER
from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.runtimes import open_runtime
from ccn_deploy.runtimes.base import Array, Runtime
from ccn_deploy.storage import sha256

EPSILON = 0.2
BATCH = 50
TOLERANCE = 1e-6
PGD_EPSILONS = (0.1, 0.2, 0.3)
CONSTANT = {"rel_stepsize": 1 / 30, "decay": False}
SETTINGS: dict[str, dict[str, int | float | bool]] = {
    "1 x 40 of 1/30": {**CONSTANT},
    "1 x 40 from 1/4": {"rel_stepsize": 0.25},
    "1 x 40 from 1/2": {"rel_stepsize": 0.5},
    "1 x 40 from 1": {},
    "2 x 20 from 1": {"steps": 20, "restarts": 2},
    "4 x 10 from 1": {"steps": 10, "restarts": 4},
}


def pgds(subjects: Subjects, _: int) -> Iterator[str]:
    """Accuracy in percent that PGD leaves, at 40 gradients an image that holds, by its steps."""
    columns = ["network", "epsilon", *SETTINGS, "APGD, 100"]
    return table(columns, _pgd_rows(subjects))


def _pgd_rows(subjects: Subjects) -> Iterator[tuple[str, ...]]:
    for name, bundle in _networks(subjects).items():
        with open_runtime(bundle, options=ONE_THREAD) as runtime:
            for epsilon in PGD_EPSILONS:
                specs = [
                    suite(["pgd"], [epsilon], settings={"pgd": change})[0]
                    for change in SETTINGS.values()
                ]
                specs += suite(["apgd"], [epsilon])
                batch = _batch(subjects, 0, subjects.samples)
                left = [len(_ours(runtime, [spec], epsilon, batch).left) for spec in specs]
                shares = (f"{100 * n / subjects.samples:.1f}" for n in left)
                yield name, f"{epsilon:g}", *shares


def audit(subjects: Subjects, _: int) -> Iterator[str]:
    """Accuracy in percent under Linf 0.2 that our audit and pyautoattack's standard set leave.

    Both attack the deployed graph with its own gradients. Queries are counted where the runtime
    answers: images forward, gradients backward. Our audit is run without its transfer stage.
    """
    columns = (
        *("network", "images", "clean", "our audit", "pyautoattack", "gradients", "pyautoattack's"),
        *("ratio", "our stages: what they fooled, at how many gradients"),
    )
    return table(columns, _audit_rows(subjects))


def _audit_rows(subjects: Subjects) -> Iterator[tuple[str, ...]]:
    (spec,) = suite(["audit"], [EPSILON])
    stages = [stage for stage in spec.stages if stage.name != TRANSFER]
    for name, bundle in _networks(subjects).items():
        kept = _Kept(subjects.keep, bundle)
        ours, theirs = _Found(), _Found()
        with open_runtime(bundle, options=ONE_THREAD) as runtime:
            for first, last in pairwise([*range(0, subjects.samples, BATCH), subjects.samples]):
                batch = _batch(subjects, first, last)
                ours += kept.get(spec.document(), batch, partial(_ours, runtime, stages, EPSILON))
                theirs += kept.get({"name": "pyautoattack"}, batch, partial(_theirs, runtime))
        n = subjects.samples
        ratio = f"**1/{theirs.backward / ours.backward:.1f}**" if ours.backward else "-"
        yield (
            *(name, str(n), f"{100 * len(ours.right) / n:.1f}"),
            *(f"**{100 * len(side.left) / n:.1f}**" for side in (ours, theirs)),
            *(f"{side.backward:,}" for side in (ours, theirs)),
            ratio,
            ", ".join(f"{stage} {fooled} ({asked:,})" for stage, fooled, asked in ours.stages),
        )


@dataclass(frozen=True)
class _Batch:
    """Some images of the evaluation.

    Attributes:
        first: Position of the first.
        index: int64 [n] in the data set.
        images: float32 [n, C, H, W].
        labels: int64 [n].
    """

    first: int
    index: NDArray[np.int64]
    images: Array
    labels: NDArray[np.int64]


def _batch(subjects: Subjects, first: int, last: int) -> _Batch:
    return _Batch(
        first,
        subjects.order[first:last],
        subjects.images[first:last],
        subjects.labels[first:last].astype(np.int64),
    )


@dataclass(frozen=True)
class _Found:
    """What a set of attacks left.

    Attributes:
        right: Positions that are right without an attack.
        left: Positions that still hold after it.
        backward: Gradients that were asked for, of all images together.
        stages: Of each attack its name, how many images it fooled, and its gradients.
    """

    right: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    backward: int = 0
    stages: tuple[tuple[str, int, int], ...] = ()

    def __add__(self, other: _Found) -> _Found:
        stages = {name: (fooled, asked) for name, fooled, asked in self.stages}
        for name, fooled, asked in other.stages:
            before = stages.get(name, (0, 0))
            stages[name] = before[0] + fooled, before[1] + asked
        return _Found(
            self.right + other.right,
            self.left + other.left,
            self.backward + other.backward,
            tuple((name, *counts) for name, counts in stages.items()),
        )


def _ours(runtime: Runtime, stages: list[AttackSpec], epsilon: float, at: _Batch) -> _Found:
    """Run attacks one after another on the images that still hold."""
    model = NativeModel(runtime)
    held = runtime.logits(at.images).argmax(axis=1) == at.labels
    found = _Found(right=_positions(held, at))
    for stage in stages:
        rows = held.nonzero()[0]
        if stage.part is not None:
            rows = rows[at.first + rows < stage.part]
        counter = QueryCounter(model, len(rows))
        seeds = np.stack([np.zeros_like(at.index[rows]), at.index[rows]], axis=1)
        made = perform(stage, counter, at.images[rows], at.labels[rows], seeds=seeds)
        away = np.abs(made - at.images[rows]).max(axis=(1, 2, 3))
        near = away <= epsilon + TOLERANCE  # and not NaN
        gone = rows[near][runtime.logits(made[near]).argmax(axis=1) != at.labels[rows[near]]]
        held[gone] = False
        asked = int(counter.queries.backward.sum())
        found += _Found(backward=asked, stages=((stage.name, len(gone), asked),))
    return replace(found, left=_positions(held, at))


def _theirs(runtime: Runtime, at: _Batch) -> _Found:
    """Run the standard set of pyautoattack: APGD-CE, APGD-T, FAB-T, Square."""
    from pyautoattack import AutoAttack

    counting = _Counting(runtime)
    network = NativeModel(counting)  # type: ignore[arg-type]
    held = runtime.logits(at.images).argmax(axis=1) == at.labels
    images, labels = torch.from_numpy(at.images), torch.from_numpy(at.labels)

    def answer(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = network(x)
        return logits

    attack = AutoAttack(answer, norm="Linf", eps=EPSILON, seed=0)
    made, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    still = held & (runtime.logits(made.numpy()).argmax(axis=1) == at.labels)
    return _Found(_positions(held, at), _positions(still, at), counting.backward)


class _Counting:
    """A runtime that counts the gradients that it is asked for."""

    differentiable = True

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.backward = 0

    def logits(self, images: Array) -> Array:
        return self._runtime.logits(images)

    def vjp(self, images: Array, cotangents: Array) -> tuple[Array, Array]:
        self.backward += cotangents.shape[0] * cotangents.shape[1]
        return self._runtime.vjp(images, cotangents)


def _positions(chosen: NDArray[np.bool_], at: _Batch) -> tuple[int, ...]:
    return tuple((at.first + chosen.nonzero()[0]).tolist())


class _Kept:
    """What was measured before, by batch: a killed run goes on.

    Args:
        directory: To keep it in; nothing is kept if None.
        bundle: What is attacked.
    """

    def __init__(self, directory: Path | None, bundle: Bundle) -> None:
        self._directory = directory
        self._digest = bundle.manifest.digest

    def get(
        self, attack: dict[str, Any], at: _Batch, measure: Callable[[_Batch], _Found]
    ) -> _Found:
        """Return what is kept, or measure and keep it."""
        key = [self._digest, attack, EPSILON, at.first, at.index.tolist()]
        path = self._directory and self._directory / f"{sha256(json.dumps(key).encode())[:24]}.json"
        if path and path.is_file():
            document = json.loads(path.read_text())
            stages = tuple(tuple(stage) for stage in document.pop("stages"))
            lists = {name: tuple(document.pop(name)) for name in ("right", "left")}
            return _Found(**lists, **document, stages=stages)
        found = measure(at)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(vars(found)))
        return found


def _networks(subjects: Subjects) -> dict[str, Bundle]:
    """Return the bundles of ``--bundles``; without it, all that can be trained here."""
    if subjects.made is not None:
        found = sorted(path.parent for path in subjects.made.glob("*/manifest.json"))
        return {path.name: open_bundle(path) for path in found}
    test_data = load_dataset(DATASET, "test")
    hardened: dict[str, Any] = {"recipe": "pgd-mnist", "epsilon": EPSILON}
    return {
        **{name: subjects.bundles[name] for name in DEFENSES},
        "ccn+ls": trained("ccn+ls", test_data, subjects.scratch),
        "noise": trained_on_noise(load_dataset(DATASET, "train"), subjects.scratch / "noise"),
        "pgd": trained("sm", test_data, subjects.scratch / "hardened", **hardened),
    }
