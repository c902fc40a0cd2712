"""What every runtime offers, and the checks they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.errors import InputError, UsageError

Array = NDArray[Any]
_Own = TypeVar("_Own", bound="Closing")

LARGEST_BATCH = 256
"""Images that run in one piece where nothing else is asked for or known to be faster."""

# A call on one small image takes 200 microseconds, so those of its check count: what NumPy would
# look up or convert on every call is made once.
_FLOAT32, _BITS = np.dtype(np.float32), np.dtype(np.uint32)
_BITS_OF_ONE = int(np.float32(1).view(_BITS))


@dataclass(frozen=True)
class RuntimeOptions:
    """How a runtime uses the machine.

    Attributes:
        threads: CPU threads of one call; the runtime's own choice if None.
        memory_limit: Bytes of device memory the runtime may take; CUDA only.
        arena: Whether the CPU provider keeps freed memory for the next call. Faster; more memory.
        device: Index of the GPU.
        max_batch: Larger batches are split into pieces of this size; the runtime's own choice if
            None.
        cuda_graphs: Whether a batch size that comes again is replayed from a CUDA graph, which
            saves the time of launching kernels one by one; TensorRT only.
        check_range: Whether images outside [0, 1] are an error. Only an attack that is meant to
            leave the box turns this off. NaN and infinity are always refused.

    Raises:
        UsageError: A number below the lowest that makes sense.
    """

    threads: int | None = None
    memory_limit: int | None = None
    arena: bool = True
    device: int = 0
    max_batch: int | None = None
    cuda_graphs: bool = True
    check_range: bool = True

    def __post_init__(self) -> None:
        lowest = {"threads": 1, "memory_limit": 1, "device": 0, "max_batch": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} is {value}.", f"Give a number of at least {low}.")


@dataclass(frozen=True)
class RuntimeSpec:
    """What a runtime is and takes.

    Attributes:
        name: As asked for, for example ``"onnxruntime-cpu"``.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"fp8"``; the reference also
            ``"fp64"``.
        input_shape: (channels, height, width) of one image.
        classes: Number of logits.
        max_batch: The largest batch that runs in one piece; larger ones are split.
        device: What computes, for example ``"cpu"`` or ``"cuda:0"``.
        versions: Libraries that shape the numbers, by name; on a GPU that compiles or chooses
            kernels, its name and driver too.
        thread_safe: Whether several threads may call at once.
        graph: Path in the bundle of the graph or engine that :meth:`Runtime.logits` executes;
            empty if it executes none.
        usual_batch: What ``max_batch`` is where nothing else is asked for.
    """

    name: str
    precision: str
    input_shape: tuple[int, int, int]
    classes: int
    max_batch: int
    device: str
    versions: Mapping[str, str]
    thread_safe: bool
    graph: str = ""
    usual_batch: int = LARGEST_BATCH

    @property
    def target(self) -> str:
        """Name in tables and test ids, for example ``"onnxruntime-cpu-fp32"``."""
        return f"{self.name}-{self.precision}"


class Runtime(Protocol):
    """A program that maps images to logits: what production runs, or the reference.

    A runtime owns its memory and is closed by :meth:`close` or a ``with`` block. It never
    answers from another device or precision than its :attr:`spec` names.
    """

    @property
    def spec(self) -> RuntimeSpec:
        """What this runtime is and takes."""
        ...

    @property
    def differentiable(self) -> bool:
        """Whether :meth:`vjp` gives the true input gradient of :meth:`logits`."""
        ...

    def logits(self, images: Array) -> Array:
        """Return float32 [N, classes] for float32 images [N, C, H, W] in [0, 1].

        The float64 reference returns float64.

        Raises:
            InputError: Wrong shape or dtype, a NaN, or a value outside [0, 1].
        """
        ...

    def vjp(self, images: Array, cotangents: Array) -> tuple[Array, Array]:
        """Return logits and K input gradients per image, the forward computed once.

        Args:
            images: [N, C, H, W] as for :meth:`logits`.
            cotangents: float32 [N, K, classes]; row k asks for the gradient of
                ``sum_j cotangents[n, k, j] * logits[n, j]`` with respect to image n.

        Returns:
            Logits [N, classes] and gradients [N, K, C, H, W].

        Raises:
            RuntimeUnavailableError: :attr:`differentiable` is false.
        """
        ...

    def close(self) -> None:
        """Release sessions and memory. Calling twice is harmless."""
        ...

    def __enter__(self) -> Runtime: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Closing(ABC):
    """What is closed at the end of a ``with`` block."""

    @abstractmethod
    def close(self) -> None:
        """Release what is held. Calling twice is harmless."""

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@runtime_checkable
class LossGradient(Protocol):
    """A runtime that finds the slope of the cross-entropy by itself, with one forward pass."""

    def cross_entropy(self, images: Array, labels: Array) -> tuple[Array, Array]:
        """Return logits [N, classes] and the input gradient of each cross-entropy [N, C, H, W].

        Args:
            images: float32 [N, C, H, W].
            labels: int64 [N].
        """
        ...


def already_closed(name: str) -> UsageError:
    """Build the error for a call of a runtime, by its name, that was closed before."""
    return UsageError(f"This {name} runtime is closed.", "Open it again.")


def check_images(images: Array, spec: RuntimeSpec, *, check_range: bool = True) -> None:
    """Refuse anything that is not a batch of images this runtime takes.

    Raises:
        InputError: Says what is wrong and which image it is.
    """
    wanted = spec.input_shape
    if not isinstance(images, np.ndarray) or images.dtype != _FLOAT32:
        kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(
            f"Images must be a NumPy array of float32, got {kind}.",
            "Convert with: images.astype('float32') / 255 for 8-bit pixels.",
        )
    if images.ndim != 4 or images.shape[1:] != wanted:
        raise InputError(
            f"Images must have shape [N, {', '.join(map(str, wanted))}], got {list(images.shape)}.",
            "Add a batch axis to a single image, and put channels first.",
        )
    if not images.size:
        return
    # Read as integers, the floats of [0, 1] are exactly those up to the bits of 1.0: a sign, an
    # infinity or a NaN is larger. One pass; -0.0 is the exception that the slow path allows. On one
    # small image argmax takes a third of the time of max; from any other layout it makes a copy.
    bits = images.view(_BITS)
    largest = bits.item(bits.argmax()) if images.flags.c_contiguous else bits.max()
    if largest <= _BITS_OF_ONE:
        return
    if not np.isfinite(images).all():
        raise _non_finite(images)
    if not check_range or (images.min() >= 0.0 and images.max() <= 1.0):
        return
    outside = (images < 0.0) | (images > 1.0)
    where = int(np.flatnonzero(outside.any(axis=(1, 2, 3)))[0])
    raise InputError(
        f"Image {where} has values from {images[where].min():g} to {images[where].max():g}, "
        "outside [0, 1].",
        "Divide 8-bit pixels by 255; the mean is subtracted inside the model.",
    )


def check_cotangents(cotangents: Array, images: int, spec: RuntimeSpec) -> None:
    """Refuse anything but finite float32 [N, K, classes].

    Raises:
        InputError: Says what is wrong.
    """
    if not isinstance(cotangents, np.ndarray) or cotangents.dtype != np.float32:
        kind = cotangents.dtype if isinstance(cotangents, np.ndarray) else type(cotangents).__name__
        raise InputError(
            f"Cotangents must be a NumPy array of float32, got {kind}.",
            "Convert with: cotangents.astype('float32').",
        )
    check_cotangent_shape(cotangents, images, spec)
    if not np.isfinite(cotangents).all():
        raise InputError(
            "Cotangents have NaN or infinite values.", "Check the loss that they are slopes of."
        )


def check_cotangent_shape(cotangents: Array, images: int, spec: RuntimeSpec) -> None:
    """Refuse another shape than [N, K, classes].

    Raises:
        InputError: It is another one.
    """
    if cotangents.ndim != 3 or cotangents.shape[::2] != (images, spec.classes):
        raise InputError(
            f"Cotangents must have shape [{images}, K, {spec.classes}], got "
            f"{list(cotangents.shape)}.",
            "Give K rows of one weight a logit for each image.",
        )


def in_batches(images: Array, max_batch: int, run: Callable[[Array], Array], classes: int) -> Array:
    """Run ``run`` on pieces of at most ``max_batch`` images and join the results."""
    if len(images) <= max_batch:
        if len(images) == 0:
            return np.empty((0, classes), dtype=np.float32)
        return run(images)
    pieces = [run(images[at : at + max_batch]) for at in range(0, len(images), max_batch)]
    return np.concatenate(pieces)


def _non_finite(images: Array) -> InputError:
    bad = ~np.isfinite(images).all(axis=(1, 2, 3))
    return InputError(
        f"Image {int(np.flatnonzero(bad)[0])} has NaN or infinite pixels ({int(bad.sum())} of "
        f"{len(images)} images do).",
        "Check the preprocessing that made them; a network answers NaN with any label.",
    )
