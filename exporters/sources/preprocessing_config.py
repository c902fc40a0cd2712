"""Preprocessing as Hugging Face's and timm's files tell it.

* ``preprocessor_config.json`` of Hugging Face Transformers: ``do_rescale``, ``rescale_factor``,
  ``rescale_offset``, ``do_normalize``, ``image_mean``, ``image_std``, ``do_flip_channel_order``;
  ``size`` as a number, a ``shortest_edge`` or ``height`` and ``width``; ``do_center_crop``,
  ``crop_size``, ``crop_pct``, ``resample``.
* ``config.json`` of timm, or its ``pretrained_cfg`` or ``default_cfg`` alone: ``mean``, ``std``,
  ``input_size``, ``interpolation``, ``crop_pct``, ``crop_mode``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from ccn_deploy.errors import UsageError
from ccn_deploy.exporters.sources.intake import Intake

LARGEST = 1 << 20
"""Bytes of the largest file that is read."""

RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Names of Pillow's filters by their number, which is what Hugging Face writes."""

CROPPED_BELOW = 384
"""Pixels of the side below which ConvNeXt's processor enlarges and crops; above it only resizes."""

HINT = "Give Hugging Face's preprocessor_config.json or timm's config.json."


@dataclass(frozen=True)
class SourcePreprocessing:
    """What a file says of a network's input.

    Attributes:
        intake: What goes into the graph.
        resize: Of evaluation images: the shorter side, or (height, width); None if not said.
        crop: (height, width) of the middle that is then kept; None if all of it is.
        interpolation: One of :data:`RESAMPLE`; empty if not said.
    """

    intake: Intake
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: str = ""

    def facts(self) -> dict[str, Any]:
        """Return how evaluation images are made, as it stands in a model card."""
        named = {"resize": self.resize, "crop": self.crop, "interpolation": self.interpolation}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in named.items()
            if value
        }


def read_preprocessing(path: str | os.PathLike[str]) -> SourcePreprocessing:
    """Read either kind of file.

    Raises:
        UsageError: It cannot be read, is too large, is of neither kind, or a value is none.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise UsageError(f"{path} holds no preprocessing: it is no JSON object.", HINT)
    for key in ("pretrained_cfg", "default_cfg"):
        if isinstance(document.get(key), dict):
            document = document[key]
    if "image_mean" in document or "do_rescale" in document or "do_normalize" in document:
        return _from_hugging_face(_convert(document, _HuggingFace, path))
    if "mean" in document and "std" in document:
        return _from_timm(_convert(document, _Timm, path))
    keys = ", ".join(sorted(map(str, document))[:8]) or "nothing"
    raise UsageError(f"{path} holds no preprocessing that is known; it has {keys}.", HINT)


def read_json(path: str | os.PathLike[str], limit: int = LARGEST) -> Any:
    """Read a JSON file of bounded size.

    Raises:
        UsageError: It cannot be read, is too large, or is no JSON.
    """
    try:
        return msgspec.json.decode(read_text(path, limit))
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}.", "Check the file.") from error


def read_text(path: str | os.PathLike[str], limit: int = LARGEST) -> str:
    """Read a UTF-8 file of bounded size.

    Raises:
        UsageError: It cannot be read, is too large, or is no UTF-8.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text.", "Save it as UTF-8.") from error
    if len(data) > limit:
        raise UsageError(f"{path} has more than {limit:,} bytes.", "Check the path.")
    return text


class _Sides(msgspec.Struct):
    """Hugging Face's later spelling of a size."""

    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None


_Size = int | tuple[int, int] | _Sides


class _HuggingFace(msgspec.Struct):
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    rescale_offset: bool = False
    do_normalize: bool = True
    image_mean: tuple[float, ...] | float | None = None
    image_std: tuple[float, ...] | float | None = None
    do_flip_channel_order: bool = False
    do_resize: bool = True
    size: _Size | None = None
    do_center_crop: bool = False
    crop_size: _Size | None = None
    crop_pct: float | None = None
    resample: int | str | None = None


class _Timm(msgspec.Struct):
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int] | None = None
    interpolation: str = ""
    crop_pct: float | None = None
    crop_mode: str = "center"


def _from_hugging_face(config: _HuggingFace) -> SourcePreprocessing:
    low, high = 0.0, 255.0
    if config.do_rescale:
        # 255 times the 1/255 that is written with sixteen digits is 1.
        high = round(high * config.rescale_factor, 9)
    if config.do_rescale and config.rescale_offset:
        low, high = low - 1, high - 1
    resize = _size(config.size, "size") if config.do_resize else None
    crop = _square(_size(config.crop_size, "crop_size")) if config.do_center_crop else None
    if config.crop_pct is not None and isinstance(resize, int) and crop is None:
        crop = _square(resize)
        if resize < CROPPED_BELOW:
            resize = int(resize / _share(config.crop_pct))
        else:
            resize, crop = crop, None
    taken = crop or (resize if isinstance(resize, tuple) else None)
    order: Literal["rgb", "bgr"] = "bgr" if config.do_flip_channel_order else "rgb"
    intake = Intake(
        input_range=(low, high),
        mean=_numbers(config.image_mean) if config.do_normalize else (),
        std=_numbers(config.image_std) if config.do_normalize else (),
        channel_order=order,
        input_size=taken,
    )
    return SourcePreprocessing(intake, resize, crop, _interpolation(config.resample))


def _from_timm(config: _Timm) -> SourcePreprocessing:
    size = config.input_size[1:] if config.input_size else None
    intake = Intake(mean=config.mean, std=config.std, input_size=size)
    resize: int | tuple[int, int] | None = size
    crop = None
    if size is not None and config.crop_pct is not None and config.crop_mode == "center":
        scaled = (math.floor(side / _share(config.crop_pct)) for side in size)
        height, width = scaled
        resize = height if height == width else (height, width)
        crop = size
    return SourcePreprocessing(intake, resize, crop, _interpolation(config.interpolation))


def _size(size: _Size | None, name: str) -> int | tuple[int, int] | None:
    """Return the shorter side, or (height, width), in any of the spellings."""
    if not isinstance(size, _Sides):
        return size
    if size.shortest_edge is not None:
        return size.shortest_edge
    if size.height is None or size.width is None:
        raise UsageError(
            f"{name!r} has neither height and width nor shortest_edge.", "Check the file."
        )
    return size.height, size.width


def _square(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def _share(crop: float) -> float:
    if not 0.1 <= crop <= 1:
        raise UsageError(f"crop_pct is {crop:g}, not a share from 0.1 to 1.", "Check the file.")
    return crop


def _numbers(value: tuple[float, ...] | float | None) -> tuple[float, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, float) else value


def _interpolation(value: int | str | None) -> str:
    if isinstance(value, int):
        value = RESAMPLE[value] if 0 <= value < len(RESAMPLE) else str(value)
    if value and value not in RESAMPLE:
        if value == "random":  # timm's word for training; it evaluates with bilinear
            return "bilinear"
        raise UsageError(f"There is no interpolation {value!r}.", f"Known: {', '.join(RESAMPLE)}.")
    return value or ""


S = TypeVar("S", bound=msgspec.Struct)


def _convert(document: Mapping[str, Any], kind: type[S], path: str | os.PathLike[str]) -> S:
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path} holds a value that is none: {error}.", HINT) from error
