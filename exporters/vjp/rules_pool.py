"""Rules of pools."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ccn_deploy.exporters.vjp.rules_elementwise import Owed
from ccn_deploy.exporters.vjp.rules_reduce import evenly, spread
from ccn_deploy.exporters.vjp.table import rule
from ccn_deploy.exporters.vjp.tape import Gradient, Site
from ccn_deploy.exporters.vjp.window import Window, window_of
from ccn_deploy.graph.evaluate import GraphModule


@rule("MaxPool")
def _max_pool(at: Site, g: Gradient) -> Owed:
    """Give each window's gradient to its maximum; of equal ones to the first, as PyTorch does.

    Ties are everywhere: a constant background makes whole windows equal. MaxPool could return
    where its maxima are, but TensorRT takes no such graph.
    """
    window = window_of(at, at.attribute("kernel_shape"))
    tiled = (
        len(window.kernel) == 2
        and window.kernel == window.strides
        and set(window.dilations) == {1}
        and set(window.begin) == {0}
        and min(window.missed()) >= 0
    )
    return [_tiled_max(at, g, window) if tiled else _sliding_max(at, g, window)]


def _tiled_max(at: Site, g: Gradient, window: Window) -> Gradient:
    """Enlarge maxima and gradients over their windows; a mask says which position is the one.

    Among the positions that hold the maximum, a second max-pool picks the one of highest rank.
    """
    kernel, border = window.kernel, window.missed()
    tiles = [size - miss for size, miss in zip(window.inner, border, strict=True)]
    ranks = np.arange(math.prod(kernel), 0, -1, dtype=np.float32).reshape(kernel)
    rank = at.array(np.tile(ranks, window.outer), "rank")
    x = at.x
    if any(border):
        x = at.add("Slice", x, at.ints(0, 0), at.ints(*tiles), at.ints(2, 3), part="tiles")

    maximal = at.add("Equal", x, enlarged(at, at.y, kernel), part="maximal")
    ranked = at.add("Mul", at.floats(maximal), rank, part="ranked")
    highest = at.add("MaxPool", ranked, part="highest", kernel_shape=kernel, strides=kernel)
    first = at.add("Equal", ranked, enlarged(at, highest, kernel), part="first")
    mask = at.add("Cast", first, part="mask", to=1)

    channels = at.sizes(at.x, [1])
    wide = enlarged(at, at.fold(at.whole(g), at.sizes(at.y)), kernel)
    inside = Gradient(at.unfold(wide, [*channels, *tiles]), mask)
    if not any(border):
        return inside
    ends = at.ints(*[0] * 5, *[0] * 3, *border)
    return Gradient(at.add("Pad", at.whole(inside), ends))


def enlarged(at: Site, tensor: str, kernel: Sequence[int]) -> str:
    """Repeat every value of [N, C, H, W] over its window."""
    return at.add(
        "Resize",
        tensor,
        "",
        at.array(np.array([1, 1, *kernel], dtype=np.float32), "scales"),
        part="enlarged",
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _sliding_max(at: Site, g: Gradient, window: Window) -> Gradient:
    """Compare the maximum with each place of its window; add up by a transposed convolution."""
    places = list(np.ndindex(*window.kernel))
    spatial = len(window.kernel)
    axes = list(range(2, 2 + spatial))
    x = _with_room(at, window)
    matches = []
    for place in places:
        starts = [i * d for i, d in zip(place, window.dilations, strict=True)]
        ends = [
            s + (n - 1) * t + 1
            for s, n, t in zip(starts, window.outer, window.strides, strict=True)
        ]
        cut = at.add(
            "Slice", x, at.ints(*starts), at.ints(*ends), at.ints(*axes), at.ints(*window.strides)
        )
        matches.append(at.add("Unsqueeze", at.add("Equal", cut, at.y), at.ints(2)))
    held = at.floats(at.add("Concat", *matches, axis=2))
    rank = np.arange(len(places), 0, -1, dtype=np.float32).reshape(-1, *[1] * spatial)
    ranked = at.add("Mul", held, at.array(rank, "rank"), part="ranked")
    highest = at.add("ReduceMax", ranked, at.ints(2), keepdims=1, part="highest")
    first = at.add("Cast", at.add("Equal", ranked, highest), part="mask", to=1)

    lifted = at.add("Unsqueeze", at.whole(g), at.ints(3), part="lifted")
    sent = at.add("Mul", lifted, first, part="sent")
    one_hot = np.eye(len(places), dtype=np.float32).reshape(-1, 1, *window.kernel)
    folded = at.fold(sent, [len(places), *window.outer])
    back = at.add(
        "ConvTranspose", folded, at.array(one_hot, "place"), part="conv", **window.transposed()
    )
    return Gradient(at.unfold(back, at.sizes(at.x)))


def _with_room(at: Site, window: Window) -> str:
    """Pad x so that every window lies inside; what is padded is below any maximum."""
    begin, end = window.begin, [max(-miss, 0) for miss in window.missed()]
    if not any([*begin, *end]):
        return at.x
    pads = at.ints(0, 0, *begin, 0, 0, *end)
    return at.add("Pad", at.x, pads, at.number(float(np.finfo(np.float32).min)))


@rule("AveragePool")
def _average_pool(at: Site, g: Gradient) -> Owed:
    """Spread each window's gradient over its positions, weighted as the pool weighs them."""
    window = window_of(at, at.attribute("kernel_shape"))
    weights = _weights(at, window)
    even = bool(np.all(weights == weights.reshape(-1)[0]))
    if not even:
        g = at.scaled(g, at.array(weights, "weights"))
    kernel = np.full((1, 1, *window.kernel), weights.reshape(-1)[0] if even else 1.0)
    folded = at.fold(at.whole(g), [1, *window.outer])
    back = at.add(
        "ConvTranspose", folded, at.array(kernel, "kernel"), part="conv", **window.transposed()
    )
    return [Gradient(at.unfold(back, at.sizes(at.x)))]


def _weights(at: Site, window: Window) -> np.ndarray:
    """Return the weight of one position in each window: the pool of ones, over how many it has.

    Asking the op itself leaves one place that knows what counts as a position.
    """
    module = GraphModule(at.tape.forward, torch.float64)
    ones = torch.ones(1, 1, *window.inner, dtype=torch.float64)
    (pooled,) = module.apply(at.node, [ones])
    held: np.ndarray = np.ones(())
    for axis, size in enumerate(window.inner):
        starts = np.arange(window.outer[axis]) * window.strides[axis] - window.begin[axis]
        offsets = np.arange(window.kernel[axis]) * window.dilations[axis]
        places = starts[:, None] + offsets
        held = np.multiply.outer(held, ((places >= 0) & (places < size)).sum(1))
    weights: np.ndarray = pooled[0, 0].numpy() / np.maximum(held, 1)
    return weights


@rule("GlobalAveragePool")
def _global_average(at: Site, g: Gradient) -> Owed:
    axes = range(2, at.rank(at.x))
    return [spread(at, at.whole(g), axes, 1 / math.prod(at.sizes(at.x, axes)))]


@rule("GlobalMaxPool")
def _global_max(at: Site, g: Gradient) -> Owed:
    return [evenly(at, at.whole(g), at.y, range(2, at.rank(at.x)))]
