"""Measuring a runtime against the float64 reference, once. Imports torch only to measure."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

import ccn_deploy
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import Dataset, Images
from ccn_deploy.errors import IntegrityError, UsageError
from ccn_deploy.evaluation import check_fits
from ccn_deploy.extras import require
from ccn_deploy.parity.comparison import compare_logits, compare_values, scale_of
from ccn_deploy.parity.evidence import (
    KINDS,
    REFERENCE,
    InputRow,
    LayerRow,
    ParityEvidence,
    evidence_path,
)
from ccn_deploy.parity.gradients import (
    CANDIDATES,
    GradientEvidence,
    GradientProbe,
    GradientRow,
    KinkRow,
    make_cotangents,
    measure_gradients,
)
from ccn_deploy.parity.invariance import Claim, batch_sizes, measure_invariance
from ccn_deploy.parity.tolerances import Arithmetic, tolerance_for
from ccn_deploy.runtimes import Runtime, RuntimeOptions, RuntimeSpec, open_runtime
from ccn_deploy.runtimes.base import LARGEST_BATCH, Array
from ccn_deploy.runtimes.layer_outputs import open_layer_outputs
from ccn_deploy.targets import Role, Target

if TYPE_CHECKING:
    from ccn_deploy.graph.evaluate import GraphModule
    from ccn_deploy.parity.inputs import Probe

ODD_BATCH = 7
SINGLES = 8
"""Images that are run one at a time."""

UNIT_IMAGES = (2, 16)
"""Least and most images of each kind on which the rounding model, which is costly, is run: a
sixteenth of the samples."""

GRADIENT_IMAGES = (3, 9)
"""Least and most images of each kind whose gradients are compared, an odd number."""

DRAWS = 8
"""Seeded repetitions per image in the rounding model; the unit is the largest among them."""

PAIRS = 4
"""Draws of errors by which kinks are looked for, each run with both signs."""

MANY_VALUES = 100_000
"""An image of more values gets half the draws and one pair, and errors in float32 where kinks are
looked for. Fewer make the verdict stricter, not milder: the largest of fewer draws is smaller, and
an image whose kink is missed is judged as if it had none."""

MIXED_IMAGES = 8
"""Images of each of three kinds in the batch that must not depend on its company."""

_MIXED = ("clean", "adversarial", "noise")
_REFERENCE_BATCH = 64

_ONE_PIECE = 1 << 16
"""A batch that no measurement exceeds: what is asked for is run in one piece, if an engine can."""

SMALL_IMAGE = 10_000
"""Values of an image up to which hundreds of them take a CPU seconds."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""


@dataclass(frozen=True)
class ParityRequest:
    """What to measure.

    Attributes:
        dataset: Its first images in the order that ``seed`` gives are used.
        runtime: A name in :data:`ccn_deploy.targets.RUNTIMES`.
        precision: Of the deployed graph.
        samples: Images of each kind, at least 8; they are also the large batch. By default 256, or
            32 where an image has more than 10,000 values.
        per_layer: Whether to compare every layer.
        seed: Of selection, noise and rounding.
        threads: CPU threads; the runtime's own choice if None.
    """

    dataset: Dataset
    runtime: str = "onnxruntime-cpu"
    precision: str = "fp32"
    samples: int | None = None
    per_layer: bool = False
    seed: int = 0
    threads: int | None = None


