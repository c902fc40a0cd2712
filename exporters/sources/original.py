"""A foreign ONNX file under ONNX Runtime as its owner runs it, fed in its own format."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from ccn_deploy.bundle.preprocessing import Preprocessing, from_images
from ccn_deploy.errors import UsageError, one_line
from ccn_deploy.exporters.sources.onnx_cut import Removed
from ccn_deploy.extras import require

SOFT = ("Softmax", "LogSoftmax")


def session(model: bytes, what: str) -> Any:
    """Open a model in ONNX Runtime on the CPU, with one thread.

    Args:
        model: The file.
        what: Begins the error: ``"The file"``.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        UsageError: ONNX Runtime refuses the model.
    """
    ort = require("onnxruntime", "cpu", "to compare an ONNX file with what is made of it")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it raises
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        raise UsageError(
            f"{what} does not load in ONNX Runtime: {one_line(error)}",
            "Check it with onnx.checker.check_model, or export it again.",
        ) from error


@dataclass(frozen=True)
class Original:
    """The file, and how it is fed.

    Attributes:
        session: The file in ONNX Runtime, byte for byte.
        logits_session: The file with the tensor under its softmax as a further output; the same
            session where nothing was removed.
        input: Name of its input.
        output: Name of its output.
        logits: Name of the tensor with the logits.
        input_type: Element type of the input, as in ``onnx.TensorProto``.
        batch: The batch that it was exported for; None if any goes.
        preprocessing: What it is fed, made of images in [0, 1].
        removed: What normalises its logits, in order of execution.
    """

    session: Any
    logits_session: Any
    input: str
    output: str
    logits: str
    input_type: int
    batch: int | None
    preprocessing: Preprocessing
    removed: tuple[Removed, ...] = ()

    def outputs(self, images: NDArray[np.float32]) -> NDArray[Any]:
        """Return what the file itself returns, [N, ...].

        Args:
            images: float32 [N, C, H, W] in [0, 1]; converted to the file's own format, and fed in
                batches of the size that it was exported for, the last one filled up.

        Raises:
            UsageError: ONNX Runtime fails on it.
        """
        return self._run(self.session, self.output, images)

    def raw_logits(self, images: NDArray[np.float32]) -> NDArray[Any]:
        """Return what the file gives before what was removed, [N, ...]; see :meth:`outputs`."""
        return self._run(self.logits_session, self.logits, images)

    def _run(self, opened: Any, output: str, images: NDArray[np.float32]) -> NDArray[Any]:
        size = self.batch or len(images)
        dtype = helper.tensor_dtype_to_np_dtype(self.input_type)
        source = from_images(images, self.preprocessing).astype(dtype)
        found = []
        for start in range(0, len(source), size):
            piece = source[start : start + size]
            fed = np.resize(piece, (size, *piece.shape[1:]))
            found.append(run(opened, output, {self.input: fed})[: len(piece)])
        return np.concatenate(found)

    def normalised(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Return what the file makes of logits, [N, classes], by the operators removed from it."""
        x = logits.astype(np.float64)
        for removed in self.removed:
            if removed.op in SOFT:
                x = x - x.max(axis=1, keepdims=True)
                x = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
                x = np.exp(x) if removed.op == "Softmax" else x
        return x


def with_output(model: onnx.ModelProto, tensor: str) -> bytes:
    """Return a model that returns one more of its tensors."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.graph.output.append(onnx.ValueInfoProto(name=tensor))
    return bytes(made.SerializeToString())


def run(opened: Any, output: str, feed: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Run a session for one output.

    Raises:
        UsageError: ONNX Runtime fails.
    """
    try:
        (found,) = opened.run([output], feed)
    except Exception as error:  # its exceptions have no base of their own
        shapes = ", ".join(str(list(value.shape)) for value in feed.values())
        raise UsageError(
            f"The file fails in ONNX Runtime on input of shape {shapes}: {one_line(error)}",
            "Check --input-layout and --input-size.",
        ) from error
    return np.asarray(found)


def declared_sizes(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Return the sizes of an input's axes; None where one is open."""
    return tuple(
        int(axis.dim_value) if axis.dim_value > 0 else None
        for axis in value.type.tensor_type.shape.dim
    )
