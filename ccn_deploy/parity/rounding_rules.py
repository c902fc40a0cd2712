"""How the result of each operator is rounded: one rule an op, on values that are noisy already.

A rule gets a node's results on noisy inputs, still exact, and adds the errors that an arithmetic
would make there. ``docs/parity.md`` derives the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ccn_deploy.graph.calls import Inputs
from ccn_deploy.graph.graph import Node

FEW = 4.0
"""Units in the last place by which a library's transcendental functions may be off."""


@dataclass(frozen=True)
class Errors:
    """Random errors for tensors whose batch is ``draws`` times that of the exact network.

    Attributes:
        generator: Where they come from.
        draws: Repetitions of every image, side by side in the batch.
        paired: Whether the second half of the draws has the errors of the first with the opposite
            sign, so that one of each pair crosses a kink that is near.
        deployed: Whether the first draw takes a grid as it is deployed, and not another.

    Errors are float32, which has bits enough for them and takes a fifth of the time.
    """

    generator: torch.Generator
    draws: int
    paired: bool = False
    deployed: bool = True

    def uniform(self, like: Tensor, axis: int) -> Tensor:
        """Return errors uniform in [-1, 1], of the shape of ``like`` with its batch on ``axis``."""
        return self._signed(self._room(like, axis).uniform_(-1, 1, generator=self.generator), axis)

    def normal(self, like: Tensor, axis: int) -> Tensor:
        """Return normal errors of variance 1, likewise."""
        return self._signed(self._room(like, axis).normal_(generator=self.generator), axis)

    def _room(self, like: Tensor, axis: int) -> Tensor:
        shape = list(like.shape)
        if self.paired:
            shape[axis] //= 2
        return torch.empty(shape)

    def _signed(self, errors: Tensor, axis: int) -> Tensor:
        return torch.cat([errors, -errors], axis) if self.paired else errors


Size = tuple[Tensor, bool]
"""Standard deviation of a sum's error, float32, and whether no term of the sum is negative."""


@dataclass(frozen=True)
class Step:
    """One node, run on noisy inputs.

    Attributes:
        node: The node.
        opset: Version of the operator set.
        run: Runs the node on other inputs and returns its first result.
        exact: Its inputs in the exact network, from which the size of errors is computed; none if
            that is known.
        total: Its first result in the exact network, likewise.
        noisy: Its inputs with the errors that were made before.
        result: Its first result on ``noisy``, with no error of its own.
        axis: Where the batch is in ``result``.
        constant: Whether one of the first two inputs is a constant: weights, which are rounded.
        store: Unit roundoff of what is handed on.
        inner: Unit roundoff of what a normalisation or a softmax computes inside.
        accumulate: Unit roundoff of sums.
        errors: Random errors.
        sizes: What :meth:`once` keeps.
    """

    node: Node
    opset: int
    run: Callable[[Inputs], Tensor]
    exact: Inputs
    total: Tensor | None
    noisy: Inputs
    result: Tensor
    axis: int
    constant: bool
    store: float
    inner: float
    accumulate: float
    errors: Errors
    sizes: list[Size] = field(default_factory=list)

    def rounded(self, values: Tensor, unit: float) -> Tensor:
        """Give each value a relative error uniform in [-unit, unit]."""
        return torch.addcmul(values, values, self.errors.uniform(values, self.axis), value=unit)

    def once(self, find: Callable[[], Size]) -> Size:
        """Return what depends on the exact network alone, which is the same for all draws."""
        if not self.sizes:
            std, positive = find()
            self.sizes.append((std.float(), positive))
        return self.sizes[0]

    def summed(self, std: Tensor) -> Tensor:
        """Return the result with the error of a sum, rounded to what is stored.

        Args:
            std: Of the error, of the shape of the exact result: the same for every draw.
        """
        axis, errors = self.axis, self.errors.normal(self.result, self.axis)
        apart(errors, axis, std.shape[axis]).mul_(std.unsqueeze(axis))
        return self.rounded(self.result + errors, self.store)


def apart(values: Tensor, axis: int, images: int) -> Tensor:
    """Give draws an axis of their own, in front of that of the images."""
    return values.view(*values.shape[:axis], -1, images, *values.shape[axis + 1 :])


Rule = Callable[[Step], Tensor]


def round_result(step: Step) -> Tensor:
    """Return the first result of a node with the errors that rounding makes in it."""
    if step.node.op in EXACT or not step.result.is_floating_point():
        return step.result
    return RULES.get(step.node.op, _elementwise)(step)


