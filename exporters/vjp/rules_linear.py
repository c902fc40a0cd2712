"""Rules of matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.exporters.vjp.rules_elementwise import Owed, owed
from ccn_deploy.exporters.vjp.table import rule
from ccn_deploy.exporters.vjp.tape import Gradient, Site
from ccn_deploy.exporters.vjp.window import Window, window_of

WIDE = 8
"""Channels from which on a transposed convolution is written as a plain one.

ONNX Runtime's CPU kernels compute at least a block of channels: 32 -> 1 as a Conv took nine times
as long as the ConvTranspose, 64 -> 64 was a tenth faster."""


def swapped(at: Site, index: int) -> str:
    """Return a matrix input of two axes or more with its last two swapped."""
    name, value = at.node.inputs[index], at.value(index)
    if value is not None:
        return at.array(value.swapaxes(-1, -2), "swapped")
    rank = at.rank(name)
    return at.add("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])


@rule("MatMul")
def _matmul(at: Site, g: Gradient) -> Owed:
    ranks = [at.rank(name) for name in at.node.inputs]
    if min(ranks) < 2:
        return _vector_product(at, g, ranks)
    tensor = at.whole(g)
    found: list[Gradient | None] = [None, None]
    if at.needed(0):
        found[0] = _batched(at, at.add("MatMul", tensor, swapped(at, 1)), 0)
    if at.needed(1):
        found[1] = _batched(at, at.add("MatMul", swapped(at, 0), tensor), 1)
    return found


def _batched(at: Site, tensor: str, index: int) -> Gradient:
    """Add up over the leading axes along which a matrix was broadcast."""
    shape = at.shape(at.node.inputs[index])
    spread = at.shape(at.y)
    return Gradient(at.sum_to(tensor, shape, (*spread[:-2], *shape[-2:])))


def _vector_product(at: Site, g: Gradient, ranks: Sequence[int]) -> Owed:
    """Go back through a product with a vector: sums of outer products, by broadcasting."""
    a, b = at.node.inputs
    if ranks == [1, 1]:
        # The output has no axis; the gradient is [candidates].
        lifted = Gradient(at.add("Unsqueeze", at.whole(g), at.ints(1)))
        return [at.scaled(lifted, b), at.scaled(lifted, a)]
    vector = 0 if ranks[0] == 1 else 1
    axis = max(ranks) - 2 if vector == 0 else max(ranks) - 1
    lifted_g = at.add("Unsqueeze", at.whole(g), at.ints(axis + 1))
    row = at.add("Unsqueeze", at.node.inputs[vector], at.ints(1)) if vector == 0 else b
    matrix = at.node.inputs[1 - vector]
    found: list[Gradient | None] = [None, None]
    if at.needed(1 - vector):
        found[1 - vector] = Gradient(at.add("Mul", lifted_g, row))
    if at.needed(vector):
        product = at.add("Mul", lifted_g, matrix)
        summed = at.rank(matrix) - (1 if vector == 0 else 2)
        total = at.summed(product, [summed], keepdims=False)
        shape = at.shape(matrix)
        rest = tuple(size for i, size in enumerate(shape) if i != summed)
        found[vector] = Gradient(at.sum_to(total, at.shape(at.node.inputs[vector]), rest))
    return found


@rule("Gemm")
def _gemm(at: Site, g: Gradient) -> Owed:
    """``y = alpha A' B' + beta C``, where A' and B' may be turned."""
    alpha, beta = at.attribute("alpha", 1.0), at.attribute("beta", 1.0)
    tensor = at.whole(g)
    found: list[Gradient | None] = [None, None, None]
    for own, turned, other_turned in ((0, "transA", "transB"), (1, "transB", "transA")):
        if not at.needed(own):
            continue
        other = at.node.inputs[1 - own]
        if not at.attribute(other_turned, 0):
            other = swapped(at, 1 - own)
        pair = [tensor, other] if own == 0 else [other, tensor]
        product = at.add("MatMul", *pair)
        if at.attribute(turned, 0):
            product = at.add("Transpose", product, perm=[0, 2, 1])
        found[own] = at.times(Gradient(product), alpha)
    if at.needed(2):
        found[2] = owed(at, 2, at.times(g, beta))
    return found


@rule("Einsum", limits="one or two inputs, no ellipsis, no letter twice in one term")
def _einsum(at: Site, g: Gradient) -> Owed:
    equation = at.attribute("equation").replace(" ", "")
    terms, arrow, output = equation.partition("->")
    letters = terms.split(",")
    plain = all(len(set(term)) == len(term) for term in [*letters, output])
    if not arrow or not plain or len(letters) > 2 or "." in equation:
        at.refuse(f"has the equation {equation!r}")
    free = next(letter for letter in "zyxwvutsrqponmlkjihgfedcba" if letter not in equation)
    tensor = at.whole(g)
    found: list[Gradient | None] = []
    for index, term in enumerate(letters):
        others = [i for i in range(len(letters)) if i != index]
        known = set(output).union(*(letters[i] for i in others))
        if not set(term) <= known:
            at.refuse(f"has the equation {equation!r}, which adds up one input alone")
        if not at.needed(index):
            found.append(None)
            continue
        given = ",".join([free + output, *(letters[i] for i in others)])
        inputs = [tensor, *(at.node.inputs[i] for i in others)]
        back = at.add("Einsum", *inputs, equation=f"{given}->{free}{term}")
        found.append(Gradient(back))
    return found


@rule("Conv", limits="kernel not dependent on the images")
def _conv(at: Site, g: Gradient) -> Owed:
    if at.needed(1):
        at.refuse("has a kernel that depends on the images")
    window = window_of(at, at.shape(at.node.inputs[1])[2:])
    folded = at.fold(at.whole(g), at.sizes(at.y))
    back = at.unfold(_transposed(at, window, folded), at.sizes(at.x))
    bias = None
    if at.needed(2):
        bias = Gradient(at.summed(at.whole(g), [0, *range(2, at.rank(at.y))], keepdims=False))
    return [Gradient(back), None, bias]


def _transposed(at: Site, window: Window, folded: str) -> str:
    """Add the transpose of a convolution with respect to its input.

    With stride 1 it is a convolution too, with the kernel transposed, turned by half a circle
    and fully padded, and faster as such unless it is narrow; see :data:`WIDE`.
    """
    kernel, group = at.value(1), at.attribute("group", 1)
    full = window.full_pads()
    wide = at.sizes(at.x, [1])[0] >= WIDE
    if kernel is not None and wide and set(window.strides) == {1} and min(full) >= 0:
        turned = at.array(_turned(kernel, group), "turned")
        plain = {"kernel_shape": window.kernel, "pads": full, "dilations": window.dilations}
        return at.add("Conv", folded, turned, part="conv", group=group, **plain)
    back = window.transposed()
    return at.add("ConvTranspose", folded, at.node.inputs[1], part="conv", group=group, **back)


def _turned(kernel: NDArray[np.float32], group: int) -> NDArray[np.float32]:
    """Swap the channels of [out, in / group, *k] within their groups and reverse all axes of k."""
    out, inner = kernel.shape[:2]
    parts = kernel.reshape(group, out // group, inner, *kernel.shape[2:]).swapaxes(1, 2)
    swapped_channels = parts.reshape(group * inner, out // group, *kernel.shape[2:])
    return np.flip(swapped_channels, axis=tuple(range(2, kernel.ndim)))


@rule("ConvTranspose", limits="kernel not dependent on the images")
def _conv_transpose(at: Site, g: Gradient) -> Owed:
    if at.needed(1):
        at.refuse("has a kernel that depends on the images")
    window = window_of(at, at.shape(at.node.inputs[1])[2:], transposed=True)
    folded = at.fold(at.whole(g), at.sizes(at.y))
    back = at.add(
        "Conv",
        folded,
        at.node.inputs[1],
        group=at.attribute("group", 1),
        kernel_shape=window.kernel,
        strides=window.strides,
        dilations=window.dilations,
        pads=window.pads,
    )
    return [Gradient(at.unfold(back, at.sizes(at.x)))]
