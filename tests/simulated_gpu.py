"""A stand-in for CUDA and TensorRT where there is no GPU: slower than any, and far stricter.

It answers to the names of ``cuda.bindings.runtime`` and of ``tensorrt`` that the runtime uses.
Nothing in a stream happens before the stream is waited for, so that whoever reads too early reads
rubbish. Memory is filled with rubbish, freed memory is gone, and each of these is a fault that is
kept: a thread that did not choose its device, a free of what is in use, a leak, a graph replayed
after its context changed, a capture right after a change of shape, one context in two threads.

The network is linear: logits = images @ W, so the gradient of ``c . logits`` is W @ c.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from enum import Enum, IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class Status(IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


class Stream:
    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.spoilt = False

    def put(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)


class Gpu:
    """All state: what is allocated, what is queued, what went wrong.

    ``fail_at`` makes the n-th call from then on fail once; None never does.
    """

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight
        self.faults: list[str] = []
        self.memory: dict[int, tuple[str, Any]] = {}
        self.freed: list[Any] = []
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.contexts = 0
        self.engines = 0
        self.seen = np.zeros(0, np.float32)
        self.launches = 0
        self.enqueued = 0
        self.calls = 0
        self.fail_at: int | None = None
        self.chosen = threading.local()
        self.lock = threading.RLock()
        self.names = itertools.count(1)

    @property
    def held(self) -> dict[str, int]:
        return {
            "memory": len(self.memory),
            "streams": len(self.streams),
            "graphs": len(self.graphs),
            "executables": len(self.executables),
            "contexts": self.contexts,
            "engines": self.engines,
        }

    def fault(self, what: str) -> None:
        self.faults.append(what)

    def fails(self) -> bool:
        self.calls += 1
        if self.fail_at is None:
            return False
        self.fail_at -= 1
        if self.fail_at < 0:
            self.fail_at = None
            return True
        return False

    def floats(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        kind, buffer = self.memory[address]
        count = int(np.prod(shape))
        assert kind == "device" and count * 4 <= len(buffer), (kind, shape, len(buffer))
        return np.frombuffer(buffer, np.float32, count).reshape(shape)


def cuda_module(gpu: Gpu) -> ModuleType:
    """Return what stands in for ``cuda.bindings.runtime``."""
    module = ModuleType("cuda.bindings.runtime")

    def function(work: Callable[..., Any]) -> None:
        def call(*arguments: Any) -> tuple[Any, ...]:
            with gpu.lock:
                name = work.__name__
                if name != "cudaSetDevice" and not hasattr(gpu.chosen, "device"):
                    gpu.fault(f"{name} in a thread that chose no device")
                frees = "Free" in name or "Destroy" in name or name == "cudaStreamEndCapture"
                if not frees and gpu.fails():
                    return (Status.cudaErrorMemoryAllocation, None)
                answer = work(*arguments)
                return answer if isinstance(answer, tuple) else (Status.cudaSuccess, answer)

        setattr(module, work.__name__, call)

    def nothing(status: Status = Status.cudaSuccess) -> tuple[Status]:
        return (status,)

    def allocate(kind: str, size: int) -> int:
        buffer = ctypes.create_string_buffer(b"\xa5" * size, size)
        address = ctypes.addressof(buffer)
        gpu.memory[address] = (kind, buffer)
        return address

    def free(kind: str, address: int) -> tuple[Status]:
        if gpu.memory.get(address, ("none",))[0] != kind:
            gpu.fault(f"free of {kind} memory that is none")
            return nothing()
        if any(stream.queue for stream in gpu.streams.values()) and threading.active_count() == 1:
            gpu.fault("free while work is queued")
        _, buffer = gpu.memory.pop(address)
        ctypes.memset(address, 0x5A, len(buffer))
        gpu.freed.append(buffer)  # who still looks at it sees rubbish, not a crash
        return nothing()

    def cudaSetDevice(index: int) -> tuple[Status]:  # noqa: N802
        gpu.chosen.device = index
        return nothing()

    def cudaMalloc(size: int) -> int:  # noqa: N802
        return allocate("device", size)

    def cudaHostAlloc(size: int, flags: int) -> int:  # noqa: N802
        return allocate("pinned", size)

    def cudaFree(address: int) -> tuple[Status]:  # noqa: N802
        return free("device", address)

    def cudaFreeHost(address: int) -> tuple[Status]:  # noqa: N802
        return free("pinned", address)

    def cudaMemGetInfo() -> tuple[Any, ...]:  # noqa: N802
        return Status.cudaSuccess, 1000, 2000

    def cudaStreamCreateWithFlags(flags: int) -> int:  # noqa: N802
        name = next(gpu.names)
        gpu.streams[name] = Stream()
        return name

    def cudaStreamDestroy(stream: int) -> tuple[Status]:  # noqa: N802
        if gpu.streams.pop(stream).queue:
            gpu.fault("a stream destroyed with work in it")
        return nothing()

    def cudaStreamSynchronize(stream: int) -> tuple[Status]:  # noqa: N802
        here = gpu.streams[stream]
        if here.recording is not None:
            gpu.fault("wait for a stream that is capturing")
        queue, here.queue = here.queue, []
        for work in queue:
            work()
        return nothing()

    def cudaMemcpyAsync(  # noqa: N802
        target: int, source: int, size: int, kind: str, stream: int
    ) -> tuple[Status]:
        ends = (gpu.memory[target][0], gpu.memory[source][0])
        if ends != {"up": ("device", "pinned"), "down": ("pinned", "device")}[kind]:
            gpu.fault(f"copy {kind} between {ends}")

        def copy() -> None:
            if target in gpu.memory and source in gpu.memory:
                ctypes.memmove(target, source, size)
            else:
                gpu.fault("copy of freed memory")

        gpu.streams[stream].put(copy)
        return nothing()

    def cudaStreamBeginCapture(stream: int, mode: int) -> tuple[Status]:  # noqa: N802
        gpu.streams[stream].recording = []
        return nothing()

    def cudaStreamEndCapture(stream: int) -> Any:  # noqa: N802
        here = gpu.streams[stream]
        recording, here.recording = here.recording, None
        if here.spoilt:
            here.spoilt = False
            return Status.cudaErrorStreamCaptureInvalidated, None
        graph = next(gpu.names)
        gpu.graphs[graph] = recording or []
        return graph

    def cudaGraphInstantiate(graph: int, flags: int) -> int:  # noqa: N802
        executable = next(gpu.names)
        gpu.executables[executable] = gpu.graphs[graph]
        return executable

    def cudaGraphDestroy(graph: int) -> tuple[Status]:  # noqa: N802
        del gpu.graphs[graph]
        return nothing()

    def cudaGraphLaunch(executable: int, stream: int) -> tuple[Status]:  # noqa: N802
        gpu.launches += 1
        for work in gpu.executables[executable]:
            gpu.streams[stream].put(work)
        return nothing()

    def cudaGraphExecDestroy(executable: int) -> tuple[Status]:  # noqa: N802
        if any(stream.queue for stream in gpu.streams.values()) and threading.active_count() == 1:
            gpu.fault("a graph destroyed while work is queued")
        del gpu.executables[executable]
        return nothing()

    for work in list(locals().values()):
        if callable(work) and getattr(work, "__name__", "").startswith("cuda"):
            function(work)
    module.cudaGetLastError = lambda: (Status.cudaSuccess,)  # type: ignore[attr-defined]
    module.cudaGetErrorName = lambda s: (Status.cudaSuccess, s.name.encode())  # type: ignore[attr-defined]
    module.cudaGetErrorString = lambda s: (Status.cudaSuccess, b"simulated")  # type: ignore[attr-defined]
    module.cudaError_t = Status  # type: ignore[attr-defined]
    module.cudaStreamNonBlocking = module.cudaHostAllocDefault = 0  # type: ignore[attr-defined]
    module.cudaMemcpyKind = SimpleNamespace(  # type: ignore[attr-defined]
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down"
    )
    module.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # type: ignore[attr-defined]
    return module


class Context:
    """An execution context; ``eager`` is TensorRT-RTX, which brings its own scratch memory."""

    def __init__(self, gpu: Gpu, engine: Any, eager: bool) -> None:
        self._gpu, self._engine, self._eager = gpu, engine, eager
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._version = 0
        self._flushed = -1
        self._scratch: int | None = None
        self._busy = threading.Lock()
        gpu.contexts += 1

    def __del__(self) -> None:
        self._gpu.contexts -= 1

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= 512 and self._gpu.memory[memory][0] == "device"
        self._scratch = memory

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return not self._gpu.fails()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.profile[name]
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        self._version += 1
        return not self._gpu.fails()

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.profile if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch, *image = self._shapes["images"]
        if name == "logits":
            return (batch, self._gpu.weight.shape[1])
        return (batch, self._shapes["cotangents"][1], *image)

    def execute_async_v3(self, stream: int) -> bool:
        gpu, here = self._gpu, self._gpu.streams[stream]
        if not self._busy.acquire(blocking=False):
            gpu.fault("one context in two threads")
            return False
        try:
            with gpu.lock:
                gpu.enqueued += 1
                capturing = here.recording is not None
                if gpu.fails():
                    here.spoilt = capturing
                    return False
                if not self._eager and (self._scratch not in gpu.memory):
                    gpu.fault("no scratch memory")
                if capturing and self._flushed != self._version:
                    gpu.fault("captured before the new shapes were run once")
                if not capturing:
                    self._flushed = self._version
                version, shapes = self._version, dict(self._shapes)
                outputs = {name: self.get_tensor_shape(name) for name in self._engine.outputs}
                here.put(lambda: self._compute(shapes, outputs, version if capturing else None))
                return True
        finally:
            self._busy.release()

    def _compute(
        self, shapes: dict[str, Any], outputs: dict[str, Any], version: int | None
    ) -> None:
        gpu = self._gpu
        if version is not None and version != self._version:
            gpu.fault("a graph replayed after its context changed")
        images = gpu.floats(self._addresses["images"], shapes["images"])
        flat = images.reshape(len(images), -1)
        gpu.seen = images.copy()
        gpu.floats(self._addresses["logits"], outputs["logits"])[...] = flat @ gpu.weight
        if "gradients" in outputs:
            c = gpu.floats(self._addresses["cotangents"], shapes["cotangents"])
            gradients = gpu.floats(self._addresses["gradients"], outputs["gradients"])
            gradients[...] = (c @ gpu.weight.T).reshape(gradients.shape)


class Mode(Enum):
    INPUT = 1
    OUTPUT = 2


def trt_module(gpu: Gpu, *, eager: bool = False) -> ModuleType:
    """Return what stands in for ``tensorrt``, or if ``eager`` for ``tensorrt_rtx``.

    A plan is its magic, then ``images``'s profile and, of a gradient engine, the candidates':
    ``b"ftrt 1 4 8"`` or ``b"ftrt 1 4 8 1 3 3"``.
    """
    module = ModuleType("tensorrt")
    classes = gpu.weight.shape[1]

    class CudaEngine:
        def __init__(self, numbers: list[int], image: tuple[int, ...]) -> None:
            batches, candidates = numbers[:3], numbers[3:]
            self.profile = {"images": [(n, *image) for n in batches]}
            self.outputs = ["logits"]
            self.free = {"images": (-1, *image), "logits": (-1, classes)}
            if candidates:
                pairs = zip(batches, candidates, strict=True)
                self.profile["cotangents"] = [(n, k, classes) for n, k in pairs]
                self.outputs.append("gradients")
                self.free |= {"cotangents": (-1, -1, classes), "gradients": (-1, -1, *image)}
            self.num_io_tensors = len(self.free)
            self.device_memory_size_v2 = 512
            gpu.engines += 1

        def __del__(self) -> None:
            gpu.engines -= 1

        def get_tensor_name(self, index: int) -> str:
            return list(self.free)[index]

        def get_tensor_mode(self, name: str) -> Mode:
            return Mode.INPUT if name in self.profile else Mode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return SimpleNamespace(name="FLOAT")

        def get_tensor_location(self, name: str) -> Any:
            return SimpleNamespace(name="DEVICE")

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self.free[name]

        def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
            return self.profile[name]

        def create_execution_context(self, how: Any) -> Context | None:
            assert (how == "user managed") is not eager
            return None if gpu.fails() else Context(gpu, self, eager)

        def create_runtime_config(self) -> Any:
            return Config()

    class Config:
        cuda_graph_strategy = dynamic_shapes_kernel_specialization_strategy = None

        def create_runtime_cache(self) -> Any:
            return Cache()

        def set_runtime_cache(self, cache: Any) -> bool:
            return True

    class Cache:
        blob = b"kernels:"

        def deserialize(self, blob: bytes) -> bool:
            module.taken.append(blob)  # type: ignore[attr-defined]
            if not blob.startswith(b"kernels:"):
                return False
            self.blob = blob
            return True

        def serialize(self) -> memoryview:
            self.blob += b"+"
            return memoryview(self.blob)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            words = plan.split()
            if len(words) not in (4, 7):
                self.logger.log(SimpleNamespace(name="ERROR"), "simulated: no plan")
                return None
            return CudaEngine([int(word) for word in words[1:]], module.image)  # type: ignore[attr-defined]

    class ILogger:
        pass

    module.Runtime, module.ILogger, module.taken = Runtime, ILogger, []  # type: ignore[attr-defined]
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")  # type: ignore[attr-defined]
    module.CudaGraphStrategy = SimpleNamespace(  # type: ignore[attr-defined]
        WHOLE_GRAPH_CAPTURE=SimpleNamespace(name="whole"), DISABLED=SimpleNamespace(name="off")
    )
    module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(  # type: ignore[attr-defined]
        EAGER=SimpleNamespace(name="EAGER")
    )
    return module
