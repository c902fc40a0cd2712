"""What production embeds: one call from a bundle to a program that answers.

Imports NumPy and the one runtime that is used. Nothing here needs torch or onnx.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.bundle.preprocessing import to_images
from ccn_deploy.errors import (
    EnvironmentUnfitError,
    GateError,
    IntegrityError,
    RuntimeUnavailableError,
    UsageError,
)
from ccn_deploy.machine import this_machine
from ccn_deploy.runtimes import Runtime, RuntimeOptions, RuntimeSpec, open_runtime
from ccn_deploy.runtimes.base import Array, Closing
from ccn_deploy.runtimes.compatibility import Candidate, candidates_for
from ccn_deploy.targets import Role, precision_named, runtime_named

AUTO = "auto"
"""The runtime to ask for to get the best one that works on this machine."""

log = logging.getLogger(__name__)
"""Says at WARNING which runtime fits this machine on paper and failed when it was opened."""


@dataclass(frozen=True)
class PassedOver:
    """A runtime that was not taken.

    Attributes:
        runtime: Its name.
        precision: Of the graph or engine.
        why: What is in its way, and what to do about it.
        failed: True if it fits this machine by all that is known and failed when it was opened or
            first ran; False if it does not fit.
    """

    runtime: str
    precision: str
    why: str
    failed: bool


@dataclass(frozen=True)
class Choice:
    """Which runtime answers, and why.

    Attributes:
        runtime: Its name.
        precision: Of the graph or engine.
        why: One phrase.
        passed_over: What would have been preferred and was not taken, in order of preference.
    """

    runtime: str
    precision: str
    why: str
    passed_over: tuple[PassedOver, ...] = ()


class Model(Closing):
    """A bundle that answers. Made by :func:`load`; several threads may call it at once.

    Args:
        bundle: The bundle that the runtime was opened from.
        runtime: An open runtime; closed with the model.
        choice: Why this runtime.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, choice: Choice) -> None:
        self._runtime = runtime
        self._spec = runtime.spec
        self._choice = choice
        self._digest = bundle.manifest.digest
        self._class_names = bundle.card.class_names
        self._preprocessing = bundle.card.source.preprocessing

    @property
    def spec(self) -> RuntimeSpec:
        """What runs the model: runtime, precision, shapes, device, versions."""
        return self._spec

    @property
    def choice(self) -> Choice:
        """Which runtime was chosen and why, and what was passed over."""
        return self._choice

    @property
    def digest(self) -> str:
        """SHA-256 of the bundle's manifest: the identity of what answers."""
        return self._digest

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name for each logit."""
        return self._class_names

    @property
    def max_batch(self) -> int:
        """The largest batch that runs in one piece; a larger one is split, and takes longer."""
        return self._spec.max_batch

    def predict(self, images: Array) -> Array:
        """Return logits, float32 [N, classes], of images, float32 [N, C, H, W] in [0, 1].

        Images that are C-contiguous are not copied. N may be any number, 0 too.

        Raises:
            InputError: Wrong shape or dtype, a NaN, or a value outside [0, 1].
            UsageError: The model is closed.
            RuntimeUnavailableError: The runtime failed, for want of memory most likely.
        """
        return self._runtime.logits(images)

    def predict_source(self, source: Array) -> Array:
        """Return logits, float32 [N, classes], of input in the format of the source network.

        That is what the network was fed before it was exported: its own layout, channel order,
        range, mean and deviation, as ``ccn-deploy inspect`` shows them.

        Args:
            source: [N, C, H, W] or [N, H, W, C], integers or floats.

        Raises:
            InputError: Not of that format, or values outside its range.
            CcnDeployError: As :meth:`predict` does.
        """
        return self.predict(to_images(source, self._preprocessing))

    def classify(self, images: Array) -> Array:
        """Return the label of each image, int64 [N]: the index of its largest logit.

        Raises:
            CcnDeployError: As :meth:`predict` does.
            GateError: A logit is not finite: there is no largest one, and no label is made up.
        """
        return self.labels(self.predict(images))

    def labels(self, logits: Array) -> Array:
        """Return the label of each row of logits, int64 [N], as :meth:`classify` does.

        Args:
            logits: [N, classes], from :meth:`predict`.

        Raises:
            GateError: A logit is not finite.
        """
        if not np.isfinite(logits).all():
            bad = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise GateError(
                f"The logits of image {bad} are not finite on {self._spec.target}.",
                f"Find the layer with: ccn-deploy verify-parity BUNDLE --runtime {self._spec.name} "
                f"--precision {self._spec.precision} --per-layer",
            )
        labels: Array = logits.argmax(axis=1).astype(np.int64, copy=False)
        return labels

    def names(self, labels: Iterable[int]) -> list[str]:
        """Return the class name of each label, as :meth:`classify` gives them."""
        return [self._class_names[label] for label in labels]

    def warm_up(self, batches: Sequence[int] | None = None) -> None:
        """Run each batch size, so that the first request is as fast as the next.

        At the first call of a size memory is taken and, on a GPU, kernels are loaded; at the second
        TensorRT captures a CUDA graph. So every size runs twice. What calls in several threads at
        once need beyond that is taken when they first come.

        Args:
            batches: Sizes to run; 1 and :attr:`max_batch` if not given.

        Raises:
            UsageError: A size below 1, or the model is closed.
            RuntimeUnavailableError: The runtime failed.
        """
        sizes = (1, self.max_batch) if batches is None else batches
        for size in sizes:
            if size < 1:
                raise UsageError(f"A batch of {size} cannot be run.", "Give sizes of at least 1.")
        for size in sizes:
            images = np.zeros((size, *self._spec.input_shape), np.float32)
            self.predict(images)
            self.predict(images)

    def close(self) -> None:
        """Release the runtime and its memory. Calling twice is harmless."""
        self._runtime.close()


def load(
    bundle: Bundle | str | os.PathLike[str],
    runtime: str = AUTO,
    precision: str | None = None,
    options: RuntimeOptions | None = None,
) -> Model:
    """Load a bundle to answer requests. It has answered one image when this returns.

    A runtime that is named is the one that answers, or this fails: nothing falls back. With
    ``"auto"`` the runtimes that the bundle has files for are tried from the fastest kind to the
    slowest: TensorRT, TensorRT-RTX, ONNX Runtime on a GPU, ONNX Runtime on the CPU. One that this
    machine cannot run is passed over, and :attr:`Model.choice` says why. One that should run here
    and fails all the same is passed over too, and logged as a warning: a server then starts,
    slower than was meant.

    Args:
        bundle: An open bundle, or the path of one.
        runtime: A name in :data:`ccn_deploy.targets.RUNTIMES`, or ``"auto"``.
        precision: ``"fp32"``, ``"fp16"`` and so on; if not given, fp32 where the bundle has it for
            the runtime, or else the only one that it has.
        options: Threads, memory, device and batch limit; defaults if not given.

    Raises:
        UsageError: An unknown runtime or precision, or several precisions to choose from and none
            named.
        NotABundleError: No bundle at the path.
        IntegrityError: A file of the bundle is not what its manifest says.
        RuntimeUnavailableError: The runtime or the precision cannot be had here.
        MissingExtraError: The runtime's library is not installed.
    """
    if precision is not None:
        precision_named(precision)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if runtime == AUTO:
        device = 0 if options is None else options.device
        candidates = candidates_for(opened, this_machine(), device=device)
        return first_usable(opened, candidates, precision, options)
    chosen = precision or _only_precision(opened, runtime)
    return _open(opened, Choice(runtime, chosen, "asked for by name"), options)


def first_usable(
    bundle: Bundle,
    candidates: Iterable[Candidate],
    precision: str | None = None,
    options: RuntimeOptions | None = None,
) -> Model:
    """Open the first candidate that fits, opens and answers.

    Args:
        bundle: An open bundle.
        candidates: In order of preference, as :mod:`ccn_deploy.runtimes.compatibility` gives them.
        precision: The only one to take, if given.
        options: For the runtime.

    Raises:
        IntegrityError: A file of the bundle is not what its manifest says; such a bundle serves
            nothing.
        RuntimeUnavailableError: None can be had; the message has the reason of each.
    """
    passed: list[PassedOver] = []
    for fit in candidates:
        target = (fit.target.runtime, fit.target.precision)
        if precision not in (None, fit.target.precision) or any(
            p.failed for p in passed if (p.runtime, p.precision) == target
        ):
            continue
        if isinstance(fit.problem, IntegrityError):
            raise fit.problem
        if fit.problem is not None:
            passed.append(PassedOver(*target, str(fit.problem), failed=False))
            continue
        # An engine for another GPU beside the one that fits is nothing that was passed over.
        others = tuple(p for p in passed if (p.runtime, p.precision) != target)
        why = "the first in order of preference that works here"
        try:
            return _open(bundle, Choice(*target, why, others), options)
        except EnvironmentUnfitError as error:
            log.warning("%s in %s fits this machine and failed: %s", *target, error)
            passed.append(PassedOver(*target, str(error), failed=True))
    raise _none_usable(bundle, passed, precision)


def _open(bundle: Bundle, choice: Choice, options: RuntimeOptions | None) -> Model:
    """Open a runtime and have it answer one image: what loads and cannot run fails here."""
    model = Model(bundle, open_runtime(bundle, choice.runtime, choice.precision, options), choice)
    try:
        model.warm_up([1])
    except BaseException:
        model.close()
        raise
    return model


def _only_precision(bundle: Bundle, runtime: str) -> str:
    """Return the precision to use where none is named; what is not there fails when opened."""
    kind = runtime_named(runtime)
    role = Role.ENGINE if kind.runs_engines else Role.FORWARD
    runtimes = (runtime,) if kind.runs_engines else (runtime, "")
    files = bundle.manifest.files
    have = sorted({r.precision for r in files if r.role == role and r.runtime in runtimes})
    if len(have) > 1 and "fp32" not in have:
        raise UsageError(
            f"The bundle has {', '.join(have)} for {runtime}, and no fp32.",
            "Name the precision to serve.",
        )
    return have[0] if len(have) == 1 else "fp32"


def _none_usable(
    bundle: Bundle, passed: Sequence[PassedOver], precision: str | None
) -> RuntimeUnavailableError:
    if not passed:
        return RuntimeUnavailableError(
            f"No runtime serves this bundle{f' in {precision}' if precision else ''}.",
            "ccn-deploy inspect BUNDLE shows what is in it.",
        )
    reasons = " ".join(f"{p.runtime} {p.precision}: {p.why.splitlines()[0]}" for p in passed)
    return RuntimeUnavailableError(
        f"No runtime that this bundle has files for works here. {reasons}",
        "ccn-deploy doctor shows how to fix that.",
    )
