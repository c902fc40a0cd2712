"""What a source network was fed, and how it relates to images in [0, 1]. NumPy only."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.errors import InputError, UsageError
from ccn_deploy.records import Record

SLACK = 1e-5
"""How far outside [0, 1] the rounding of a normalised float32 pixel may come to lie."""


class Preprocessing(Record, frozen=True):
    """The input format of a source network.

    ``source = (image * (high - low) + low - mean) / std``, by channel.

    Attributes:
        layout: ``"nchw"`` or ``"nhwc"`` (channels last).
        channel_order: ``"rgb"`` or ``"bgr"``.
        range: (low, high), the values of a black and of a white pixel before mean and std.
        mean: One per channel in the source's channel order, in units of the range; empty for 0.
        std: One per channel in that order, above 0; empty for 1.

    Raises:
        UsageError: A range of no width, a std that is not positive, or a value that is
            not finite.
    """

    layout: Literal["nchw", "nhwc"] = "nchw"
    channel_order: Literal["rgb", "bgr"] = "rgb"
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.layout not in ("nchw", "nhwc") or self.channel_order not in ("rgb", "bgr"):
            raise UsageError(
                f"No such input format: {self.layout} {self.channel_order}.",
                "The layout is nchw or nhwc, the channel order rgb or bgr.",
            )
        if not all(map(math.isfinite, (*self.range, *self.mean, *self.std))):
            raise UsageError(
                "Range, mean and std must be finite numbers.", "Give numbers such as 0.485."
            )
        if not self.range[0] < self.range[1]:
            raise UsageError(
                f"The input range {self.range[0]:g} to {self.range[1]:g} has no width.",
                "Give the value of black, then that of white, for example 0,255.",
            )
        if any(value <= 0 for value in self.std):
            raise UsageError(
                f"A std must be above 0, not {min(self.std):g}.",
                "Images are divided by it; leave --std out to divide by nothing.",
            )

    def __str__(self) -> str:
        """Say in words what the source was fed, for a person to check."""
        low, high = self.range
        parts = [self.layout.upper(), self.channel_order.upper(), f"values {low:g} to {high:g}"]
        for what, values in (("less the mean", self.mean), ("over the deviation", self.std)):
            if values:
                parts.append(f"{what} {' '.join(f'{value:g}' for value in dict.fromkeys(values))}")
        return ", ".join(parts)

    def check(self, channels: int) -> None:
        """Refuse a format that images of so many channels cannot have.

        Raises:
            UsageError: Another number of means or deviations; BGR without three channels.
        """
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != channels:
                raise UsageError(
                    f"--{name} has {len(values)} values and images have {channels} channels.",
                    f"Give {channels}, in the channel order of the source.",
                )
        if self.channel_order == "bgr" and channels != 3:
            raise UsageError(
                f"Images of {channels} channels are not BGR.", "Leave --channel-order out."
            )

    def affine(self, channels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (scale, shift), one per channel in the source's order.

        ``source = image * scale + shift``, in float64.

        Raises:
            UsageError: As :meth:`check`.
        """
        self.check(channels)
        low, high = self.range
        mean = np.array(self.mean or [0.0] * channels)
        std = np.array(self.std or [1.0] * channels)
        return (high - low) / std, (low - mean) / std


def from_images(images: NDArray[Any], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return images as the source network takes them.

    Args:
        images: [batch, C, H, W] in [0, 1], RGB or grey.
        preprocessing: Of the source.

    Returns:
        float32, in the layout and channel order of the source; computed in float64.

    Raises:
        InputError: Not four axes, or not of numbers.
        UsageError: As :meth:`Preprocessing.check`.
    """
    _check_array(images, "images")
    scale, shift = preprocessing.affine(images.shape[1])
    x = images.astype(np.float64)
    if preprocessing.channel_order == "bgr":
        x = x[:, ::-1]
    x = x * scale[:, None, None] + shift[:, None, None]
    if preprocessing.layout == "nhwc":
        x = x.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(x, dtype=np.float32)


def to_images(source: NDArray[Any], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return what the source network takes as images; the inverse of :func:`from_images`.

    Args:
        source: Four axes, in the layout, channel order and units of the source; integers or
            floats.
        preprocessing: Of the source.

    Returns:
        float32 [batch, C, H, W] in [0, 1]; what rounding puts outside by up to :data:`SLACK` is
        clipped.

    Raises:
        InputError: Not four axes, not of numbers, or values outside the source's range.
        UsageError: As :meth:`Preprocessing.check`.
    """
    _check_array(source, "input in the source's format")
    x = source.astype(np.float64)
    if preprocessing.layout == "nhwc":
        x = x.transpose(0, 3, 1, 2)
    scale, shift = preprocessing.affine(x.shape[1])
    x = (x - shift[:, None, None]) / scale[:, None, None]
    if preprocessing.channel_order == "bgr":
        x = x[:, ::-1]
    if x.size and not (x.min() >= -SLACK and x.max() <= 1 + SLACK):  # NaN, too
        low, high = preprocessing.range
        raise InputError(
            f"The input is outside what the source was fed: taken back to the range {low:g} to "
            f"{high:g}, its values are {x.min() * (high - low) + low:g} to "
            f"{x.max() * (high - low) + low:g}.",
            "Give it as the source network takes it, with its range, mean and std.",
        )
    return np.ascontiguousarray(x.clip(0.0, 1.0), dtype=np.float32)


def _check_array(array: NDArray[Any], what: str) -> None:
    if array.ndim != 4 or array.dtype.kind not in "uif":
        raise InputError(
            f"The {what} must be four axes of numbers, not {array.dtype} {list(array.shape)}.",
            "Put a batch axis first: array[None].",
        )
