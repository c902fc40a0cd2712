"""What is told of a machine: here for real, and with the driver's answers of other machines."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ccn_deploy.machine import NO_CUDA_PYTHON, NO_DRIVER, this_machine


def test_this_machine() -> None:
    machine = this_machine()
    assert machine is this_machine()
    assert machine.system == sys.platform
    assert machine.python == ".".join(map(str, sys.version_info[:3]))
    assert machine.packages["numpy"] == importlib.metadata.version("numpy")
    assert machine.packages["tensorrt-rtx"] == importlib.metadata.version("tensorrt_rtx")
    assert bool(machine.gpus) != bool(machine.no_gpu_reason)
    if not Path("/proc/driver/nvidia").exists():
        assert machine.driver is None
        assert machine.no_gpu_reason == NO_DRIVER
    json.dumps(machine.document())


def look(path: Path, **environment: str) -> dict[str, object]:
    """Look at the machine from a new process that finds ``path`` before the installed packages."""
    code = (
        "import json; from ccn_deploy.machine import this_machine; "
        "print(json.dumps(this_machine().document()))"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{root}", **environment},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    document: dict[str, object] = json.loads(result.stdout)
    return document


def plant(path: Path, source: str) -> Path:
    """Write a package ``cuda`` whose driver bindings are ``source``."""
    package = path / "cuda" / "bindings"
    package.mkdir(parents=True)
    for directory in (path / "cuda", package):
        (directory / "__init__.py").touch()
    (package / "driver.py").write_text(source)
    return path


DRIVER = """
from enum import IntEnum

class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803

class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76

CUDA_VERSION = 13040
GPUS = [(b"NVIDIA L4", 8, 9, 24 << 30), (b"NVIDIA H100", 9, 0, 80 << 30)]
OK = CUresult.CUDA_SUCCESS

def cuDriverGetVersion(): return OK, 13010
def cuInit(flags): return (OK,)
def cuDeviceGetCount(): return OK, len(GPUS)
def cuDeviceGet(index): return OK, index
def cuDeviceGetName(size, device): return OK, GPUS[device][0].ljust(size, b"\\0")
def cuDeviceTotalMem(device): return OK, GPUS[device][3]
def cuDeviceGetAttribute(attribute, device): return OK, GPUS[device][attribute - 74]
"""


def test_gpus(tmp_path: Path) -> None:
    found = look(plant(tmp_path, DRIVER))
    assert str(found["driver"]).endswith("CUDA 13.1") or "(CUDA 13.1)" in str(found["driver"])
    assert found["no_gpu_reason"] == ""
    assert found["gpus"] == [
        {"index": 0, "name": "NVIDIA L4", "compute_capability": "8.9", "memory": 24 << 30},
        {"index": 1, "name": "NVIDIA H100", "compute_capability": "9.0", "memory": 80 << 30},
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("GPUS = []", "no NVIDIA GPU"),
        ("cuInit = lambda flags: (CUresult.CUDA_ERROR_NO_DEVICE,)", "no NVIDIA GPU"),
        (
            "cuDriverGetVersion = lambda: (OK, 12080)",
            "the NVIDIA driver is too old for CUDA 13: it has CUDA 12.8",
        ),
        (
            "cuInit = lambda flags: (CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,)",
            "the NVIDIA driver failed with CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        ),
        ("cuInit = None", "the GPUs could not be asked: TypeError"),
        ("raise ImportError('libfoo.so')", "the GPUs could not be asked: ImportError: libfoo.so"),
        ("raise ModuleNotFoundError('No module', name='cuda')", NO_CUDA_PYTHON),
    ],
)
def test_why_there_is_no_gpu(tmp_path: Path, change: str, reason: str) -> None:
    found = look(plant(tmp_path, DRIVER + change))
    assert found["gpus"] == []
    assert str(found["no_gpu_reason"]).startswith(reason)


def test_no_gpu_is_chosen(tmp_path: Path) -> None:
    found = look(plant(tmp_path, f"{DRIVER}GPUS = []"), CUDA_VISIBLE_DEVICES="")
    assert found["no_gpu_reason"] == "no NVIDIA GPU (CUDA_VISIBLE_DEVICES is '')"


def test_looking_loads_no_library(tmp_path: Path) -> None:
    code = (
        "import sys; from ccn_deploy.machine import this_machine; before = set(sys.modules); "
        "this_machine(); new = {m.partition('.')[0] for m in set(sys.modules) - before}; "
        "sys.exit(str(new & {'numpy', 'torch', 'onnxruntime', 'tensorrt_rtx', 'onnx'} or '') or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
