"""ONNX Runtime on the CPU or on a CUDA device. Imports neither torch nor onnx."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ccn_deploy.bundle import Bundle, FileRecord
from ccn_deploy.data.dataset import check_labels
from ccn_deploy.errors import InputError, IntegrityError, RuntimeUnavailableError, one_line
from ccn_deploy.extras import require
from ccn_deploy.graph.signature import COTANGENTS, GRADIENTS, INPUT, OUTPUT
from ccn_deploy.runtimes.base import (
    LARGEST_BATCH,
    Array,
    Closing,
    RuntimeOptions,
    RuntimeSpec,
    already_closed,
    check_cotangents,
    check_images,
    in_batches,
)
from ccn_deploy.runtimes.loss_gradient import LABELS, with_loss_gradient
from ccn_deploy.targets import RUNTIMES, Role, Target

PROVIDERS = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
}
OUTPUTS = [OUTPUT]

IMAGES = 16
"""Images that one run of the forward graph computes for each thread of a CPU, unless asked
otherwise. Their activations fit its caches: in pieces of 256 the compact MNIST network takes a
third longer, while the plain one and VGG11 are level."""

ROWS = 32
"""Gradients that one run of the gradient graph computes at most on a CPU. They fit its caches: 256
at once were 4 to 32 % slower, and take eight times the memory."""

Shapes = Mapping[str, Sequence[int | str]]
"""Of a graph's inputs or outputs by name, without the batch."""

_WRONG = ("ReluQuantRewrite", "ClipQuantRewrite")
"""Optimisations that are not made: they drop a ReLU before a QuantizeLinear whose zero point is 0,
which is right for unsigned integers and wrong for fp8 (seen in 1.32)."""

_FATAL = 4
"""ONNX Runtime's log level; everything else comes back as an exception with the same words."""


