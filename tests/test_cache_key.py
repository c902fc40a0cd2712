"""What evidence is kept under: every change that could change a number changes the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccn_deploy.attacks import suite
from ccn_deploy.bundle import Bundle, NewFile, write_bundle
from ccn_deploy.data import dataset_from_arrays
from ccn_deploy.errors import EngineUnfitError, EnvironmentUnfitError, RuntimeUnavailableError
from ccn_deploy.machine import NO_DRIVER, Gpu, Machine, instruction_sets
from ccn_deploy.robustness import RobustnessRequest, collect
from ccn_deploy.robustness.cache_key import cache_key, differentiable
from ccn_deploy.storage import sha256
from ccn_deploy.targets import Role, Target
from tests.cards import a_card

ADA = Gpu(0, "NVIDIA L4", "8.9", 24 << 30)
HOPPER = Gpu(1, "NVIDIA H100 80GB HBM3", "9.0", 80 << 30)
MACHINE = Machine(
    system="linux",
    architecture="x86_64",
    python="3.12.1",
    packages={"tensorrt": "11.4.0.2", "tensorrt-rtx": "1.7.1.116", "onnxruntime-gpu": "1.30.0"},
    driver="580.95.05 (CUDA 13.0)",
    no_gpu_reason="",
    gpus=(ADA, HOPPER),
)
BARE = replace(MACHINE, driver=None, no_gpu_reason=NO_DRIVER, gpus=())
DATA = dataset_from_arrays(
    "gray", np.full((4, 1, 28, 28), 0.5, np.float32), np.arange(4), [str(k) for k in range(10)]
)
PLANS = {
    "ada": b"ftrt for Ada",
    "hopper": b"ftrt for Hopper",
    "hopper-slope": b"ftrt and back",
    "rtx": b"vtrt for both",
}


def engine(name: str, role: Role, library: str, *capabilities: str) -> NewFile:
    details: Mapping[str, Any] = {
        "library": library,
        "version": MACHINE.packages[library],
        "magic": PLANS[name][:4].decode(),
        "system": "linux",
        "machine": "x86_64",
        "compute_capabilities": list(capabilities),
    }
    return NewFile(f"engines/{name}.engine", PLANS[name], role, "fp32", library, details=details)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(
        tmp_path / "bundle",
        card=a_card(defense="sm"),
        files=[
            NewFile("weights.safetensors", b"weights", Role.WEIGHTS),
            NewFile("graphs/forward.onnx", b"plain", Role.FORWARD, "fp32"),
            NewFile("graphs/cpu.onnx", b"rewritten", Role.FORWARD, "fp32", "onnxruntime-cpu"),
            NewFile("graphs/gradient.onnx", b"slope", Role.GRADIENT, "fp32"),
            NewFile("graphs/forward-int8.onnx", b"eight bits", Role.FORWARD, "int8"),
            engine("ada", Role.ENGINE, "tensorrt", "8.9"),
            engine("hopper", Role.ENGINE, "tensorrt", "9.0"),
            engine("hopper-slope", Role.GRADIENT_ENGINE, "tensorrt", "9.0"),
            engine("rtx", Role.ENGINE, "tensorrt-rtx", "8.9", "9.0"),
        ],
    )


def of(bundle: Bundle, runtime: str, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    settings = {"gradient": "reference", "seed": 0, "machine": MACHINE, **more}
    gradient = settings.pop("gradient")
    return cache_key(bundle, Target(runtime, precision), gradient, DATA, **settings)


def test_the_program_is_the_file_that_the_runtime_executes(bundle: Bundle) -> None:
    for runtime, precision, program in (
        ("onnxruntime-cpu", "fp32", b"rewritten"),  # written for this runtime
        ("onnxruntime-cuda", "fp32", b"plain"),
        ("onnxruntime-cpu", "int8", b"eight bits"),
        ("tensorrt", "fp32", PLANS["ada"]),
        ("tensorrt-rtx", "fp32", PLANS["rtx"]),
    ):
        found = of(bundle, runtime, precision)["bundle"]
        assert found == {
            "reference": sha256(b"plain"), "program": sha256(program), "gradient": None
        }  # fmt: skip
    assert of(bundle, "torch")["bundle"]["program"] == sha256(b"plain")


def test_native_gradients_are_a_program_too(bundle: Bundle) -> None:
    cpu = of(bundle, "onnxruntime-cpu", gradient="native")["bundle"]
    assert cpu["gradient"] == sha256(b"slope")
    gpu = of(bundle, "tensorrt", gradient="native", device=1)["bundle"]
    assert gpu["program"] == sha256(PLANS["hopper"])
    assert gpu["gradient"] == sha256(PLANS["hopper-slope"])
    assert of(bundle, "torch", gradient="native")["bundle"]["gradient"] is None


def test_a_gpu_is_told_from_another(bundle: Bundle) -> None:
    for runtime in ("torch-cuda", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"):
        first, second = (of(bundle, runtime, device=device) for device in (0, 1))
        assert first["gpu"] == {"name": "NVIDIA L4", "compute_capability": "8.9"}
        assert second["gpu"] == {"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}
    for runtime in ("torch", "onnxruntime-cpu"):
        assert of(bundle, runtime)["gpu"] is None
        assert of(bundle, runtime, machine=BARE) == of(bundle, runtime)


def test_the_library_is_the_one_that_computes(bundle: Bundle) -> None:
    assert of(bundle, "tensorrt")["versions"]["tensorrt"] == "11.4.0.2"
    assert of(bundle, "tensorrt-rtx")["versions"]["tensorrt-rtx"] == "1.7.1.116"
    for runtime in ("tensorrt", "tensorrt-rtx", "torch"):
        assert "onnxruntime" not in of(bundle, runtime)["versions"]
    assert of(bundle, "onnxruntime-cpu")["versions"]["onnxruntime"]
    assert {"ccn-deploy", "numpy", "torch", "foolbox"} <= set(of(bundle, "tensorrt")["versions"])


def test_the_processor_is_told_from_another(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr("ccn_deploy.machine._PROCESSORS", told)
    keys = []
    for name, flags in (
        ("Xeon", "fpu avx2 avx512f ht"),
        ("Xeon", "fpu avx2 ht"),
        ("EPYC", "avx2 fpu"),
    ):
        told.write_text(f"processor\t: 0\nmodel name\t: {name}\nflags\t\t: {flags}\n\n")
        instruction_sets.cache_clear()
        keys.append(of(bundle, "onnxruntime-cpu")["processor"])
    instruction_sets.cache_clear()
    assert keys == [
        {"name": "Xeon", "instruction_sets": ["avx2", "avx512f"]},
        {"name": "Xeon", "instruction_sets": ["avx2"]},
        {"name": "EPYC", "instruction_sets": ["avx2"]},
    ]


def test_without_a_gpu_nothing_is_told_to_be_of_one(bundle: Bundle) -> None:
    for runtime in ("torch-cuda", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"):
        with pytest.raises(EnvironmentUnfitError, match=NO_DRIVER):
            of(bundle, runtime, machine=BARE)
    with pytest.raises(EngineUnfitError, match="there is no GPU 2"):
        of(bundle, "torch-cuda", device=2)


def test_a_runtime_has_gradients_if_the_bundle_has_their_program(bundle: Bundle) -> None:
    for target, expected in (
        (Target("onnxruntime-cpu", "fp32"), True),
        (Target("onnxruntime-cpu", "int8"), False),
        (Target("tensorrt", "fp32"), True),
        (Target("tensorrt-rtx"), False),  # the ONNX gradient graph is none of its programs
        (Target("torch", "fp32"), True),
    ):
        assert differentiable(bundle, target, machine=MACHINE, device=1) is expected
    # An engine for another GPU is no engine here, and without a GPU there is none.
    assert not differentiable(bundle, Target("tensorrt"), machine=MACHINE, device=0)
    assert not differentiable(bundle, Target("tensorrt"), machine=BARE)


def test_a_precision_that_is_not_there_is_refused_before_anything_is_measured(
    bundle: Bundle,
) -> None:
    request = RobustnessRequest(DATA, precision="fp16", attacks=suite(["fgsm"], [0.1]))
    with pytest.raises(RuntimeUnavailableError, match="fp16"):
        collect(bundle, request)
    assert not bundle.evidence.exists()
