"""Somebody's ONNX classifier as a forward graph.

The file's nodes enter the graph unchanged, for what is measured is what its owner deploys; folding
and upgrading belong to derived graphs. Around them stand the nodes of
:mod:`ccn_deploy.exporters.sources.take_in`; from the end, what normalises the logits is taken away.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from ccn_deploy.bundle.card import Source
from ccn_deploy.bundle.preprocessing import Preprocessing
from ccn_deploy.errors import UsageError
from ccn_deploy.exporters.sources.agreement import Agreement, check_agreement, probe_images
from ccn_deploy.exporters.sources.intake import Intake, image_shape
from ccn_deploy.exporters.sources.onnx_cut import Cut, cut, listed
from ccn_deploy.exporters.sources.original import (
    SOFT,
    Original,
    declared_sizes,
    run,
    session,
    with_output,
)
from ccn_deploy.exporters.sources.rebatch import rebatch
from ccn_deploy.exporters.sources.take_in import Format, take_in
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.graph import Graph, type_name
from ccn_deploy.graph.reader import LIMITS, parse_model, read_graph
from ccn_deploy.graph.signature import INPUT, OUTPUT

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)

_OTHER_BATCH = 3
"""Of a probe that shows whether any batch goes; not the one that files are exported for."""


@dataclass(frozen=True)
class OnnxFile:
    """A foreign classifier that was taken in.

    Attributes:
        graph: Forward: ``images`` float32 [batch, C, H, W] in [0, 1] to ``logits`` float32
            [batch, classes].
        name: Of the file, without its folder.
        sha256: Of the file.
        input_shape: (C, H, W).
        classes: Logits.
        preprocessing: What the file itself is fed.
        removed: Operators that were taken away from the end, in order of execution.
        changes: What else was changed, a sentence each.
        notes: What its owner should know, a sentence each.
        original: The file in ONNX Runtime.
    """

    graph: Graph
    name: str
    sha256: str
    input_shape: tuple[int, int, int]
    classes: int
    preprocessing: Preprocessing
    removed: tuple[str, ...]
    changes: tuple[str, ...]
    notes: tuple[str, ...]
    original: Original

    def check(self, images: NDArray[np.float32] | None = None) -> Agreement:
        """Show that the forward graph is the file, on the same images.

        Args:
            images: float32 [N, C, H, W] in [0, 1]; noise, smooth and plain ones if not given.

        Raises:
            LoweringError: They differ.
        """
        shown = probe_images(self.input_shape) if images is None else images
        return check_agreement(self.graph, self.original, shown)

    def source(self, agreement: Agreement) -> Source:
        """Return what the model card says of the file."""
        return Source(
            kind="onnx",
            name=self.name,
            sha256=self.sha256,
            removed=self.removed,
            changes=self.changes,
            preprocessing=self.preprocessing,
            agreement=agreement.figures(),
        )


def open_onnx_file(
    source: str | os.PathLike[str] | bytes, intake: Intake | None = None
) -> OnnxFile:
    """Make a forward graph of an ONNX classifier. Call :meth:`OnnxFile.check` before it is used.

    Args:
        source: Path or content of the file.
        intake: What its owner says of its input; nothing if not given.

    Raises:
        UsageError: No such file; it takes no images or several inputs; it is no classifier, or
            has only one logit; its batch cannot be opened; what is needed was not said.
        GraphError: No ONNX, or an operator or feature that is not taken in, by name.
        MissingExtraError: ONNX Runtime is not installed.
    """
    intake = intake or Intake()
    data, name = _read(source)
    model = parse_model(data, name)
    kept = cut(model, intake.input, intake.output)
    sizes = declared_sizes(kept.input)
    input_type = kept.input.type.tensor_type.elem_type
    _check_input_type(input_type, kept.input.name)
    layout, shape = image_shape(sizes, intake, kept.input.name)
    read_graph(to_bytes(kept.model), name)  # refuses by name before anything runs
    original = Original(
        session=(opened := session(data, "The file")),
        logits_session=session(with_output(model, kept.output), "The file")
        if kept.removed
        else opened,
        input=kept.input.name,
        output=kept.source_output,
        logits=kept.output,
        input_type=input_type,
        batch=sizes[0],
        preprocessing=intake.preprocessing(layout, shape[0]),
        removed=kept.removed,
    )
    form = _probe_format(original, kept, shape)
    made, renamed = take_in(kept, form)
    graph, opened_targets = _any_batch(made, form, sizes[0])
    return OnnxFile(
        graph=graph,
        name=name,
        sha256=hashlib.sha256(data).hexdigest(),
        input_shape=shape,
        classes=form.classes,
        preprocessing=original.preprocessing,
        removed=tuple(map(str, kept.removed)),
        changes=(*_changes(model, kept, sizes[0]), *renamed, *opened_targets),
        notes=tuple(_notes(kept, original, shape)),
        original=original,
    )


def _read(source: str | os.PathLike[str] | bytes) -> tuple[bytes, str]:
    """Return content and name of a file."""
    if isinstance(source, bytes):
        return source, "the file"
    path = Path(source)
    try:
        size = path.stat().st_size
        if size > LIMITS.size:
            raise UsageError(
                f"{path} has {size:,} bytes, more than an ONNX file can have.",
                "Weights in a file of their own are not taken in either.",
            )
        return path.read_bytes(), path.name
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}.", "Give the path of an ONNX file."
        ) from error


def _check_input_type(element_type: int, name: str) -> None:
    if element_type in _FLOATS:
        return
    hint = "Only networks that classify images, given as floats, can be exported."
    if element_type == TensorProto.UINT8:
        hint = (
            "Pixels that are rounded have no gradient. Export the network with a float input, "
            "and give --input-range 0,255."
        )
    raise UsageError(
        f"Input {name!r} takes {type_name(element_type)}, not float32 or float16.", hint
    )


def _probe_format(original: Original, kept: Cut, shape: tuple[int, int, int]) -> Format:
    """Run the file once to see what it returns.

    Raises:
        UsageError: It returns no logits of several classes.
    """
    batch = original.batch or 2
    logits = original.raw_logits(np.full((batch, *shape), 0.5, np.float32))
    rows, *sizes = logits.shape or (0,)
    name = original.output
    if rows != batch or not sizes or any(size != 1 for size in sizes[1:]):
        raise UsageError(
            f"Output {name!r} has shape {list(logits.shape)} for {batch} images, which are no "
            "logits [batch, classes]: detectors, segmenters and encoders are no classifiers.",
            "Name another output with --output-name, if there is one.",
        )
    if logits.dtype.kind != "f":
        raise UsageError(
            f"Output {name!r} is {logits.dtype}: labels, not logits.",
            "Name the output with scores or probabilities with --output-name.",
        )
    if sizes[0] < 2:
        last = kept.model.graph.node[-1].op_type
        after = ", behind a Sigmoid," if last == "Sigmoid" else ""
        raise UsageError(
            f"Output {name!r} has a single value{after}: a classifier has a logit per class.",
            "For two classes export two logits, 0 and z where the value is z or Sigmoid(z): their "
            "softmax is the same probability.",
        )
    for removed in kept.removed:
        # Before opset 13 it is over the axis and all behind it, which have size 1 here.
        if removed.axis is not None and removed.axis % logits.ndim != 1:
            raise UsageError(
                f"The last {removed} of shape {list(logits.shape)} is not over the classes.",
                "Export the network without it.",
            )
    return Format(
        preprocessing=original.preprocessing,
        image_shape=shape,
        input_type=original.input_type,
        output_type=onnx.helper.np_dtype_to_tensor_dtype(logits.dtype),
        output_rank=logits.ndim,
        classes=sizes[0],
    )


def _any_batch(
    model: onnx.ModelProto, form: Format, batch: int | None
) -> tuple[Graph, tuple[str, ...]]:
    """Return the graph for any batch, and a sentence on what was changed for it.

    Raises:
        UsageError: A batch is built into the file in a way that cannot be opened.
    """
    problem = _batch_problem(model, form)
    changed: tuple[str, ...] = ()
    if problem:
        targets = rebatch(model, INPUT, batch or 1)
        left = _batch_problem(model, form)
        if left:
            raise UsageError(
                f"A batch of {batch or 1} is built into the file and cannot be opened: {left}",
                "Export it with a symbolic batch (dynamic_axes, dynamic_shapes).",
            )
        changed = (f"Targets of Reshape that take any batch now: {listed(targets)}.",)
    return read_graph(to_bytes(model), "the forward graph"), changed


def _batch_problem(model: onnx.ModelProto, form: Format) -> str:
    """Return why a batch that the file was not exported for fails; empty if it does not."""
    images = np.full((_OTHER_BATCH, *form.image_shape), 0.5, np.float32)
    try:
        opened = session(to_bytes(model), "The forward graph")
        shape = run(opened, OUTPUT, {INPUT: images}).shape
    except UsageError as error:
        return error.what
    if shape != (_OTHER_BATCH, form.classes):
        return f"{_OTHER_BATCH} images give logits of shape {list(shape)}."
    return ""


def _changes(model: onnx.ModelProto, kept: Cut, batch: int | None) -> list[str]:
    """Return what was changed besides nodes, a sentence each."""
    changes = []
    if batch is not None:
        changes.append(f"The batch of {batch} became symbolic.")
    if model.ir_version != kept.model.ir_version:
        changes.append(
            f"The file's format was raised from IR {model.ir_version} to {kept.model.ir_version}."
        )
    others = [output.name for output in model.graph.output if output.name != kept.source_output]
    if others:
        changes.append(f"Other outputs were dropped: {listed(others)}.")
    return changes


def _notes(kept: Cut, original: Original, shape: tuple[int, int, int]) -> list[str]:
    """Return what an owner should know, a sentence each."""
    if any(removed.op in SOFT for removed in kept.removed):
        return []
    outputs = original.outputs(probe_images(shape)).reshape(8, -1)
    if (outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1.0, atol=1e-3):
        return [
            "The outputs look like probabilities, and no Softmax stands last: attacks that climb "
            "a loss see its slope vanish where the network is sure of itself."
        ]
    return []
