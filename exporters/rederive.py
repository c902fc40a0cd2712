"""Every graph of a bundle derived again from what it was made of, and compared byte for byte.

A digest says that a file was not changed since somebody sealed it, and measurements see a few
images. Passes are deterministic, so that what a graph computes, on all images, is known from what
it was made of: a graph that somebody changed and sealed again is not what its pass makes.

What a bundle begins with cannot be derived: weights, and a forward graph that was taken in from a
file or a module. Everything else follows from them, from the card and from the settings and ranges
in the manifest. Nothing that was derived again is ever kept as evidence: evidence could be forged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
import onnx
import torch

from ccn_deploy.bundle import Bundle, FileRecord, Lineage
from ccn_deploy.errors import CcnDeployError, EnvironmentUnfitError, IntegrityError
from ccn_deploy.exporters.bundle_graphs import OURS
from ccn_deploy.exporters.canonical import canonical
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.optimized import TARGETS, optimize
from ccn_deploy.exporters.precision import convert
from ccn_deploy.exporters.sources.run import network_from
from ccn_deploy.exporters.vjp import gradient_graph
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.reader import parse_model
from ccn_deploy.runtimes.torch_runtime import forward_graph
from ccn_deploy.storage import sha256
from ccn_deploy.targets import PRECISIONS, Role
from ccn_deploy.verdict import Verdict

Status = Literal["same", "differs", "inconclusive", "not-rederivable"]

_HINT = "Do not use this bundle: export the network again, or find out who changed it."

_Range = Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True)
class Rederived:
    """What became of one file of a bundle.

    Attributes:
        path: Of the file.
        status: ``"same"``: byte for byte what its pass makes of its sources. ``"differs"``: it is
            not, or the manifest claims what cannot be. ``"inconclusive"``: it is not, but was made
            by other versions than are here, which may make other bytes. ``"not-rederivable"``:
            there is nothing in the bundle to derive it from.
        why: How it was derived, what differs, or why it cannot be derived: one phrase.
    """

    path: str
    status: Status
    why: str

    @property
    def verdict(self) -> Verdict | None:
        """What that says of the bundle; None where nothing could be derived."""
        return {
            "same": Verdict.PASS,
            "differs": Verdict.FAIL,
            "inconclusive": Verdict.INCONCLUSIVE,
            "not-rederivable": None,
        }[self.status]

    def document(self) -> dict[str, str]:
        """Return the JSON of the commands."""
        return {"path": self.path, "status": self.status, "why": self.why}


def rederive(
    bundle: Bundle, progress: Callable[[str], None] = lambda path: None
) -> tuple[Rederived, ...]:
    """Repeat every pass of a bundle in memory and compare its bytes with those of the file.

    The forward graph of a network of this package is lowered from the weights, all others are
    derived from the forward graph that comes out of that, so that each file is compared with what
    it must be and not with what follows from another forgery.

    Args:
        bundle: An open bundle.
        progress: Told the path of each file before its turn.

    Returns:
        One for each file, in the order of the manifest.

    Raises:
        IntegrityError: The forward graph is damaged, or holds what no graph may.
        RuntimeUnavailableError: The bundle has no float32 forward graph.
        MissingExtraError: A package that a pass needs is not installed.
    """
    passes = _Passes(bundle)
    found = []
    for record in bundle.manifest.files:
        progress(record.path)
        found.append(passes.repeat(record))
    return tuple(found)


def refuse_differences(found: Iterable[Rederived]) -> None:
    """Raise if a file is not what its pass makes.

    Raises:
        IntegrityError: Names every such file, and what is wrong with the first.
    """
    wrong = [file for file in found if file.status == "differs"]
    if wrong:
        others = ", ".join(file.path for file in wrong[1:])
        raise IntegrityError(
            f"{wrong[0].path} is not what it is said to be: {wrong[0].why}."
            + (f" So are: {others}." if others else ""),
            _HINT,
        )


@dataclass(frozen=True)
class _Made:
    """What a pass makes, and what the manifest must say of it."""

    model: onnx.ModelProto
    lineage: Lineage
    layers: Mapping[str, Any] | None = None


class _Passes:
    """The passes of one bundle; what several start from is made once."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._root = bundle.file(Role.FORWARD, "fp32")

    def repeat(self, record: FileRecord) -> Rederived:
        """Derive one file again."""
        if record.role is Role.WEIGHTS:
            return self._weights(record)
        if record.role.is_engine:
            return self._engine(record)
        taken_in = record == self._root and not self._bundle.card.architecture
        return self._taken_in(record) if taken_in else self._graph(record)

    def _graph(self, record: FileRecord) -> Rederived:
        try:
            made = self._derive(record)
        except EnvironmentUnfitError:
            raise
        except CcnDeployError as error:
            return self._unequal(record, error.what.removesuffix("."))
        if sha256(to_bytes(made.model)) != record.sha256:
            return self._unequal(record, self._difference(record, made))
        if wrong := _false_claim(record, made):
            return Rederived(record.path, "differs", wrong)
        return Rederived(record.path, "same", _told(made.lineage))

    def _weights(self, record: FileRecord) -> Rederived:
        source = self._bundle.card.source
        if source.kind == "run" and source.sha256 != record.sha256:
            why = "the card is of a run with other weights"
            return Rederived(record.path, "differs", why)
        return Rederived(record.path, "not-rederivable", "what training left")

    def _taken_in(self, record: FileRecord) -> Rederived:
        _ = self._taken  # a graph that must not be read is an error, whoever took it in
        source = self._bundle.card.source
        said = f"{source.kind} {source.name}".strip()
        why = f"what was taken in from {said}, SHA-256 {source.sha256[:16]}"
        return Rederived(record.path, "not-rederivable", why)

    def _engine(self, record: FileRecord) -> Rederived:
        if record.lineage is None:
            return Rederived(record.path, "not-rederivable", "an engine; nothing says of what")
        role = Role.GRADIENT if record.role.has_gradients else Role.FORWARD
        graphs = [file.path for file in self._bundle.files(role, record.precision)]
        if list(record.lineage.sources) != graphs:
            why = f"an engine of {listed(record.lineage.sources)}, not of {listed(graphs)}"
            return Rederived(record.path, "differs", why)
        return Rederived(record.path, "not-rederivable", f"an engine, of {listed(graphs)}")

    @cached_property
    def _forward(self) -> Graph:
        """The forward graph: lowered from the weights, or as it was taken in; then canonical."""
        return canonical(self._taken if self._lowered is None else Graph(self._lowered))

    @cached_property
    def _taken(self) -> Graph:
        """The forward graph of the bundle, its every node looked at."""
        return forward_graph(self._bundle)

    @cached_property
    def _lowered(self) -> onnx.ModelProto | None:
        """The forward graph that the weights give; None where they give none."""
        try:
            return self._lower()
        except IntegrityError:
            return None

    def _lower(self) -> onnx.ModelProto:
        card = self._bundle.card
        if not card.architecture:
            raise IntegrityError("the card names no architecture")
        weights = self._bundle.files(Role.WEIGHTS)
        if not weights:
            raise IntegrityError(f"the card says {card.title}, and there are no weights")
        data = self._bundle.read(weights[0])
        return lower(network_from(card, data))

    @cached_property
    def _gradient(self) -> onnx.ModelProto:
        return gradient_graph(self._forward)

    def _derive(self, record: FileRecord) -> _Made:
        """Repeat the pass that a file of its role, precision and runtime comes from.

        Raises:
            CcnDeployError: There is none, or it fails.
        """
        role, precision, runtime = record.role, record.precision, record.runtime
        if record == self._root:
            sources = tuple(file.path for file in self._bundle.files(Role.WEIGHTS))
            return _Made(self._lowered or self._lower(), Lineage(sources=sources, step="lower"))
        if role is Role.GRADIENT and precision == "fp32" and not runtime:
            return _Made(self._gradient, Lineage(sources=(self._root.path,), step="vjp"))
        if role is Role.FORWARD and precision == "fp32" and runtime in TARGETS:
            lineage = Lineage(
                sources=(self._root.path,), step="optimize", settings={"runtime": runtime}
            )
            return _Made(optimize(self._forward), lineage)
        if precision == "fp32" or runtime:
            raise IntegrityError(f"no pass makes a {role} graph in {precision} for {runtime}")
        return self._convert(record)

    def _convert(self, record: FileRecord) -> _Made:
        kind, settings = PRECISIONS[record.precision].kind, _settings(record)
        graph, source = self._forward, self._root.path
        if record.role is Role.GRADIENT:
            graph, source = Graph(self._gradient), self._bundle.file(Role.GRADIENT, "fp32").path
        known = _ranges(record) if kind == "grid" else None
        converted = convert(graph, record.precision, known, settings["keep_fp32"])
        step = "cast" if kind == "half" else "qdq"
        lineage = Lineage(sources=(source,), step=step, settings=settings)
        return _Made(converted.graph, lineage, converted.layers)

    def _unequal(self, record: FileRecord, why: str) -> Rederived:
        """Return what follows from other bytes: a failure, if the same versions made them."""
        if record.lineage is None:
            why = f"{why}; the manifest does not say how it was made"
            return Rederived(record.path, "inconclusive", why)
        here = {**OURS, "onnx": onnx.__version__, "torch": str(torch.__version__)}
        others = [
            f"{name} {version} (here {here.get(name, 'none')})"
            for name, version in record.made_by.items()
            if here.get(name) != version
        ]
        if others:
            return Rederived(record.path, "inconclusive", f"{why}; made by {', '.join(others)}")
        return Rederived(record.path, "differs", why)

    def _difference(self, record: FileRecord, made: _Made) -> str:
        """Say what differs between a file and what its pass makes."""
        found = parse_model(self._bundle.read(record), record.path)
        return f"not {_told(made.lineage)}: {_first_difference(found, made.model)}"


