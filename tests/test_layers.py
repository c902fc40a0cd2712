"""Compact layers against equation 6 computed patch by patch, in float64, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ccn_deploy.errors import UsageError
from ccn_deploy.layers import (
    DELTA,
    MEAN,
    SQUARE_FLOOR,
    BoundedReLU,
    CompactConv2d,
    CompactLinear,
    SubtractMean,
    guarded_sqrt,
)

Array = NDArray[Any]
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


@dataclass
class Case:
    """A layer with random parameters, an input, and equation 6 in NumPy."""

    layer: CompactConv2d
    x: Array

    @property
    def parameters(self) -> tuple[Array, Array, float]:
        weight, bias = (p.detach().double().numpy() for p in (self.layer.weight, self.layer.bias))
        return weight, bias, float(self.layer.alpha.detach())

    def patches(self, x: Array) -> tuple[Array, tuple[int, int]]:
        """Return the patches [N, positions, C * kh * kw], read one at a time."""
        (kh, kw), (sh, sw), (ph, pw) = (
            self.layer.kernel_size, self.layer.stride, self.layer.padding,
        )  # fmt: skip
        n, c, h, w = x.shape
        padded = np.zeros((n, c, h + 2 * ph, w + 2 * pw))
        padded[:, :, ph : ph + h, pw : pw + w] = x
        rows, columns = (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1
        found = [
            padded[:, :, r * sh : r * sh + kh, s * sw : s * sw + kw].reshape(n, -1)
            for r in range(rows)
            for s in range(columns)
        ]
        return np.stack(found, axis=1), (rows, columns)

    def expected(self, x: Array) -> Array:
        weight, bias, alpha = self.parameters
        patches, (rows, columns) = self.patches(x)
        y = np.empty((len(x), len(weight), rows, columns))
        for n, image in enumerate(patches):
            for at, patch in enumerate(image):
                length = np.sqrt((patch**2).sum())
                for out, kernel in enumerate(weight):
                    scaled = alpha * (kernel.ravel() @ patch) / (length + 0.01)
                    y[n, out, at // columns, at % columns] = scaled + bias[out]
        return y

    def output(self, x: Array) -> Array:
        dtype = self.layer.weight.dtype
        result: Array = self.layer(torch.from_numpy(x).to(dtype)).detach().double().numpy()
        return result

    def bound(self) -> Array:
        """Bound what rounding may do to each output channel: [C_out, 1, 1].

        A sum of K products is off by at most K u |W| |p| (Cauchy and Schwarz), and dividing by
        |p| + delta leaves K u alpha |W|. The norm is off by K u / 2 of itself; a dozen roundings
        remain. The patch's floor moves an output by 1e-8 alpha |W| if the patch is that short,
        which :func:`test_a_patch_below_the_floor` measures; here none is.
        """
        weight, bias, alpha = self.parameters
        terms = weight[0].size
        unit = ROUNDING[self.layer.weight.dtype]
        lengths = np.linalg.norm(weight.reshape(len(weight), -1), axis=1)
        size = unit * (1.5 * terms + 12) * (abs(alpha) * lengths + np.abs(bias))
        return size[:, np.newaxis, np.newaxis]


def make(
    dtype: torch.dtype,
    seed: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    channels: tuple[int, int],
    extra: tuple[int, int],
    batch: int = 2,
    scale: float = 1.0,
) -> Case:
    rng = np.random.default_rng(seed)
    layer = CompactConv2d(*channels, kernel, stride=stride, padding=padding).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(rng.normal(size=layer.weight.shape)))
        layer.bias.copy_(torch.from_numpy(rng.normal(size=layer.bias.shape)))
        layer.alpha.fill_(float(rng.uniform(-3, 3)))
    size = (batch, channels[0], kernel[0] + extra[0], kernel[1] + extra[1])
    x = rng.normal(size=size) * scale
    x[rng.uniform(size=size) < 0.3] = 0.0
    return Case(layer, x.astype(np.float32).astype(np.float64))


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
geometry = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "kernel": pairs,
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
        "channels": pairs,
        "extra": st.tuples(st.integers(0, 4), st.integers(0, 4)),
    }
)


@dtypes
@settings(deadline=None, max_examples=60)
@given(shape=geometry, scale=st.sampled_from([1e-2, 1.0, 30.0]))
def test_compact_convolution_is_equation_6(
    dtype: torch.dtype, shape: dict[str, Any], scale: float
) -> None:
    case = make(dtype, scale=scale, **shape)
    expected, got = case.expected(case.x), case.output(case.x)
    assert got.shape == expected.shape
    assert (np.abs(got - expected) <= case.bound()).all()


@dtypes
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    features=st.tuples(st.integers(1, 30), st.integers(1, 10)),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
)
def test_compact_linear_is_the_one_by_one_case(
    dtype: torch.dtype, seed: int, features: tuple[int, int], scale: float
) -> None:
    case = make(dtype, seed, (1, 1), (1, 1), (0, 0), features, (0, 0), batch=3, scale=scale)
    linear = CompactLinear(*features).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(case.layer.weight.flatten(1))
        linear.bias.copy_(case.layer.bias)
        linear.alpha.copy_(case.layer.alpha)
    got = linear(torch.from_numpy(case.x[:, :, 0, 0]).to(dtype)).detach().double().numpy()
    by_definition = case.expected(case.x)[:, :, 0, 0]
    as_convolution = case.output(case.x)[:, :, 0, 0]
    assert (np.abs(got - by_definition) <= case.bound()[:, 0, 0]).all()
    assert (np.abs(got - as_convolution) <= 2 * case.bound()[:, 0, 0]).all()


def test_the_output_is_far_from_plain_convolution_so_that_the_above_can_fail() -> None:
    case = make(torch.float64, 0, (3, 3), (1, 1), (1, 1), (2, 3), (4, 4))
    plain = torch.nn.functional.conv2d(
        torch.from_numpy(case.x), case.layer.weight, case.layer.bias, padding=1
    )
    assert np.abs(case.output(case.x) - plain.detach().numpy()).max() > 1e6 * case.bound().max()


@pytest.mark.parametrize("length", [0.0, 1e-9, 1e-7, 9.9e-7, 1.1e-6, 1e-4])
def test_a_patch_below_the_floor(length: float) -> None:
    case = make(torch.float64, 3, (3, 3), (1, 1), (0, 0), (2, 4), (0, 0))
    weight, _, alpha = case.parameters
    x = case.x * (length / np.linalg.norm(case.x.reshape(2, -1), axis=1))[:, None, None, None]
    lengths = np.linalg.norm(weight.reshape(4, -1), axis=1)
    moved = np.abs(case.output(x) - case.expected(x))[:, :, 0, 0]
    assert (moved <= 1e-8 * abs(alpha) * lengths + case.bound()[:, 0, 0]).all()


def test_a_scaled_image_keeps_its_output_but_for_delta() -> None:
    case = make(torch.float64, 5, (3, 3), (1, 1), (0, 0), (3, 4), (2, 2))
    with torch.no_grad():
        case.layer.bias.zero_()
    assert np.allclose(case.output(case.x * 1e6), case.output(case.x * 2e6), rtol=1e-7)


# The input gradient.


def gradient(layer: torch.nn.Module, x: Array, cotangent: Array) -> Array:
    """Return the gradient of ``sum(cotangent * layer(x))`` that torch computes."""
    dtype = next(layer.parameters()).dtype
    leaf = torch.from_numpy(x).to(dtype).requires_grad_()
    (layer(leaf) * torch.from_numpy(cotangent).to(dtype)).sum().backward()
    assert leaf.grad is not None
    result: Array = leaf.grad.double().numpy()
    return result


@dtypes
@settings(deadline=None, max_examples=30)
@given(shape=geometry)
def test_the_gradient_at_zero_is_alpha_w_over_delta(
    dtype: torch.dtype, shape: dict[str, Any]
) -> None:
    case = make(dtype, **{**shape, "padding": (0, 0)})
    weight, _, alpha = case.parameters
    zero = np.zeros_like(case.x)
    _, (rows, columns) = case.patches(zero)
    cotangent = np.random.default_rng(shape["seed"]).normal(size=(2, len(weight), rows, columns))
    expected, scale = np.zeros_like(zero), np.zeros_like(zero)
    (kh, kw), (sh, sw) = case.layer.kernel_size, case.layer.stride
    for n, out, r, s in np.ndindex(*cotangent.shape):
        part = cotangent[n, out, r, s] * alpha * weight[out] / 0.01
        expected[n, :, r * sh : r * sh + kh, s * sw : s * sw + kw] += part
        scale[n, :, r * sh : r * sh + kh, s * sw : s * sw + kw] += np.abs(part)
    got = gradient(case.layer, zero, cotangent)
    assert np.isfinite(got).all()
    assert (np.abs(got - expected) <= 1e-3 * scale).all()  # scale: parts may cancel


@dtypes
def test_one_zero_patch_has_the_true_derivative_within_a_thousandth(dtype: torch.dtype) -> None:
    case = make(dtype, 7, (3, 3), (1, 1), (0, 0), (2, 3), (0, 0), batch=1)
    weight, _, alpha = case.parameters
    for out in range(3):
        cotangent = np.eye(3)[out].reshape(1, 3, 1, 1)
        got = gradient(case.layer, np.zeros_like(case.x), cotangent)[0]
        np.testing.assert_allclose(got, alpha * weight[out] / 0.01, rtol=1e-3, atol=0)


@dtypes
def test_the_gradient_of_compact_linear_at_zero(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = CompactLinear(7, 4).to(dtype)
    with torch.no_grad():
        layer.alpha.fill_(2.5)
    got = gradient(layer, np.zeros((4, 7)), np.eye(4))
    expected = 2.5 * layer.weight.detach().double().numpy() / 0.01
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=0)


def differences(case: Case, x: Array, cotangent: Array, step: float) -> Array:
    """Return the gradient by central differences of equation 6 in NumPy."""
    result = np.empty_like(x)
    for at in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[at] += step
        down[at] -= step
        result[at] = (cotangent * (case.expected(up) - case.expected(down))).sum() / (2 * step)
    return result


@settings(deadline=None, max_examples=25)
@given(shape=geometry)
def test_the_gradient_elsewhere_agrees_with_finite_differences(shape: dict[str, Any]) -> None:
    shape = {**shape, "extra": tuple(min(e, 2) for e in shape["extra"])}
    case = make(torch.float64, batch=1, **shape)
    rng = np.random.default_rng(shape["seed"])
    x = rng.uniform(0.3, 1.0, size=case.x.shape) * rng.choice([-1, 1], size=case.x.shape)
    cotangent = rng.normal(size=case.expected(x).shape)
    got = gradient(case.layer, x, cotangent)
    expected = differences(case, x, cotangent, step=1e-5)
    # Truncation is step^2 / 6 times a third derivative, at most 100 alpha |W| / |p|^3 or so.
    scale = 1.0 + np.abs(expected).max() + np.abs(cotangent).sum() * abs(case.parameters[2])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-7 * scale)


def test_the_gradient_where_some_patches_are_zero_agrees_with_finite_differences() -> None:
    case = make(torch.float64, 11, (3, 3), (1, 1), (1, 1), (1, 2), (4, 4), batch=1)
    x = np.zeros_like(case.x)
    x[0, 0, 0, 0] = 0.8  # a digit's corner; every patch that does not touch it is zero
    patches, _ = case.patches(x)
    assert (np.linalg.norm(patches, axis=2) == 0).sum() > 30
    cotangent = np.random.default_rng(1).normal(size=case.expected(x).shape)
    got = gradient(case.layer, x, cotangent)
    expected = differences(case, x, cotangent, step=1e-7)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["weight", "bias", "alpha"])
def test_the_gradient_of_the_parameters_agrees_with_finite_differences(name: str) -> None:
    case = make(torch.float64, 13, (2, 3), (1, 2), (1, 0), (2, 2), (2, 2))
    cotangent = np.random.default_rng(2).normal(size=case.expected(case.x).shape)
    gradient(case.layer, case.x, cotangent)
    parameter = getattr(case.layer, name)
    flat, got = parameter.detach().view(-1), parameter.grad.view(-1)
    for at in range(len(flat)):
        with torch.no_grad():
            flat[at] += 1e-6
            up = (cotangent * case.expected(case.x)).sum()
            flat[at] -= 2e-6
            down = (cotangent * case.expected(case.x)).sum()
            flat[at] += 1e-6
        assert float(got[at]) == pytest.approx((up - down) / 2e-6, rel=1e-6, abs=1e-7)


# The small parts.


def test_delta_and_mean_are_the_papers() -> None:
    assert (DELTA, MEAN) == (0.01, 0.5)


def test_guarded_sqrt_is_the_root_above_its_floor_and_flat_below() -> None:
    values = torch.tensor([0.0, SQUARE_FLOOR / 2, SQUARE_FLOOR * 2, 1.0, 9.0], dtype=torch.float64)
    leaf = values.requires_grad_()
    root = guarded_sqrt(leaf)
    root.sum().backward()
    assert root.tolist() == pytest.approx([1e-6, 1e-6, np.sqrt(2e-12), 1.0, 3.0], rel=1e-12)
    assert leaf.grad is not None
    assert leaf.grad.tolist() == pytest.approx([0, 0, 0.5 / np.sqrt(2e-12), 0.5, 1 / 6], rel=1e-12)


def test_bounded_relu_clips_to_the_unit_interval_and_stops_the_gradient_outside() -> None:
    x = torch.tensor([-2.0, 0.25, 0.75, 3.0], requires_grad=True)
    y = BoundedReLU()(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.25, 0.75, 1.0]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


@dtypes
def test_subtract_mean_shifts_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    y = SubtractMean()(torch.tensor([0.0, 0.5, 1.0], dtype=dtype))
    assert y.tolist() == [-0.5, 0.0, 0.5]
    assert y.dtype == dtype


def test_the_kernel_of_ones_is_no_weight() -> None:
    layer = CompactConv2d(3, 8, 3)
    assert set(layer.state_dict()) == {"weight", "bias", "alpha"}
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "alpha"}
    assert layer.alpha.shape == ()


def test_the_layer_says_its_delta() -> None:
    assert "delta=0.01" in repr(CompactConv2d(1, 1, 3))
    assert "delta=0.01" in repr(CompactLinear(1, 1))


# Groups, dilation, padding by name or by other pixels, no bias; delta.

PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def by_definition(layer: CompactConv2d, x: Array, delta: float) -> Array:
    """Equation 6 patch by patch, each group of channels on its own, in NumPy."""
    weight, alpha = layer.weight.detach().numpy(), layer.alpha.item()
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().numpy()
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":  # an odd pixel is added at the end
        totals = dh * (kh - 1), dw * (kw - 1)
        around = [(total // 2, total - total // 2) for total in totals]
    elif layer.padding == "valid":
        around = [(0, 0), (0, 0)]
    else:
        around = [(p, p) for p in layer.padding]
    padded = np.pad(x, [(0, 0), (0, 0), *around], mode=PAD_MODES[layer.padding_mode])
    rows = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    columns = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    inputs, outputs = weight.shape[1], len(weight) // layer.groups
    y = np.empty((len(x), len(weight), rows, columns))
    for n, out, r, s in np.ndindex(*y.shape):
        first = out // outputs * inputs
        patch = [
            padded[n, first + c, r * sh + i * dh, s * sw + j * dw]
            for c in range(inputs)
            for i in range(kh)
            for j in range(kw)
        ]
        length = np.sqrt(np.sum(np.square(patch)))
        y[n, out, r, s] = alpha * np.dot(weight[out].ravel(), patch) / (length + delta) + bias[out]
    return y


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.integers(1, 3),
    channels=pairs,
    kernel=pairs,
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(st.integers(0, 2), pairs, st.sampled_from(["same", "valid"])),
    mode=st.sampled_from(sorted(PAD_MODES)),
    bias=st.booleans(),
    learn_delta=st.booleans(),
)
def test_every_option_is_equation_6(
    seed: int, groups: int, channels: tuple[int, int], kernel: tuple[int, int],
    stride: tuple[int, int], dilation: tuple[int, int], padding: Any, mode: Any, bias: bool,
    learn_delta: bool,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    layer = CompactConv2d(
        groups * channels[0], groups * channels[1], kernel, 1 if padding == "same" else stride,
        padding, dilation, groups, bias, mode, dtype=torch.float64, delta=0.03,
        learn_delta=learn_delta,
    )  # fmt: skip
    with torch.no_grad():
        layer.alpha.fill_(-1.7)
    x = np.random.default_rng(seed).normal(size=(2, groups * channels[0], 8, 9))
    expected = by_definition(layer, x, 0.03)
    got = layer(torch.from_numpy(x)).detach().numpy()
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    alone = layer(torch.from_numpy(x[0])).detach().numpy()  # torch takes an image without a batch
    np.testing.assert_allclose(alone, expected[0], rtol=0, atol=1e-12)


def test_groups_are_compact_convolutions_side_by_side() -> None:
    layer = CompactConv2d(6, 4, 3, groups=2, dtype=torch.float64)
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    x[:, 3:] *= 100  # the other group's pixels must not count
    y = layer(x).detach().numpy()
    np.testing.assert_allclose(y, by_definition(layer, x.numpy(), DELTA), rtol=0, atol=1e-12)
    moved = layer(torch.cat([x[:, :3], 3 * x[:, 3:]], dim=1)).detach().numpy()
    np.testing.assert_array_equal(moved[:, :2], y[:, :2])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (2, 3, 4)])
def test_compact_linear_norms_the_last_axis(bias: bool, leading: tuple[int, ...]) -> None:
    layer = CompactLinear(7, 4, bias, dtype=torch.float64, delta=0.1)
    x = np.random.default_rng(0).normal(size=(*leading, 7))
    weight = layer.weight.detach().numpy()
    expected = np.empty((*leading, 4))
    for at in np.ndindex(*leading):
        expected[at] = weight @ x[at] / (np.sqrt((x[at] ** 2).sum()) + 0.1)
    if bias:
        expected += layer.bias.detach().numpy()
    got = layer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("make_layer", [lambda **k: CompactConv2d(2, 3, 3, groups=1, **k),
                                        lambda **k: CompactLinear(4, 3, **k)])  # fmt: skip
def test_a_learned_delta_has_the_derivative_of_equation_6(make_layer: Any) -> None:
    layer = make_layer(dtype=torch.float64, delta=0.2, learn_delta=True)
    assert set(layer.state_dict()) == {"weight", "bias", "alpha", "delta"}
    assert "delta=learned" in repr(layer)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    layer(x).sum().backward()
    with torch.no_grad():
        layer.delta += 1e-6
        up = layer(x).sum()
        layer.delta -= 2e-6
        down = layer(x).sum()
    assert layer.delta.grad.item() == pytest.approx((up - down).item() / 2e-6, rel=1e-6)
    with torch.no_grad():
        layer.delta.fill_(-1.0)  # where training may drive it
    assert layer(torch.zeros_like(x)).isfinite().all()


@pytest.mark.parametrize("delta", [0.0, -0.01, float("nan"), float("inf")])
def test_a_delta_that_divides_by_zero_is_refused(delta: float) -> None:
    with pytest.raises(UsageError, match=r"The delta .*\n.*the paper's is 0\.01"):
        CompactConv2d(1, 1, 3, delta=delta)
    with pytest.raises(UsageError, match="delta"):
        CompactLinear(1, 1, delta=delta)


def test_a_given_delta_is_no_weight() -> None:
    assert set(CompactLinear(2, 2, bias=False, delta=1).state_dict()) == {"weight", "alpha"}
