"""The one vocabulary of what is deployed where: runtimes, precisions, and roles of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Literal

from ccn_deploy.errors import named

Family = Literal["torch", "onnxruntime", "tensorrt"]


class Role(str, Enum):
    """What a file of a bundle is for.

    ``weights``: of a network of the package, as safetensors. ``forward``: a graph from images to
    logits. ``gradient``: a graph from images and cotangents to logits and input gradients.
    ``engine`` and ``gradient-engine``: TensorRT code built from such graphs.
    """

    WEIGHTS = "weights"
    FORWARD = "forward"
    GRADIENT = "gradient"
    ENGINE = "engine"
    GRADIENT_ENGINE = "gradient-engine"

    def __str__(self) -> str:
        return self.value

    @property
    def is_engine(self) -> bool:
        """Whether such a file is code for one library and a few GPUs."""
        return self in (Role.ENGINE, Role.GRADIENT_ENGINE)

    @property
    def has_gradients(self) -> bool:
        """Whether such a file computes input gradients."""
        return self in (Role.GRADIENT, Role.GRADIENT_ENGINE)

    @property
    def engine(self) -> Role:
        """Role of the engines that are built from a graph of this role."""
        return Role.GRADIENT_ENGINE if self.has_gradients else Role.ENGINE


@dataclass(frozen=True)
class Precision:
    """A number format that a network computes in.

    Attributes:
        name: As in options and manifests.
        kind: ``"float"`` (exact enough to compare with), ``"half"`` (16 bits, computed in) or
            ``"grid"`` (8 bits, put on by a scale).
        deployed: Whether graphs and engines exist in it; fp64 is for the reference alone.
    """

    name: str
    kind: Literal["float", "half", "grid"]
    deployed: bool = True

    @property
    def has_gradients(self) -> bool:
        """Whether a gradient graph exists: rounding to a grid has slope zero almost everywhere."""
        return self.kind != "grid"


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        precision.name: precision
        for precision in (
            Precision("fp64", "float", deployed=False),
            Precision("fp32", "float"),
            Precision("fp16", "half"),
            Precision("bf16", "half"),
            Precision("int8", "grid"),
            Precision("fp8", "grid"),
        )
    }
)
"""Every precision by name, the most exact first."""

DEPLOYED_PRECISIONS = tuple(name for name, precision in PRECISIONS.items() if precision.deployed)
"""Names of the precisions that a bundle can hold, the most exact first."""


@dataclass(frozen=True)
class RuntimeKind:
    """A program that maps images to logits, and what it needs.

    Attributes:
        name: As in options and evidence.
        title: For people.
        family: The library whose interface it has.
        on_gpu: Whether it needs an NVIDIA GPU.
        distribution: The package that must be installed.
        extra: The extra of this package that installs it.
    """

    name: str
    title: str
    family: Family
    on_gpu: bool
    distribution: str
    extra: str

    @property
    def runs_engines(self) -> bool:
        """Whether it executes engines, not graphs."""
        return self.family == "tensorrt"

    @property
    def is_reference(self) -> bool:
        """Whether it evaluates the network itself, to compare the others with."""
        return self.family == "torch"


_RUNTIMES: tuple[tuple[str, str, Family, bool, str, str], ...] = (
    ("tensorrt", "a TensorRT engine on an NVIDIA GPU", "tensorrt", True, "tensorrt", "gpu"),
    ("tensorrt-rtx", "a TensorRT-RTX engine on an NVIDIA RTX GPU", "tensorrt", True,
     "tensorrt-rtx", "rtx"),
    ("onnxruntime-cuda", "ONNX Runtime on an NVIDIA GPU", "onnxruntime", True,
     "onnxruntime-gpu", "gpu"),
    ("onnxruntime-cpu", "ONNX Runtime on the CPU", "onnxruntime", False, "onnxruntime", "cpu"),
    ("torch-cuda", "the reference in PyTorch on an NVIDIA GPU", "torch", True, "torch", "train"),
    ("torch", "the reference in PyTorch on the CPU, in fp64 or fp32", "torch", False,
     "torch", "train"),
)  # fmt: skip

RUNTIMES: Mapping[str, RuntimeKind] = MappingProxyType(
    {row[0]: RuntimeKind(*row) for row in _RUNTIMES}
)
"""Every runtime by name, in order of preference: the fastest first, the reference last."""

DEPLOYED_RUNTIMES = tuple(name for name, kind in RUNTIMES.items() if not kind.is_reference)
"""Names of the runtimes that a bundle is deployed in, the fastest first."""


def runtime_named(name: str) -> RuntimeKind:
    """Return the runtime of a name.

    Raises:
        UsageError: There is none; the hint suggests the nearest.
    """
    return named("runtime", name, RUNTIMES)


def precision_named(name: str) -> Precision:
    """Return the precision of a name.

    Raises:
        UsageError: There is none; the hint suggests the nearest.
    """
    return named("precision", name, PRECISIONS)


@dataclass(frozen=True)
class Target:
    """A runtime in a precision: what is deployed, measured and attacked.

    Attributes:
        runtime: A name in :data:`RUNTIMES`.
        precision: A name in :data:`PRECISIONS`.

    Raises:
        UsageError: An unknown name; the hint suggests the nearest.
    """

    runtime: str
    precision: str = "fp32"

    def __post_init__(self) -> None:
        runtime_named(self.runtime)
        precision_named(self.precision)

    def __str__(self) -> str:
        return f"{self.runtime}-{self.precision}"

    @property
    def kind(self) -> RuntimeKind:
        """What is known of the runtime."""
        return RUNTIMES[self.runtime]

    @property
    def family(self) -> Family:
        """The library whose interface the runtime has."""
        return self.kind.family

    @property
    def on_gpu(self) -> bool:
        """Whether the runtime needs an NVIDIA GPU."""
        return self.kind.on_gpu

    @property
    def is_reference(self) -> bool:
        """Whether the runtime evaluates the network itself."""
        return self.kind.is_reference
