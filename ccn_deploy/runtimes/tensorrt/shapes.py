"""What an engine takes and gives, checked against a bundle; how batches are cut to fit it.

Pure: nothing here needs a library or a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ccn_deploy.errors import IntegrityError
from ccn_deploy.graph.signature import BATCH, CANDIDATES, COTANGENTS, GRADIENTS, INPUT, OUTPUT

Shape = tuple[int, ...]
Sizes = Mapping[str, int]
"""The dimensions that vary by name: how many images, how many gradients of each."""

Form = tuple[str | int, ...]
"""A shape in which the dimensions that vary stand by name."""


@dataclass(frozen=True)
class Range:
    """Sizes that an engine was built for, ends included."""

    low: int
    high: int


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of an engine, all of them float32 on the device, by name."""

    inputs: Mapping[str, Form]
    outputs: Mapping[str, Form]

    def shapes(self, sizes: Sizes) -> dict[str, Shape]:
        """Return the shape of every input, then of every output, at some sizes."""

        def at(form: Form) -> Shape:
            return tuple(sizes[d] if isinstance(d, str) else d for d in form)

        return {name: at(form) for name, form in {**self.inputs, **self.outputs}.items()}


@dataclass(frozen=True)
class Tensor:
    """One input or output as a library describes it.

    Attributes:
        kind: ``"INPUT"`` or ``"OUTPUT"``.
        dtype: For example ``"FLOAT"``.
        location: ``"DEVICE"`` or ``"HOST"``.
        shape: With -1 for a dimension that varies.
        profile: Of an input, the least, best and largest shape; of an output, empty.
    """

    kind: str
    dtype: str
    location: str
    shape: Shape
    profile: Sequence[Shape] = ()


def forward_signature(image: Shape, classes: int) -> Signature:
    """Return the ends of an engine from images to logits."""
    return Signature({INPUT: (BATCH, *image)}, {OUTPUT: (BATCH, classes)})


def gradient_signature(image: Shape, classes: int) -> Signature:
    """Return the ends of an engine from images and cotangents to logits and gradients."""
    return Signature(
        {INPUT: (BATCH, *image), COTANGENTS: (BATCH, CANDIDATES, classes)},
        {OUTPUT: (BATCH, classes), GRADIENTS: (BATCH, CANDIDATES, *image)},
    )


def read_limits(ends: Signature, found: Mapping[str, Tensor], path: str) -> dict[str, Range]:
    """Return the sizes that an engine takes, from its own profile.

    Args:
        ends: What it should take and give.
        found: What the library says it takes and gives.
        path: Of the engine, for the error.

    Raises:
        IntegrityError: It has other inputs or outputs, or a profile that contradicts itself.
    """
    wanted = {**dict.fromkeys(ends.inputs, "INPUT"), **dict.fromkeys(ends.outputs, "OUTPUT")}
    have = {name: tensor.kind for name, tensor in found.items()}
    if have != wanted:
        raise _unlike(path, f"has the ends {have}, not {wanted}")
    limits: dict[str, Range] = {}
    for name, form in {**ends.inputs, **ends.outputs}.items():
        tensor = found[name]
        shape = tuple(-1 if isinstance(d, str) else d for d in form)
        if (tensor.dtype, tensor.location, tensor.shape) != ("FLOAT", "DEVICE", shape):
            raise _unlike(
                path,
                f"has {name!r} as {tensor.dtype} {list(tensor.shape)} on the "
                f"{tensor.location.lower()}, not as FLOAT {list(shape)} on the device",
            )
        if name in ends.inputs:
            _merge(limits, form, tensor, f"{path}: {name}")
    return limits


def _merge(limits: dict[str, Range], form: Form, tensor: Tensor, what: str) -> None:
    if len(tensor.profile) != 3 or any(len(shape) != len(form) for shape in tensor.profile):
        raise _unlike(what, f"has the profile {list(tensor.profile)}")
    low, _, high = tensor.profile
    for dimension, least, most in zip(form, low, high, strict=True):
        if not isinstance(dimension, str):
            continue
        found = Range(least, most)
        if not 1 <= least <= most or limits.setdefault(dimension, found) != found:
            raise _unlike(what, f"has the profile {list(tensor.profile)}")


def _unlike(what: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{what} {why}: it is no engine of this bundle's network.", "Export the bundle again."
    )


@dataclass(frozen=True)
class Piece:
    """A part of a batch that runs at once.

    Attributes:
        rows: Which of the batch.
        size: Rows that run: those, and as many of zeros behind them as the engine needs.
    """

    rows: slice
    size: int


def pieces(count: int, limit: Range) -> Iterator[Piece]:
    """Cut ``count`` rows into pieces that fit a range, the last one padded if it is too small.

    A padded row costs time and nothing else: no row of these networks sees another.
    """
    for start in range(0, count, limit.high):
        stop = min(start + limit.high, count)
        yield Piece(slice(start, stop), max(stop - start, limit.low))
