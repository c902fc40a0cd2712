from __future__ import annotations

import numpy as np
import pytest
import torch

from ccn_deploy.parity.rounding import RoundingModel, rounding_units
from ccn_deploy.parity.rounding_rules import Errors, sum_error_std
from ccn_deploy.parity.tolerances import Arithmetic, tolerance_for
from tests.networks import random_graph, random_network

FP32 = tolerance_for("fp32").arithmetic
EXACT = Arithmetic(0.0, 0.0, 0.0)
DOUBLE = torch.float64


def images(n: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, 1, 28, 28), dtype=np.float32))


@pytest.mark.parametrize("mean", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("terms", [9, 100, 2000])
def test_error_of_a_sum_is_that_of_real_float32_sums(terms: int, mean: float) -> None:
    """Sums of float32 numbers, one term after another, in many random orders."""
    rng = np.random.default_rng(terms)
    values = (mean + rng.standard_normal(terms)).astype(np.float32)
    total = np.float64(values.astype(np.float64).sum())
    errors = []
    for _ in range(300):
        running = np.cumsum(rng.permutation(values), dtype=np.float32)  # rounds at every step
        errors.append(float(running[-1]) - total)
    squares = torch.tensor(float((values.astype(np.float64) ** 2).sum()))
    predicted = float(sum_error_std(torch.tensor(total), squares, terms, 2.0**-24))
    # A mantissa is not always at its worst, so the truth lies a little below.
    assert 0.4 < float(np.std(errors)) / predicted < 1.3


@pytest.mark.parametrize("defense", ["sm", "brelu", "l2sm", "ccn"])
def test_explains_what_torch_does_in_float32(defense: str) -> None:
    x = images()
    single, exact = (random_graph("mnist-cnn", defense, kind) for kind in (torch.float32, DOUBLE))
    units = rounding_units(exact, x.double(), FP32)
    with torch.inference_mode():
        error = float((single(x).double() - exact(x.double())).abs().max())
    assert 0.02 < error / list(units.values())[-1] < 2.0


def test_covers_every_layer_of_every_architecture_in_order() -> None:
    model = random_graph("vgg11-cifar10", "ccn")
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    units = rounding_units(model, x, FP32, draws=2)
    names = [name for name, _ in random_network("vgg11-cifar10", "ccn").named_layers()]
    assert list(units) == [name for name in names if name != "flatten" and "dropout" not in name]
    assert all(0.0 < unit < 1e-3 for unit in units.values())


def test_without_rounding_there_is_no_deviation() -> None:
    model = random_graph("mnist-cnn", "ccn")
    units = rounding_units(model, images(2).double(), EXACT, draws=2)
    # The exact and the noisy branch may sum in another order: 1e-16, not 1e-8.
    assert max(units.values()) < 1e-13


def test_the_exact_branch_is_the_network() -> None:
    model = random_graph("mnist-cnn", "ccn")
    x = images(2).double()
    rounding = RoundingModel(model, FP32, Errors(torch.Generator().manual_seed(0), draws=3))
    *_, (tensor, exact, noisy) = rounding.run(x)
    assert tensor == "logits"
    assert torch.equal(exact, model(x))
    assert noisy.shape == (3 * 2, 10)


def test_the_unit_grows_with_the_unit_roundoff() -> None:
    model = random_graph("mnist-cnn", "ccn")
    x = images(2).double()
    small, large = (
        list(rounding_units(model, x, Arithmetic(u, u, u)).values())[-1]
        for u in (2.0**-24, 2.0**-18)
    )
    assert large / small == pytest.approx(2**6, rel=0.05)  # the same errors, 64 times as large


def test_a_seed_gives_the_same_unit() -> None:
    model = random_graph("mnist-cnn", "sm")
    x = images(2).double()
    assert rounding_units(model, x, FP32, seed=1) == rounding_units(model, x, FP32, seed=1)
    assert rounding_units(model, x, FP32, seed=1) != rounding_units(model, x, FP32, seed=2)


@pytest.mark.parametrize("channels", [32, 128])
def test_tensor_float_32_is_far_more_than_rounding_in_float32_explains(channels: int) -> None:
    """Operands with 10 bits of mantissa instead of 23 are what a GPU does unasked."""
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal((64, 9 * channels))).astype(np.float32)
    w = rng.standard_normal((9 * channels, 16)).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    squares = torch.from_numpy(x.astype(np.float64) ** 2 @ w.astype(np.float64) ** 2)
    std = sum_error_std(torch.from_numpy(exact), squares, 9 * channels, FP32.accumulate)
    unit = 4.0 * float(std.max())  # about the largest of a few thousand draws

    def error(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs((a @ b).astype(np.float64) - exact).max())

    short = [(v.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for v in (x, w)]
    bound = tolerance_for("fp32").max_units
    assert error(x, w) / unit < 1.0
    assert error(*short) / unit > 5 * bound
