"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU. Imports neither torch nor pycuda."""

from __future__ import annotations

import threading
import weakref
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np

from ccn_deploy.bundle import Bundle, FileRecord
from ccn_deploy.errors import EnvironmentUnfitError
from ccn_deploy.graph.signature import BATCH, CANDIDATES, COTANGENTS, GRADIENTS, INPUT, OUTPUT
from ccn_deploy.machine import Machine, this_machine
from ccn_deploy.runtimes.base import (
    Array,
    Closing,
    RuntimeOptions,
    RuntimeSpec,
    already_closed,
    check_cotangents,
    check_images,
)
from ccn_deploy.runtimes.compatibility import HEAD, check_engine, choose_engine
from ccn_deploy.runtimes.tensorrt.cuda import Device
from ccn_deploy.runtimes.tensorrt.engine import Engine, Execution
from ccn_deploy.runtimes.tensorrt.kernel_cache import cache_directory, kernel_path
from ccn_deploy.runtimes.tensorrt.library import LIBRARIES
from ccn_deploy.runtimes.tensorrt.pool import Pool
from ccn_deploy.runtimes.tensorrt.shapes import (
    Range,
    Signature,
    Sizes,
    forward_signature,
    gradient_signature,
    pieces,
)
from ccn_deploy.targets import Role, Target


class TensorRtRuntime(Closing):
    """The engine of a bundle that fits this machine, and its gradient engine if there is one.

    Nothing of an engine is read by a library before its digest, magic bytes, library release,
    system and compute capabilities have been checked against this machine.

    Several threads may call at once: each call has a stream, buffers and an execution context to
    itself. They are made when a call finds none idle, at the largest sizes of the engine's
    profile, and kept for the next. Batches above the profile are cut into pieces; those below it
    are filled up with images of zeros, whose rows are dropped. A batch size that comes the second
    time is captured as a CUDA graph and replayed from then on, unless ``options.cuda_graphs`` is
    off; TensorRT-RTX does that by itself.

    Memory on the GPU is freed by :meth:`close`, at the latest when the runtime is collected.

    Args:
        bundle: An open bundle.
        target: A TensorRT runtime and the engine's precision.
        options: Device, batch limit, CUDA graphs, range check.

    Raises:
        EngineUnfitError: No engine fits this machine: its release, system, driver or GPU.
        RuntimeUnavailableError: The bundle has no such engine, or the GPU refused.
        MissingExtraError: The library, or cuda-python, is not installed.
        IntegrityError: An engine is not what the manifest says.
    """

    def __init__(self, bundle: Bundle, target: Target, options: RuntimeOptions) -> None:
        machine, name = this_machine(), target.runtime
        record = choose_engine(bundle, target, machine, device=options.device)
        self._bundle, self._machine, self._options = bundle, machine, options
        self._target, self._name = target, name
        self._image = bundle.card.input_shape
        self._classes = bundle.card.classes
        self._device = Device(options.device, LIBRARIES[name].extra)
        self._gradient_record = _gradient_engine(bundle, target, machine, options.device)
        self._gradient: _Loaded | None = None
        self._lock = threading.Lock()
        self._forward = self._load(record, forward_signature(self._image, self._classes))
        gpu = machine.gpus[options.device]
        self._spec = RuntimeSpec(
            name=name,
            precision=target.precision,
            input_shape=self._image,
            classes=self._classes,
            max_batch=self._forward.limits[BATCH].high,
            device=f"cuda:{options.device}",
            versions={
                name: machine.packages[LIBRARIES[name].distribution],
                "driver": machine.driver or "unknown",
                "gpu": gpu.name,
            },
            thread_safe=True,
            graph=record.path,
            usual_batch=self._forward.limits[BATCH].high,
        )

    @property
    def spec(self) -> RuntimeSpec:
        """What this runtime is and takes."""
        return self._spec

    @property
    def differentiable(self) -> bool:
        """Whether the bundle has a gradient engine in this precision that fits this machine."""
        return self._gradient_record is not None

    def logits(self, images: Array) -> Array:
        """Return float32 [N, classes] for float32 images [N, C, H, W] in [0, 1].

        Raises:
            InputError: Wrong shape or dtype, a NaN, or a value outside [0, 1].
            UsageError: The runtime is closed.
            RuntimeUnavailableError: The GPU or the library failed.
        """
        check_images(images, self._spec, check_range=self._options.check_range)
        logits = np.empty((len(images), self._classes), np.float32)
        with self._forward.borrow() as execution:
            for piece in pieces(len(images), self._forward.limits[BATCH]):
                rows = images[piece.rows]
                outputs = execution.run({INPUT: rows}, {BATCH: piece.size})
                logits[piece.rows] = outputs[OUTPUT][: len(rows)]
        return logits

    def vjp(self, images: Array, cotangents: Array) -> tuple[Array, Array]:
        """Return logits [N, classes] and K input gradients an image [N, K, C, H, W], in float32.

        Both come from the gradient engine. More gradients of an image than it was built for are
        computed in several runs, fewer are filled up with zeros.

        Arguments are those of :meth:`ccn_deploy.runtimes.base.Runtime.vjp`.

        Raises:
            InputError: Images as for :meth:`logits`, or cotangents of another shape or dtype, or
                not finite.
            UsageError: The runtime is closed.
            RuntimeUnavailableError: The bundle has no gradient engine, or none that fits, or the
                GPU or the library failed.
            IntegrityError: The engine is not the one of the manifest, or no gradient engine.
        """
        gradient = self._with_gradient()
        check_images(images, self._spec, check_range=self._options.check_range)
        check_cotangents(cotangents, len(images), self._spec)
        candidates = cotangents.shape[1]
        gradients = np.empty((len(images), candidates, *self._image), np.float32)
        if not candidates:
            return self.logits(images), gradients
        logits = np.empty((len(images), self._classes), np.float32)
        with gradient.borrow() as execution:
            for piece in pieces(len(images), gradient.limits[BATCH]):
                for some in pieces(candidates, gradient.limits[CANDIDATES]):
                    x, c = images[piece.rows], cotangents[piece.rows, some.rows]
                    sizes: Sizes = {BATCH: piece.size, CANDIDATES: some.size}
                    outputs = execution.run({INPUT: x, COTANGENTS: c}, sizes)
                    logits[piece.rows] = outputs[OUTPUT][: len(x)]
                    gradients[piece.rows, some.rows] = outputs[GRADIENTS][: len(x), : c.shape[1]]
        return logits, gradients

    def close(self) -> None:
        """Release engines and memory once no call uses them; twice is harmless."""
        with self._lock:
            gradient = self._gradient
        try:
            self._forward.close()
        finally:
            if gradient is not None:
                gradient.close()

    def _with_gradient(self) -> _Loaded:
        """Return the gradient engine, loaded when it is first asked for."""
        record = self._gradient_record
        if record is None:  # this says why there is none, or why none fits
            record = choose_engine(
                self._bundle,
                self._target,
                self._machine,
                device=self._options.device,
                role=Role.GRADIENT_ENGINE,
            )
        with self._lock:
            if self._forward.closed:
                raise already_closed(self._name)
            if self._gradient is None:
                self._gradient = self._load(record, gradient_signature(self._image, self._classes))
            return self._gradient

    def _load(self, record: FileRecord, ends: Signature) -> _Loaded:
        """Deserialize one of the bundle's engines: the very bytes that were checked."""
        plan = self._bundle.read(record)
        check_engine(record, plan[:HEAD], self._machine, device=self._options.device)
        engine = Engine(
            plan,
            record,
            self._name,
            self._device,
            ends,
            cuda_graphs=self._options.cuda_graphs,
            kernels=kernels_file(record, self._name, self._machine, self._options.device),
        )
        return _Loaded(self._name, engine, self._options.max_batch)


