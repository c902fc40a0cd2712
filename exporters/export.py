"""From a network, wherever it comes from, to a bundle with all that was asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ccn_deploy.bundle import Bundle, Lineage, NewFile, write_bundle
from ccn_deploy.bundle.writer import check_target
from ccn_deploy.errors import DatasetNotFoundError, UsageError, unknown
from ccn_deploy.exporters import bundle_graphs
from ccn_deploy.exporters.bundle_draft import BundleDraft
from ccn_deploy.exporters.bundle_graphs import GraphFile
from ccn_deploy.exporters.calibration import CalibrationRequest, load_calibration
from ccn_deploy.exporters.optimized import TARGETS
from ccn_deploy.exporters.precision import (
    Calibration,
    NumericReport,
    numeric_report,
)
from ccn_deploy.exporters.sources.opening import NetworkSource, of_run
from ccn_deploy.exporters.tensorrt.build import Batches, build_engine, find_targets
from ccn_deploy.extras import require
from ccn_deploy.graph.graph import Graph
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
    """What a bundle shall hold; see :func:`export_bundle`."""

    gradient: bool
    optimize: str | None
    libraries: tuple[str, ...]
    precisions: tuple[str, ...]
    batch: Batches
    calibration: CalibrationRequest | None
    compute_capabilities: tuple[str, ...]
    tf32: bool
    keep_fp32: tuple[str, ...]

    def asked_of(self, library: str) -> tuple[str, ...]:
        """Return the GPUs asked for, if the library builds for others than the one here."""
        return self.compute_capabilities if LIBRARIES[library].portable else ()


def export_bundle(
    source: TrainedRun | NetworkSource | Bundle,
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
    keep_fp32: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
    note: Callable[[str], None] = lambda sentence: None,
) -> Bundle:
    """Derive graphs from a network's forward graph, check them, build engines, write the bundle.

    Args:
        source: From :func:`ccn_deploy.exporters.sources.opening.open_source` or
            :func:`ccn_deploy.runs.open_run`; or a bundle: then every file of it is kept as it is,
            and what is missing is added.
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
        keep_fp32: Nodes of the forward graph, or what their names begin with, that stay float32 in
            every precision, beside those that do by structure.
        progress: Told each step before it begins.
        note: Told what a user should know of the Triton repository.

    Raises:
        UsageError: ``output`` exists and may not be replaced; an unknown name; a source that has
            everything already.
        IntegrityError: The weights do not belong to the network.
        NoGradientError: An operator has no gradient rule, and a gradient graph is asked for.
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
        keep_fp32=tuple(keep_fp32),
    )
    _check_names(wanted, formats, precisions)
    target = Path(output)
    check_target(target, overwrite)
    if isinstance(source, TrainedRun):
        source = of_run(source)
    draft = BundleDraft(source)
    maker = _Maker(draft, wanted, progress)
    maker.make_graphs(keep_without_gradient=isinstance(source, Bundle))
    maker.make_engines()
    if not draft.added and TRITON not in formats:
        raise UsageError(
            f"{source.path} has all of this already: nothing to add.",
            "Ask for another --format, --precision, --batch or --compute-capability.",
        )
    progress("Writing the bundle")
    bundle = write_bundle(target, card=draft.card, files=draft.files, overwrite=overwrite)
    if TRITON in formats:
        from ccn_deploy.exporters.triton import write_repository

        progress("Writing the Triton repository")
        for sentence in write_repository(bundle, bundle.path / TRITON).notes:
            note(sentence)
    return bundle


