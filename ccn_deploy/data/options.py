"""How data of one's own become images of a network: :class:`DataOptions`, :class:`ModelInput`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from ccn_deploy.errors import UsageError, unknown

RESIZES = ("shortest", "stretch", "none")
CROPS = ("center", "none")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box")
LAYOUTS = ("nchw", "nhwc")
LARGEST_SIDE = 8192

FOLDER_OPTIONS = ("resize", "crop", "interpolation", "size")
NPZ_OPTIONS = ("layout", "images_key", "labels_key")


@dataclass(frozen=True)
class DataOptions:
    """How files of any size become images of the network's size; None is the default of the data.

    Attributes:
        resize: ``"shortest"`` (the default): the aspect is kept, and the image is as small as
            covers the network's size; ``"shortest:256"``: its shorter side gets 256 pixels;
            ``"stretch"``: to the network's size, whatever the aspect; ``"none"``: not at all.
        crop: ``"center"`` (the default): the middle of the resized image; ``"none"``: the resized
            image must have the network's size.
        interpolation: ``"bilinear"`` (the default), ``"nearest"``, ``"bicubic"``, ``"lanczos"`` or
            ``"box"``, each with antialiasing where it shrinks, except ``"nearest"``.
        size: (height, width) to make; by default the network's.
        layout: ``"nchw"`` or ``"nhwc"``, the order of axes in an .npz file whose own cannot be
            told from its shape.
        images_key: Name of the array of images in an .npz file that has several.
        labels_key: Name of its array of labels.

    Raises:
        UsageError: A word that is none of these, or a size that is not from 1 to 8192.
    """

    resize: str | None = None
    crop: str | None = None
    interpolation: str | None = None
    size: tuple[int, int] | None = None
    layout: str | None = None
    images_key: str | None = None
    labels_key: str | None = None

    def __post_init__(self) -> None:
        if self.resize is not None:
            parse_resize(self.resize)
        for kind, value, known in (
            ("crop", self.crop, CROPS),
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("layout", self.layout, LAYOUTS),
        ):
            if value is not None and value not in known:
                raise unknown(kind, value, known)
        for side in self.size or ():
            _check_side(side, "size")

    def refuse(self, names: Iterable[str], data: str, meant_for: str) -> None:
        """Refuse options that mean nothing for some data, rather than ignore them.

        Args:
            names: Of the attributes that mean nothing.
            data: What the data are called.
            meant_for: What the options are for.

        Raises:
            UsageError: One of them is given.
        """
        given = [f.name for f in fields(self) if f.name in names and getattr(self, f.name)]
        if given:
            option = {"images_key": "npz-images", "labels_key": "npz-labels"}.get(
                given[0], given[0]
            )
            raise UsageError(
                f"--{option} is for {meant_for}, and {data} is none.", f"Leave out --{option}."
            )


DEFAULT = DataOptions()
"""Nothing said."""


@dataclass(frozen=True)
class ModelInput:
    """What a network takes and tells apart, as far as data are made to fit it.

    Attributes:
        input_shape: (channels, height, width).
        class_names: One per logit, in order; empty if classes are not to be matched.
    """

    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()


def parse_resize(text: str) -> tuple[str, int | None]:
    """Read ``"shortest:256"`` as ("shortest", 256), and a mode alone as (mode, None).

    Raises:
        UsageError: No such mode, or a number that is no side of an image.
    """
    mode, colon, side = text.partition(":")
    if mode not in RESIZES or (colon and mode != "shortest"):
        raise unknown("resize", text, (*RESIZES, "shortest:256"))
    if not colon:
        return mode, None
    if not (side.isascii() and side.isdigit() and len(side) < 6):
        raise unknown("resize", text, (*RESIZES, "shortest:256"))
    return mode, _check_side(int(side), "resize")


def _check_side(side: int, what: str) -> int:
    if not 1 <= side <= LARGEST_SIDE:
        raise UsageError(
            f"{what}: {side} pixels are no side of an image.", f"Give 1 to {LARGEST_SIDE}."
        )
    return side
