"""What a user says of a source network's input, for a file cannot say most of it."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from ccn_deploy.bundle.preprocessing import Preprocessing
from ccn_deploy.errors import UsageError

Layout = Literal["nchw", "nhwc"]

_COLOURS = 3
_PIXEL_CHANNELS = (1, _COLOURS)
"""Sizes of an axis that can be nothing but the channels of a picture."""

LARGEST_SIDE = 1 << 14
"""Pixels of the longest side that is taken in; channels, too."""

LARGEST_BATCH = 1024
"""The largest batch that a file may be fixed to."""


@dataclass(frozen=True)
class Intake:
    """What a source network takes and returns, as far as its owner says.

    The source is fed ``(image * (high - low) + low - mean) / std``, image being in [0, 1].

    Attributes:
        input_layout: ``"nchw"`` or ``"nhwc"``; None to tell it from the file where that is certain.
        input_range: (low, high): the values of a black and of a white pixel.
        mean: One per channel in the source's order, in units of the range; one number for all
            channels; empty for 0.
        std: One per channel, or one number for all; empty for 1.
        channel_order: ``"rgb"`` or ``"bgr"``.
        input_size: (height, width), for files in which they are open.
        input: Name of the input with the images, where there are several.
        output: Name of the output to take; the first if empty.

    Raises:
        UsageError: A range without width, a deviation that is not positive, a number that is not
            finite, a size that is none.
    """

    input_layout: Layout | None = None
    input_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channel_order: Literal["rgb", "bgr"] = "rgb"
    input_size: tuple[int, int] | None = None
    input: str = ""
    output: str = ""

    def __post_init__(self) -> None:
        Preprocessing(  # checks its values
            layout=self.input_layout or "nchw",
            channel_order=self.channel_order,
            range=self.input_range,
            mean=self.mean,
            std=self.std,
        )
        if self.input_size is not None and any(
            not 1 <= side <= LARGEST_SIDE for side in self.input_size
        ):
            raise UsageError(
                f"Images of {self.input_size[0]}x{self.input_size[1]} pixels are not taken in.",
                f"Give HEIGHTxWIDTH, each from 1 to {LARGEST_SIDE}.",
            )

    def preprocessing(self, layout: Layout, channels: int) -> Preprocessing:
        """Return the record of the source's input format.

        Args:
            layout: Of the source.
            channels: Of its images; a single mean or std is meant for all of them.

        Raises:
            UsageError: Another number of means or deviations than channels; BGR without three.
        """
        made = Preprocessing(
            layout=layout,
            channel_order=self.channel_order,
            range=self.input_range,
            mean=_for_each(self.mean, channels),
            std=_for_each(self.std, channels),
        )
        made.check(channels)
        return made

    def replaced(self, **given: Any) -> Intake:
        """Return this with the fields that are given and not None: options beat a file."""
        return dataclasses.replace(self, **{k: v for k, v in given.items() if v is not None})


def parse_numbers(text: str, option: str, count: int | None = None) -> tuple[float, ...]:
    """Read ``"0.485,0.456,0.406"``.

    Args:
        text: Numbers with commas between them.
        option: Named in the error: ``"--mean"``.
        count: How many there must be, if that is known.

    Raises:
        UsageError: No numbers, or another count.
    """
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not all(map(math.isfinite, numbers)) or len(numbers) != (count or max(1, len(numbers))):
        raise UsageError(
            f"{option} takes {count or 'finite'} numbers with commas between them, not {text!r}.",
            f"For example: {option} {'0,255' if count == 2 else '0.485,0.456,0.406'}",
        )
    return numbers


def parse_size(text: str) -> tuple[int, int]:
    """Read ``"224x224"``: height, then width.

    Raises:
        UsageError: Anything else.
    """
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text)
    if match is None:
        raise UsageError(
            f"--input-size takes HEIGHTxWIDTH, not {text!r}.", "For example: --input-size 224x224"
        )
    return int(match[1]), int(match[2])


def image_shape(
    sizes: tuple[int | None, ...], intake: Intake, name: str
) -> tuple[Layout, tuple[int, int, int]]:
    """Tell layout and image shape from the declared sizes of an input.

    Args:
        sizes: Of the four axes; None where one is open.
        intake: What the user says.
        name: Of the input, for errors.

    Returns:
        The layout and (channels, height, width).

    Raises:
        UsageError: It takes no images, or not enough is known, or what is said contradicts it.
    """
    shown = "[" + ", ".join("?" if size is None else str(size) for size in sizes) + "]"
    if len(sizes) != 4:
        raise UsageError(
            f"Input {name!r} takes {shown}, not a batch of images of four axes.",
            "Only networks that classify images can be exported.",
        )
    layout = intake.input_layout or _certain_layout(sizes)
    if layout is None:
        raise UsageError(
            f"Input {name!r} takes {shown}: which axis holds the channels cannot be told.",
            "Say so with --input-layout nchw or --input-layout nhwc.",
        )
    first, last = sizes[1], sizes[3]
    channels, other = (first, last) if layout == "nchw" else (last, first)
    if other == _COLOURS and channels is not None and channels not in _PIXEL_CHANNELS:
        raise UsageError(
            f"Input {name!r} takes {shown}: in the layout {layout} these are images of {channels} "
            f"channels, {_COLOURS} pixels {'wide' if layout == 'nchw' else 'high'}.",
            "Leave out --input-layout: the file itself says where its channels are.",
        )
    sides = (sizes[2], sizes[3]) if layout == "nchw" else (sizes[1], sizes[2])
    if channels is None:
        raise UsageError(
            f"Input {name!r} takes {shown}: the number of channels is open.",
            "Export the file with a fixed number of channels, or check --input-layout.",
        )
    asked = intake.input_size or (None, None)
    height, width = (side or wish for side, wish in zip(sides, asked, strict=True))
    if height is None or width is None:
        raise UsageError(
            f"Input {name!r} takes {shown}: height and width are open.",
            "Say which size it is deployed with: --input-size HEIGHTxWIDTH.",
        )
    if max(channels, height, width) > LARGEST_SIDE or (sizes[0] or 1) > LARGEST_BATCH:
        raise UsageError(
            f"Input {name!r} takes {shown}, which are no images.",
            f"At most {LARGEST_SIDE} pixels a side and batches of {LARGEST_BATCH} are taken in.",
        )
    if intake.input_size not in (None, (height, width)):
        raise UsageError(
            f"Input {name!r} takes {shown}, not images of {asked[0]}x{asked[1]} pixels.",
            "Check --input-size, --preprocessing and --input-layout.",
        )
    return layout, (channels, height, width)


def _certain_layout(sizes: tuple[int | None, ...]) -> Layout | None:
    """Return the layout where one axis can be the channels' and the other cannot."""
    first, last = (sizes[axis] in _PIXEL_CHANNELS for axis in (1, 3))
    if first and not last:
        return "nchw"
    if last and not first:
        return "nhwc"
    return None


def _for_each(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values
