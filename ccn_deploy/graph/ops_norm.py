"""Operators that normalise, in inference: by batch, layer, group, instance or neighbours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccn_deploy.graph.calls import Call, Function, Operator
from ccn_deploy.graph.ops_elementwise import guarded_sqrt


def _batch(call: Call) -> Function:
    if call.get("training_mode", 0) or (call.opset < 7 and not call.get("is_test", 0)):
        raise call.refuse("it is in training mode and would normalise by the batch at hand")
    if not call.get("spatial", 1):
        raise call.refuse("statistics for every pixel (spatial=0) are not supported")
    epsilon = call.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)

    return run


def _layer(call: Call) -> Function:
    axis, epsilon = call.get("axis", -1), call.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        shape = x.shape[axis % x.dim() :]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            result = F.layer_norm(x, shape, scale, bias, epsilon)
        else:
            result = F.layer_norm(x, shape, None, None, epsilon) * scale
            result = result if bias is None else result + bias
        if call.outputs == 1:
            return result
        axes = tuple(range(x.dim() - len(shape), x.dim()))
        mean = x.mean(axes, keepdim=True)
        spread = ((x - mean).square().mean(axes, keepdim=True) + epsilon).rsqrt()
        return (result, mean, spread)[: call.outputs]

    return run


def _root_mean_square(call: Call) -> Function:
    axis, epsilon = call.get("axis", -1), call.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        axes = tuple(range(axis % x.dim(), x.dim()))
        root: Tensor = (x.square().mean(axes, keepdim=True) + epsilon).sqrt()
        return x / root * scale

    return run


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """Put one value a channel where it broadcasts over images [N, C, ...]."""
    return values.view(-1, *[1] * (x.dim() - 2))


def _instance(call: Call) -> Function:
    epsilon = call.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        normal = F.layer_norm(x, x.shape[2:], None, None, epsilon)
        return normal * _channels(scale, x) + _channels(bias, x)

    return run


def _group(call: Call) -> Function:
    groups, epsilon = call.get("num_groups"), call.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        channels = x.shape[1]
        if scale.numel() == groups != channels:  # one a group, before operator set 21
            scale = scale.repeat_interleave(channels // groups)
            bias = bias.repeat_interleave(channels // groups)
        return F.group_norm(x, groups, scale, bias, epsilon)

    return run


def _lp(call: Call) -> Function:
    axis, p = call.get("axis", -1), call.get("p", 2)

    def run(x: Tensor) -> Tensor:
        if p == 1:
            norm = x.abs().sum(axis, keepdim=True)
        else:
            norm = guarded_sqrt(x.square().sum(axis, keepdim=True))
        return torch.where(norm == 0, 0.0, x / torch.where(norm == 0, 1.0, norm))

    return run


def _mean_variance(call: Call) -> Function:
    axes = tuple(call.get("axes", [0, 2, 3]))

    def run(x: Tensor) -> Tensor:
        centred = x - x.mean(axes, keepdim=True)
        return centred / (guarded_sqrt(centred.square().mean(axes, keepdim=True)) + 1e-9)

    return run


def _local_response(call: Call) -> Function:
    size, bias = call.get("size"), call.get("bias", 1.0)
    alpha, beta = call.get("alpha", 1e-4), call.get("beta", 0.75)

    def run(x: Tensor) -> Tensor:
        channels = x.shape[1]
        before = (size - 1) // 2
        edges = [0, 0] * (x.dim() - 2) + [before, size - 1 - before]
        squares = F.pad(x.square(), edges)
        total = squares[:, :channels]
        for at in range(1, size):
            total = total + squares[:, at : at + channels]
        divisor: Tensor = (bias + alpha / size * total).pow(beta)
        return x / divisor

    return run


OPERATORS: dict[str, Operator] = {
    "BatchNormalization": _batch,
    "GroupNormalization": _group,
    "InstanceNormalization": _instance,
    "LRN": _local_response,
    "LayerNormalization": _layer,
    "LpNormalization": _lp,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": _root_mean_square,
}
