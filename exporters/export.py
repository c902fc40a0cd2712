"""From a finished training run, or from a bundle, to a bundle with all that was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
import torch

from ccn_deploy.bundle import MANIFEST, Bundle, Lineage, NewFile, write_bundle
from ccn_deploy.errors import DatasetNotFoundError, UsageError, unknown
from ccn_deploy.exporters import bundle_graphs
from ccn_deploy.exporters.bundle_draft import OURS, BundleDraft
from ccn_deploy.exporters.calibration import CalibrationRequest, load_calibration
from ccn_deploy.exporters.optimized import TARGETS, differs
from ccn_deploy.exporters.precision import (
    Calibration,
    NumericReport,
    numeric_report,
)
from ccn_deploy.exporters.sources.run import network_from
from ccn_deploy.exporters.tensorrt.build import Batches, build_engine, find_targets
from ccn_deploy.extras import require
from ccn_deploy.models import Classifier
from ccn_deploy.runs import TrainedRun
from ccn_deploy.runtimes.tensorrt.library import LIBRARIES
from ccn_deploy.targets import DEPLOYED_PRECISIONS, PRECISIONS, Role, precision_named

TRITON = "triton"
"""The format that is a model repository, and the directory of the bundle that it is written to."""

FORMATS = ("onnx", *LIBRARIES, TRITON)
"""What a bundle can be asked to hold; it always holds ONNX."""

CANDIDATES = 10
"""Gradients of one image that an engine computes at once, at most: what DeepFool asks for."""

LARGEST_TENSOR = 2**31
"""Bytes of the largest tensor inside a gradient engine; a batch that needs more is cut."""


@dataclass(frozen=True)
class Wanted:
    """What a bundle shall hold; see :func:`export_run`."""

    gradient: bool
    optimize: str | None
    libraries: tuple[str, ...]
    precisions: tuple[str, ...]
    batch: Batches
    calibration: CalibrationRequest | None
    compute_capabilities: tuple[str, ...]
    tf32: bool

    def asked_of(self, library: str) -> tuple[str, ...]:
        """Return the GPUs asked for, if the library builds for others than the one here."""
        return self.compute_capabilities if LIBRARIES[library].portable else ()


def export_run(
    source: TrainedRun | Bundle,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    gradient: bool = True,
    optimize: str | None = None,
    formats: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    batch: Batches | tuple[int, int, int] = (1, 32, 256),
    calibration: CalibrationRequest | None = None,
    compute_capabilities: Sequence[str] = (),
    tf32: bool = False,
    progress: Callable[[str], None] = lambda step: None,
    note: Callable[[str], None] = lambda sentence: None,
) -> Bundle:
    """Lower a network, check the graphs, convert them, build engines, and write the bundle.

    Args:
        source: From :func:`ccn_deploy.runs.open_run`, or a bundle: then every file of it is kept
            as it is, and what is missing is added.
        output: Directory to make.
        overwrite: Whether to replace a bundle that is there.
        gradient: Whether to add the graph of the input gradients, with which the deployed runtime
            can be attacked by itself. It holds the weights once more, convolutions twice. A
            bundle without one gets none.
        optimize: A runtime of :data:`~ccn_deploy.exporters.optimized.TARGETS` to write a forward
            graph for, beside the default one, which stays as it is. A network without compact
            layers has nothing to be written otherwise, and gets none.
        formats: Of :data:`FORMATS`. For each library an engine of every graph in every precision;
            for ``"triton"`` a model repository in the bundle's directory.
        precisions: Of graphs and engines: ``"fp32"``, in which a bundle has its graphs in any
            case, and others of :data:`~ccn_deploy.targets.DEPLOYED_PRECISIONS`.
        batch: Smallest, usual and largest batch that engines take.
        calibration: On which images to find the ranges of activations; 512 of the training split
            by default.
        compute_capabilities: GPUs to build TensorRT-RTX engines for, such as ``"8.6"``.
        tf32: Whether engines may round factors of float32 products to ten bits.
        progress: Told each step before it begins.
        note: Told what a user should know of the Triton repository.

    Raises:
        UsageError: ``output`` exists and may not be replaced; an unknown name; a source that has
            everything already.
        IntegrityError: The weights do not belong to the architecture.
        MissingExtraError: A format needs a package that is not installed.
        DatasetNotFoundError: Images for the calibration are not there.
        LoweringError: A graph is not what it must be; nothing is written.
        EngineBuildError: An engine cannot be built; nothing is written.
        StorageError: The disk is full or not writable; nothing half-written is left.
    """
    wanted = Wanted(
        gradient=gradient,
        optimize=optimize,
        libraries=tuple(name for name in LIBRARIES if name in formats),
        precisions=tuple(name for name in DEPLOYED_PRECISIONS if name in precisions),
        batch=batch if isinstance(batch, Batches) else Batches(*batch),
        calibration=calibration,
        compute_capabilities=tuple(compute_capabilities),
        tf32=tf32,
    )
    _check_names(wanted, formats, precisions)
    target = Path(output)
    _check_target(target, overwrite)
    contents = BundleDraft(source)
    maker = _Maker(contents, wanted, progress)
    maker.make_graphs(keep_without_gradient=isinstance(source, Bundle))
    maker.make_engines()
    if not contents.added and TRITON not in formats:
        raise UsageError(
            f"{source.path} has all of this already: nothing to add.",
            "Ask for another --format, --precision, --batch or --compute-capability.",
        )
    progress("Writing the bundle")
    bundle = write_bundle(target, card=contents.card, files=contents.files, overwrite=overwrite)
    if TRITON in formats:
        from ccn_deploy.exporters.triton import write_repository

        progress("Writing the Triton repository")
        for sentence in write_repository(bundle, bundle.path / TRITON).notes:
            note(sentence)
    return bundle


class _Maker:
    """Adds to the contents of a bundle what is wanted and not there."""

    def __init__(
        self, contents: BundleDraft, wanted: Wanted, progress: Callable[[str], None]
    ) -> None:
        card, weights = contents.card, contents.find(Role.WEIGHTS)
        assert weights is not None
        self.model: Classifier = network_from(
            card.architecture, card.defense, card.classes, weights.data
        )
        self._contents = contents
        self._wanted = wanted
        self._progress = progress

    def make_graphs(self, *, keep_without_gradient: bool) -> None:
        """Add graphs, float32 first: the others are made of those.

        Args:
            keep_without_gradient: Whether contents without a gradient graph get none.
        """
        optimize = self._wanted.optimize
        forward = self._graph(Role.FORWARD, lambda: bundle_graphs.forward_graph(self.model))
        if optimize is not None and differs(self.model):
            self._graph(
                Role.FORWARD,
                lambda: bundle_graphs.optimized_graph(self.model, optimize),
                optimize,
            )
        gradient = self._contents.find(Role.GRADIENT, "fp32")
        if gradient is None and self._wanted.gradient and not keep_without_gradient:
            gradient = self._graph(
                Role.GRADIENT, lambda: bundle_graphs.gradient_graph(self.model, forward)
            )
        for precision in self._wanted.precisions:
            if precision == "fp32":
                continue
            self._convert(forward, precision)
            if (
                gradient is not None
                and self._wanted.gradient
                and PRECISIONS[precision].has_gradients
            ):
                self._convert(gradient, precision)

    def make_engines(self) -> None:
        """Add an engine of every graph that is wanted."""
        roles = (Role.FORWARD, Role.GRADIENT) if self._wanted.gradient else (Role.FORWARD,)
        for library in self._wanted.libraries:
            for precision in self._wanted.precisions:
                for role in roles:
                    graph = self._contents.find(role, precision)
                    if graph is not None:
                        self._engine(library, graph)

    def _graph(self, role: Role, make: Callable[[], NewFile], runtime: str = "") -> NewFile:
        """Return the float32 graph of a role and runtime, made if it is not there."""
        found = self._contents.find(role, "fp32", runtime)
        if found is None:
            self._progress(f"Lowering and checking {bundle_graphs.path_of(role, 'fp32', runtime)}")
            found = self._contents.add(make())
        return found

    def _convert(self, graph: NewFile, precision: str) -> None:
        if self._contents.find(graph.role, precision) is not None:
            return
        self._progress(f"Converting to {bundle_graphs.path_of(graph.role, precision)}")
        calibration = self._images if PRECISIONS[precision].kind == "grid" else None
        report = self._report if graph.role == Role.FORWARD else None
        self._contents.add(
            bundle_graphs.converted_graph(graph, precision, self.model, calibration, report)
        )

    @cached_property
    def _images(self) -> Calibration:
        request = self._wanted.calibration or CalibrationRequest()
        return load_calibration(request, self._contents.card.training, self.model)

    @cached_property
    def _report(self) -> NumericReport | None:
        """What the norm branches met; None where there are no images and nobody named any."""
        forward = self._contents.find(Role.FORWARD, "fp32")
        assert forward is not None
        try:
            images = self._images.images
        except (DatasetNotFoundError, UsageError):
            if self._wanted.calibration is not None:
                raise
            return None
        return numeric_report(onnx.load_model_from_string(forward.data), images)

    def _engine(self, library: str, graph: NewFile) -> None:
        batch, candidates, prefix = self._wanted.batch, None, ""
        if graph.role.has_gradients:
            most = min(CANDIDATES, self.model.classes)
            prefix, candidates = "gradient-", Batches(1, most, most)
            batch = batch.at_most(LARGEST_TENSOR // (most * _largest_activation(self.model)))
        asked = self._wanted.asked_of(library)
        named = asked or not LIBRARIES[library].portable
        gpus = [f"-sm{target.replace('.', '')}" for target in find_targets(library, asked) if named]
        stem = f"engines/{prefix}{library}-{graph.precision}{''.join(gpus)}"
        self._progress(f"Building {stem}.engine")
        built = build_engine(
            graph.data,
            library=library,
            batch=batch,
            candidates=candidates,
            compute_capabilities=asked,
            tf32=self._wanted.tf32,
        )
        details = {
            **built.details,
            "layers": graph.details.get("layers", {}),
        }
        same = {**details, "log": None, "reproducible": None}
        for other in self._contents.every(graph.role.engine, graph.precision, library):
            if {**other.details, "log": None, "reproducible": None} == same:
                return
        self._contents.add(
            NewFile(
                self._contents.free_path(stem, ".engine"),
                built.plan,
                graph.role.engine,
                graph.precision,
                library,
                Lineage(sources=(graph.path,), step="build"),
                made_by={**OURS, LIBRARIES[library].distribution: built.details["version"]},
                details=details,
            )
        )


def _largest_activation(model: Classifier) -> int:
    """Return the bytes of the largest float32 tensor between two layers, for one image."""
    sizes = [0]
    x = torch.zeros(1, *model.architecture.input_shape)
    with torch.inference_mode():
        for _, layer in model.named_layers():
            x = layer(x)
            sizes.append(4 * x.numel())
    return max(sizes)


def _check_names(wanted: Wanted, formats: Sequence[str], precisions: Sequence[str]) -> None:
    """Refuse unknown names, and what cannot be had here, before any work is done."""
    for name in formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    for name in precisions:
        if not precision_named(name).deployed:
            raise UsageError(
                f"No graph is exported in {name}.", "It is for the reference; leave it out."
            )
    if wanted.optimize is not None and wanted.optimize not in TARGETS:
        raise unknown("lowering for a runtime", wanted.optimize, TARGETS)
    if wanted.compute_capabilities and not any(map(wanted.asked_of, wanted.libraries)):
        raise UsageError(
            "Compute capabilities are those of TensorRT-RTX engines, and none is asked for.",
            "Add --format tensorrt-rtx; TensorRT builds for the GPU that is here.",
        )
    if TRITON in formats:
        require("tritonclient", "triton", "to write a Triton repository")
    for library in wanted.libraries:
        find_targets(library, wanted.asked_of(library))


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse before the work is done, and never replace what is no bundle."""
    if not target.exists():
        return
    if not overwrite:
        raise UsageError(
            f"{target} exists already.",
            "Choose another --output, or add --overwrite to replace it.",
        )
    if not (target / MANIFEST).is_file():
        raise UsageError(
            f"{target} exists and is no bundle: it has no {MANIFEST}, so it is not replaced.",
            "Choose another --output, or remove it yourself.",
        )
