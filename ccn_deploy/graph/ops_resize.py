"""Resizing, as a product with one constant matrix an axis: exact by definition, differentiable."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ccn_deploy.graph.calls import Call, Function, Operator


@lru_cache(maxsize=64)
def _matrix(
    size: int, new: int, scale: float, settings: tuple[tuple[str, Any], ...]
) -> NDArray[np.float64]:
    """Return the weights [new, size] with which pixels of one axis become new ones."""
    get = dict(settings)
    places = _places(size, new, scale, get["coordinates"])
    if get["mode"] == "nearest":
        chosen = _nearest(places, get["nearest"]).clip(0, size - 1)
        weights = np.zeros((new, size))
        weights[np.arange(new), chosen.astype(np.int64)] = 1.0
        return weights
    # Below scale 1 an anti-aliasing kernel is as much wider as the image becomes smaller.
    narrow = min(scale, 1.0) if get["antialias"] else 1.0
    reach = (1 if get["mode"] == "linear" else 2) / narrow
    weights = np.zeros((new, size))
    for row, place in enumerate(places):
        pixels = np.arange(math.floor(place - reach) + 1, math.floor(place + reach) + 1)
        distances = np.abs(pixels - place) * narrow
        found = _linear(distances) if get["mode"] == "linear" else _cubic(distances, get["a"])
        if get["exclude_outside"]:
            found = np.where((pixels >= 0) & (pixels < size), found, 0.0)
        if get["exclude_outside"] or get["antialias"]:
            found = found / found.sum()
        np.add.at(weights[row], pixels.clip(0, size - 1), found)
    return weights


def _places(size: int, new: int, scale: float, coordinates: str) -> NDArray[np.float64]:
    """Return where each new pixel lies among the old ones."""
    at = np.arange(new, dtype=np.float64)
    if coordinates == "asymmetric":
        return at / scale
    if coordinates == "align_corners":
        return at * (size - 1) / (new - 1) if new > 1 else at
    if coordinates == "pytorch_half_pixel" and new == 1:
        return at
    centred = (at + 0.5) / scale - 0.5
    if coordinates == "half_pixel_symmetric":
        return centred + size / 2 * (1 - new / (scale * size))
    return centred


def _nearest(places: NDArray[np.float64], mode: str) -> NDArray[np.float64]:
    if mode == "floor":
        return np.floor(places)
    if mode == "ceil":
        return np.ceil(places)
    return np.floor(places + 0.5) if mode == "round_prefer_ceil" else np.ceil(places - 0.5)


def _linear(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    return (1 - distances).clip(0)


def _cubic(d: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


COORDINATES = (
    "align_corners", "asymmetric", "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel",
)  # fmt: skip
"""The ways to lay the new pixels over the old ones that are supported."""


def _resize(call: Call) -> Function:
    old = call.op == "Upsample" or call.opset < 11
    coordinates = call.get("coordinate_transformation_mode", "half_pixel")
    mode = call.get("mode", "nearest")
    settings = tuple(
        {
            "coordinates": "asymmetric" if old else coordinates,
            "mode": "linear" if mode in ("linear", "bilinear") else mode,
            "nearest": "floor" if old else call.get("nearest_mode", "round_prefer_floor"),
            "antialias": bool(call.get("antialias", 0)),
            "exclude_outside": bool(call.get("exclude_outside", 0)),
            "a": call.get("cubic_coeff_a", -0.75),
        }.items()
    )
    if not old and coordinates not in COORDINATES:
        raise call.refuse(f"the coordinates {coordinates!r} are not supported")
    policy = call.get("keep_aspect_ratio_policy", "stretch")
    axes: list[int] | None = call.get("axes")
    factors = call.list_at(1 if old else 2, "scales")
    sizes = call.list_at(3)

    def run(*inputs: Tensor) -> Tensor:
        x = inputs[0]
        along = [axis % x.dim() for axis in axes] if axes else list(range(x.dim()))
        shape = [x.shape[axis] for axis in along]
        new, scales = sizes(inputs), factors(inputs)
        if new:
            scales = [after / before for before, after in zip(shape, new, strict=True)]
            if policy != "stretch":
                scale = (min if policy == "not_larger" else max)(scales)
                scales = [scale] * len(shape)
                new = [math.floor(scale * before + 0.5) for before in shape]
        else:
            scales = scales or [1.0] * len(shape)
            new = [math.floor(n * s) for n, s in zip(shape, scales, strict=True)]
        for axis, size, after, scale in zip(along, shape, new, scales, strict=True):
            if size != after or scale != 1:
                weights = torch.from_numpy(_matrix(size, after, float(scale), settings))
                weights = weights.to(x.device, x.dtype)
                x = (x.movedim(axis, -1) @ weights.t()).movedim(-1, axis)
        return x

    return run


OPERATORS: dict[str, Operator] = {"Resize": _resize, "Upsample": _resize}