def sum_error_std(
    total: Tensor, squares: Tensor, terms: int, accumulate: float, operands: float = 0.0
) -> Tensor:
    """Return the standard deviation of the error of summing one term after another.

    Each of the n partial sums is rounded, with an error uniform within its unit roundoff, so the
    variance is ``accumulate^2 / 3 * sum_k s_k^2``. For terms in random order with sum S and sum of
    squares Q, the expectation of ``sum_k s_k^2`` is
    ``(n + 1)(2n + 1) / (6n) * S^2 + (n + 1) / 6 * (Q - S^2 / n)``: the drift of the partial sums
    and a random bridge around it. Together that is ``(n + 1) / 3 * S^2 + (n + 1) / 6 * Q``.

    Args:
        total: S, of any shape.
        squares: Q, of the same shape.
        terms: n.
        accumulate: Unit roundoff of the accumulator.
        operands: Variance of the relative errors that each term has of its own.
    """
    drift = accumulate**2 * (terms + 1) / 9
    variance = total.square().mul_(drift)
    return variance.add_(squares, alpha=drift / 2 + operands).sqrt_()


def _weighted(step: Step) -> Tensor:
    """Round a sum of products: of inputs with weights, or of two activations."""
    std, positive = step.once(lambda: _product_size(step))
    return _of_one_sign(step.summed(std), positive)


def _product_size(step: Step) -> Size:
    node = step.node
    count = len(step.exact) if node.op == "Einsum" else 2
    factors = [x for x in step.exact[:count] if x is not None]
    total = _without_bias(step, factors)
    alpha: float = node.attributes.get("alpha", 1.0) if node.op == "Gemm" else 1.0
    squares = step.run([x.square() for x in factors])
    # A weight (with what was folded into it) is rounded once, and so is each product.
    operands = (step.constant * step.store**2 + step.accumulate**2) / 3
    squares = squares if alpha == 1.0 else squares * alpha
    std = sum_error_std(total, squares, _terms(node, factors), step.accumulate, operands)
    return std, _not_negative(factors)


def _without_bias(step: Step, factors: list[Tensor]) -> Tensor:
    """Return the exact sum of products, without running a convolution again for it."""
    bias = step.exact[2] if step.node.op == "Conv" and len(step.exact) > 2 else None
    if step.total is None or (step.node.op == "Gemm" and len(step.exact) > 2):
        return step.run(factors)
    return step.total if bias is None else step.total - bias.view(-1, *[1] * (factors[0].dim() - 2))


def _of_one_sign(rounded: Tensor, positive: bool) -> Tensor:
    """Keep a sum of terms that are not negative from becoming negative, which rounding never does.

    Its errors have the size of the exact sum's, and on a grid the noisy sum itself may be 0.
    """
    return rounded.clamp(min=0.0) if positive else rounded


def _not_negative(terms: Sequence[Tensor]) -> bool:
    return all(float(x.amin()) >= 0.0 for x in reversed(terms) if x.numel())


def _terms(node: Node, factors: Sequence[Tensor]) -> int:
    """Return how many products one result is the sum of."""
    if node.op == "Conv":
        return factors[1][0].numel()
    if node.op == "ConvTranspose":
        weight = factors[1]
        taps: float = math.prod(weight.shape[2:]) / math.prod(node.attributes.get("strides", [1]))
        return math.ceil(len(weight) / int(node.attributes.get("group", 1)) * taps)
    if node.op == "Gemm":
        return factors[0].shape[0 if node.attributes.get("transA", 0) else 1]
    if node.op == "MatMul":
        return factors[0].shape[-1]
    inputs, _, output = node.attributes["equation"].replace(" ", "").partition("->")
    sizes = {
        label: size
        for term, factor in zip(inputs.split(","), factors, strict=True)
        for label, size in zip(term.replace("...", ""), factor.shape, strict=False)
    }
    kept = output or {label for label in inputs if inputs.count(label) == 1}
    return math.prod(size for label, size in sizes.items() if label not in kept)


def _sum(step: Step) -> Tensor:
    std, positive = step.once(lambda: _sum_size(step))
    return _of_one_sign(step.summed(std), positive)


def _sum_size(step: Step) -> Size:
    x, total = _only(step), step.run(step.exact)
    squares = step.run([x.square(), *step.exact[1:]])
    return sum_error_std(total, squares, _reduced(step), step.accumulate), _not_negative([x])


def _mean(step: Step) -> Tensor:
    std, positive = step.once(lambda: _mean_size(step))
    return _of_one_sign(step.summed(std), positive)


def _mean_size(step: Step) -> Size:
    x, mean = _only(step), step.run(step.exact)
    terms = _reduced(step)
    squares = terms * step.run([x.square(), *step.exact[1:]])
    std = sum_error_std(terms * mean, squares, terms, step.accumulate) / terms
    return std, _not_negative([x])


def _sum_of_squares(step: Step) -> Tensor:
    """Round a sum of squares, or its root."""
    std, _ = step.once(lambda: _sum_of_squares_size(step))
    return _of_one_sign(step.summed(std), positive=True)


