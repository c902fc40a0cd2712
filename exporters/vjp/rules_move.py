"""Rules of ops that move numbers and change none."""

from __future__ import annotations

import numpy as np

from ccn_deploy.exporters.vjp.rules_elementwise import Owed
from ccn_deploy.exporters.vjp.table import rule
from ccn_deploy.exporters.vjp.tape import Gradient, Site


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(at: Site, g: Gradient) -> Owed:
    return [Gradient(at.shaped(at.whole(g), at.shape(at.x)))]


@rule("Transpose")
def _transpose(at: Site, g: Gradient) -> Owed:
    perm = at.attribute("perm") or list(range(at.rank(at.x)))[::-1]
    back = [0, *(int(axis) + 1 for axis in np.argsort(perm))]
    return [Gradient(at.add("Transpose", at.whole(g), perm=back))]


@rule("Concat")
def _concat(at: Site, g: Gradient) -> Owed:
    axis = at.attribute("axis") % at.rank(at.y)
    sizes = [at.sizes(name, [axis])[0] for name in at.node.inputs]
    needed = [i for i in range(len(sizes)) if at.needed(i)]
    tensor = at.whole(g)
    if len(sizes) == 1:
        return [Gradient(tensor)]
    if len(needed) > 1:
        parts = at.many("Split", [tensor, at.ints(*sizes)], outputs=len(sizes), axis=axis + 1)
        return [Gradient(part) for part in parts]
    found: list[Gradient | None] = [None] * len(sizes)
    for index in needed:
        start = sum(sizes[:index])
        found[index] = Gradient(_cut(at, tensor, axis, start, start + sizes[index]))
    return found


def _cut(at: Site, tensor: str, axis: int, start: int, end: int) -> str:
    """Return a range of a gradient along an axis of the forward tensor."""
    return at.add("Slice", tensor, at.ints(start), at.ints(end), at.ints(axis + 1))


@rule("Split")
def _split(at: Site, g: Gradient) -> Owed:
    axis = at.attribute("axis", 0) % at.rank(at.x)
    at.sizes(at.x, [axis])
    parts = [
        _zeros(at, tensor) if gradient is None else at.whole(gradient)
        for tensor, gradient in zip(at.node.outputs, at.incoming, strict=True)
    ]
    return [Gradient(at.add("Concat", *parts, axis=axis + 1))]


def _zeros(at: Site, tensor: str) -> str:
    """Return zeros [candidates, *S] for a forward tensor of shape S."""
    shape = at.add(
        "Concat", at.tape.candidates(), at.add("Shape", tensor), part="zeros.shape", axis=0
    )
    return at.add("Expand", at.number(0), shape, part="zeros")


@rule("Expand")
def _expand(at: Site, g: Gradient) -> Owed:
    return [at.sum_like(at.whole(g), 0)]


@rule("Tile", limits="constant repeats")
def _tile(at: Site, g: Gradient) -> Owed:
    """Give the copies axes of their own and add up over those."""
    tensor, shape = at.whole(g), at.shape(at.x)
    repeats = at.integers(1, "repeats")
    for axis, count in enumerate(repeats):
        if count == 1:
            continue
        # Axes before this one have been added up, those behind it have not.
        behind = [
            size * times if isinstance(size, int) else size
            for size, times in zip(shape[axis + 1 :], repeats[axis + 1 :], strict=True)
        ]
        split = (*shape[:axis], count, *shape[axis:][:1], *behind)
        tensor = at.summed(at.shaped(tensor, split), [axis], keepdims=False)
    return [Gradient(tensor)]


@rule("DepthToSpace")
def _depth_to_space(at: Site, g: Gradient) -> Owed:
    block = at.attribute("blocksize")
    channels, high, wide = at.sizes(at.x)
    inner = channels // block**2
    folded = at.fold(at.whole(g), [inner, high, block, wide, block])
    depth_first = at.attribute("mode", "DCR") == "DCR"
    perm = [0, 3, 5, 1, 2, 4] if depth_first else [0, 1, 3, 5, 2, 4]
    back = at.add("Transpose", folded, perm=perm)
    return [Gradient(at.unfold(back, [channels, high, wide]))]


@rule("SpaceToDepth")
def _space_to_depth(at: Site, g: Gradient) -> Owed:
    block = at.attribute("blocksize")
    channels, high, wide = at.sizes(at.x)
    folded = at.fold(at.whole(g), [block, block, channels, high // block, wide // block])
    back = at.add("Transpose", folded, perm=[0, 3, 4, 1, 5, 2])
    return [Gradient(at.unfold(back, [channels, high, wide]))]


@rule("Pad", limits="constant amounts")
def _pad(at: Site, g: Gradient) -> Owed:
    from ccn_deploy.exporters.vjp.rules_pick import along

    rank = at.rank(at.x)
    amounts = at.integers(1, "amounts")
    axes = [a % rank for a in at.integers(3, "axes")] if at.given(3) else list(range(rank))
    tensor = at.whole(g)
    mode = at.attribute("mode", "constant")
    for index, axis in enumerate(axes):
        before, behind = amounts[index], amounts[index + len(axes)]
        if not (before or behind):
            continue
        size = at.sizes(at.x, [axis])[0]
        if mode == "constant":
            tensor = _unpad(at, tensor, axis, (before, behind))
        else:
            source = np.pad(np.arange(size), (before, behind), mode=mode)
            tensor = along(at, tensor, axis, source, size)
    return [Gradient(tensor)]


def _unpad(at: Site, tensor: str, axis: int, amounts: tuple[int, int]) -> str:
    """Cut off what was padded, and pad what was cut off."""
    before, behind = amounts
    if max(before, behind) > 0:
        (size,) = at.sizes(at.x, [axis])
        start = max(before, 0)
        end = start + size + min(before, 0) + min(behind, 0)
        tensor = _cut(at, tensor, axis, start, end)
    return padded(at, tensor, axis, max(-before, 0), max(-behind, 0))


def padded(at: Site, tensor: str, axis: int, before: int, behind: int) -> str:
    """Pad a gradient with zeros along an axis of the forward tensor."""
    if not (before or behind):
        return tensor
    amounts = np.zeros((2, at.rank(at.x) + 1), dtype=np.int64)
    amounts[:, axis + 1] = before, behind
    return at.add("Pad", tensor, at.array(amounts.reshape(-1), "amounts"))


@rule("Trilu", limits="a constant diagonal")
def _trilu(at: Site, g: Gradient) -> Owed:
    inputs = [at.whole(g)]
    if at.given(1):
        inputs.append(at.node.inputs[1])
    return [Gradient(at.add("Trilu", *inputs, upper=at.attribute("upper", 1)))]
