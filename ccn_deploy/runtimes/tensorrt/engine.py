"""An engine on a GPU, and what one thread at a time needs to run it.

What must outlive what: the library's runtime its engine, the engine its contexts, a context the
graphs captured from it, the buffers all of them, the stream everything that was put into it.
Here that is the order of construction, and each release runs it backwards.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccn_deploy.bundle import FileRecord
from ccn_deploy.errors import EngineUnfitError, RuntimeUnavailableError
from ccn_deploy.runtimes.base import Array
from ccn_deploy.runtimes.tensorrt.cuda import Device, floats_at
from ccn_deploy.runtimes.tensorrt.kernel_cache import load_kernels, store_kernels
from ccn_deploy.runtimes.tensorrt.library import LIBRARIES, Log, capture, load_library, logger
from ccn_deploy.runtimes.tensorrt.shapes import Range, Shape, Signature, Sizes, Tensor, read_limits

GRAPHS = 8
"""Sizes whose CUDA graphs one execution keeps; the first that come twice. Others run without."""

FLOAT = 4
"""Bytes of a float32."""

SCRATCH = 256
"""Least bytes of scratch memory; TensorRT wants its address aligned to as many."""

Key = tuple[tuple[str, int], ...]


class Engine:
    """A deserialized engine. Its plan is that of a checked manifest: engines are code.

    The contexts of TensorRT share one piece of scratch memory in each execution, so that a
    captured graph can have a context of its own, which the library asks for. TensorRT-RTX keeps
    its graphs by itself and compiles kernels when it runs; those are kept at ``kernels``.

    Args:
        plan: The bytes of the engine; not needed afterwards.
        record: Its line in the manifest.
        library: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        device: The GPU to run on.
        ends: What it must take and give.
        cuda_graphs: Whether repeated sizes are replayed from CUDA graphs.
        kernels: File of the kernels that TensorRT-RTX compiled; None to keep none.

    Raises:
        EngineUnfitError: The library refused it; the message has its log.
        IntegrityError: It is no engine of this bundle's network.
        CudaError: The GPU refused.
    """

    def __init__(
        self,
        plan: bytes,
        record: FileRecord,
        library: str,
        device: Device,
        ends: Signature,
        *,
        cuda_graphs: bool,
        kernels: Path | None,
    ) -> None:
        self.device, self.ends, self.path = device, ends, record.path
        self._library = library
        self._trt = load_library(library, f"for the runtime {library}")
        self._portable = LIBRARIES[library].portable
        self.cuda_graphs = cuda_graphs and not self._portable
        self._lock = threading.Lock()
        device.use()
        with capture() as log:
            self._runtime: Any = self._trt.Runtime(logger(self._trt))
            self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineUnfitError(
                f"{library} refused {record.path}, whose digest is right.{_lines(log)}",
                "Export the bundle again, on or for this machine.",
            )
        self.limits: dict[str, Range] = read_limits(ends, self._tensors(), record.path)
        self.scratch = 0 if self._portable else max(SCRATCH, self._engine.device_memory_size_v2)
        self._config: Any = None
        self._cache: Any = None
        self._kernels = kernels
        self._kept: bytes | None = None
        self._met: set[Key] = set()
        if self._portable:
            self._configure(cuda_graphs)

    def context(self) -> Any:
        """Return a new execution context, without scratch memory where it is to be shared."""
        if self._portable:
            how = self._config
        else:
            how = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._lock, capture() as log:
            context = self._engine.create_execution_context(how)
        if context is None:
            raise self.failed("create an execution context", log)
        return context

    def ran(self, key: Key) -> None:
        """Note that a size has run; keeps the kernels at the 1st, 2nd, 4th, 8th ... new one.

        So a process that is killed loses little, and a hundred sizes are not a hundred writes.
        """
        if self._cache is None or key in self._met:
            return
        with self._lock:
            self._met.add(key)
            if len(self._met) & (len(self._met) - 1) == 0:
                self._keep()

    def release(self) -> None:
        """Let go of the engine; every execution of it must have been released."""
        try:
            self.device.use()
            self._keep()
        finally:
            self._config = None
            self._cache = None
            self._engine = None
            self._runtime = None

    def failed(self, what: str, log: Log) -> RuntimeUnavailableError:
        """Build the error for a call that the library answered with no."""
        return RuntimeUnavailableError(
            f"{self._library} could not {what} ({self.path}).{_lines(log)}",
            "If memory ran out, free some on the GPU or export an engine for smaller batches.",
        )

    def _tensors(self) -> dict[str, Tensor]:
        engine = self._engine
        found = {}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            kind = engine.get_tensor_mode(name).name
            shapes = engine.get_tensor_profile_shape(name, 0) if kind == "INPUT" else ()
            found[name] = Tensor(
                kind=kind,
                dtype=engine.get_tensor_dtype(name).name,
                location=engine.get_tensor_location(name).name,
                shape=tuple(engine.get_tensor_shape(name)),
                profile=[tuple(shape) for shape in shapes],
            )
        return found

    def _configure(self, cuda_graphs: bool) -> None:
        """Prepare what contexts of TensorRT-RTX are made with."""
        trt = self._trt
        with capture() as log:
            config = self._engine.create_runtime_config()
            if config is None:
                raise self.failed("create a runtime configuration", log)
            graphs = trt.CudaGraphStrategy
            # By default kernels for a size are compiled in the background, and answers change in
            # their last bits when they are ready: the same image, another hour, another answer.
            settings = {
                "cuda_graph_strategy": graphs.WHOLE_GRAPH_CAPTURE
                if cuda_graphs
                else graphs.DISABLED,
                "dynamic_shapes_kernel_specialization_strategy": (
                    trt.DynamicShapesKernelSpecializationStrategy.EAGER
                ),
            }
            for name, value in settings.items():
                setattr(config, name, value)
                if getattr(config, name) != value:
                    raise self.failed(f"set {name} to {value.name}", log)
            if self._kernels is not None:
                self._cache = config.create_runtime_cache()
                if self._cache is None:
                    raise self.failed("create a cache of kernels", log)
                self._kept = load_kernels(self._kernels)
                if self._kept is not None and not self._cache.deserialize(self._kept):
                    self._kept = None  # of another driver, say: compiled anew, then replaced
                if not config.set_runtime_cache(self._cache):
                    raise self.failed("use a cache of kernels", log)
        self._config = config

    def _keep(self) -> None:
        """Write the compiled kernels to disk if there are new ones."""
        if self._cache is None or self._kernels is None:
            return
        with capture():
            blob = self._cache.serialize()
        data = bytes(blob) if blob is not None else b""
        if data and data != self._kept:
            store_kernels(self._kernels, data)
            self._kept = data


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph, and the context that it was captured from and that nothing else may touch."""

    executable: Any
    context: Any


