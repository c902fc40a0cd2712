"""Bundles timed as they are served: every runtime, precision and batch, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from ccn_deploy.bundle import Bundle
from ccn_deploy.data import Dataset
from ccn_deploy.errors import (
    EnvironmentUnfitError,
    IntegrityError,
    RuntimeUnavailableError,
    UsageError,
)
from ccn_deploy.evaluation import check_fits
from ccn_deploy.latency import Latency, Program, Ratio, take_turns
from ccn_deploy.machine import processor, this_machine
from ccn_deploy.runtimes import RuntimeOptions
from ccn_deploy.runtimes.base import Array
from ccn_deploy.runtimes.compatibility import Candidate, candidates_for
from ccn_deploy.serving import Model, PassedOver, load
from ccn_deploy.targets import Target, precision_named, runtime_named

SCHEMA = "ccn-deploy/bench/1"

Progress = Callable[[str, int, int], None]
"""What comes next, how many configurations are done, and of how many."""


@dataclass(frozen=True)
class BenchRequest:
    """What to measure, and how long.

    Attributes:
        runtimes: Names; every one that the bundles have files for and this machine can run, if
            empty. One that is named and cannot be had is an error.
        precisions: Names; every one that the bundles have files in, if empty.
        batches: Images a call.
        threads: CPU threads of one call; the runtime's choice if None.
        seconds: Of timed calls for each bundle, runtime, precision and batch.
        calls: How many instead.
        warm_up: Calls before.
        dataset: Whose images, in the order of its sample with seed 0, and again from the first
            where a batch is larger than it; noise if None.
    """

    runtimes: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 32)
    threads: int | None = None
    seconds: float = 1.0
    calls: int | None = None
    warm_up: int = 10
    dataset: Dataset | None = None


@dataclass(frozen=True)
class Row:
    """One bundle in one runtime, precision and batch.

    Attributes:
        network: Names the bundle among those of :attr:`BenchResult.bundles`.
        runtime: Its name.
        precision: Of the graph or engine.
        graph: Path in the bundle of what was executed; empty if the runtime executes no file.
        latency: Of :meth:`ccn_deploy.serving.Model.predict`, input checks and copies included.
        ratio: The first bundle's time by this one's, in the same rounds; None for the first
            bundle.
    """

    network: str
    runtime: str
    precision: str
    graph: str
    latency: Latency
    ratio: Ratio | None = None


@dataclass(frozen=True)
class BenchResult:
    """What was measured and what was not.

    Attributes:
        request: What was asked for.
        bundles: By the name that rows use; the first is what ratios are of.
        versions: Libraries that were measured, by name.
        rows: In order of runtime, precision, batch and bundle.
        passed_over: For each bundle, what cannot be measured on this machine, and why.
    """

    request: BenchRequest
    bundles: dict[str, Bundle]
    versions: dict[str, str]
    rows: tuple[Row, ...]
    passed_over: dict[str, tuple[PassedOver, ...]]

    def document(self) -> dict[str, Any]:
        """Return all of it as plain JSON values; times are in seconds."""
        machine, dataset = this_machine(), self.request.dataset
        return {
            "schema": SCHEMA,
            "machine": {
                "system": machine.system,
                "architecture": machine.architecture,
                "processor": processor(),
                "cpus": os.cpu_count(),
                "driver": machine.driver,
                "gpus": [asdict(gpu) for gpu in machine.gpus],
            },
            "versions": self.versions,
            "data": dataset.identity if dataset is not None else None,
            "setting": {
                "threads": self.request.threads,
                "seconds": None if self.request.calls else self.request.seconds,
                "calls": self.request.calls,
                "warm_up": self.request.warm_up,
            },
            "networks": {
                name: {
                    "bundle": str(bundle.path),
                    "digest": bundle.manifest.digest,
                    "architecture": bundle.card.architecture,
                    "defense": bundle.card.defense,
                }
                for name, bundle in self.bundles.items()
            },
            "rows": [asdict(row) for row in self.rows],
            "passed_over": {
                name: [asdict(passed) for passed in found]
                for name, found in self.passed_over.items()
            },
        }


def bench(
    bundles: Sequence[Bundle], request: BenchRequest, *, progress: Progress | None = None
) -> BenchResult:
    """Time bundles as :func:`ccn_deploy.load` serves them, in turn where there are several.

    Args:
        bundles: One, or several of one architecture to compare.
        request: What to measure.
        progress: Called before each configuration and at the end.

    Raises:
        UsageError: Bundles of different architectures, nothing to measure in common, or data that
            do not fit the network.
        RuntimeUnavailableError: A runtime or precision that was named cannot be had here, or no
            runtime can.
        IntegrityError: A file of a bundle is not what its manifest says.
    """
    named = _names(bundles)
    targets, passed_over = _targets(named, request)
    images = _images(bundles[0], request.dataset, max(request.batches))
    steps = [(target, batch) for target in targets for batch in request.batches]
    rows: list[Row] = []
    versions: dict[str, str] = {}
    for target, names in targets.items():
        runtime, precision = target.runtime, target.precision
        with ExitStack() as stack:
            options = RuntimeOptions(threads=request.threads)
            try:
                models = {
                    name: stack.enter_context(load(named[name], runtime, precision, options))
                    for name in names
                }
            except EnvironmentUnfitError as error:
                if runtime in request.runtimes:
                    raise
                for name in names:
                    failed = PassedOver(runtime, precision, str(error), failed=True)
                    passed_over[name].append(failed)
                continue
            for model in models.values():
                versions.update(model.spec.versions)
            for batch in request.batches:
                if progress is not None:
                    done = steps.index((target, batch))
                    progress(f"{runtime} {precision}, batch {batch}", done, len(steps))
                rows += _measure(models, images[:batch], request)
    if progress is not None:
        progress("", len(steps), len(steps))
    if not rows:
        raise _nothing(passed_over)
    return BenchResult(
        request=request,
        bundles=named,
        versions=versions,
        rows=tuple(rows),
        passed_over={name: tuple(found) for name, found in passed_over.items()},
    )


def _names(bundles: Sequence[Bundle]) -> dict[str, Bundle]:
    """Name bundles by their defense, or by their directory where that does not tell them apart.

    A network without a defense goes by its own name.

    Raises:
        UsageError: They are not of one architecture, or one of them is given twice.
    """
    networks = {
        (bundle.card.architecture, bundle.card.input_shape, bundle.card.class_names)
        for bundle in bundles
    }
    if len(networks) > 1:
        each = ", ".join(
            f"{bundle.path} is {bundle.card.architecture or bundle.card.name}" for bundle in bundles
        )
        raise UsageError(
            f"The bundles are of different networks or classes: {each}.",
            "Compare bundles of one architecture and data set, or measure one at a time.",
        )
    spellings: tuple[Callable[[Bundle], str], ...] = (
        lambda bundle: bundle.card.system or bundle.card.name,
        lambda bundle: bundle.path.name,
        lambda bundle: str(bundle.path),
    )
    for spelling in spellings:
        named = {spelling(bundle): bundle for bundle in bundles}
        if len(named) == len(bundles):
            return named
    raise UsageError("A bundle is given twice.", "Give each of them once.")


def _targets(
    named: Mapping[str, Bundle], request: BenchRequest
) -> tuple[dict[Target, list[str]], dict[str, list[PassedOver]]]:
    """Return which bundles to measure in each runtime and precision, and what not, and why."""
    for runtime in request.runtimes:
        runtime_named(runtime)
    for precision in request.precisions:
        precision_named(precision)
    targets: dict[Target, list[str]] = {}
    passed_over: dict[str, list[PassedOver]] = {}
    for name, bundle in named.items():
        found = [fit for fit in candidates_for(bundle, this_machine()) if _wanted(fit, request)]
        for fit in found:
            if isinstance(fit.problem, IntegrityError):
                raise fit.problem
        usable = dict.fromkeys(fit.target for fit in found if not fit.problem)
        for target in usable:
            targets.setdefault(target, []).append(name)
        passed_over[name] = [
            PassedOver(fit.target.runtime, fit.target.precision, str(fit.problem), failed=False)
            for fit in found
            if fit.target not in usable
        ]
    # What was named and fits nowhere is opened all the same: that says best what is in the way.
    for runtime in request.runtimes:
        if not any(runtime == target.runtime for target in targets):
            for precision in request.precisions or ("fp32",):
                targets[Target(runtime, precision)] = list(named)
    for precision in request.precisions:
        if not any(precision == target.precision for target in targets):
            raise _nothing(passed_over, precision)
    return targets, passed_over


def _wanted(fit: Candidate, request: BenchRequest) -> bool:
    target = fit.target
    return (not request.runtimes or target.runtime in request.runtimes) and (
        not request.precisions or target.precision in request.precisions
    )


def _images(bundle: Bundle, dataset: Dataset | None, count: int) -> Array:
    """Return images of the data, or noise.

    What a network takes for an image hardly changes how long it takes; where it does, because
    numbers become tiny or a kernel skips zeros, real images show it.
    """
    if dataset is not None:
        check_fits(bundle, dataset)
        return dataset.images(np.resize(dataset.order(), count))
    shape = (count, *bundle.card.input_shape)
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def _measure(models: Mapping[str, Model], images: Array, request: BenchRequest) -> list[Row]:
    """Time models in turn on one batch; the ratios are of the first by each other."""
    programs: list[Program] = [partial(model.predict, images) for model in models.values()]
    blocks = take_turns(
        programs, seconds=request.seconds, calls=request.calls, warm_up=request.warm_up
    )
    return [
        Row(
            network=name,
            runtime=model.spec.name,
            precision=model.spec.precision,
            graph=model.spec.graph,
            latency=Latency.of(np.concatenate(own), len(images)),
            ratio=None if own is blocks[0] else Ratio.of(blocks[0], own),
        )
        for (name, model), own in zip(models.items(), blocks, strict=True)
    ]


def _nothing(
    passed_over: Mapping[str, Sequence[PassedOver]], precision: str = ""
) -> RuntimeUnavailableError:
    reasons = dict.fromkeys(
        f"{p.runtime} {p.precision}: {p.why.splitlines()[0]}"
        for found in passed_over.values()
        for p in found
    )
    what = f"Nothing can be measured here{f' in {precision}' if precision else ''}."
    return RuntimeUnavailableError(
        " ".join((what, *reasons)),
        "ccn-deploy inspect BUNDLE shows what is in it, ccn-deploy doctor what works here.",
    )