def collect(
    bundle: Bundle,
    request: ParityRequest,
    *,
    progress: Progress | None = None,
    fresh: bool = False,
) -> ParityEvidence:
    """Measure a runtime, or return the evidence of the same measurement made before.

    Evidence is kept under ``BUNDLE/evidence/parity`` by a digest of everything it depends on.
    Only a measurement needs torch.

    Args:
        bundle: An open bundle.
        request: What to measure.
        progress: Is told how far the measurement is; never called where evidence is read.
        fresh: Measure even if there is evidence.

    Raises:
        UsageError: An unknown runtime or precision, or data of another shape.
        RuntimeUnavailableError: The runtime cannot be had here, or shows no layers.
        IntegrityError: Evidence that was changed after it was written.
        StorageError: Evidence cannot be written.
        MissingExtraError: Something is to be measured and torch is not installed.
    """
    tolerance_for(request.precision)
    data = request.dataset
    check_fits(bundle, data)
    samples = _samples(request, data)
    options = RuntimeOptions(threads=request.threads, max_batch=_ONE_PIECE)
    with open_runtime(bundle, request.runtime, request.precision, options) as runtime:
        setting = _setting(bundle, request, data, samples, runtime)
        target = Target(request.runtime, request.precision)
        path = evidence_path(bundle, setting)
        kept = None if fresh else ParityEvidence.read(path, setting)
        if kept is not None:
            return kept
        torch = require("torch", "train", "for the float64 reference")
        setting[REFERENCE] = {
            "name": "torch",
            "precision": "fp64",
            "version": str(torch.__version__),
        }
        from ccn_deploy.runtimes.torch_runtime import check_programs, torch_threads

        check_programs(bundle, target)
        measurement = _Measurement(bundle, request, options, runtime, setting)
        with torch_threads(request.threads):
            evidence = measurement.run(data, progress)
    evidence.write(path)
    return evidence


def measure_inputs(
    run: Callable[[Images], Array],
    probe: Probe,
    reference: Array,
    *,
    unit: float,
    samples: int,
    scale: float | None = None,
) -> list[InputRow]:
    """Compare a runtime with the reference on one kind of input, at three batch sizes.

    Args:
        run: Maps images to the runtime's logits, any batch in one piece.
        probe: The images.
        reference: float64 logits of ``probe.images``.
        unit: What rounding explains on them.
        samples: Size of the large batch.
        scale: Logit scale; that of ``reference`` if not given.
    """
    scale = scale_of(reference) if scale is None else scale
    rows = []
    for batch, n in _batches(samples):
        chosen = probe.take(n)
        found = [run(probe.images[chosen[at : at + batch]]) for at in range(0, n, batch)]
        deviation = compare_logits(np.concatenate(found), reference[chosen], scale=scale, unit=unit)
        rows.append(InputRow(probe.kind, batch, deviation))
    return rows


