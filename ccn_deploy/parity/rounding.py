"""How much of a deviation rounding explains: a Monte-Carlo model of floating-point error.

The float64 network is run with random errors of the size and in the places that an arithmetic of
unit roundoff u would make them. Errors then travel through the real network, so whatever
amplifies or damps them there (the division of a compact layer, a pool, a dead activation) is
accounted for. ``docs/parity.md`` derives the model and shows how it was calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy.layers import BoundedReLU, CompactConv2d, CompactLinear, SubtractMean, guarded_sqrt
from ccn_deploy.models import Classifier
from ccn_deploy.parity.tolerances import Arithmetic

_EXACT = (nn.ReLU, BoundedReLU, nn.MaxPool2d, nn.Flatten, nn.Dropout)
"""Layers that choose among their inputs and round nothing."""

_GRIDS: dict[str, tuple[float, torch.dtype | None]] = {
    "int8": (127.0, None),
    "fp8": (448.0, torch.float8_e4m3fn),
}
"""Largest number of each grid, and its dtype if its steps are not equal."""

_STRETCH = 0.05
"""How much finer or coarser than the deployed grid the others are."""

_DOUBLES = 2**23
"""Numbers that one wide tensor of one pass may hold: 64 MiB in float64."""


def rounding_units(
    model: Classifier,
    images: Tensor,
    arithmetic: Arithmetic,
    *,
    draws: int = 8,
    seed: int = 0,
    ranges: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return, for each layer, the largest absolute deviation that rounding produced.

    Args:
        model: The network in float64 and evaluation mode.
        images: float64 [N, C, H, W] in [0, 1].
        arithmetic: What is modelled.
        draws: Repetitions per image.
        seed: Of the errors.
        ranges: For each layer that is quantised, the largest absolute input to represent.

    Returns:
        Layer name -> max over images, draws and elements of ``|noisy - exact|``, in the order of
        execution; the last entry is that of the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    units = {name: 0.0 for name, _ in model.named_layers()}
    size = images_at_once(model, draws)
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        steps = noisy_forward(model, chunk, arithmetic, draws, generator, ranges=ranges)
        for name, exact, noisy in steps:
            units[name] = max(units[name], float((noisy - exact).abs().max()))
    return units


@torch.no_grad()
def noisy_forward(
    model: Classifier,
    images: Tensor,
    arithmetic: Arithmetic,
    draws: int,
    generator: torch.Generator,
    *,
    ranges: Mapping[str, float] | None = None,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Run the network exactly and with rounding errors, side by side.

    Yields:
        (layer name, exact output [N, ...], noisy outputs [draws, N, ...]), layer by layer.
    """
    model_of = RoundingModel(arithmetic, generator, ranges or {})
    exact, noisy = images, images.expand(draws, *images.shape)
    for name, layer in model.named_layers():
        exact, noisy = model_of.step(name, layer, exact, noisy)
        yield name, exact, noisy


def sum_error_std(total: Tensor, squares: Tensor, terms: int, accumulate: float) -> Tensor:
    """Return the standard deviation of the error of summing one term after another.

    Each of the n partial sums is rounded, with an error uniform within its unit roundoff, so the
    variance is ``accumulate^2 / 3 * sum_k s_k^2``. For terms in random order with sum S and sum of
    squares Q, the expectation of ``sum_k s_k^2`` is
    ``(n + 1)(2n + 1) / (6n) * S^2 + (n + 1) / 6 * (Q - S^2 / n)``: the drift of the partial sums
    and a random bridge around it.

    Args:
        total: S, of any shape.
        squares: Q, of the same shape.
        terms: n.
        accumulate: Unit roundoff of the accumulator.
    """
    drift = (terms + 1) * (2 * terms + 1) / (6 * terms) * total.square()
    bridge = (terms + 1) / 6 * (squares - total.square() / terms).clamp(min=0.0)
    return accumulate * ((drift + bridge) / 3).sqrt()


