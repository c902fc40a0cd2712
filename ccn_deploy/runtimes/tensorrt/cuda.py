"""The CUDA runtime calls that an engine needs, each checked. Imports no torch and no pycuda."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from ccn_deploy.errors import RuntimeUnavailableError
from ccn_deploy.extras import require
from ccn_deploy.runtimes.base import Array


class CudaError(RuntimeUnavailableError):
    """A CUDA call that failed.

    Attributes:
        name: Of the error, for example ``"cudaErrorMemoryAllocation"``.
    """

    def __init__(self, call: str, name: str, text: str) -> None:
        super().__init__(f"{call} failed: {name}, {text}.", _advice(name))
        self.name = name


class Device:
    """One GPU, through ``cuda.bindings.runtime``.

    CUDA keeps a current device for each thread: a thread calls :meth:`use` before anything else
    here. Streams and addresses are plain integers. Every method raises :class:`CudaError` where
    CUDA reports an error.

    Args:
        index: Of the GPU among those that are visible.
        extra: Of this package, which brings cuda-python to those who need this device.

    Raises:
        MissingExtraError: cuda-python is not installed.
    """

    def __init__(self, index: int, extra: str) -> None:
        self.index = index
        self._api: ModuleType = require("cuda.bindings.runtime", extra, "to use a GPU")

    def use(self) -> None:
        """Make this the calling thread's device."""
        self._call("cudaSetDevice", self.index)

    def memory(self) -> tuple[int, int]:
        """Return the free bytes of the device, and all of them."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def create_stream(self) -> int:
        """Make a stream that does not wait for the default one."""
        return int(self._call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for all that is in a stream; what failed in it is raised here."""
        self._call("cudaStreamSynchronize", stream)

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` new bytes on the device."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        """Free what :meth:`allocate` gave."""
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> int:
        """Return the address of ``size`` new page-locked bytes on the host."""
        return int(self._call("cudaHostAlloc", size, self._api.cudaHostAllocDefault))

    def free_pinned(self, address: int) -> None:
        """Free what :meth:`allocate_pinned` gave; no view of it may be used again."""
        self._call("cudaFreeHost", address)

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """Put a copy from page-locked memory to the device into a stream."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """Put a copy from the device to page-locked memory into a stream."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def record(self, stream: int, work: Callable[[], None]) -> Any:
        """Return an executable graph of what ``work`` puts into a stream; nothing of it runs.

        Whatever goes wrong, the stream is not left capturing and the graph is not left behind.
        """
        # Other threads may allocate meanwhile: only this thread's unsafe calls are errors.
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        except BaseException:
            with contextlib.suppress(CudaError):  # the capture is invalid; work's error says why
                self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", stream))
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, executable: Any, stream: int) -> None:
        """Put an executable graph into a stream."""
        self._call("cudaGraphLaunch", executable, stream)

    def destroy_executable(self, executable: Any) -> None:
        """Destroy an executable graph."""
        self._call("cudaGraphExecDestroy", executable)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call CUDA and return what follows the status: nothing, one value, or a tuple of them."""
        api = self._api
        status, *values = getattr(api, name)(*arguments)
        if status != api.cudaError_t.cudaSuccess:
            # CUDA also keeps the error, for a later call to trip over; this takes it away.
            api.cudaGetLastError()
            text = api.cudaGetErrorString(status)[1].decode()
            raise CudaError(name, api.cudaGetErrorName(status)[1].decode(), text)
        return values[0] if len(values) == 1 else tuple(values)


def floats_at(address: int, count: int) -> Array:
    """Return ``count`` float32 at an address; the array is valid while that memory is allocated."""
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


_NO_GPU = {
    "cudaErrorInsufficientDriver",
    "cudaErrorNoDevice",
    "cudaErrorStubLibrary",
    "cudaErrorSystemDriverMismatch",
    "cudaErrorSystemNotReady",
}
_NO_SUCH_GPU = {"cudaErrorInvalidDevice", "cudaErrorDevicesUnavailable"}


def _advice(name: str) -> str:
    if name in _NO_GPU:
        return "It needs an NVIDIA GPU with its driver; see what is here with: ccn-deploy doctor"
    if name in _NO_SUCH_GPU:
        return "Choose another device; see which are here with: ccn-deploy doctor"
    if name == "cudaErrorMemoryAllocation":
        return "Free memory on the GPU, or export an engine for smaller batches (--batch)."
    if name.startswith("cudaErrorStreamCapture"):
        return "Open the runtime with RuntimeOptions(cuda_graphs=False)."
    return "The GPU may not work for this process any more; start it again."