def _told(lineage: Lineage) -> str:
    return f"{lineage.step} of {listed(lineage.sources)}"


def listed(paths: Sequence[str]) -> str:
    """Return paths with commas."""
    return ", ".join(paths) or "nothing"


def _settings(record: FileRecord) -> dict[str, Any]:
    """Return the settings of a conversion, as far as the manifest has them."""
    given = record.lineage.settings.get("keep_fp32", []) if record.lineage else []
    try:
        kept = msgspec.convert(given, list[str])
    except msgspec.ValidationError as error:
        raise IntegrityError(f"its lineage keeps no list of nodes in float32: {error}") from error
    return {"precision": record.precision, "keep_fp32": kept}


def _ranges(record: FileRecord) -> dict[str, float]:
    """Return the ranges that a graph was calibrated to."""
    try:
        return msgspec.convert(record.details["calibration"]["ranges"], dict[str, _Range])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError("the manifest has no ranges that it was calibrated to") from error


def _false_claim(record: FileRecord, made: _Made) -> str:
    """Return what the manifest says wrongly of a file whose bytes are right; empty if nothing."""
    if record.lineage is not None and record.lineage != made.lineage:
        return f"the manifest says {_told(record.lineage)}, it is {_told(made.lineage)}"
    if made.layers is not None and record.details.get("layers") != made.layers:
        return "the manifest names other precisions of its layers than they have"
    return ""


def _first_difference(found: onnx.ModelProto, wanted: onnx.ModelProto) -> str:
    """Return the first thing that two graphs differ in, one phrase."""
    a, b = found.graph, wanted.graph
    for at, (node, other) in enumerate(zip(a.node, b.node, strict=False)):
        if node != other:
            names = f"{node.op_type} {node.name!r}", f"{other.op_type} {other.name!r}"
            return f"node {at} is {names[0]}, it must be {names[1]}" + (
                " with other settings" if names[0] == names[1] else ""
            )
    if len(a.node) != len(b.node):
        return f"it has {len(a.node)} nodes, not {len(b.node)}"
    held = {constant.name: constant for constant in a.initializer}
    for constant in b.initializer:
        if constant.name not in held:
            return f"it lacks the constant {constant.name!r}"
        if held[constant.name] != constant:
            return f"the constant {constant.name!r} has other values"
    return "other names, order or settings of the file"
