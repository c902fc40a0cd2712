"""Rules of ops that pick numbers by position, or mix those near one: Gather, Slice, Resize."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ccn_deploy.exporters.vjp.rules_elementwise import Owed
from ccn_deploy.exporters.vjp.rules_move import padded
from ccn_deploy.exporters.vjp.table import rule
from ccn_deploy.exporters.vjp.tape import Gradient, Site
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.signature import INPUT


def along(at: Site, tensor: str, axis: int, source: NDArray[np.int64], size: int) -> str:
    """Send a gradient back along an axis from where each position came from.

    Args:
        at: The node.
        tensor: Name of the gradient; its axis has one size a position of ``source``.
        axis: Axis of the forward tensor.
        source: Position in the node's input of each position in its output.
        size: Of the input's axis.
    """
    steps = np.diff(source)
    if len(source) and np.all(steps == 1):
        return padded(at, tensor, axis, int(source[0]), size - 1 - int(source[-1]))
    if len(np.unique(source)) == len(source):
        return _picked(at, tensor, axis, source, size)
    matrix = np.zeros((len(source), size), dtype=np.float32)
    matrix[np.arange(len(source)), source] = 1
    return mixed(at, tensor, axis, matrix)


def _picked(at: Site, tensor: str, axis: int, source: NDArray[np.int64], size: int) -> str:
    """Gather back: from where each position of the input went, or from a row of zeros."""
    back = np.full(size, len(source), dtype=np.int64)
    back[source] = np.arange(len(source))
    if len(source) < size:
        tensor = padded(at, tensor, axis, 0, 1)
    return at.add("Gather", tensor, at.array(back, "positions"), axis=axis + 1)


def mixed(at: Site, tensor: str, axis: int, matrix: NDArray[np.float32]) -> str:
    """Multiply a gradient along an axis by a matrix [size of the output, size of the input]."""
    rank = at.rank(at.x) + 1
    axis += 1
    if axis == rank - 1:
        return at.add("MatMul", tensor, at.array(matrix, "matrix"))
    if axis == rank - 2:
        return at.add("MatMul", at.array(matrix.T, "matrix"), tensor)
    perm = [*(i for i in range(rank) if i != axis), axis]
    last = at.add("Transpose", tensor, perm=perm)
    product = at.add("MatMul", last, at.array(matrix, "matrix"))
    return at.add("Transpose", product, perm=[int(i) for i in np.argsort(perm)])


@rule("Gather", limits="indices constant, or all of an axis in order")
def _gather(at: Site, g: Gradient) -> Owed:
    axis = at.attribute("axis", 0) % at.rank(at.x)
    indices = at.value(1)
    if indices is None:
        if not _is_whole_axis(at, axis):
            at.refuse("picks by indices that are computed")
        return [Gradient(at.shaped(at.whole(g), at.shape(at.x)))]
    size = at.sizes(at.x, [axis])[0]
    tensor, shape = at.whole(g), at.shape(at.x)
    if indices.ndim != 1:
        flat = (*shape[:axis], indices.size, *shape[axis + 1 :])
        tensor = at.shaped(tensor, flat)
    return [Gradient(along(at, tensor, axis, indices.reshape(-1) % size, size))]


def _is_whole_axis(at: Site, axis: int) -> bool:
    """Whether the indices are 0, 1, 2, ... to the end of the axis, for any batch."""
    if not _of_sizes_alone(at.tape.forward, at.node.inputs[1]):
        return False
    for count in (2, 3):
        x, indices = _inputs(at, count, [0, 1])
        if not torch.equal(indices.reshape(-1).long(), torch.arange(x.shape[axis])):
            return False
    return True


def _of_sizes_alone(forward: Graph, tensor: str) -> bool:
    """Whether a tensor is made of constants and of shapes: what has a shape does not matter."""
    ahead, seen = [tensor], set[str]()
    while ahead:
        name = ahead.pop()
        if name in forward.floats:
            return False
        node = forward.made_by.get(name)
        if node is not None and name not in seen and node.op not in ("Shape", "Size"):
            ahead.extend(node.inputs)
        seen.add(name)
    return True


def _inputs(at: Site, count: int, which: list[int]) -> list[torch.Tensor]:
    """Return inputs of the node for a batch of grey images, in float64."""
    forward = at.tape.forward
    shape = forward.shapes[INPUT]
    pixels = [size for size in shape if isinstance(size, int)]
    module = GraphModule(forward, torch.float64)
    images = torch.full((count, *pixels), 0.5, dtype=torch.float64)
    names = [at.node.inputs[index] for index in which]
    with torch.no_grad():
        values = module.values(images, names)
    return [values[name] for name in names]


@rule("Slice", limits="constant bounds")
def _slice(at: Site, g: Gradient) -> Owed:
    rank = at.rank(at.x)
    starts, ends = at.integers(1, "bounds"), at.integers(2, "bounds")
    axes = at.integers(3, "axes") if at.given(3) else list(range(len(starts)))
    steps = at.integers(4, "steps") if at.given(4) else [1] * len(starts)
    tensor = at.whole(g)
    shape = at.shape(at.x)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if shape[axis % rank] == at.shape(at.y)[axis % rank] and step == 1:
            continue
        size = at.sizes(at.x, [axis % rank])[0]
        stop = None if step < 0 and end < -size else end
        source = np.arange(size)[slice(start, stop, step)]
        tensor = along(at, tensor, axis % rank, source, size)
    return [Gradient(tensor)]


@rule("Resize", limits="spatial axes; not tf_crop_and_resize")
def _resize(at: Site, g: Gradient) -> Owed:
    """Interpolation is linear along each axis: go back through the transposed matrices."""
    if at.attribute("coordinate_transformation_mode") == "tf_crop_and_resize":
        at.refuse("crops by regions of interest")
    before, after = at.shape(at.x), at.shape(at.y)
    if before[:2] != after[:2]:
        at.refuse("resizes another axis than the spatial ones")
    matrices = {axis: _matrix(at, axis) for axis in range(2, len(before))}
    tensor = at.whole(g)
    blocks = [_block(matrix) for matrix in matrices.values()]
    if all(blocks):
        return [Gradient(_block_sums(at, tensor, blocks))]
    for axis, matrix in matrices.items():
        if matrix.shape[0] != matrix.shape[1] or not np.array_equal(matrix, np.eye(len(matrix))):
            tensor = mixed(at, tensor, axis, matrix)
    return [Gradient(tensor)]


def _matrix(at: Site, axis: int) -> NDArray[np.float32]:
    """Return the weights [size after, size before] of an axis, by resizing unit vectors."""
    names = [index for index in range(len(at.node.inputs)) if at.node.inputs[index]]
    values = dict(zip(names, _inputs(at, 2, names), strict=True))
    x = values[0]
    size, channels = x.shape[axis], x.shape[1]
    columns = []
    module = GraphModule(at.tape.forward, torch.float64)
    for first in range(0, size, channels):
        probe = torch.zeros_like(x)
        held = range(first, min(first + channels, size))
        for channel, position in enumerate(held):
            probe[:, channel].select(axis - 1, position).fill_(1)
        values[0] = probe
        inputs = [values.get(index) for index in range(len(at.node.inputs))]
        (resized,) = module.apply(at.node, inputs)
        moved = resized[0].movedim(axis - 1, 1)
        columns.append(moved.reshape(*moved.shape[:2], -1)[: len(held), :, 0])
    return np.asarray(torch.cat(columns).T.float().numpy())


def _block(matrix: NDArray[np.float32]) -> int:
    """Return k if every position is repeated k times in place, else 0."""
    after, before = matrix.shape
    k = after // before
    repeated = np.kron(np.eye(before, dtype=np.float32), np.ones((k, 1), dtype=np.float32))
    return k if repeated.shape == matrix.shape and np.array_equal(matrix, repeated) else 0


def _block_sums(at: Site, tensor: str, blocks: list[int]) -> str:
    """Add up the copies of every position: an average pool, times how many there are."""
    if set(blocks) == {1}:
        return tensor
    folded = at.fold(tensor, at.sizes(at.y))
    mean = at.add("AveragePool", folded, kernel_shape=blocks, strides=blocks)
    total = at.add("Mul", mean, at.number(float(np.prod(blocks))))
    return at.unfold(total, at.sizes(at.x))