@dataclass(frozen=True)
class _Measurement:
    """Everything that one measurement needs at hand."""

    bundle: Bundle
    request: ParityRequest
    options: RuntimeOptions
    runtime: Runtime
    setting: dict[str, Any]

    def run(self, data: Dataset, progress: Progress | None) -> ParityEvidence:
        """Measure every kind of input, then the same images under other circumstances."""
        import torch

        from ccn_deploy.parity.inputs import make_inputs
        from ccn_deploy.parity.rounding import images_kept
        from ccn_deploy.runtimes.torch_runtime import load_reference

        samples: int = self.setting["samples"]
        parts = 2 + self.request.per_layer + self.runtime.differentiable
        step = _Steps(2 + len(KINDS) * parts, progress)
        step("crafting inputs")
        exact = load_reference(self.bundle, torch.float64)
        batch = min(_REFERENCE_BATCH, images_kept(exact.graph))
        reference32 = load_reference(self.bundle)
        probes = make_inputs(reference32, data, samples, self.request.seed, batch=batch)
        units: dict[str, dict[str, float]] = {}
        logits: dict[str, Array] = {}
        inputs: list[InputRow] = []
        options = replace(self.options, max_batch=batch)
        with open_runtime(self.bundle, "torch", "fp64", options) as reference:
            for probe in probes:
                step(f"{probe.kind}: what rounding explains")
                units[probe.kind] = self._units(exact, probe)
                step(f"{probe.kind}: comparing")
                logits[probe.kind] = reference.logits(probe.images)
                inputs += measure_inputs(
                    self.runtime.logits,
                    probe,
                    logits[probe.kind],
                    unit=_last(units[probe.kind]),
                    samples=samples,
                    scale=self._scale(logits[probe.kind], logits["clean"]),
                )
            gradients = (
                self._gradients(
                    probes,
                    step,
                    exact=exact,
                    single=reference32,
                    reference=reference,
                    logits=logits,
                    units=units,
                )
                if self.runtime.differentiable
                else None
            )
        step("batch invariance")
        claims = self._invariance(probes, logits, units)
        layers = self._layers(probes, units, step) if self.request.per_layer else None
        step.finish()
        return ParityEvidence(self.setting, tuple(inputs), tuple(claims), gradients, layers)

    def _units(self, exact: GraphModule, probe: Probe) -> dict[str, float]:
        import torch

        from ccn_deploy.parity.rounding import rounding_units

        images = torch.from_numpy(probe.images[: self.setting["unit_images"]]).double()
        return rounding_units(
            exact,
            images,
            self._arithmetic,
            draws=self.setting["draws"],
            seed=self.request.seed,
            ranges=self._ranges() if self._arithmetic.grid else None,
            per_layer=self.request.per_layer,
        )

    @property
    def _arithmetic(self) -> Arithmetic:
        return tolerance_for(self.request.precision).arithmetic

    def _ranges(self) -> dict[str, float]:
        """Return the calibrated ranges, which stand in the manifest apart from the graph."""
        record = self.bundle.file(Role.FORWARD, self.request.precision)
        try:
            ranges = record.details["calibration"]["ranges"]
            return msgspec.convert(ranges, dict[str, Annotated[float, msgspec.Meta(ge=0)]])
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"The manifest does not say which ranges {record.path} was calibrated to.",
                f"Export again with --precision {self.request.precision}.",
            ) from error

    def _scale(self, values: Array, clean: Array) -> float:
        """Return the scale to measure errors by.

        The steps of a grid are made for clean images, and no finer where everything is small.
        """
        return max(map(scale_of, (values, clean))) if self._arithmetic.grid else scale_of(values)

    def _invariance(
        self,
        probes: Sequence[Probe],
        logits: dict[str, Array],
        units: dict[str, dict[str, float]],
    ) -> list[Claim]:
        mixed = [probe for probe in probes if probe.kind in _MIXED]
        return measure_invariance(
            self.runtime.logits,
            np.concatenate([probe.images[:MIXED_IMAGES] for probe in mixed]),
            np.concatenate([logits[probe.kind][:MIXED_IMAGES] for probe in mixed]),
            unit=max(_last(units[probe.kind]) for probe in mixed),
            seed=self.request.seed,
            sizes=self.setting["batch_sizes"],
        )

    def _gradients(
        self,
        probes: Sequence[Probe],
        step: _Steps,
        *,
        exact: GraphModule,
        single: GraphModule,
        reference: Runtime,
        logits: dict[str, Array],
        units: dict[str, dict[str, float]],
    ) -> GradientEvidence:
        """Compare the input gradients of a few images of every kind."""
        from ccn_deploy.parity.kinks import measure_shifts

        policy, seed = tolerance_for(self.request.precision), self.request.seed
        rows: list[GradientRow] = []
        near: list[float] = []
        for probe in probes:
            step(f"{probe.kind}: gradients")
            images = probe.images[: self.setting["gradients"]["images"]]
            cotangents = make_cotangents(logits[probe.kind][: len(images)], seed)
            truth = reference.vjp(images, cotangents)[1]
            # Two gradients tell which images are near a kink: a random one depends on everything,
            # but of two logits that are each other's opposite it may be nearly the sum.
            shifts = measure_shifts(
                exact,
                images,
                cotangents[:, [2, -1]],
                truth[:, [2, -1]],
                policy,
                pairs=self.setting["gradients"]["pairs"],
                seed=seed,
                single=single if self.setting["gradients"]["errors_in"] == "fp32" else None,
            )
            compared = GradientProbe(
                probe.kind,
                images,
                cotangents,
                truth,
                shifts.largest,
                shifts.typical,
                unit=_last(units[probe.kind]),
                scale=scale_of(logits[probe.kind]),
            )
            found, ratios = measure_gradients(
                self.runtime.vjp, self.runtime.logits, compared, allowed=policy.max_gradient
            )
            rows += found
            near += ratios
        return GradientEvidence(tuple(rows), KinkRow.of(near))

    def _layers(
        self, probes: Sequence[Probe], units: dict[str, dict[str, float]], step: _Steps
    ) -> tuple[LayerRow, ...]:
        """Compare every layer that the runtime shows, on an odd batch of every kind."""
        name, precision = self.request.runtime, self.request.precision
        deployed = open_layer_outputs(self.bundle, name, precision, self.options)
        reference = open_layer_outputs(self.bundle, "torch", "fp64", self.options)
        rows: dict[str, list[LayerRow]] = {}
        clean: dict[str, Array] = {}
        for probe in probes:
            step(f"{probe.kind}: layer by layer")
            images = probe.images[probe.take(ODD_BATCH)]
            found, expected = deployed(images), reference(images)
            clean = clean or expected
            for layer, values in expected.items():
                if layer in found and layer in units[probe.kind]:
                    unit = units[probe.kind][layer]
                    scale = self._scale(values, clean[layer])
                    deviation = compare_values(found[layer], values, scale=scale, unit=unit)
                    rows.setdefault(layer, []).append(LayerRow(layer, probe.kind, deviation))
        return tuple(row for layer in rows.values() for row in layer)


