"""Operators that move elements and compute none, and the integer operators of shape arithmetic.

Sizes, axes and indices stay on the CPU, whatever device the images are on.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from ccn_deploy.graph.calls import Call, Function, Operator

MOST_ELEMENTS = 2**30
"""Of one tensor that is made from sizes alone."""


def _shape(call: Call) -> Function:
    start, end = call.get("start", 0), call.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


def _reshape(call: Call) -> Function:
    sizes = call.list_at(1, "shape")
    keep = not call.get("allowzero", 0)

    def run(*inputs: Tensor) -> Tensor:
        x, wanted = inputs[0], sizes(inputs) or []
        return x.reshape([x.shape[i] if n == 0 and keep else n for i, n in enumerate(wanted)])

    return run


def _flatten(call: Call) -> Function:
    axis = call.get("axis", 1)

    def run(x: Tensor) -> Tensor:
        at = axis + x.dim() if axis < 0 else axis
        return x.reshape(math.prod(x.shape[:at]), math.prod(x.shape[at:]))

    return run


def _squeeze(call: Call) -> Function:
    axes = call.list_at(1, "axes")

    def run(*inputs: Tensor) -> Tensor:
        wanted = axes(inputs)
        return inputs[0].squeeze() if wanted is None else inputs[0].squeeze(tuple(wanted))

    return run


def _unsqueeze(call: Call) -> Function:
    axes = call.list_at(1, "axes")

    def run(*inputs: Tensor) -> Tensor:
        x, wanted = inputs[0], axes(inputs) or []
        rank = x.dim() + len(wanted)
        for axis in sorted(axis % rank for axis in wanted):
            x = x.unsqueeze(axis)
        return x

    return run


def _transpose(call: Call) -> Function:
    order = call.get("perm")
    return lambda x: x.permute(order or list(range(x.dim()))[::-1])


def _concat(call: Call) -> Function:
    axis = call.get("axis", 1)
    return lambda *inputs: torch.cat(inputs, axis)


def _split(call: Call) -> Function:
    axis, pieces = call.get("axis", 0), call.get("num_outputs", call.outputs)
    sizes = call.list_at(1, "split")

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        x, wanted = inputs[0], sizes(inputs)
        if wanted is None:
            size = math.ceil(x.shape[axis] / pieces)
            wanted = [size] * (pieces - 1) + [x.shape[axis] - size * (pieces - 1)]
        pieces_of_x: tuple[Tensor, ...] = torch.split(x, wanted, axis)
        return pieces_of_x

    return run


def _slice(call: Call) -> Function:
    starts, ends = call.list_at(1, "starts"), call.list_at(2, "ends")
    axes, steps = call.list_at(3, "axes"), call.list_at(4)

    def run(*inputs: Tensor) -> Tensor:
        x = inputs[0]
        begin, end = starts(inputs) or [], ends(inputs) or []
        wanted, step = axes(inputs) or range(len(begin)), steps(inputs) or [1] * len(begin)
        index = [slice(None)] * x.dim()
        for axis, first, last, stride in zip(wanted, begin, end, step, strict=True):
            inside = slice(first, last, stride).indices(x.shape[axis])  # "to the end" is 2^63 - 1
            if stride > 0:
                index[axis] = slice(*inside)
            else:  # torch has no backward steps
                places = range(*inside)
                x = x.index_select(axis, torch.tensor(places, device=x.device, dtype=torch.int64))
        return x[tuple(index)]

    return run


def _pad(call: Call) -> Function:
    mode = call.get("mode", "constant")
    sizes = call.list_at(1, "paddings" if "paddings" in call.attributes else "pads")
    value, axes = call.number_at(2, "value", 0.0), call.list_at(3)

    def run(*inputs: Tensor) -> Tensor:
        x, wanted = inputs[0], sizes(inputs) or []
        along = axes(inputs) or range(x.dim())
        before, after = wanted[: len(along)], wanted[len(along) :]
        if mode != "constant":
            for axis, front, back in zip(along, before, after, strict=True):
                x = _pad_axis(x, axis, front, back, mode) if front or back else x
            return x
        pairs = [[0, 0] for _ in range(x.dim())]
        for axis, front, back in zip(along, before, after, strict=True):
            pairs[axis] = [front, back]
        fill = value(inputs)
        return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=fill)

    return run


def _pad_axis(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    kind = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}[mode]
    crop_front, crop_back = max(-before, 0), max(-after, 0)
    places = np.arange(crop_front, x.shape[axis] - crop_back)
    places = np.pad(places, (max(before, 0), max(after, 0)), mode=kind)  # type: ignore[call-overload]
    return x.index_select(axis, torch.from_numpy(places).to(x.device))


def _expand(call: Call) -> Function:
    sizes = call.list_at(1)

    def run(*inputs: Tensor) -> Tensor:
        wanted = tuple(sizes(inputs) or ())
        shape = torch.broadcast_shapes(inputs[0].shape, wanted)  # type: ignore[no-untyped-call]
        return inputs[0].expand(shape)

    return run


def _tile(call: Call) -> Function:
    repeats = call.list_at(1)

    def run(*inputs: Tensor) -> Tensor:
        times = repeats(inputs) or []
        _check_count(call, inputs[0].numel() * math.prod(times))
        return inputs[0].repeat(times)

    return run


def _check_count(call: Call, count: int) -> None:
    """Refuse a tensor that some bytes in a file ask for and no memory can hold."""
    if count > MOST_ELEMENTS:
        raise call.refuse(f"it would make {count:,} elements; at most {MOST_ELEMENTS:,} are made")


def _range(call: Call) -> Function:
    def run(start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
        _check_count(call, math.ceil((limit.item() - start.item()) / step.item()))
        return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)

    return run


def _constant_of_shape(call: Call) -> Function:
    sizes = call.list_at(0)
    value = np.asarray(call.get("value", np.zeros(1, np.float32))).reshape(-1)[0]
    dtype = call.dtype if value.dtype.kind == "f" else TORCH_TYPES[value.dtype.name]

    def run(*inputs: Tensor) -> Tensor:
        shape = sizes(inputs) or []
        _check_count(call, math.prod(shape))
        return torch.full(shape, value.item(), dtype=dtype)

    return run


def _depth_to_space(call: Call) -> Function:
    n, mode = call.get("blocksize"), call.get("mode", "DCR")

    def run(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if mode == "DCR":
            parts = x.reshape(batch, n, n, -1, height, width).permute(0, 3, 4, 1, 5, 2)
        else:
            parts = x.reshape(batch, -1, n, n, height, width).permute(0, 1, 4, 2, 5, 3)
        return parts.reshape(batch, channels // n**2, height * n, width * n)

    return run


def _space_to_depth(call: Call) -> Function:
    n = call.get("blocksize")
    order = (0, 3, 5, 1, 2, 4) if call.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)

    def run(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        parts = x.reshape(batch, channels, height // n, n, width // n, n).permute(order)
        return parts.reshape(batch, channels * n**2, height // n, width // n)

    return run


def _eye_like(call: Call) -> Function:
    offset, kind = call.get("k", 0), call.get("dtype")

    def run(x: Tensor) -> Tensor:
        eye = torch.ones_like(x).tril(offset).triu(offset)
        return eye if kind is None else cast(eye, kind, call.dtype)

    return run


def cast(x: Tensor, kind: int, dtype: torch.dtype) -> Tensor:
    """Cast to an element type of ONNX, given by its number.

    Floats stay in the type that all floats are computed in; those of fewer bits than float32
    round to that type's values.
    """
    if kind in (1, 11):
        return x.to(dtype)
    if kind in NARROW_FLOATS:
        return _round_to(x.to(dtype), NARROW_FLOATS[kind]).to(dtype)
    return x.to(INTEGERS[kind])


def _round_to(x: Tensor, kind: torch.dtype) -> Tensor:
    if kind.itemsize == 1:  # out of range saturates, as the standard's default is
        largest = torch.finfo(kind).max
        x = x.clamp(-largest, largest)
    return x.to(kind)


def _cast(call: Call) -> Function:
    kind = call.get("to")
    kind = TensorProto.DataType.Value(kind) if isinstance(kind, str) else kind
    if kind not in (1, 11) and kind not in NARROW_FLOATS and kind not in INTEGERS:
        raise call.refuse(f"no numbers of ONNX's element type {kind}")
    return lambda x: cast(x, kind, call.dtype)


def _cast_like(call: Call) -> Function:
    if len(call.types) > 1 and call.types[1] is not None and call.types[1].name == "float16":
        return lambda x, like: cast(x, 10, call.dtype)
    return lambda x, like: x.to(like.dtype)


TORCH_TYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.int32,  # torch computes little in the wider unsigned types
    "uint32": torch.int64,
    "uint64": torch.int64,
}
"""Torch's type for NumPy's, of integers and truth values."""

NARROW_FLOATS: dict[int, torch.dtype] = {
    10: torch.float16,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    19: torch.float8_e5m2,
}
"""Element types of ONNX below float32."""

INTEGERS: dict[int, torch.dtype] = {
    int(helper.np_dtype_to_tensor_dtype(np.dtype(name))): kind for name, kind in TORCH_TYPES.items()
}
"""Element types of ONNX that hold integers or truth values."""


def _dropout(call: Call) -> Function:
    training = call.known[2] if len(call.known) > 2 else None
    if training is not None and bool(training):
        raise call.refuse("it is in training mode and draws random numbers")
    if call.outputs == 1:
        return lambda x, *rest: x
    return lambda x, *rest: (x, torch.ones_like(x, dtype=torch.bool))


OPERATORS: dict[str, Operator] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Identity": lambda call: lambda x: x,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda call: lambda x: torch.tensor(x.numel(), dtype=torch.int64),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