def _sum_of_squares_size(step: Step) -> Size:
    x, result = _only(step), step.run(step.exact)
    fourth = step.run([x.square(), *step.exact[1:]])
    root = step.node.op == "ReduceL2"
    total, squares = (result.square(), fourth.square()) if root else (result, fourth)
    each = step.accumulate**2 / 3  # each square is rounded
    std = sum_error_std(total, squares, _reduced(step), step.accumulate, each)
    return std / (2 * result.clamp(min=1e-30)) if root else std, True


def _only(step: Step) -> Tensor:
    (x, *_) = step.exact
    assert x is not None
    return x


def _reduced(step: Step) -> int:
    """Return how many values one result of a reduction or of a pool is made of."""
    kernel = step.node.attributes.get("kernel_shape")
    if kernel is not None:
        return math.prod(kernel)
    noisy = step.noisy[0]
    assert noisy is not None
    return max(1, noisy.numel() // max(1, step.result.numel()))


def _elementwise(step: Step) -> Tensor:
    """Round each value on its own, in units of a size that fits the function."""
    op, result = step.node.op, step.result
    x = next((x for x in step.noisy if x is not None), result)
    if op in ONE_ROUNDING:
        return step.rounded(result, step.store)
    if op == "Pow":
        power = step.noisy[1]
        whole = power is not None and power.numel() == 1 and power.item() in (1.0, 2.0, 0.5)
        return step.rounded(result, step.store if whole else FEW * step.store)
    size = (
        MAGNITUDES[op](x.detach(), result.detach()) if op in MAGNITUDES else result.detach().abs()
    )
    return result + FEW * step.store * size * step.errors.uniform(result, step.axis)


def _gated(x: Tensor, result: Tensor) -> Tensor:
    """Return the size of errors of ``x * gate(x)``, whose gate is wrong by a unit of 1."""
    return torch.where(result == 0.0, 0.0, x.abs())


def _batch_normalization(step: Step) -> Tensor:
    """Round ``a x + c``, whose two terms may cancel."""
    std, _ = step.once(lambda: _batch_normalization_size(step))
    return step.summed(std)


def _batch_normalization_size(step: Step) -> Size:
    x, scale, bias, mean, variance = (value for value in step.exact[:5])
    assert x is not None and scale is not None and bias is not None
    assert mean is not None and variance is not None
    sides = (-1, *[1] * (x.dim() - 2))
    factor = scale / (variance + step.node.attributes.get("epsilon", 1e-5)).sqrt()
    added = (bias - mean * factor).square().view(sides)
    # The factor is rounded, and so is the product.
    moved = (x * factor.view(sides)).square_().mul_(2)
    return moved.add_(added).sqrt_().mul_(step.inner / math.sqrt(3)), False


def _normalization(step: Step) -> Tensor:
    """Round what subtracts a mean, divides by a root and scales."""
    node, (x, *rest) = step.node, step.noisy
    assert x is not None
    scale, bias = (*rest, None, None)[:2]
    epsilon = node.attributes.get("epsilon", 1e-5)
    if node.op in ("LayerNormalization", "RMSNormalization"):
        dims = list(range(node.attributes.get("axis", -1) % x.dim(), x.dim()))
        y = _normalized(step, x, dims, epsilon, centred=node.op == "LayerNormalization")
    else:
        groups = node.attributes.get("num_groups", x.shape[1])
        grouped = x.reshape(x.shape[0], groups, -1)
        y = _normalized(step, grouped, [2], epsilon, centred=True)
        per_group = node.op == "GroupNormalization" and scale is not None and len(scale) == groups
        if per_group and groups != x.shape[1]:  # the form of opset 18
            scale, bias = (
                None if v is None else v.repeat_interleave(x.shape[1] // groups)
                for v in (scale, bias)
            )
        y = y.reshape(x.shape)
        sides = (-1, *[1] * (x.dim() - 2))
        scale, bias = (None if value is None else value.view(sides) for value in (scale, bias))
    if scale is not None:
        y = step.rounded(y * scale, step.inner)
    return step.rounded(y if bias is None else y + bias, step.store)


def _normalized(step: Step, x: Tensor, dims: list[int], epsilon: float, *, centred: bool) -> Tensor:
    """Return ``x``, less its mean if it is to be centred, over the root of its mean square."""
    unit, terms = step.inner, math.prod(x.shape[dim] for dim in dims)
    mean_square = x.detach().square().mean(dims, keepdim=True)
    if centred:
        mean = x.mean(dims, keepdim=True)
        std = sum_error_std(terms * mean.detach(), terms * mean_square, terms, unit) / terms
        x = step.rounded(x - mean - std * step.errors.normal(mean, step.axis), unit)
    power = x.square().mean(dims, keepdim=True)
    fourth = x.detach().pow(4).sum(dims, keepdim=True)
    std = sum_error_std(terms * power.detach(), fourth, terms, unit) / terms
    # In one pass, the mean of squares less the squared mean, both are rounded before they cancel.
    std = (std.square() + unit**2 / 3 * (fourth / terms**2 + 2 * mean_square.square())).sqrt()
    power = (power + std * step.errors.normal(power, step.axis)).clamp(min=0.0)
    return step.rounded(x * step.rounded((power + epsilon).rsqrt(), FEW * unit), unit)


def _lp_normalization(step: Step) -> Tensor:
    x, result = step.noisy[0], step.result
    assert x is not None
    terms = x.detach().abs() ** step.node.attributes.get("p", 2)
    axis = step.node.attributes.get("axis", -1)
    total, squares = terms.sum(axis, keepdim=True), terms.square().sum(axis, keepdim=True)
    std = sum_error_std(total, squares, x.shape[axis], step.inner) / total.clamp(min=1e-30)
    shared = 1.0 + std * step.errors.normal(total, step.axis)
    return step.rounded(step.rounded(result * shared, FEW * step.inner), step.store)


def _softmax(step: Step) -> Tensor:
    """Round exponentials, which amplify their arguments' errors, and the sum that they share."""
    unit, result = step.inner, step.result
    axis = step.node.attributes.get("axis", -1 if step.opset >= 13 else 1) % result.dim()
    dims = [axis] if step.opset >= 13 else list(range(axis, result.dim()))
    fixed = result.detach()
    own = unit * (FEW * fixed + torch.special.entr(fixed)) * step.errors.uniform(fixed, step.axis)
    squares = fixed.square().sum(dims, keepdim=True)
    terms = math.prod(fixed.shape[dim] for dim in dims)
    std = sum_error_std(torch.ones_like(squares), squares, terms, unit)
    shared = 1.0 + std * step.errors.normal(squares, step.axis)
    return step.rounded(result * shared + own, step.store)


EXACT = frozenset(
    {
        "Abs", "ArgMax", "ArgMin", "Cast", "CastLike", "Ceil", "Clip", "Concat", "ConstantOfShape",
        "DepthToSpace", "Dropout", "Expand", "EyeLike", "Flatten", "Floor", "Gather",
        "GatherElements", "GatherND", "GlobalMaxPool", "Hardmax", "Identity", "Max", "MaxPool",
        "Min", "Neg", "OneHot", "Pad", "QuantizeLinear", "Range", "ReduceMax", "ReduceMin", "Relu",
        "Reshape", "Round", "ScatterElements", "ScatterND", "Shape", "Sign", "Size", "Slice",
        "SpaceToDepth", "Split", "Squeeze", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu",
        "Unsqueeze", "Where",
    }
)  # fmt: skip
"""Ops that choose, move or compare their inputs and round nothing."""

ONE_ROUNDING = frozenset(
    {
        "Add", "DequantizeLinear", "Div", "LeakyRelu", "Mean", "Mod", "Mul", "PRelu", "Reciprocal",
        "Shrink", "Sqrt", "Sub", "Sum",
    }
)  # fmt: skip
"""Ops whose exact result is rounded once."""

MAGNITUDES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Celu": lambda x, y: torch.where(x < 0, 1.0, 0.0),
    "Elu": lambda x, y: torch.where(x < 0, 1.0, 0.0),
    "Gelu": _gated,
    "HardSigmoid": lambda x, y: torch.where((y == 0) | (y == 1), 0.0, 1.0),
    "HardSwish": _gated,
    "LogSoftmax": lambda x, y: y.abs() + 1.0,
    "Mish": _gated,
    "ReduceLogSumExp": lambda x, y: y.abs() + 1.0,
    "Selu": lambda x, y: torch.where(x < 0, 1.0, y.abs()),
    "Sigmoid": lambda x, y: torch.full_like(y, 0.5),
    "Softplus": lambda x, y: y.clamp(min=1.0),
    "Swish": _gated,
}
"""By op: what its errors are relative to, given input and result; the result itself if not here."""

RULES: Mapping[str, Rule] = {
    "AveragePool": _mean,
    "BatchNormalization": _batch_normalization,
    "Conv": _weighted,
    "ConvTranspose": _weighted,
    "Einsum": _weighted,
    "Gemm": _weighted,
    "GlobalAveragePool": _mean,
    "GroupNormalization": _normalization,
    "InstanceNormalization": _normalization,
    "LayerNormalization": _normalization,
    "LpNormalization": _lp_normalization,
    "MatMul": _weighted,
    "RMSNormalization": _normalization,
    "ReduceL1": _sum,
    "ReduceL2": _sum_of_squares,
    "ReduceMean": _mean,
    "ReduceSum": _sum,
    "ReduceSumSquare": _sum_of_squares,
    "Softmax": _softmax,
}
"""Ops with a rule of their own; every other one rounds each of its results a few units."""
