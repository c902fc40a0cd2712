from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from ccn_deploy.errors import NoGradientError
from ccn_deploy.exporters.vjp import RULES, gradient_graph
from ccn_deploy.exporters.vjp.table import Rule
from ccn_deploy.graph.evaluate import GraphModule
from tests.vjp_cases import CASES, Case, ints, scalar

BY_NAME = {case.name: case for case in CASES}


def noise(case: Case, count: int, seed: int = 0) -> np.ndarray:
    images = np.random.default_rng(seed).random((count, *case.shape), dtype=np.float32)
    return images * 0.9 + 0.1 if case.positive else images


def slopes(count: int, candidates: int, classes: int, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, candidates, classes), dtype=np.float32)


def autograd(
    function: Callable[[Tensor], Tensor],
    images: np.ndarray,
    cotangents: np.ndarray,
    dtype: torch.dtype = torch.float64,
) -> np.ndarray:
    leaf = torch.from_numpy(images).to(dtype).requires_grad_(True)
    logits = function(leaf)
    rows = torch.from_numpy(cotangents).to(dtype).unbind(1)
    found = [torch.autograd.grad(logits, leaf, row, retain_graph=True)[0] for row in rows]
    return torch.stack(found, 1).numpy()


def on_onnxruntime(
    model: onnx.ModelProto, images: np.ndarray, cotangents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feeds = {"images": images, "cotangents": cotangents}
    logits, gradients = session.run(["logits", "gradients"], feeds)
    return logits, gradients


def off(got: np.ndarray, truth: np.ndarray) -> float:
    """Relative l2 error."""
    assert got.shape == truth.shape
    return float(np.linalg.norm(got - truth) / max(np.linalg.norm(truth), 1e-30))


def checked(case: Case, count: int, candidates: int) -> float:
    """Return how far a case's gradient graph is from float64 autograd."""
    graph = case.graph()
    model = gradient_graph(graph)
    onnx.checker.check_model(model)
    images = noise(case, count)
    cotangents = slopes(count, candidates, graph.classes)
    _, gradients = on_onnxruntime(model, images, cotangents)
    return off(gradients, autograd(GraphModule(graph, torch.float64), images, cotangents))


# Each rule alone


@pytest.mark.parametrize("name", BY_NAME)
def test_rule_agrees_with_autograd(name: str) -> None:
    case = BY_NAME[name]
    for count, candidates in ((3, 3), (1, 1)):
        assert checked(case, count, candidates) < 5e-6, (count, candidates)


def test_every_rule_has_a_case() -> None:
    assert set(RULES) == {case.op for case in CASES}


# Ties and edges


def leaf_case(name: str, shape: tuple[int, ...], body: str, **constants: object) -> Case:
    return Case(name, shape, body, constants)


def at_images(case: Case, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return gradients of the graph and of float64 autograd at given images."""
    graph = case.graph()
    cotangents = slopes(len(images), 2, graph.classes)
    _, gradients = on_onnxruntime(gradient_graph(graph), images, cotangents)
    return gradients, autograd(GraphModule(graph, torch.float64), images, cotangents)


BENDS = [-3.0, -1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, float(np.nextafter(1, 0)), 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "body",
    [
        "y = Relu(images)",
        "y = LeakyRelu(images)",
        "y = Elu(images)",
        "y = Selu(images)",
        "y = Clip(images, zero, one)",
        "y = Max(images, zero)",
        "y = Max(images, zero, one)",
        "y = Min(one, images)",
        "y = HardSwish(images)",
        "y = HardSigmoid<alpha = 0.5, beta = 0.5>(images)",
        "y = Celu(images)",
        "y = ThresholdedRelu(images)",
        "y = Abs(images)",
        "y = PRelu(images, one)",
        "y = ReduceMax(images, last)",
        "y = ReduceMin(images, last)",
    ],
)
def test_slopes_at_bends_are_torchs(body: str) -> None:
    images = np.array(BENDS, dtype=np.float32).reshape(1, 1, 2, 6)
    case = leaf_case("bends", (1, 2, 6), body, zero=scalar(0), one=scalar(1), last=ints(-1))
    got, truth = at_images(case, images)
    assert got == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, case in BY_NAME.items() if case.op == "MaxPool"])
def test_of_equal_maxima_the_first_takes_the_gradient(name: str) -> None:
    case = BY_NAME[name]
    rough = np.random.default_rng(0).integers(0, 3, (3, *case.shape)) / 2
    got, truth = at_images(case, rough.astype(np.float32))
    assert off(got, truth) < 1e-6


def test_even_shares_of_equal_maxima() -> None:
    rough = np.random.default_rng(0).integers(0, 2, (3, 2, 4, 4)).astype(np.float32)
    for body in ("y = GlobalMaxPool(images)", "y = ReduceMax<keepdims = 0>(images, a)"):
        got, truth = at_images(leaf_case("ties", (2, 4, 4), body, a=ints(1, 3)), rough)
        assert off(got, truth) < 1e-6


@pytest.mark.parametrize(
    "body",
    [
        "s = ReduceSumSquare(images, a) n = Sqrt(s) d = Add(n, delta) y = Div(images, d)",
        "n = ReduceL2(images, a) d = Add(n, delta) y = Div(images, d)",
        "p = Pow(images, two) s = ReduceSum(p, a) n = Pow(s, half) d = Add(n, delta)"
        " y = Div(images, d)",
    ],
)
def test_all_zero_patches_have_finite_gradients(body: str) -> None:
    constants = {"a": ints(1), "delta": scalar(0.01), "two": scalar(2), "half": scalar(0.5)}
    images = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)
    images[:, :, :2] = 0
    case = leaf_case("zeros", (3, 4, 4), body, **constants)
    graph = case.graph()
    cotangents = slopes(2, 2, graph.classes)
    _, got = on_onnxruntime(gradient_graph(graph), images, cotangents)
    # Where all is zero the norm counts as constant: 1 / delta.
    wanted = cotangents.reshape(2, 2, 3, 4, 4)[:, :, :, :2] / 0.01
    assert got[:, :, :, :2] == pytest.approx(wanted, rel=1e-5)
    assert np.isfinite(got).all()


# The engine


def test_gradients_of_a_tensor_that_many_read_add_up() -> None:
    body = "a = Sin(images) b = Exp(a) c = Mul(a, b) d = Add(c, images) y = Sub(d, a)"
    got, truth = at_images(leaf_case("fan", (2, 3), body), noise(BY_NAME["Relu"], 2)[:, :2, 0, :3])
    assert off(got, truth) < 1e-6


def test_steps_and_integers_send_nothing_back() -> None:
    body = "a = Floor(images) b = Add(a, images) c = Greater(images, h) f = Cast<to = 1>(c)"
    body += " y = Add(b, f)"
    got, truth = at_images(
        leaf_case("steps", (2, 3), body, h=scalar(0.5)), noise(Case("x", (2, 3), ""), 2)
    )
    assert off(got, truth) < 1e-6


def test_an_op_without_a_rule_is_named_with_its_node_and_what_still_works() -> None:
    graph = leaf_case("none", (2, 3), "y = ReduceProd(images, a)", a=ints(1)).graph()
    with pytest.raises(
        NoGradientError, match="ReduceProd node 'y' is of an op that has no rule"
    ) as e:
        gradient_graph(graph)
    assert "serving" in e.value.hint and "scores" in e.value.hint


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("y = ReduceMean<keepdims = 1>(images, z)", "depends on the batch"),
        ("m = ReduceMax<keepdims = 0>(images) i = Cast<to = 7>(m) y = Gather<axis = 1>(images, i)",
         "indices that are computed"),
        ("y = Einsum<equation = \"bij->bi\">(images)", "adds up one input alone"),
        ("a, m = LayerNormalization(images, h) y = Add(a, m)", "another output than the first"),
        ("a = Floor(images) y = Mul(a, h)", "do not depend on the images"),
    ],
)  # fmt: skip
def test_what_a_rule_does_not_cover_is_said(body: str, says: str) -> None:
    graph = leaf_case("refused", (2, 3), body, z=ints(0), h=scalar(0.5)).graph()
    with pytest.raises(NoGradientError, match=says):
        gradient_graph(graph)


def test_another_precision_than_float32_is_refused() -> None:
    body = "a = Cast<to = 11>(images) b = Mul(a, w) c = Cast<to = 1>(b) y = Sin(c)"
    graph = leaf_case("double", (2, 3), body, w=np.float64(3)).graph()
    with pytest.raises(NoGradientError, match="Mul node 'b' computes in float64"):
        gradient_graph(graph)


def test_names_of_the_forward_graph_are_kept_and_new_ones_are_free() -> None:
    body = "a = Relu(images) b = Relu(a) y = Add(a, b)"
    graph = leaf_case("names", (2, 3), body).graph()
    graph.model.graph.node[0].name = "b.grad.greater"  # as a step would be called
    made = gradient_graph(graph).graph
    forward = list(graph.model.graph.node)
    assert list(made.node[: len(forward)]) == forward
    added = [node.name for node in made.node[len(forward) :]]
    assert len({*added, "b.grad.greater"}) == len(added) + 1
    assert added[0] == "cotangents.turned" and added[-1] == "gradients"
    assert all(".grad" in name for name in added[1:-1])


@pytest.mark.parametrize(
    "op", ["Mul", "Conv", "MaxPool", "Softmax", "LayerNormalization", "Gather"]
)
def test_a_wrong_rule_is_caught(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES[op]

    def wrong(at, g):  # type: ignore[no-untyped-def]
        return [found and at.times(found, 1.001) for found in right.backward(at, g)]

    monkeypatch.setitem(RULES, op, Rule(wrong))
    case = next(case for case in CASES if case.op == op)
    assert checked(case, 3, 3) > 5e-5


def test_the_definition_of_the_ops_gives_the_same() -> None:
    for name in ("MaxPool tiled", "Softmax", "MatMul heads", "Conv stride", "Div broadcast"):
        case = BY_NAME[name]
        graph = case.graph()
        images, cotangents = noise(case, 2), slopes(2, 3, graph.classes)
        feeds = {"images": images, "cotangents": cotangents}
        (got,) = ReferenceEvaluator(gradient_graph(graph)).run(["gradients"], feeds)
        truth = autograd(GraphModule(graph, torch.float64), images, cotangents)
        assert off(got, truth) < 5e-6, name
