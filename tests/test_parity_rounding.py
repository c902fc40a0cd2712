from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ccn_deploy.exporters.sources.module import export_module
from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.ops import OPERATORS
from ccn_deploy.layers import CompactConv2d
from ccn_deploy.parity import rounding_rules
from ccn_deploy.parity.rounding import ExactRun, RoundingModel, rounding_units
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
    exact = ExactRun()
    *_, (tensor, noisy) = rounding.run(x, exact=exact, kept={"logits"})
    assert tensor == "logits"
    assert torch.equal(exact.values["logits"], model(x))
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


def test_a_sum_of_squares_that_a_grid_makes_zero_has_a_root() -> None:
    """Errors of the size that the exact sum has would make the root of a negative number."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(CompactConv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    model = GraphModule(Graph(export_module(layers, (1, 4, 4))), torch.float64)
    faint = 1e-3 * torch.rand(4, 1, 4, 4, dtype=torch.float64)  # a step of the grid is 8e-3
    units = rounding_units(model, faint, tolerance_for("int8").arithmetic, ranges={"0": 1.0})
    assert min(units.values()) > 0.01


# Rules by operator

A_FEW_UNITS = {
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "CumSum", "Erf", "Exp",
    "GlobalLpPool", "LRN", "Log", "LpPool", "MeanVarianceNormalization", "Pow", "ReduceLogSum",
    "ReduceProd", "Resize", "Sin", "Sinh", "Softsign", "Tan", "Tanh", "Upsample",
}  # fmt: skip
NOT_FLOATS = {
    "And", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Equal", "Greater",
    "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "NonZero", "Not", "Or", "Xor",
}  # fmt: skip


def test_every_operator_that_is_evaluated_has_a_rule() -> None:
    known = rounding_rules.EXACT | rounding_rules.ONE_ROUNDING | NOT_FLOATS | A_FEW_UNITS
    assert set(OPERATORS) <= known | set(rounding_rules.RULES) | set(rounding_rules.MAGNITUDES)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


AXES = np.array([2, 3], dtype=np.int64)
OPS: dict[str, tuple[str, list[np.ndarray], dict[str, object]]] = {
    "convolution": ("Conv", [normal(8, 4, 3, 3)], {"pads": [1, 1, 1, 1]}),
    "depthwise convolution": ("Conv", [normal(4, 1, 5, 5)], {"group": 4, "dilations": [2, 2]}),
    "transposed convolution": ("ConvTranspose", [normal(4, 6, 4, 4)], {"strides": [2, 2]}),
    "matrix product": ("MatMul", [normal(12, 9)], {}),
    "batch norm": (
        "BatchNormalization",
        [normal(4), normal(4), normal(4, seed=2), np.abs(normal(4)) + np.float32(0.1)],
        {"epsilon": 1e-3},
    ),
    "instance norm": ("InstanceNormalization", [normal(4), normal(4)], {}),
    "layer norm": ("LayerNormalization", [normal(12), normal(12)], {}),
    "layer norm of an image": ("LayerNormalization", [normal(4, 12, 12)] * 2, {"axis": 1}),
    "lp norm": ("LpNormalization", [], {"axis": 1}),
    "mean": ("ReduceMean", [AXES], {}),
    "sum": ("ReduceSum", [AXES], {}),
    "sum of squares": ("ReduceSumSquare", [AXES], {}),
    "norm": ("ReduceL2", [AXES], {}),
    "average pool": ("AveragePool", [], {"kernel_shape": [3, 3], "strides": [2, 2]}),
    "global average pool": ("GlobalAveragePool", [], {}),
    "softmax": ("Softmax", [], {"axis": 1}),
    "softmax over all": ("LogSoftmax", [], {"axis": 3}),
    "gelu": ("Gelu", [], {}),
    "hard swish": ("HardSwish", [], {}),
    "mish": ("Mish", [], {}),
    "sigmoid": ("Sigmoid", [], {}),
    "tanh": ("Tanh", [], {}),
    "elu": ("Elu", [], {}),
    "quotient": ("Div", [normal(12, seed=4)], {}),
    "maximum": ("MaxPool", [], {"kernel_shape": [2, 2]}),
}


def one_op(name: str) -> onnx.ModelProto:
    """Return a graph of one operator that reads images [batch, 4, 12, 12]."""
    op, constants, attributes = OPS[name]
    builder = GraphBuilder()
    names = [builder.constant(f"op.{at}", value) for at, value in enumerate(constants)]
    builder.node(op, ["images", *names], "op", output="logits", **attributes)
    return builder.model(name, {"images": ["batch", 4, 12, 12]}, {"logits": ["batch"]})


@pytest.mark.parametrize("name", OPS)
def test_a_rule_explains_what_float32_does_and_no_more(name: str) -> None:
    """On values with and without a mean, against torch and ONNX Runtime."""
    model = one_op(name)
    del model.graph.output[0].type.tensor_type.shape.dim[:]  # of any rank
    model.graph.output[0].type.tensor_type.ClearField("shape")
    session = onnxruntime.InferenceSession(model.SerializeToString())
    graph = Graph(model)
    exact, single = GraphModule(graph, DOUBLE), GraphModule(graph)
    for mean in (0.0, 3.0):
        x = mean + normal(16, 4, 12, 12, seed=5)
        truth = exact(torch.from_numpy(x).double())
        (unit,) = rounding_units(exact, torch.from_numpy(x).double(), FP32).values()
        (none,) = rounding_units(exact, torch.from_numpy(x).double(), EXACT).values()
        found = single(torch.from_numpy(x)), torch.from_numpy(session.run(None, {"images": x})[0])
        errors = [float((values.double() - truth).abs().max()) for values in found]
        assert none <= 1e-13 * float(truth.abs().max())  # the rule is the operator, but for errors
        if name == "maximum":
            assert errors == [0.0, 0.0] and unit == 0.0
        else:
            assert max(errors) < 2.0 * unit
            assert max(errors) > 0.03 * unit


def test_draws_lie_in_the_batch_wherever_that_is() -> None:
    """A network of tokens first and images second has the unit of one of images first."""
    units = []
    for turned in (False, True):
        builder = GraphBuilder()
        shape = builder.constant("rows.shape", np.array([0, 4, 144], dtype=np.int64))
        x = builder.node("Reshape", ["images", shape], "rows")
        if turned:
            x = builder.node("Transpose", [x], "turn", perm=[1, 0, 2])
        weight = builder.constant("fc1.weight", normal(144, 5) / 12)
        x = builder.node("MatMul", [x, weight], "fc1")
        x = builder.node("Softmax", [x], "soft", axis=2)
        if turned:
            x = builder.node("Transpose", [x], "turn back", perm=[1, 0, 2])
        builder.node("Flatten", [x], "flat", output="logits")
        model = builder.model("t", {"images": ["batch", 4, 12, 12]}, {"logits": ["batch", 20]})
        exact = GraphModule(Graph(model), DOUBLE)
        x = torch.from_numpy(normal(6, 4, 12, 12)).double()
        units.append(rounding_units(exact, x, FP32, draws=32))
    straight, turned_units = units
    for layer in ("fc1", "soft", "flat"):
        assert turned_units[layer] == pytest.approx(straight[layer], rel=0.3)


def test_layers_in_which_images_lie_interleaved_are_left_out() -> None:
    builder = GraphBuilder()
    turned = builder.node("Transpose", ["images"], "turn", perm=[1, 0, 2, 3])
    shape = builder.constant("shape", np.array([-1, 144], dtype=np.int64))
    x = builder.node("Reshape", [turned, shape], "rows")  # channel by channel, images inside
    x = builder.node("Tanh", [x], "tanh")
    back = builder.constant("back", np.array([4, -1, 144], dtype=np.int64))
    x = builder.node("Reshape", [x, back], "apart")
    axes = builder.constant("axes", np.array([0], dtype=np.int64))
    builder.node("ReduceSum", [x, axes], "sum", output="logits", keepdims=0)
    model = builder.model("t", {"images": ["batch", 4, 12, 12]}, {"logits": ["batch", 144]})
    exact = GraphModule(Graph(model), DOUBLE)
    units = rounding_units(exact, torch.from_numpy(normal(3, 4, 12, 12)).double(), FP32)
    assert list(units) == ["sum"]
    assert 0.0 < units["sum"] < 1e-5
