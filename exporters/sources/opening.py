"""From what a user names to a forward graph: a run, a bundle, an ONNX file, or a factory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ccn_deploy.bundle import MANIFEST, Bundle, open_bundle
from ccn_deploy.bundle.card import ModelCard, Source
from ccn_deploy.errors import UsageError
from ccn_deploy.exporters.checks import check_valid
from ccn_deploy.exporters.sources.agreement import module_agreement
from ccn_deploy.exporters.sources.class_names import read_class_names
from ccn_deploy.exporters.sources.intake import Intake
from ccn_deploy.exporters.sources.onnx_file import OnnxFile, open_onnx_file
from ccn_deploy.exporters.sources.run import run_network
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.graph import Graph
from ccn_deploy.runs import RUN, TrainedRun, open_run
from ccn_deploy.storage import sha256, sha256_file

_BESIDE_A_FACTORY = {
    ".py": "a file of Python",
    ".pth": "a file of weights",
    ".pt": "a file of weights",
    ".safetensors": "a file of weights",
}
"""What is taken for a network, and is given beside a factory or has one in it."""


@dataclass(frozen=True)
class SourceOptions:
    """What a user says of a source that does not say it itself.

    Attributes:
        intake: What an ONNX file or a module takes and returns.
        weights: File with the weights of a module.
        classes: File with the names of the classes.
        evaluation: How its owner makes evaluation images, for the model card.
        name: For people; that of the file or the factory if empty.
    """

    intake: Intake = field(default_factory=Intake)
    weights: Path | None = None
    classes: Path | None = None
    evaluation: Mapping[str, object] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class NetworkSource:
    """A network as its float32 forward graph.

    Attributes:
        card: What is known of it.
        forward: Images in [0, 1] to logits.
        weights: The bytes of a run's safetensors file; empty for other sources.
        notes: What its owner should know, a sentence each.
        path: Where it came from, for messages.
    """

    card: ModelCard
    forward: Graph
    weights: bytes = b""
    notes: tuple[str, ...] = ()
    path: Path = Path()


def open_source(given: str, options: SourceOptions | None = None) -> NetworkSource | Bundle:
    """Open whatever a user wants to deploy.

    Args:
        given: Directory of a run or of a bundle, an ONNX file, ``"package.module:factory"`` or
            ``"path/to/file.py:factory"``.
        options: What it does not say itself.

    Raises:
        UsageError: Nothing of the kind is there, or options that this kind of source does not
            take.
        CcnDeployError: As :func:`ccn_deploy.runs.open_run`, :func:`ccn_deploy.bundle.open_bundle`,
            :func:`~ccn_deploy.exporters.sources.onnx_file.open_onnx_file` and
            :mod:`ccn_deploy.factory` say.
    """
    options = options or SourceOptions()
    path = Path(given)
    if not path.exists() and ":" in given:
        return _of_module(given, options)
    if path.suffix in _BESIDE_A_FACTORY and path.is_file():
        raise UsageError(
            f"{path} is {_BESIDE_A_FACTORY[path.suffix]}, and no network by itself.",
            "Give a function that makes the network, FILE.py:FUNCTION, and its --weights FILE.",
        )
    if path.is_file():
        if options.weights is not None:
            raise UsageError(
                f"{path} holds its weights itself, so it takes no --weights.", "Leave it out."
            )
        return _of_onnx_file(path, options)
    if options != SourceOptions():
        raise UsageError(
            f"{path} is no ONNX file and no factory: what it expects is known.",
            "Leave out the options about weights, input and classes.",
        )
    if (path / MANIFEST).is_file() and not (path / RUN).is_file():
        return open_bundle(path)
    if not path.exists():
        raise UsageError(
            f"{given} is not there.",
            "Give a run, a bundle, FILE.onnx, or package.module:factory (path/to/file.py:factory).",
        )
    return of_run(open_run(path))


def of_run(run: TrainedRun) -> NetworkSource:
    """Lower the network of a finished run.

    Raises:
        IntegrityError: The weights do not belong to the network.
        LoweringError: Graph and network are not the same function.
    """
    module, graph = run_network(run)
    check_valid(graph.model)
    source = Source(
        kind="run",
        name=run.card.source.name,
        sha256=sha256(run.weights),
        agreement=module_agreement(module, graph),
    )
    weights = run.weights if run.card.architecture else b""
    card = msgspec.structs.replace(run.card, source=source)
    return NetworkSource(card, graph, weights, path=run.path)


def _of_onnx_file(path: Path, options: SourceOptions) -> NetworkSource:
    opened = open_onnx_file(path, options.intake)
    source = opened.source(opened.check())
    return _named(opened, source, options, path.stem, path)


def _of_module(given: str, options: SourceOptions) -> NetworkSource:
    """Export a module, then take the export in as an ONNX file is."""
    from ccn_deploy.exporters.sources.module import export_module, input_shape_of
    from ccn_deploy.factory import load_factory, load_weights

    _check_module_intake(options.intake)
    module = load_factory(given)
    notes = [] if options.weights is None else load_weights(module, options.weights)
    model = export_module(module, input_shape_of(module, options.intake.input_size))
    opened = open_onnx_file(to_bytes(model), options.intake)
    source = Source(
        kind="module",
        name=given.rpartition("/")[2],  # a card holds no path of anybody's machine
        sha256=sha256(to_bytes(model)) if options.weights is None else sha256_file(options.weights),
        removed=opened.removed,
        changes=opened.changes,
        preprocessing=opened.preprocessing,
        agreement={
            **opened.check().figures(),
            **module_agreement(module, Graph(model)),
        },
    )
    found = _named(opened, source, options, given.rpartition(":")[2], Path(given))
    return NetworkSource(found.card, found.forward, b"", (*notes, *found.notes), found.path)


def _check_module_intake(intake: Intake) -> None:
    """Refuse what can only be said of an ONNX file, before the module is made."""
    if intake.input_layout == "nhwc" or intake.input or intake.output:
        raise UsageError(
            "A module takes [N, C, H, W] as its only input and returns logits: --input-layout, "
            "--input and --output-name are for ONNX files.",
            "Leave them out; a small wrapper module can turn its input or pick an output.",
        )


def _named(
    opened: OnnxFile, source: Source, options: SourceOptions, name: str, path: Path
) -> NetworkSource:
    """Give a network its card."""
    classes = (
        tuple(map(str, range(opened.classes)))
        if options.classes is None
        else read_class_names(options.classes, opened.classes)
    )
    card = ModelCard(
        name=options.name or name,
        input_shape=opened.input_shape,
        class_names=classes,
        source=source,
        evaluation=dict(options.evaluation),
    )
    return NetworkSource(card, opened.graph, notes=opened.notes, path=path)