class OnnxRuntime(Closing):
    """The forward graph of a bundle in an ONNX Runtime session of its own.

    The gradient graph, if the bundle has one, gets a session when it is first asked for, and
    another if it is to climb the cross-entropy.
    Several threads may call at once. Images are handed over without a copy if they are
    C-contiguous.

    Args:
        bundle: An open bundle; the session is made of verified bytes.
        target: An ONNX Runtime and the graph's precision.
        options: Threads, arena, device, memory limit, batch limit.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        RuntimeUnavailableError: No such provider or device here, or no such graph in the bundle.
        IntegrityError: The graph is no ONNX model from images to this bundle's classes.
    """

    def __init__(self, bundle: Bundle, target: Target, options: RuntimeOptions) -> None:
        self._ort = load_library(target.runtime)
        self._bundle = bundle
        self._target = target
        self._options = options
        self._spec = make_spec(self._ort, bundle, target, options)
        self._failures = _failures(self._ort)
        self._gradient_sessions: dict[str, Any] = {}
        self._lock = threading.Lock()
        images = {INPUT: self._spec.input_shape}
        graph = bundle.program(target)
        self._session: Any = self._open(graph, images, {OUTPUTS[0]: [self._spec.classes]})

    @property
    def spec(self) -> RuntimeSpec:
        """What this runtime is and takes."""
        return self._spec

    @property
    def differentiable(self) -> bool:
        """Whether the bundle has a gradient graph in this precision."""
        return bool(self._bundle.files(Role.GRADIENT, self._target.precision))

    def logits(self, images: Array) -> Array:
        """Return float32 [N, classes] for float32 images [N, C, H, W] in [0, 1].

        Raises:
            InputError: Wrong shape or dtype, a NaN, or a value outside [0, 1].
            UsageError: The runtime is closed.
            RuntimeUnavailableError: ONNX Runtime failed, for want of memory most likely.
        """
        session = self._session  # a local, so that close() in another thread cannot take it away
        if session is None:
            raise already_closed(self._spec.name)
        check_images(images, self._spec, check_range=self._options.check_range)

        def run(batch: Array) -> Array:
            logits: Array = session.run(OUTPUTS, {INPUT: batch})[0]
            return logits

        try:
            return in_batches(images, self._spec.max_batch, run, self._spec.classes)
        except self._failures as error:
            raise self._failed(len(images), error) from error

    def vjp(self, images: Array, cotangents: Array) -> tuple[Array, Array]:
        """Return logits [N, classes] and K input gradients an image [N, K, C, H, W], in float32.

        Both come from the gradient graph, computed by this very runtime.

        Arguments are those of :meth:`ccn_deploy.runtimes.base.Runtime.vjp`.

        Raises:
            InputError: Images as for :meth:`logits`, or cotangents of another shape or dtype, or
                not finite.
            UsageError: The runtime is closed.
            RuntimeUnavailableError: The bundle has no gradient graph, or ONNX Runtime failed.
            IntegrityError: The graph is not the one of the manifest, or no gradient graph.
        """
        session = self._with_gradient()
        check_images(images, self._spec, check_range=self._options.check_range)
        check_cotangents(cotangents, len(images), self._spec)
        if not cotangents.shape[1]:
            return self.logits(images), np.empty((len(images), 0, *self._spec.input_shape), "f4")
        return self._backward(session, images, COTANGENTS, cotangents, cotangents.shape[1])

    def cross_entropy(self, images: Array, labels: Array) -> tuple[Array, Array]:
        """Return logits [N, classes] and the slope of each cross-entropy [N, C, H, W], in float32.

        It is :meth:`vjp` along softmax(logits) less the label's one, and saves the forward pass
        that would have to find those logits first.

        Args:
            images: float32 [N, C, H, W] as for :meth:`logits`.
            labels: int64 [N].

        Raises:
            InputError: Images as for :meth:`logits`, or labels that are no classes.
            UsageError: The runtime is closed.
            RuntimeUnavailableError: The bundle has no gradient graph, or ONNX Runtime failed.
            IntegrityError: The graph is not the one of the manifest, or no gradient graph.
            MissingExtraError: onnx is not installed.
        """
        session = self._with_loss_gradient()
        check_images(images, self._spec, check_range=self._options.check_range)
        labels = check_labels(labels, self._spec.classes)
        if len(labels) != len(images):
            raise InputError(
                f"{len(images)} images and {len(labels)} labels do not belong together.",
                "Give one label per image, in the same order.",
            )
        logits, gradients = self._backward(session, images, LABELS, labels, 1)
        return logits, gradients[:, 0]

    def _backward(
        self, session: Any, images: Array, name: str, given: Array, candidates: int
    ) -> tuple[Array, Array]:
        """Run a gradient graph in pieces that fit the caches."""
        gradients = np.empty((len(images), candidates, *self._spec.input_shape), np.float32)
        logits = np.empty((len(images), self._spec.classes), np.float32)
        size = self._options.max_batch or LARGEST_BATCH
        if self._spec.device == "cpu":
            size = max(1, min(size, ROWS // candidates))
        try:
            for at in range(0, len(images), size):
                piece = slice(at, at + size)
                logits[piece], gradients[piece] = session.run(
                    [OUTPUTS[0], GRADIENTS], {INPUT: images[piece], name: given[piece]}
                )
        except self._failures as error:
            raise self._failed(len(images), error) from error
        return logits, gradients

    def close(self) -> None:
        """Release the sessions and their memory once no call uses them; twice is harmless."""
        with self._lock:
            self._session = None
            self._gradient_sessions.clear()

    def _with_gradient(self) -> Any:
        """Return the session of the gradient graph, made when it is first asked for."""
        inputs: Shapes = {
            INPUT: self._spec.input_shape,
            COTANGENTS: ["candidates", self._spec.classes],
        }
        return self._backwards(COTANGENTS, inputs, lambda graph: graph)

    def _with_loss_gradient(self) -> Any:
        """Return the session of the gradient graph that goes back along the cross-entropy."""
        classes = self._spec.classes
        inputs: Shapes = {INPUT: self._spec.input_shape, LABELS: []}
        return self._backwards(
            LABELS, inputs, lambda graph: with_loss_gradient(graph, COTANGENTS, OUTPUTS[0], classes)
        )

    def _backwards(self, name: str, inputs: Shapes, rewrite: Callable[[bytes], bytes]) -> Any:
        """Return the session of one form of the gradient graph.

        Raises:
            RuntimeUnavailableError: The bundle has none.
        """
        if not self.differentiable:
            raise RuntimeUnavailableError(
                f"The runtime {self._spec.name} has no input gradients: the bundle has no gradient "
                f"graph in {self._spec.precision}.",
                "Export it again without --no-gradient, or take gradients from the runtime "
                "'torch', the reference of the deployed network.",
            )
        with self._lock:
            if self._session is None:
                raise already_closed(self._spec.name)
            if name not in self._gradient_sessions:
                shape = self._spec.input_shape
                self._gradient_sessions[name] = self._open(
                    self._bundle.program(self._target, Role.GRADIENT),
                    inputs,
                    {OUTPUTS[0]: [self._spec.classes], GRADIENTS: ["candidates", *shape]},
                    rewrite,
                )
            return self._gradient_sessions[name]

    def _open(
        self,
        record: FileRecord,
        inputs: Shapes,
        outputs: Shapes,
        rewrite: Callable[[bytes], bytes] = lambda graph: graph,
    ) -> Any:
        """Make a session of one of the bundle's graphs; shapes are those after the batch."""
        graph = rewrite(self._bundle.read(record))
        session = make_session(self._ort, graph, record.path, self._spec.name, self._options)
        _check_signature(session, inputs, outputs, record.path)
        return session

    def _failed(self, images: int, error: Exception) -> RuntimeUnavailableError:
        return RuntimeUnavailableError(
            f"{self._spec.name} failed on {images} images: {one_line(error)}",
            "If memory ran out, choose a smaller max_batch or a larger memory_limit.",
        )


def make_session(
    ort: ModuleType, graph: bytes, path: str, name: str, options: RuntimeOptions
) -> Any:
    """Return an ``onnxruntime.InferenceSession`` on exactly the device that was asked for.

    Args:
        ort: The module ``onnxruntime``.
        graph: Bytes of an ONNX model.
        path: Where in the bundle they come from, for errors.
        name: A key of :data:`PROVIDERS`.
        options: See :class:`~ccn_deploy.runtimes.base.RuntimeOptions`.

    Raises:
        RuntimeUnavailableError: No such provider or device here, or it lacks a kernel that the
            graph needs.
        IntegrityError: The bytes are no ONNX model.
    """
    provider = PROVIDERS[name]
    settings: dict[str, str] = {}
    if RUNTIMES[name].on_gpu:
        settings = {"device_id": str(options.device), "use_tf32": "0"}
        if options.memory_limit is not None:
            settings["gpu_mem_limit"] = str(options.memory_limit)
    session_options = ort.SessionOptions()
    session_options.log_severity_level = _FATAL
    session_options.enable_cpu_mem_arena = options.arena
    # A graph may name files to take its weights from; no digest covers those, so none are found.
    session_options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.devnull
    )
    if options.threads is not None:
        session_options.intra_op_num_threads = options.threads
    try:
        session = ort.InferenceSession(
            graph,
            session_options,
            providers=[(provider, settings)],
            enable_fallback=0,
            disabled_optimizers=_WRONG,
        )
    except ort.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise RuntimeUnavailableError(
            f"{name} cannot compute {path}: {one_line(error)}",
            "ONNX Runtime has no kernel for this precision there (bf16 on the CPU, for example). "
            "Choose another --precision, or a TensorRT runtime.",
        ) from error
    except _failures(ort) as error:
        if RUNTIMES[name].on_gpu:
            raise _no_cuda(ort, one_line(error)) from error
        raise IntegrityError(
            f"{path} has the right digest and is no graph that ONNX Runtime {ort.__version__} "
            f"reads: {one_line(error)}",
            "Export it again; if it is from a newer version, upgrade onnxruntime.",
        ) from error
    if session.get_providers()[0] != provider:
        raise _no_cuda(ort, "it chose the CPU instead")
    # The Python object keeps the file's bytes, to make the session again on other providers. Ours
    # is made once, and its weights are copies.
    session._model_bytes = None
    return session


def make_spec(
    ort: ModuleType, bundle: Bundle, target: Target, options: RuntimeOptions
) -> RuntimeSpec:
    """Describe a session of :func:`make_session`."""
    on_cpu = not target.on_gpu
    usual = IMAGES * (options.threads or os.cpu_count() or 1) if on_cpu else LARGEST_BATCH
    usual = min(usual, LARGEST_BATCH)
    return RuntimeSpec(
        name=target.runtime,
        precision=target.precision,
        input_shape=bundle.card.input_shape,
        classes=bundle.card.classes,
        max_batch=options.max_batch or usual,
        device="cpu" if on_cpu else f"cuda:{options.device}",
        versions={"onnxruntime": ort.__version__},
        thread_safe=True,
        graph=bundle.program(target).path,
        usual_batch=usual,
    )


def load_library(name: str) -> ModuleType:
    """Import ONNX Runtime and make sure that it has the provider.

    Raises:
        MissingExtraError: It is not installed.
        RuntimeUnavailableError: This build of it has no such provider.
    """
    ort = require("onnxruntime", RUNTIMES[name].extra, f"for the runtime {name}")
    if not hasattr(ort, "InferenceSession"):  # the leftovers of an uninstall are a namespace
        raise RuntimeUnavailableError(
            "The installation of onnxruntime is broken: it has no InferenceSession.",
            "Uninstall both onnxruntime and onnxruntime-gpu, then install one of them.",
        )
    if PROVIDERS[name] not in ort.get_available_providers():
        raise _no_cuda(ort, "this build of it has no CUDA provider")
    if RUNTIMES[name].on_gpu and hasattr(ort, "preload_dlls"):
        # Finds the CUDA and cuDNN wheels. It reports by print, and stdout is for results.
        with _PRELOAD, contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    return ort


_PRELOAD = threading.Lock()


def _no_cuda(ort: ModuleType, why: str) -> RuntimeUnavailableError:
    have = ", ".join(p.removesuffix("ExecutionProvider") for p in ort.get_available_providers())
    return RuntimeUnavailableError(
        f"onnxruntime-cuda cannot be had here: {why} (ONNX Runtime {ort.__version__} with {have}).",
        "It needs an NVIDIA GPU with its driver, and: pip uninstall onnxruntime; pip install "
        "'ccn-deploy[gpu]'. To measure on the CPU: --runtime onnxruntime-cpu",
    )


def _failures(ort: ModuleType) -> tuple[type[Exception], ...]:
    """Return the exceptions that ONNX Runtime raises: classes of its own, with no common base."""
    state = ort.capi.onnxruntime_pybind11_state
    own = [c for c in vars(state).values() if isinstance(c, type) and issubclass(c, Exception)]
    return (*own, ValueError, RuntimeError)


def _check_signature(session: Any, inputs: Shapes, outputs: Shapes, path: str) -> None:
    """Refuse a graph that has not the floats of this bundle's images and classes as its ends."""

    def found(ends: Any) -> list[tuple[str, str, list[int | str]]]:
        return [(end.name, end.type, list(end.shape)[1:]) for end in ends]

    def wanted(shapes: Shapes) -> list[tuple[str, str, list[int | str]]]:
        return [
            (name, "tensor(int64)" if name == LABELS else "tensor(float)", list(shape))
            for name, shape in shapes.items()
        ]

    have = found(session.get_inputs()), found(session.get_outputs())
    want = wanted(inputs), wanted(outputs)
    if have != want:
        raise IntegrityError(
            f"{path} maps {have[0]} to {have[1]}, not {want[0]} to {want[1]}.",
            "Export it again.",
        )