@dataclass(frozen=True)
class RoundingModel:
    """One layer at a time, exactly and with errors.

    Attributes:
        arithmetic: What is modelled.
        generator: Of the errors.
        ranges: For each layer that is quantised, the largest absolute input to represent.
        paired: Whether the second half of the draws has the errors of the first with the opposite
            sign, so that one of each pair crosses a kink that is near.
    """

    arithmetic: Arithmetic
    generator: torch.Generator
    ranges: Mapping[str, float] = field(default_factory=dict)
    paired: bool = False

    def step(
        self, name: str, layer: nn.Module, exact: Tensor, noisy: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map (exact [N, ...], noisy [K, N, ...]) through ``layer``."""
        if isinstance(layer, SubtractMean):
            return layer(exact), self._rounded(layer(noisy), self.arithmetic.store)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            return layer(exact), self._weighted(name, layer, exact, noisy)
        if isinstance(layer, _EXACT):
            return layer(exact), _each(layer, noisy)
        raise TypeError(f"the rounding model knows no layer of type {type(layer).__name__}")

    def _weighted(
        self, name: str, layer: nn.Conv2d | nn.Linear, exact: Tensor, noisy: Tensor
    ) -> Tensor:
        """Return the noisy outputs of a linear map, compact or not."""
        store, accumulate = self.arithmetic.store, self.arithmetic.accumulate
        terms = layer.weight[0].numel()
        total, squares = (
            _linear(layer, exact),
            _linear(layer, exact.square(), layer.weight.square()),
        )
        # A weight (with alpha folded in) is rounded once, and so is each product.
        operands = (store**2 + accumulate**2) / 3 * squares
        std = (sum_error_std(total, squares, terms, accumulate).square() + operands).sqrt()
        if name in self.ranges:
            noisy = self._on_grid(noisy, torch.tensor(self.ranges[name], dtype=noisy.dtype))
            weights = self._weights_on_grid(layer, len(noisy))
            pairs = zip(noisy, weights, strict=True)
            folded = torch.stack([_linear(layer, x, weight) for x, weight in pairs])
        else:
            folded = _each(partial(_linear, layer), noisy)
        product = folded + std * self._normal(folded)
        if isinstance(layer, CompactConv2d | CompactLinear):
            product = product * layer.alpha / self._divisor(layer, exact, noisy)
            product = self._rounded(product, store)
        assert layer.bias is not None
        bias = layer.bias.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else layer.bias
        return self._rounded(product + bias, store)

    def _divisor(
        self, layer: CompactConv2d | CompactLinear, exact: Tensor, noisy: Tensor
    ) -> Tensor:
        """Return the noisy ``norm + delta`` [K, N, 1, ...]."""
        unit = self.arithmetic.norm
        terms = layer.weight[0].numel()
        total, squares = _patch_sum(layer, exact.square()), _patch_sum(layer, exact.pow(4))
        operands = unit**2 / 3 * squares  # each square is rounded
        std = (sum_error_std(total, squares, terms, unit).square() + operands).sqrt()
        summed = _each(partial(_patch_sum, layer), noisy.square())
        norm = self._rounded(guarded_sqrt(summed + std * self._normal(summed)), unit)
        return self._rounded(norm + layer.delta, unit)

    def _on_grid(self, values: Tensor, limit: Tensor) -> Tensor:
        """Put each draw [K, ...] on a grid of its own; the first on the very one that is deployed.

        Others are up to :data:`_STRETCH` finer or coarser, with the same limits: errors of the
        same kind that fall otherwise. No grid is shifted, since every one holds 0 exactly, which
        is what most activations are.
        """
        shape = (len(values), *[1] * (values.dim() - 1))
        stretch = torch.empty(shape, dtype=values.dtype)
        stretch.uniform_(1 - _STRETCH, 1 + _STRETCH, generator=self.generator)
        stretch[0] = 1.0
        largest, dtype = _GRIDS[self.arithmetic.grid]
        scale = limit * stretch / largest
        steps = values.clamp(min=-limit, max=limit) / scale
        if dtype is None:
            return steps.round() * scale
        return steps.clamp(-largest, largest).to(dtype).to(values.dtype) * scale

    def _weights_on_grid(self, layer: nn.Conv2d | nn.Linear, draws: int) -> Tensor:
        """Return weights [K, C_out, ...] of which each channel is on a grid of its own."""
        # Every channel has its largest weight as its limit, whatever alpha is folded in.
        weight = layer.weight
        limit = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1))
        return self._on_grid(weight.expand(draws, *weight.shape), limit.clamp(min=1e-30))

    def _rounded(self, values: Tensor, unit: float) -> Tensor:
        """Give each value a relative error uniform in [-unit, unit]."""
        uniform = self._draws(values).uniform_(-1.0, 1.0, generator=self.generator)
        return values * (1.0 + unit * self._signed(uniform))

    def _normal(self, like: Tensor) -> Tensor:
        return self._signed(self._draws(like).normal_(generator=self.generator))

    def _draws(self, like: Tensor) -> Tensor:
        """Return room for the errors that are drawn: all of them, or one of each pair."""
        return torch.empty_like(like[: len(like) // 2] if self.paired else like)

    def _signed(self, errors: Tensor) -> Tensor:
        return torch.cat([errors, -errors]) if self.paired else errors


def _linear(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the weighted sums of ``x`` without bias, norm or alpha."""
    weight = layer.weight if weight is None else weight
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, None, layer.stride, layer.padding)
    return F.linear(x, weight)


def _patch_sum(layer: CompactConv2d | CompactLinear, x: Tensor) -> Tensor:
    """Return the plain sums of ``x`` over every patch (all features of a linear layer)."""
    summed = x.sum(dim=1, keepdim=True)
    if isinstance(layer, CompactConv2d):
        return F.conv2d(summed, layer.ones, None, layer.stride, layer.padding)
    return summed


def _each(function: Callable[[Tensor], Tensor], noisy: Tensor) -> Tensor:
    """Apply a function of [N, ...] to each draw of [K, N, ...]."""
    flat = function(noisy.flatten(0, 1))
    return flat.reshape(*noisy.shape[:2], *flat.shape[1:])


def images_at_once(model: Classifier, draws: int) -> int:
    """Return how many images at a time keep the widest tensor within :data:`_DOUBLES`."""
    _, height, width = model.architecture.input_shape
    widest = max(item for item in model.architecture.features[:3] if isinstance(item, int))
    return max(1, _DOUBLES // (draws * widest * height * width))
