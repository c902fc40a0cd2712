"""Making the batch of a file symbolic that was exported for a fixed one."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from ccn_deploy.graph.graph import Graph


def rebatch(model: onnx.ModelProto, images: str, batch: int) -> tuple[str, ...]:
    """Open the first size in the targets of every Reshape that depends on the images.

    A target with all sizes given gets -1 in front: whatever was there, the batch or the batch
    times the heads of an attention, the other sizes are the image's. A target that begins with
    the batch and has a -1 already gets 0 in front, which keeps the input's first size.

    Nodes stay as they are unless one target serves several that need different ones.

    Args:
        model: Changed in place.
        images: The input.
        batch: The size that was fixed.

    Returns:
        Names of the targets that were changed.
    """
    graph = model.graph
    targets = {n.input[1] for n in graph.node if n.op_type == "Reshape" and len(n.input) > 1}
    constants = {name: v for name, v in Graph(model).constants.items() if name in targets}
    depends = _depending(graph, images)
    wanted: dict[str, bool] = {}  # target -> every Reshape that reads it is to change
    for node in graph.node:
        for place, tensor in enumerate(node.input):
            if tensor in constants:
                is_target = node.op_type == "Reshape" and place == 1 and node.input[0] in depends
                wanted[tensor] = wanted.get(tensor, True) and is_target
    changed = []
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[0] not in depends:
            continue
        target = node.input[1]
        new = _opened(constants[target], batch) if target in constants else None
        if new is None:
            continue
        if wanted[target]:
            _replace(graph, target, new)
        else:
            node.input[1] = f"{node.output[0]}.shape"
            graph.initializer.append(numpy_helper.from_array(new, node.input[1]))
        changed.append(target)
    return tuple(dict.fromkeys(changed))


def _opened(target: NDArray[np.int64], batch: int) -> NDArray[np.int64] | None:
    """Return a target for any batch, or None if there is nothing to change."""
    if target.ndim != 1 or not len(target) or target[0] in (0, -1):
        return None
    new = target.copy()
    if (target[1:] > 0).all():
        new[0] = -1
    elif target[0] == batch:
        new[0] = 0
    else:
        return None
    return new


def _depending(graph: onnx.GraphProto, tensor: str) -> Collection[str]:
    """Return the tensors that depend on one."""
    found = {tensor}
    for node in graph.node:
        if found.intersection(node.input):
            found.update(node.output)
    return found


def _replace(graph: onnx.GraphProto, name: str, value: NDArray[np.int64]) -> None:
    for constant in graph.initializer:
        if constant.name == name:
            constant.CopyFrom(numpy_helper.from_array(value, name))
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] == name:
            (attribute,) = node.attribute
            if attribute.name == "value":
                attribute.t.CopyFrom(numpy_helper.from_array(value, attribute.t.name))
            else:
                attribute.ints[:] = value.tolist()