class Execution:
    """One stream, its buffers at the largest sizes, and contexts: for one thread at a time.

    Inputs are staged in page-locked memory and outputs are copied out of it, so no array of a
    caller is ever read or written by the GPU.

    Args:
        engine: What to run. The calling thread must use its device.

    Raises:
        CudaError: Most likely the memory of the GPU ran out; nothing stays allocated.
        RuntimeUnavailableError: The library could not make a context.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._device = engine, engine.device
        self._host: dict[str, Array] = {}
        self._pinned: dict[str, int] = {}
        self._remote: dict[str, int] = {}
        self._captured: dict[Key, _Captured] = {}
        self._times: Counter[Key] = Counter()
        self._current: Key = ()
        device = engine.device
        largest = engine.ends.shapes({name: size.high for name, size in engine.limits.items()})
        with contextlib.ExitStack() as stack:
            self._stream = device.create_stream()
            stack.callback(device.destroy_stream, self._stream)
            for name, shape in largest.items():
                count = math.prod(shape)
                self._pinned[name] = device.allocate_pinned(count * FLOAT)
                stack.callback(device.free_pinned, self._pinned[name])
                self._host[name] = floats_at(self._pinned[name], count)
                self._remote[name] = device.allocate(count * FLOAT)
                stack.callback(device.free, self._remote[name])
            self._scratch = 0
            if engine.scratch:
                self._scratch = device.allocate(engine.scratch)
                stack.callback(device.free, self._scratch)
            stack.callback(self._forget)
            self._context = self._new_context()
            stack.callback(device.synchronize, self._stream)
            self._undo = stack.pop_all()

    def run(self, inputs: Mapping[str, Array], sizes: Sizes) -> dict[str, Array]:
        """Return the outputs by name, float32: views of memory that the next run overwrites.

        Args:
            inputs: float32 arrays, each no larger in any dimension than its input at ``sizes``;
                the rest is zeros.
            sizes: Within the engine's limits.

        Raises:
            CudaError: A copy or a kernel failed.
            RuntimeUnavailableError: The library refused to run.
        """
        key = tuple(sorted(sizes.items()))
        shapes = self._engine.ends.shapes(sizes)
        for name, array in inputs.items():
            staged = self._view(name, shapes[name])
            if array.shape != staged.shape:
                staged[...] = 0
            staged[tuple(slice(0, length) for length in array.shape)] = array
        if self._engine.cuda_graphs and len(self._captured) < GRAPHS:
            self._times[key] += 1
            if self._times[key] == 2:
                self._captured[key] = self._capture(shapes)
        if key in self._captured:
            self._device.launch(self._captured[key].executable, self._stream)
        else:
            if key != self._current:
                self._current = ()  # should the library refuse half-way
                self._reshape(self._context, shapes)
                self._current = key
            self._enqueue(self._context, shapes)
        self._device.synchronize(self._stream)
        self._engine.ran(key)
        return {name: self._view(name, shapes[name]) for name in self._engine.ends.outputs}

    def release(self) -> None:
        """Wait for the stream, then free everything; goes on after an error, then raises it."""
        try:
            self._device.use()
        finally:
            self._undo.close()

    def _forget(self) -> None:
        """Let go of graphs, then contexts, and of the views of memory that is freed next."""
        try:
            with contextlib.ExitStack() as stack:
                for captured in self._captured.values():
                    stack.callback(self._device.destroy_executable, captured.executable)
        finally:
            self._captured.clear()
            self._context = None
            self._host.clear()

    def _view(self, name: str, shape: Shape) -> Array:
        return self._host[name][: math.prod(shape)].reshape(shape)

    def _new_context(self) -> Any:
        context = self._engine.context()
        with capture() as log:
            if self._scratch:
                context.set_device_memory(self._scratch, self._engine.scratch)
            for name, address in self._remote.items():
                if not context.set_tensor_address(name, address):
                    raise self._engine.failed(f"bind {name!r}", log)
        return context

    def _reshape(self, context: Any, shapes: Mapping[str, Shape]) -> None:
        with capture() as log:
            for name in self._engine.ends.inputs:
                if not context.set_input_shape(name, shapes[name]):
                    raise self._engine.failed(f"run {name!r} as {list(shapes[name])}", log)
            try:
                missing = context.infer_shapes()
            except RuntimeError as error:
                raise self._engine.failed(f"infer shapes: {error}", log) from error
            found = {
                name: tuple(context.get_tensor_shape(name)) for name in self._engine.ends.outputs
            }
        if missing or any(found[name] != shapes[name] for name in found):
            raise self._engine.failed(f"run {dict(shapes)}, it would give {found}", log)

    def _enqueue(self, context: Any, shapes: Mapping[str, Shape]) -> None:
        """Put the inputs' way in, the kernels and the outputs' way out into the stream."""

        def size(name: str) -> int:
            return math.prod(shapes[name]) * FLOAT

        device, stream, ends = self._device, self._stream, self._engine.ends
        for name in ends.inputs:
            device.upload(self._remote[name], self._pinned[name], size(name), stream)
        with capture() as log:
            if not context.execute_async_v3(stream):
                raise self._engine.failed("run", log)
        for name in ends.outputs:
            device.download(self._pinned[name], self._remote[name], size(name), stream)

    def _capture(self, shapes: Mapping[str, Shape]) -> _Captured:
        """Capture a run at some shapes from a context that keeps them."""
        context = self._new_context()
        self._reshape(context, shapes)
        self._enqueue(context, shapes)  # the library defers work to the first run at new shapes
        self._device.synchronize(self._stream)
        executable = self._device.record(self._stream, lambda: self._enqueue(context, shapes))
        return _Captured(executable, context)


def _lines(log: Log) -> str:
    """Return the worst lines of a log, as the end of a sentence."""
    text = " ".join(" ".join(line.split()) for line in log.at_least("WARNING"))
    return f" Its log: {text[:600]}" if text else ""
