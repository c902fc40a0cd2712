"""ONNX Runtime on the CPU or on a CUDA device. Imports neither torch nor onnx."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from types import ModuleType, TracebackType
from typing import Any

from ccn_deploy.bundle import Bundle
from ccn_deploy.errors import IntegrityError, RuntimeUnavailableError, UsageError
from ccn_deploy.extras import require
from ccn_deploy.runtimes.base import Array, RuntimeOptions, RuntimeSpec, check_images, in_batches

PROVIDERS = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
}
INPUT = "images"
OUTPUTS = ["logits"]

_FATAL = 4
"""ONNX Runtime's log level; everything else comes back as an exception with the same words."""


class OnnxRuntime:
    """The forward graph of a bundle in an ONNX Runtime session of its own.

    Several threads may call at once. Images are handed over without a copy if they are
    C-contiguous.

    Args:
        bundle: An open bundle; the session is made of verified bytes.
        name: ``"onnxruntime-cpu"`` or ``"onnxruntime-cuda"``.
        precision: Of the graph in the bundle.
        options: Threads, arena, device, memory limit, batch limit.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        RuntimeUnavailableError: No such provider or device here, or no such graph in the bundle.
        IntegrityError: The graph is no ONNX model from images to this bundle's classes.
    """

    def __init__(
        self, bundle: Bundle, *, name: str, precision: str, options: RuntimeOptions
    ) -> None:
        record = bundle.file("forward", precision)
        ort = load_library(name)
        session = make_session(ort, bundle.read(record), record.path, name, options)
        spec = make_spec(ort, bundle, name, precision, options)
        _check_signature(session, spec, record.path)
        self._session: Any = session
        self._spec = spec
        self._check_range = options.check_range
        self._failures = _failures(ort)

    @property
    def spec(self) -> RuntimeSpec:
        """What this runtime is and takes."""
        return self._spec

    @property
    def differentiable(self) -> bool:
        """False: the bundle's graph goes forward only."""
        return False

    def logits(self, images: Array) -> Array:
        """Return float32 [N, classes] for float32 images [N, C, H, W] in [0, 1].

        Raises:
            InputError: Wrong shape or dtype, a NaN, or a value outside [0, 1].
            UsageError: The runtime is closed.
            RuntimeUnavailableError: ONNX Runtime failed, for want of memory most likely.
        """
        session = self._session  # a local, so that close() in another thread cannot take it away
        if session is None:
            raise UsageError(f"This {self._spec.name} runtime is closed.", "Open it again.")
        check_images(images, self._spec, check_range=self._check_range)

        def run(batch: Array) -> Array:
            logits: Array = session.run(OUTPUTS, {INPUT: batch})[0]
            return logits

        try:
            return in_batches(images, self._spec.max_batch, run, self._spec.classes)
        except self._failures as error:
            raise RuntimeUnavailableError(
                f"{self._spec.name} failed on {len(images)} images: {one_line(error)}",
                "If memory ran out, choose a smaller max_batch or a larger memory_limit.",
            ) from error

    def vjp(self, images: Array, cotangents: Array) -> tuple[Array, Array]:
        """Refuse: a forward graph has no gradients.

        Raises:
            RuntimeUnavailableError: Always.
        """
        raise RuntimeUnavailableError(
            f"The runtime {self._spec.name} has no input gradients: the bundle has no gradient "
            "graph.",
            "Take gradients from the runtime 'torch', the twin of the deployed network.",
        )

    def close(self) -> None:
        """Release the session and its memory once no call uses it. Calling twice is harmless."""
        self._session = None

    def __enter__(self) -> OnnxRuntime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


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
        RuntimeUnavailableError: No such provider or device here.
        IntegrityError: The bytes are no ONNX model.
    """
    provider = PROVIDERS[name]
    settings: dict[str, str] = {}
    if name == "onnxruntime-cuda":
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
            graph, session_options, providers=[(provider, settings)], enable_fallback=0
        )
    except _failures(ort) as error:
        if name == "onnxruntime-cuda":
            raise _no_cuda(ort, one_line(error)) from error
        raise IntegrityError(
            f"{path} has the right digest and is no graph that ONNX Runtime {ort.__version__} "
            f"reads: {one_line(error)}",
            "Export the run again; if it is from a newer version, upgrade onnxruntime.",
        ) from error
    if session.get_providers()[0] != provider:
        raise _no_cuda(ort, "it chose the CPU instead")
    return session


def make_spec(
    ort: ModuleType, bundle: Bundle, name: str, precision: str, options: RuntimeOptions
) -> RuntimeSpec:
    """Describe a session of :func:`make_session`."""
    return RuntimeSpec(
        name=name,
        precision=precision,
        input_shape=bundle.manifest.input_shape,
        classes=len(bundle.manifest.class_names),
        max_batch=options.max_batch,
        device="cpu" if name == "onnxruntime-cpu" else f"cuda:{options.device}",
        versions={"onnxruntime": ort.__version__},
        thread_safe=True,
    )


def one_line(error: Exception) -> str:
    """Return the first 300 characters of a library's message, on one line."""
    return " ".join(str(error).split())[:300]


def load_library(name: str) -> ModuleType:
    """Import ONNX Runtime and make sure that it has the provider.

    Raises:
        MissingExtraError: It is not installed.
        RuntimeUnavailableError: This build of it has no such provider.
    """
    extra = "gpu" if name == "onnxruntime-cuda" else "cpu"
    ort = require("onnxruntime", extra, f"for the runtime {name}")
    if not hasattr(ort, "InferenceSession"):  # the leftovers of an uninstall are a namespace
        raise RuntimeUnavailableError(
            "The installation of onnxruntime is broken: it has no InferenceSession.",
            "Uninstall both onnxruntime and onnxruntime-gpu, then install one of them.",
        )
    if PROVIDERS[name] not in ort.get_available_providers():
        raise _no_cuda(ort, "this build of it has no CUDA provider")
    if name == "onnxruntime-cuda" and hasattr(ort, "preload_dlls"):
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


def _check_signature(session: Any, spec: RuntimeSpec, path: str) -> None:
    """Refuse a graph that does not map this bundle's images to its classes."""
    inputs = [(x.name, x.type, list(x.shape)[1:]) for x in session.get_inputs()]
    outputs = [(y.name, y.type, list(y.shape)[1:]) for y in session.get_outputs()]
    wanted_inputs = [(INPUT, "tensor(float)", list(spec.input_shape))]
    wanted_outputs = [(OUTPUTS[0], "tensor(float)", [spec.classes])]
    if (inputs, outputs) != (wanted_inputs, wanted_outputs):
        raise IntegrityError(
            f"{path} maps {inputs} to {outputs}, not {wanted_inputs} to {wanted_outputs}.",
            "Export the run again.",
        )
