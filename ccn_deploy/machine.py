"""What this machine is: system, installed packages, NVIDIA driver and GPUs.

Importing this module loads no library. Looking at the GPUs loads ``cuda.bindings`` and asks the
driver; no CUDA context is made and no GPU memory is taken.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGES = (
    "ccn-deploy", "cuda-bindings", "cuda-python", "foolbox", "jinja2", "lightning-fabric",
    "matplotlib", "mlxtend", "msgspec", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu",
    "onnxscript", "pillow", "rich", "safetensors", "scipy", "tensorrt", "tensorrt-rtx", "torch",
    "tritonclient", "typer",
)  # fmt: skip
"""Distributions that are looked for."""

NO_CUDA_PYTHON = "cuda-python is not installed, so GPUs cannot be seen"
NO_DRIVER = "no NVIDIA driver"

_NO_DEVICE = "no NVIDIA GPU"
_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_PROCESSORS = Path("/proc/cpuinfo")

INSTRUCTION_SETS = (
    "sse4_1", "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert",
    "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    "asimd", "asimdhp", "asimddp", "asimdfhm", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16",
    "sme", "sme2",
)  # fmt: skip
"""Of x86 and of Arm, as Linux calls them: those by which libraries choose their kernels."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        index: As CUDA counts the visible devices.
        name: For example ``"NVIDIA L4"``.
        compute_capability: For example ``"8.9"``.
        memory: In bytes, all of it.
    """

    index: int
    name: str
    compute_capability: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """What decides which runtimes work here.

    Attributes:
        system: ``"linux"``, ``"windows"`` or ``"darwin"``.
        architecture: ``"x86_64"`` or ``"aarch64"``, one spelling on every system.
        python: For example ``"3.11.7"``.
        packages: Installed versions by distribution name, lower case with dashes; of
            :data:`PACKAGES` those that are installed.
        driver: Of NVIDIA, with the newest CUDA that it runs: ``"580.95.05 (CUDA 13.0)"``; None if
            there is none or it cannot be asked.
        no_gpu_reason: Why :attr:`gpus` is empty, a phrase without a full stop; else empty.
        gpus: Visible to this process and usable.
    """

    system: str
    architecture: str
    python: str
    packages: Mapping[str, str]
    driver: str | None
    no_gpu_reason: str
    gpus: tuple[Gpu, ...]

    @property
    def gpu_broken(self) -> bool:
        """Whether something that should show a GPU is installed and fails."""
        reason = self.no_gpu_reason
        return not (reason in ("", NO_CUDA_PYTHON, NO_DRIVER) or reason.startswith(_NO_DEVICE))

    def document(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        return {**asdict(self), "packages": dict(self.packages)}


@functools.lru_cache(maxsize=1)
def this_machine() -> Machine:
    """Look at this machine, once a process. Never raises."""
    driver, reason, gpus = find_gpus()
    architecture = platform.machine().lower()
    return Machine(
        system=platform.system().lower(),
        architecture=_ARCHITECTURES.get(architecture, architecture),
        python=platform.python_version(),
        packages=installed(),
        driver=driver,
        no_gpu_reason=reason,
        gpus=gpus,
    )


def processor() -> str:
    """Return what the processor calls itself, or at least its architecture."""
    with contextlib.suppress(OSError):
        for line in _PROCESSORS.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.lru_cache(maxsize=1)
def instruction_sets() -> tuple[str, ...]:
    """Return which of :data:`INSTRUCTION_SETS` this processor has; none if it cannot be asked.

    On macOS, everything that ``sysctl`` says it has, under the names that it has there.
    """
    with contextlib.suppress(OSError):
        for line in _PROCESSORS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return tuple(flag for flag in INSTRUCTION_SETS if flag in value.split())
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["sysctl", "hw.optional", "machdep.cpu.features", "machdep.cpu.leaf7_features"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
        lines = sorted(" ".join(line.split()) for line in told.stdout.splitlines())
        return tuple(line for line in lines if not line.endswith(": 0"))
    return ()


def installed() -> dict[str, str]:
    """Return the versions of :data:`PACKAGES` that are installed, importing none of them."""
    versions = {}
    for name in PACKAGES:
        try:
            version: str | None = importlib.metadata.version(name)
        except Exception:  # not there, or metadata that an uninstall left damaged
            continue
        if version:
            versions[name] = version
    return versions


def release(version: str) -> tuple[int, ...]:
    """Return the numbers a version begins with, to be compared: ``1.7.1.post1`` is ``(1, 7, 1)``.

    Empty if it begins with none. Zeros at the end say nothing: 1.7 is 1.7.0.
    """
    found = re.match(r"\d{1,9}(\.\d{1,9})*", version, re.ASCII)
    numbers = [int(part) for part in found.group().split(".")] if found else []
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def find_gpus() -> tuple[str | None, str, tuple[Gpu, ...]]:
    """Return the driver's version, why there is no GPU, and the GPUs. Never raises."""
    driver = _kernel_module()
    try:
        cuda = _bindings()
        version = _newest_cuda(cuda, driver)
        newest = f"CUDA {version // 1000}.{version % 1000 // 10}"
        driver = f"{driver} ({newest})" if driver else newest
        if version // 1000 < (wanted := cuda.CUDA_VERSION // 1000):
            raise _NoGpuError(f"the NVIDIA driver is too old for CUDA {wanted}: it has {newest}")
        _call(cuda, cuda.cuInit, 0)
        gpus = tuple(_gpu(cuda, index) for index in range(_call(cuda, cuda.cuDeviceGetCount)))
    except _NoGpuError as error:
        return driver, str(error), ()
    except Exception as error:  # whatever a broken installation does, the machine has no GPU
        return driver, f"the GPUs could not be asked: {_one_line(error)}", ()
    return driver, "" if gpus else _no_device(), gpus


