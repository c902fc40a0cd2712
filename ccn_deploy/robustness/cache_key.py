"""Everything but the attack that a measurement depends on, told without opening a runtime.

It is the key of the evidence: what was measured under other cache_key is never taken for this.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from ccn_deploy.attacks.source import Gradient
from ccn_deploy.bundle import Bundle, FileRecord
from ccn_deploy.data.dataset import Dataset
from ccn_deploy.errors import EnvironmentUnfitError
from ccn_deploy.machine import Machine, this_machine
from ccn_deploy.robustness.attack_session import Target
from ccn_deploy.runtimes.compatibility import choose_engine, no_gpu
from ccn_deploy.runtimes.tensorrt.library import LIBRARIES


def differentiable(
    bundle: Bundle, target: Target, *, device: int = 0, machine: Machine | None = None
) -> bool:
    """Whether a runtime of this bundle has gradients of its own, on this machine if on a GPU.

    Args:
        bundle: An open bundle.
        target: Runtime and precision.
        device: Index of the GPU, for a target on one.
        machine: Where it runs; this one if None.
    """
    runtime, precision = target
    if runtime in LIBRARIES:
        try:
            _gradient_program(bundle, target, machine or this_machine(), device)
        except EnvironmentUnfitError:
            return False
        return True
    files = {(record.role, record.precision) for record in bundle.manifest.files}
    return runtime.startswith("torch") or ("gradient", precision) in files


def cache_key(
    bundle: Bundle,
    target: Target,
    gradient: Gradient,
    dataset: Dataset,
    *,
    seed: int,
    device: int = 0,
    machine: Machine | None = None,
) -> dict[str, Any]:
    """Return, as JSON, what any measurement of a target depends on but for the attack.

    Args:
        bundle: An open bundle.
        target: Runtime and precision.
        gradient: Where gradients of attacks on the target come from.
        dataset: Whose images are used.
        seed: Of their selection and of the attacks.
        device: Index of the GPU, for a target on one.
        machine: Where it is measured; this one if None.

    Raises:
        RuntimeUnavailableError: The bundle has nothing that the target could execute.
        EnvironmentUnfitError: The target is on a GPU, and there is none; or no engine fits it.
    """
    runtime, precision = target
    native = gradient == "native" and not runtime.startswith("torch")
    if on_gpu(runtime) and machine is None:
        machine = this_machine()
    program = _program(bundle, target, machine, device)
    slope = _gradient_program(bundle, target, machine, device) if native else None
    return {
        "target": {"runtime": runtime, "precision": precision},
        "gradient": gradient,
        "bundle": {
            "weights": bundle.file("weights").sha256,
            "program": None if program is None else program.sha256,
            "gradient": None if slope is None else slope.sha256,
        },
        "dataset": {"name": dataset.name, "split": dataset.split, "digest": dataset.digest},
        "selection": {"rule": "permutation", "seed": seed},
        "seed": seed,
        "versions": _versions(runtime, machine),
        "machine": platform.machine(),
        "gpu": _gpu(runtime, machine, device),
    }


def on_gpu(runtime: str) -> bool:
    """Whether a runtime computes on a GPU."""
    return runtime in LIBRARIES or runtime.endswith("-cuda")


def _program(
    bundle: Bundle, target: Target, machine: Machine | None, device: int
) -> FileRecord | None:
    """Return the very file that the target executes; None for torch, which has the weights."""
    runtime, precision = target
    if runtime.startswith("torch"):
        return None
    if runtime in LIBRARIES:
        assert machine is not None  # it is on a GPU
        return choose_engine(bundle, runtime, precision, machine, device=device)
    return bundle.forward(runtime, precision)


def _gradient_program(
    bundle: Bundle, target: Target, machine: Machine | None, device: int
) -> FileRecord:
    runtime, precision = target
    if runtime in LIBRARIES:
        assert machine is not None
        return choose_engine(
            bundle, runtime, precision, machine, device=device, role="gradient-engine"
        )
    return bundle.file("gradient", precision)


def _gpu(runtime: str, machine: Machine | None, device: int) -> dict[str, str] | None:
    """Return what tells a GPU from another, or None for a target on the CPU.

    Raises:
        EnvironmentUnfitError: There is none, so nothing that was measured can be told to be of it.
    """
    if not on_gpu(runtime):
        return None
    assert machine is not None
    extra = LIBRARIES[runtime].extra if runtime in LIBRARIES else "gpu"
    problem = no_gpu(machine, device, f"{runtime} cannot run", extra)
    if problem is not None:
        raise problem
    gpu = machine.gpus[device]
    return {"name": gpu.name, "compute_capability": gpu.compute_capability}


def _versions(runtime: str, machine: Machine | None) -> Mapping[str, str | None]:
    """Return the libraries that shape the numbers; the first three carry out every attack."""
    versions = {name: _version(name) for name in ("ccn-deploy", "torch", "foolbox")}
    if runtime in LIBRARIES:
        assert machine is not None
        distribution = LIBRARIES[runtime].distribution
        versions[distribution] = machine.packages.get(distribution)
    elif not runtime.startswith("torch"):
        versions["onnxruntime"] = _version("onnxruntime", "onnxruntime-gpu")
    return versions


def _version(*distributions: str) -> str | None:
    """Return the version of the first of these that is installed, without importing it."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