def _batches(samples: int) -> list[tuple[int, int]]:
    """Return (batch, images in all): one at a time, an odd batch, all at once."""
    odd = samples // ODD_BATCH * ODD_BATCH
    return [(1, min(SINGLES, samples)), (ODD_BATCH, min(5 * ODD_BATCH, odd)), (samples, samples)]


def _samples(request: ParityRequest, data: Dataset) -> int:
    wanted = request.samples
    if wanted is None:
        wanted = 256 if int(np.prod(data.input_shape)) <= SMALL_IMAGE else 32
    if wanted <= ODD_BATCH:
        raise UsageError(
            f"{wanted} images are too few to compare at several batch sizes.",
            f"Give --samples {ODD_BATCH + 1} or more.",
        )
    if len(data) <= ODD_BATCH:
        raise UsageError(
            f"{data.name} has only {len(data)} images.",
            f"Give a data set with at least {ODD_BATCH + 1}.",
        )
    return min(wanted, len(data))


def _gradient_images(samples: int) -> int:
    """Return about a sixteenth of the samples, odd: kernels for whole blocks must not suffice."""
    least, most = GRADIENT_IMAGES
    return max(least, min(most, samples // 16 | 1))


def _setting(
    bundle: Bundle, request: ParityRequest, data: Dataset, samples: int, runtime: Runtime
) -> dict[str, Any]:
    """Return everything that the measurement depends on."""
    spec = runtime.spec
    many = int(np.prod(data.input_shape)) > MANY_VALUES
    return {
        "bundle": bundle.manifest.digest,
        "dataset": data.identity,
        "seed": request.seed,
        "samples": samples,
        "per_layer": request.per_layer,
        "batch_sizes": _batch_sizes(runtime.spec),
        "unit_images": max(UNIT_IMAGES[0], min(UNIT_IMAGES[1], samples // 16)),
        "draws": DRAWS // 2 if many else DRAWS,
        "gradients": {
            "images": _gradient_images(samples),
            "candidates": CANDIDATES,
            "pairs": 1 if many else PAIRS,
            "errors_in": "fp32" if many else "fp64",
        }
        if runtime.differentiable
        else None,
        "runtime": {
            "name": spec.name,
            "precision": spec.precision,
            "device": spec.device,
            "graph": spec.graph,
            "threads": request.threads,
            "versions": dict(spec.versions),
        },
        "machine": platform.machine(),
        "ccn_deploy": ccn_deploy.__version__,
    }


def _batch_sizes(spec: RuntimeSpec) -> list[int]:
    """Return the sizes of batches that are tried; of large images on a CPU, those it is served."""
    largest = spec.usual_batch
    if spec.device != "cpu" or int(np.prod(spec.input_shape)) <= SMALL_IMAGE:
        largest = max(largest, LARGEST_BATCH)
    largest = min(largest, spec.max_batch)
    return [n for n in batch_sizes(largest, spec.usual_batch) if n <= spec.max_batch]


def _last(units: dict[str, float]) -> float:
    return list(units.values())[-1]


class _Steps:
    """Counts steps for a progress display."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._done, self._progress = total, 0, progress

    def __call__(self, what: str) -> None:
        if self._progress:
            self._progress(what, self._done, self._total)
        self._done += 1

    def finish(self) -> None:
        assert self._done == self._total
        if self._progress:
            self._progress("done", self._total, self._total)