class _Loaded:
    """An engine with the executions of the threads that use it.

    Args:
        name: Of the runtime, for errors.
        engine: Owned, and released with this.
        max_batch: Largest piece, if smaller than that of the engine.
    """

    def __init__(self, name: str, engine: Engine, max_batch: int | None) -> None:
        self._device = engine.device
        self._pool = Pool(name, partial(Execution, engine), Execution.release, engine.release)
        # Also runs when this is collected, and before the interpreter takes CUDA down at exit.
        self._finish = weakref.finalize(self, self._pool.close)
        batch = engine.limits[BATCH]
        high = min(batch.high, max_batch or batch.high)
        self.limits = {**engine.limits, BATCH: Range(batch.low, high)}

    @property
    def closed(self) -> bool:
        return not self._finish.alive

    def borrow(self) -> AbstractContextManager[Execution]:
        """Lend an execution to the calling thread, whose device is set for it."""
        self._device.use()
        return self._pool.borrow()

    def close(self) -> None:
        """Release the engine once no thread uses it."""
        self._finish()


def kernels_file(record: FileRecord, name: str, machine: Machine, device: int) -> Path | None:
    """Return where the kernels that a runtime compiles for an engine are kept; None if nowhere."""
    directory = cache_directory()
    if not LIBRARIES[name].portable or directory is None:
        return None
    return kernel_path(
        directory,
        record.sha256,
        version=machine.packages[LIBRARIES[name].distribution],
        gpu=machine.gpus[device],
        driver=machine.driver,
    )


def _gradient_engine(
    bundle: Bundle, target: Target, machine: Machine, device: int
) -> FileRecord | None:
    """Return the gradient engine that fits; None if there is none or none of them fits."""
    try:
        return choose_engine(bundle, target, machine, device=device, role=Role.GRADIENT_ENGINE)
    except EnvironmentUnfitError:
        return None