class _NoGpuError(Exception):
    """Why there is no GPU, as :attr:`Machine.no_gpu_reason` says it."""


def _bindings() -> Any:
    """Return the module ``cuda.bindings.driver``."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ModuleNotFoundError as error:
        raise _NoGpuError(NO_CUDA_PYTHON) from error


def _newest_cuda(cuda: Any, kernel_module: str | None) -> int:
    """Return the newest CUDA that the driver runs: 13020 for CUDA 13.2."""
    try:
        return int(_call(cuda, cuda.cuDriverGetVersion))
    except _NoGpuError:
        raise
    except Exception as error:  # libcuda was not found; the exception's type varies by release
        if kernel_module is None:
            raise _NoGpuError(NO_DRIVER) from error
        raise _NoGpuError(
            f"the NVIDIA driver {kernel_module} is loaded and its library libcuda is not visible "
            "here, as in a container that was started without its GPUs"
        ) from error


def _gpu(cuda: Any, index: int) -> Gpu:
    device = _call(cuda, cuda.cuDeviceGet, index)
    attribute = cuda.CUdevice_attribute
    major, minor = (
        _call(cuda, cuda.cuDeviceGetAttribute, which, device)
        for which in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    name: bytes = _call(cuda, cuda.cuDeviceGetName, 256, device)
    return Gpu(
        index=index,
        name=name.split(b"\0")[0].decode("utf-8", "replace"),
        compute_capability=f"{major}.{minor}",
        memory=int(_call(cuda, cuda.cuDeviceTotalMem, device)),
    )


def _call(cuda: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the driver and return what comes after the status, if anything does."""
    status, *values = function(*arguments)
    if status == cuda.CUresult.CUDA_ERROR_NO_DEVICE:
        raise _NoGpuError(_no_device())
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise _NoGpuError(f"the NVIDIA driver failed with {status.name}")
    return values[0] if values else None


def _no_device() -> str:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _NO_DEVICE + (f" (CUDA_VISIBLE_DEVICES is {chosen!r})" if chosen is not None else "")


def _kernel_module() -> str | None:
    """Return the version of the driver's kernel module on Linux, without asking the driver."""
    try:
        text = _KERNEL_MODULE.read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found.group() if found else None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
