"""What production embeds: one call from a bundle to a program that answers.

Imports NumPy and the one runtime that is used. Nothing here needs torch or onnx.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.bundle.preprocessing import to_images
from ccn_deploy.certificates.statement import Certificate
from ccn_deploy.certificates.verify import admit, read_certificate
from ccn_deploy.errors import (
    CcnDeployError,
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
from ccn_deploy.targets import Role, Target, precision_named, runtime_named

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
        certificate: What was certified of it; None if it was not asked for.
    """

    def __init__(
        self,
        bundle: Bundle,
        runtime: Runtime,
        choice: Choice,
        certificate: Certificate | None = None,
    ) -> None:
        self._runtime = runtime
        self._certificate = certificate
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
    def certificate(self) -> Certificate | None:
        """The signed certificate by which this runtime may serve; None if none was given."""
        return self._certificate

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
    *,
    certificate: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a bundle to answer requests. It has answered one image when this returns.

    A runtime that is named is the one that answers, or this fails: nothing falls back. With
    ``"auto"`` the runtimes that the bundle has files for are tried from the fastest kind to the
    slowest: TensorRT, TensorRT-RTX, ONNX Runtime on a GPU, ONNX Runtime on the CPU. One that this
    machine cannot run is passed over, and :attr:`Model.choice` says why. One that should run here
    and fails all the same is passed over too, and logged as a warning: a server then starts,
    slower than was meant.

    With a certificate, only what is certified may serve: signed with the key, of this bundle, on
    this machine, not ended, and with the verdict pass. Evidence is not read; ``ccn-deploy verify``
    does that.

    Args:
        bundle: An open bundle, or the path of one.
        runtime: A name in :data:`ccn_deploy.targets.RUNTIMES`, or ``"auto"``.
        precision: ``"fp32"``, ``"fp16"`` and so on; if not given, fp32 where the bundle has it for
            the runtime, or else the only one that it has.
        options: Threads, memory, device and batch limit; defaults if not given.
        certificate: File that ``ccn-deploy certify`` wrote and signed; none is asked for if not
            given.
        key: Public key of who is to have signed it.

    Raises:
        UsageError: An unknown runtime or precision, several precisions to choose from and none
            named, or a certificate without a key.
        NotABundleError: No bundle at the path.
        IntegrityError: A file of the bundle is not what its manifest says, or the certificate is
            not what was signed, not signed, or of another bundle.
        GateError: The runtime that was named is not certified, or its verdict is no pass, or no
            longer.
        RuntimeUnavailableError: The runtime or the precision cannot be had here.
        EnvironmentUnfitError: It was certified on another machine.
        MissingExtraError: The runtime's library is not installed, or ``cryptography``.
    """
    if precision is not None:
        precision_named(precision)
    if (certificate is None) is not (key is None):
        raise UsageError(
            "A certificate needs the key that it is to be signed with, and a key a certificate.",
            "Give both, or neither.",
        )
    said: Certificate | None = None
    if certificate is None:
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    else:
        said, _, opened = read_certificate(certificate, bundle, key)
    device = 0 if options is None else options.device
    if runtime == AUTO:
        candidates = candidates_for(opened, this_machine(), device=device)
        if said is not None:
            candidates = tuple(_if_certified(one, said, device) for one in candidates)
        return first_usable(opened, candidates, precision, options, said)
    chosen = precision or _only_precision(opened, runtime)
    if said is not None:
        admit(said, Target(runtime, chosen), this_machine(), device=device)
    return _open(opened, Choice(runtime, chosen, "asked for by name"), options, said)


def _if_certified(candidate: Candidate, certificate: Certificate, device: int) -> Candidate:
    """Return a candidate, with a problem if it may not serve by a certificate."""
    problem: CcnDeployError | None = candidate.problem
    if problem is None:
        try:
            found = admit(certificate, candidate.target, this_machine(), device=device)
        except (GateError, EnvironmentUnfitError) as error:
            problem = error
        else:
            if candidate.record.path != found.program:
                problem = _not_the_program(candidate.target, candidate.record.path, found.program)
    return replace(candidate, problem=problem)


def _not_the_program(target: Target, program: str, certified: str) -> GateError:
    return GateError(
        f"On this machine {target} executes {program}, and what is certified is {certified}.",
        "Certify on this machine, or leave the other engine out of the bundle.",
    )


def first_usable(
    bundle: Bundle,
    candidates: Iterable[Candidate],
    precision: str | None = None,
    options: RuntimeOptions | None = None,
    certificate: Certificate | None = None,
) -> Model:
    """Open the first candidate that fits, opens and answers.

    Args:
        bundle: An open bundle.
        candidates: In order of preference, as :mod:`ccn_deploy.runtimes.compatibility` gives them.
        precision: The only one to take, if given.
        options: For the runtime.
        certificate: By which the candidates may serve; kept with the model.

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
            return _open(bundle, Choice(*target, why, others), options, certificate)
        except EnvironmentUnfitError as error:
            log.warning("%s in %s fits this machine and failed: %s", *target, error)
            passed.append(PassedOver(*target, str(error), failed=True))
    raise _none_usable(bundle, passed, precision)


def _open(
    bundle: Bundle,
    choice: Choice,
    options: RuntimeOptions | None,
    certificate: Certificate | None = None,
) -> Model:
    """Open a runtime and have it answer one image: what loads and cannot run fails here."""
    runtime = open_runtime(bundle, choice.runtime, choice.precision, options)
    model = Model(bundle, runtime, choice, certificate)
    try:
        _check_program(runtime.spec, certificate)
        model.warm_up([1])
    except BaseException:
        model.close()
        raise
    return model


def _check_program(spec: RuntimeSpec, certificate: Certificate | None) -> None:
    """Refuse a runtime that chose another engine than is certified: a bundle may have several.

    Raises:
        GateError: It did.
    """
    target = Target(spec.name, spec.precision)
    for certified in certificate.targets if certificate is not None else ():
        if certified.target == target and spec.graph not in ("", certified.program):
            raise _not_the_program(target, spec.graph, certified.program)


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
