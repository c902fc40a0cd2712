"""Everything but the attack that a measurement depends on, told without opening a runtime.

It is the key of the evidence: what was measured in another setting is never taken for this.
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
from ccn_deploy.machine import Machine, instruction_sets, processor, this_machine
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.runtimes.compatibility import choose_engine, no_gpu
from ccn_deploy.targets import Role, Target


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
    if target.is_reference:
        return True
    try:
        _program(bundle, target, machine, device, Role.GRADIENT)
    except EnvironmentUnfitError:
        return False
    return True


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
    if target.on_gpu and machine is None:
        machine = this_machine()
    native = gradient == "native" and not target.is_reference
    program = _program(bundle, target, machine, device)
    slope = _program(bundle, target, machine, device, Role.GRADIENT) if native else None
    return {
        "target": {"runtime": target.runtime, "precision": target.precision},
        "gradient": gradient,
        "bundle": {
            "reference": bundle.program(REFERENCE).sha256,
            "program": program.sha256,
            "gradient": None if slope is None else slope.sha256,
        },
        "dataset": dataset.identity,
        "selection": {"rule": "permutation", "seed": seed},
        "seed": seed,
        "versions": _versions(target, machine),
        "machine": platform.machine(),
        # Always: reference and attacks compute on it. Kernels, and so the last bits, are chosen
        # by it.
        "processor": {"name": processor(), "instruction_sets": list(instruction_sets())},
        "gpu": _gpu(target, machine, device),
    }


def _program(
    bundle: Bundle,
    target: Target,
    machine: Machine | None,
    device: int,
    role: Role = Role.FORWARD,
) -> FileRecord:
    """Return the very file that the target executes; for the reference, the graph it evaluates."""
    if target.kind.runs_engines:
        machine = machine or this_machine()
        return choose_engine(bundle, target, machine, device=device, role=role.engine)
    return bundle.program(target, role)


def _gpu(target: Target, machine: Machine | None, device: int) -> dict[str, str] | None:
    """Return what tells a GPU from another, or None for a target on the CPU.

    Raises:
        EnvironmentUnfitError: There is none, so nothing that was measured can be told to be of it.
    """
    if not target.on_gpu:
        return None
    assert machine is not None
    extra = "gpu" if target.is_reference else target.kind.extra
    problem = no_gpu(machine, device, f"{target.runtime} cannot run", extra)
    if problem is not None:
        raise problem
    gpu = machine.gpus[device]
    return {"name": gpu.name, "compute_capability": gpu.compute_capability}


def _versions(target: Target, machine: Machine | None) -> Mapping[str, str | None]:
    """Return the libraries that shape the numbers; the first four carry out every attack."""
    versions = {name: _version(name) for name in ("ccn-deploy", "numpy", "torch", "foolbox")}
    if target.kind.runs_engines:
        assert machine is not None
        distribution = target.kind.distribution
        versions[distribution] = machine.packages.get(distribution)
    elif not target.is_reference:
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