class _Maker:
    """Adds to the draft of a bundle what is wanted and not there."""

    def __init__(self, draft: BundleDraft, wanted: Wanted, progress: Callable[[str], None]) -> None:
        forward = draft.find(Role.FORWARD, "fp32")
        assert forward is not None  # a source has one, and a bundle was let in with one
        self._forward = GraphFile(forward)
        self._draft = draft
        self._wanted = wanted
        self._progress = progress

    def make_graphs(self, *, keep_without_gradient: bool) -> None:
        """Add graphs derived from the forward graph, float32 first.

        Args:
            keep_without_gradient: Whether a draft without a gradient graph gets none.
        """
        optimize, draft = self._wanted.optimize, self._draft
        if optimize is not None and draft.find(Role.FORWARD, "fp32", optimize) is None:
            self._progress(f"Rewriting {self._forward.file.path} for {optimize}")
            rewritten = bundle_graphs.optimized_file(self._forward, optimize)
            if rewritten is not None:
                draft.add(rewritten)
        gradient = draft.find(Role.GRADIENT, "fp32")
        if gradient is None and self._wanted.gradient and not keep_without_gradient:
            self._progress("Deriving and checking the gradient graph")
            gradient = draft.add(bundle_graphs.gradient_file(self._forward))
        differentiated = None if gradient is None else GraphFile(gradient)
        for precision in self._wanted.precisions:
            if precision == "fp32":
                continue
            self._convert(self._forward, precision)
            differentiable = self._wanted.gradient and PRECISIONS[precision].has_gradients
            if differentiated is not None and differentiable:
                self._convert(differentiated, precision)

    def make_engines(self) -> None:
        """Add an engine of every graph that is wanted."""
        roles = (Role.FORWARD, Role.GRADIENT) if self._wanted.gradient else (Role.FORWARD,)
        for library in self._wanted.libraries:
            for precision in self._wanted.precisions:
                for role in roles:
                    graph = self._draft.find(role, precision)
                    if graph is not None:
                        self._engine(library, graph)

    def _convert(self, source: GraphFile, precision: str) -> None:
        role = source.file.role
        if self._draft.find(role, precision) is not None:
            return
        self._progress(f"Converting to {bundle_graphs.path_of(role, precision)}")
        calibration = self._images if PRECISIONS[precision].kind == "grid" else None
        report = self._report if role == Role.FORWARD else None
        self._draft.add(
            bundle_graphs.converted_file(
                source, precision, calibration, report, self._wanted.keep_fp32
            )
        )

    @cached_property
    def _images(self) -> Calibration:
        request = self._wanted.calibration or CalibrationRequest()
        return load_calibration(request, self._draft.card)

    @cached_property
    def _report(self) -> NumericReport | None:
        """What the norm branches met; None where there are no images and nobody named any."""
        try:
            images = self._images.images
        except (DatasetNotFoundError, UsageError):
            if self._wanted.calibration is not None:
                raise
            return None
        return numeric_report(self._forward.canonical, images)

    def _engine(self, library: str, graph: NewFile) -> None:
        batch, candidates, prefix = self._wanted.batch, None, ""
        if graph.role.has_gradients:
            most = min(CANDIDATES, self._draft.card.classes)
            prefix, candidates = "gradient-", Batches(1, most, most)
            batch = batch.at_most(
                LARGEST_TENSOR // (most * _largest_activation(self._forward.graph))
            )
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
        for other in self._draft.every(graph.role.engine, graph.precision, library):
            if {**other.details, "log": None, "reproducible": None} == same:
                return
        self._draft.add(
            NewFile(
                self._draft.free_path(stem, ".engine"),
                built.plan,
                graph.role.engine,
                graph.precision,
                library,
                Lineage(sources=(graph.path,), step="build"),
                made_by={
                    **bundle_graphs.OURS,
                    LIBRARIES[library].distribution: built.details["version"],
                },
                details=details,
            )
        )


def _largest_activation(graph: Graph) -> int:
    """Return the bytes of the largest float32 tensor that one image makes."""
    shapes = (graph.shapes[name] for name in graph.floats)
    return 4 * max(math.prod(n for n in shape if isinstance(n, int)) for shape in shapes)


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
    _check_used(wanted)
    if TRITON in formats:
        require("tritonclient", "triton", "to write a Triton repository")
    for library in wanted.libraries:
        find_targets(library, wanted.asked_of(library))


def _check_used(wanted: Wanted) -> None:
    """Refuse what would have no effect: whoever asks for it believes that it has one."""
    low = any(name != "fp32" for name in wanted.precisions)
    request = wanted.calibration
    if not low and request is not None and request != CalibrationRequest(seed=request.seed):
        raise UsageError(
            "Images and how to calibrate on them are for low precisions, and none is asked for.",
            "Add --precision int8, fp16, bf16 or fp8, or leave out --dataset and --calibration.",
        )
    if not low and wanted.keep_fp32:
        raise UsageError(
            "--keep-fp32 is for low precisions, and none is asked for.",
            "Add --precision int8, fp16, bf16 or fp8, or leave it out.",
        )
    if wanted.tf32 and not wanted.libraries:
        raise UsageError(
            "--tf32 is for engines, and none is asked for.",
            "Add --format tensorrt-rtx or tensorrt, or leave it out.",
        )
