"""Which files of a bundle a machine can run, decided before any library reads one of them.

An engine is code for one library release, one system and a few GPUs. Everything that would make
a deserializer refuse it, or misread it, is in the manifest; here it is compared with the machine.
Digests are checked when the bundle is opened, before all of this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ccn_deploy.bundle import Bundle, FileRecord
from ccn_deploy.errors import (
    CcnDeployError,
    EngineUnfitError,
    IntegrityError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from ccn_deploy.machine import NO_CUDA_PYTHON, Gpu, Machine, release
from ccn_deploy.runtimes.tensorrt.library import LIBRARIES, Library
from ccn_deploy.targets import DEPLOYED_PRECISIONS, DEPLOYED_RUNTIMES, Role, Target

BOTH_ONNXRUNTIMES = (
    "onnxruntime and onnxruntime-gpu are both installed, and each overwrites files of the other."
)
KEEP_ONE = (
    "Uninstall both, then install one: pip uninstall -y onnxruntime onnxruntime-gpu; "
    "pip install 'ccn-deploy[gpu]' (or [cpu])"
)
HEAD = 4
"""Bytes at the start of an engine that name the library that wrote it."""


_REPLACE = "Do not use this bundle; get it again from where it was made, or export it again."


@dataclass(frozen=True)
class Candidate:
    """Whether a machine can run one file of a bundle.

    Attributes:
        target: The runtime that would execute it, and the file's precision.
        record: The graph or engine.
        problem: Why it cannot; None if nothing is known to be in the way.
    """

    target: Target
    record: FileRecord
    problem: CcnDeployError | None


def candidates_for(bundle: Bundle, machine: Machine, *, device: int = 0) -> tuple[Candidate, ...]:
    """Return every way to run the bundle's network, in order of preference.

    Runtimes in the order of :data:`~ccn_deploy.targets.RUNTIMES`, then precisions, the most exact
    first, then the bundle's own order: there may be several engines, for several GPUs.

    Args:
        bundle: An open bundle.
        machine: What it shall run on.
        device: Index of the GPU.
    """
    return tuple(
        Candidate(target, record, incompatibility(bundle, record, target, machine, device=device))
        for runtime in DEPLOYED_RUNTIMES
        for precision in DEPLOYED_PRECISIONS
        for target in [Target(runtime, precision)]
        for record in bundle.programs(target)
    )


def choose_engine(
    bundle: Bundle,
    target: Target,
    machine: Machine,
    *,
    device: int = 0,
    role: Role = Role.ENGINE,
) -> FileRecord:
    """Return the first engine that fits the machine.

    Args:
        bundle: An open bundle.
        target: A TensorRT runtime and a precision.
        machine: What it shall run on.
        device: Index of the GPU.
        role: ``ENGINE`` or ``GRADIENT_ENGINE``.

    Raises:
        RuntimeUnavailableError: The bundle has no such engine.
        CcnDeployError: None fits: the error of :func:`check_engine` of the one that came
            nearest, or of one that is not what its manifest says.
    """
    found = bundle.files(role, target.precision, target.runtime)
    if not found:
        files = bundle.manifest.files
        have = [r.precision for r in files if (r.role, r.runtime) == (role, target.runtime)]
        raise RuntimeUnavailableError(
            f"The bundle has no {str(role).replace('-', ' ')} for {target.runtime} in "
            f"{target.precision}; it has {', '.join(dict.fromkeys(have)) or 'none at all'}.",
            f"Add it with: {_export(target)}",
        )
    refused = []
    for record in found:
        refusal = _refusal(record, bundle.head(record, HEAD), machine, device)
        if refusal is None:
            return record
        refused.append(refusal)
    raise max(refused, key=lambda refusal: refusal[0])[1]  # of several as near, the first


def check_engine(record: FileRecord, head: bytes, machine: Machine, *, device: int = 0) -> None:
    """Refuse an engine that cannot run on a machine, for the first of the reasons below.

    Args:
        record: Its line in the manifest.
        head: Its first bytes, at least :data:`HEAD`.
        machine: What it shall run on.
        device: Index of the GPU.

    Raises:
        IntegrityError: The manifest's line is incomplete, or the bytes are no engine of the
            library that it names.
        MissingExtraError: The library, or cuda-python, is not installed.
        EngineUnfitError: Another release of the library; another system or architecture; no
            driver; no such GPU; a GPU that the engine was not built for.
    """
    refusal = _refusal(record, head, machine, device)
    if refusal is not None:
        raise refusal[1]


class _Built(msgspec.Struct, frozen=True):
    """What an engine was built with and for, among the details of its line in the manifest."""

    library: str
    version: str
    system: str
    machine: str
    magic: str
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True)
class _Engine:
    """What the manifest says of an engine, with its types checked."""

    path: str
    target: Target
    built: _Built

    @property
    def library(self) -> Library:
        return LIBRARIES[self.target.runtime]

    @property
    def export(self) -> str:
        """The command that builds such an engine."""
        return _export(self.target)


def _export(target: Target) -> str:
    """Return the command that adds an engine to a bundle."""
    return (
        f"ccn-deploy export BUNDLE --output NEW --format {target.runtime} "
        f"--precision {target.precision}"
    )


def _read(record: FileRecord) -> _Engine:
    """Read the manifest's line of an engine.

    Raises:
        IntegrityError: It lacks or mistypes a field, or contradicts its role.
    """
    try:
        built = msgspec.convert(record.details, _Built)
    except msgspec.ValidationError:
        built = None
    if built is None or built.library != record.runtime or not release(built.version):
        raise IntegrityError(
            f"The manifest does not say what {record.path} was built with and for.", _REPLACE
        )
    return _Engine(record.path, Target(record.runtime, record.precision), built)


def _refusal(
    record: FileRecord, head: bytes, machine: Machine, device: int
) -> tuple[int, CcnDeployError] | None:
    """Return the first reason against an engine and how near it came; damage counts as nearest."""
    damaged = len(_CHECKS)
    try:
        engine = _read(record)
    except IntegrityError as error:
        return damaged, error
    if (mistyped := _other_magic(engine, head)) is not None:
        return damaged, mistyped
    for distance, check in enumerate(_CHECKS):
        if (unfit := check(engine, machine, device)) is not None:
            return distance, unfit
    return None


def _other_magic(engine: _Engine, head: bytes) -> IntegrityError | None:
    wanted = engine.library.magic
    if engine.built.magic == wanted.decode() and head[:HEAD] == wanted:
        return None
    found = next((lib.title for lib in LIBRARIES.values() if head[:HEAD] == lib.magic), "")
    return IntegrityError(
        f"{engine.path} has the right digest and is no {engine.library.title} engine: it begins "
        f"with {head[:HEAD]!r}{f', as those of {found} do' if found else ''}, not with {wanted!r}.",
        _REPLACE,
    )


def _no_library(engine: _Engine, machine: Machine, device: int) -> CcnDeployError | None:
    if engine.library.distribution in machine.packages:
        return None
    return MissingExtraError(
        f"The runtime {engine.target.runtime} needs the package "
        f"{engine.library.distribution!r}, which is not installed.",
        f"Install it with: pip install 'ccn-deploy[{engine.library.extra}]'",
    )


def _other_release(engine: _Engine, machine: Machine, device: int) -> CcnDeployError | None:
    distribution = engine.library.distribution
    here = machine.packages[distribution]
    built, have = release(engine.built.version), release(here)
    if built == have:
        return None
    install = f"pip install '{distribution}=={engine.built.version}'"
    return EngineUnfitError(
        f"{engine.path} was built with {engine.library.title} {engine.built.version}; installed is "
        f"{here}, which is {'older' if built > have else 'newer'}, and an engine runs only with "
        "the release that built it.",
        f"Upgrade with: {install}"
        if built > have
        else f"Build it again with: {engine.export} (or go back: {install})",
    )


def _other_system(engine: _Engine, machine: Machine, device: int) -> CcnDeployError | None:
    built = (engine.built.system, engine.built.machine)
    here = (machine.system, machine.architecture)
    if built == here:
        return None
    return EngineUnfitError(
        f"{engine.path} was built for {' '.join(built)}; this machine is {' '.join(here)}.",
        f"Build one on such a machine: {engine.export}",
    )


def _no_gpu(engine: _Engine, machine: Machine, device: int) -> CcnDeployError | None:
    return no_gpu(machine, device, f"{engine.path} cannot run", engine.library.extra)


def _other_gpu(engine: _Engine, machine: Machine, device: int) -> CcnDeployError | None:
    gpu = machine.gpus[device]
    if gpu.compute_capability in engine.built.compute_capabilities:
        return None
    target = (
        f"Build one for it: {engine.export} --compute-capability {gpu.compute_capability}"
        if engine.library.portable
        else f"Build one on this machine: {engine.export}"
    )
    return EngineUnfitError(
        f"{engine.path} was built for GPUs of compute capability "
        f"{', '.join(engine.built.compute_capabilities) or '(none)'}; {_called(gpu)} has "
        f"{gpu.compute_capability}.",
        target,
    )


_CHECKS: tuple[Callable[[_Engine, Machine, int], CcnDeployError | None], ...] = (
    _no_library,
    _other_release,
    _other_system,
    _no_gpu,
    _other_gpu,
)
"""In this order: each may rely on those before it."""


def no_gpu(machine: Machine, device: int, what: str, extra: str) -> CcnDeployError | None:
    """Return why a machine has no GPU of an index, or None if it has.

    Args:
        machine: What it shall run on.
        device: Index of the GPU.
        what: Begins the error: ``"onnxruntime-cuda cannot run"``.
        extra: The one that brings cuda-python for this purpose.
    """
    if device < len(machine.gpus):
        return None
    if machine.gpus:
        return EngineUnfitError(
            f"{what} here: there is no GPU {device}, this machine has {len(machine.gpus)}.",
            "Choose one of: " + ", ".join(map(_called, machine.gpus)) + ".",
        )
    if machine.no_gpu_reason == NO_CUDA_PYTHON:
        return MissingExtraError(
            f"{what} here: {NO_CUDA_PYTHON}.",
            f"Install it with: pip install 'ccn-deploy[{extra}]'",
        )
    return EngineUnfitError(
        f"{what} here: {machine.no_gpu_reason}.",
        "It needs an NVIDIA GPU with its driver; on this machine use --runtime onnxruntime-cpu."
        if machine.driver is None
        else "Make a GPU visible, or update the driver; without one use --runtime onnxruntime-cpu.",
    )


def _called(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({gpu.name})"


def incompatibility(
    bundle: Bundle, record: FileRecord, target: Target, machine: Machine, *, device: int = 0
) -> CcnDeployError | None:
    """Return why a target cannot run a file of a bundle here, or None if nothing is known.

    Args:
        bundle: An open bundle.
        record: A graph or engine in it that the target takes.
        target: Runtime and precision.
        machine: What it shall run on.
        device: Index of the GPU.
    """
    if not target.kind.runs_engines:
        return onnxruntime_problem(target, machine, device=device)
    refusal = _refusal(record, bundle.head(record, HEAD), machine, device)
    return None if refusal is None else refusal[1]


def onnxruntime_problem(
    target: Target, machine: Machine, *, device: int = 0
) -> CcnDeployError | None:
    """Return why ONNX Runtime cannot run a graph here, or None if nothing is known against it.

    Args:
        target: ONNX Runtime and the graph's precision; bf16 has no kernels for convolution on the
            CPU.
        machine: What it shall run on.
        device: Index of the GPU.
    """
    kind = target.kind
    builds = [name for name in ("onnxruntime", "onnxruntime-gpu") if name in machine.packages]
    if not builds or (kind.on_gpu and builds == ["onnxruntime"]):
        replace = "pip uninstall onnxruntime; " if builds else ""
        return MissingExtraError(
            f"The runtime {kind.name} needs the package {kind.distribution!r}, which is not "
            "installed.",
            f"Install it with: {replace}pip install 'ccn-deploy[{kind.extra}]'",
        )
    if not kind.on_gpu:
        if target.precision != "bf16":
            return None
        return RuntimeUnavailableError(
            "ONNX Runtime has no kernels for bf16 on the CPU.",
            "Choose another --precision, or a runtime on a GPU.",
        )
    if len(builds) == 2:
        return RuntimeUnavailableError(BOTH_ONNXRUNTIMES, KEEP_ONE)
    return no_gpu(machine, device, f"{kind.name} cannot run", kind.extra)
