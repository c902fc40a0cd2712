from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy.architectures import Architecture
from ccn_deploy.attacks.foolbox_model import foolbox_model
from ccn_deploy.bundle import Bundle, NewFile, write_bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.defenses import DEFENSES as BY_NAME
from ccn_deploy.errors import (
    InputError,
    IntegrityError,
    LoweringError,
    RuntimeUnavailableError,
    UsageError,
)
from ccn_deploy.exporters import export_bundle
from ccn_deploy.exporters.checks import check_gradient
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.vjp import gradient_graph
from ccn_deploy.graph.graph import Graph
from ccn_deploy.layers import BoundedReLU, CompactConv2d, CompactLinear, SubtractMean, guarded_sqrt
from ccn_deploy.models import Classifier
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes import onnx_runtime as onnx_runtime_module
from ccn_deploy.targets import Role
from tests.networks import DEFENSES, as_run, random_network

SHAPE = (1, 28, 28)


def lower_gradient(model: Classifier) -> onnx.ModelProto:
    return gradient_graph(Graph(lower(model)))


def session(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph.SerializeToString(), options)


def vjp(
    graph: onnx.ModelProto, images: np.ndarray, cotangents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    feeds = {"images": images, "cotangents": cotangents}
    logits, gradients = session(graph).run(["logits", "gradients"], feeds)
    return logits, gradients


def autograd(
    model: Callable[[Tensor], Tensor], images: np.ndarray, cotangents: np.ndarray
) -> np.ndarray:
    leaf = torch.from_numpy(images).double().requires_grad_(True)
    logits = model(leaf)
    rows = torch.from_numpy(cotangents).double().unbind(1)
    found = [torch.autograd.grad(logits, leaf, row, retain_graph=True)[0] for row in rows]
    return torch.stack(found, 1).numpy()


def noise(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *shape), dtype=np.float32)


def slopes(count: int, candidates: int, classes: int = 10, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, candidates, classes), dtype=np.float32)


def error(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Per image, relative to its largest slope."""
    axes = tuple(range(1, truth.ndim))
    return np.abs(got - truth).max(axis=axes) / np.abs(truth).max(axis=axes)


# The function


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("architecture", ["mnist-cnn", "vgg11-cifar10"])
def test_gradients_are_those_of_autograd(architecture: str, defense: str) -> None:
    model = random_network(architecture, defense)
    run = session(lower_gradient(model))
    images = noise(2, model.architecture.input_shape)
    cotangents = slopes(2, 9)
    truth = autograd(model.double(), images, cotangents)
    expected = model(torch.from_numpy(images).double()).numpy()

    for candidates in (1, 3, 9):
        feeds = {"images": images, "cotangents": cotangents[:, :candidates]}
        logits, gradients = run.run(None, feeds)
        assert logits == pytest.approx(expected, abs=1e-5 * np.abs(expected).max(), rel=0)
        assert gradients.shape == (2, candidates, *model.architecture.input_shape)
        assert error(gradients, truth[:, :candidates]).max() < 1e-5


@pytest.mark.parametrize("defense", ["sm", "brelu", "ccn"])
def test_the_definition_of_its_ops_gives_the_same(defense: str) -> None:
    model = random_network("mnist-cnn", defense)
    graph = lower_gradient(model)
    images, cotangents = noise(2), slopes(2, 2)
    feeds = {"images": images, "cotangents": cotangents}
    (by_definition,) = ReferenceEvaluator(graph).run(["gradients"], feeds)

    assert error(by_definition, autograd(model.double(), images, cotangents)).max() < 1e-5


def test_gradients_are_finite_differences_of_the_logits() -> None:
    model = random_network("mnist-cnn", "ccn")
    images, cotangents = noise(2, seed=3), slopes(2, 3)
    _, gradients = vjp(lower_gradient(model), images, cotangents)
    model.double()
    step = 1e-6
    for direction in np.random.default_rng(4).normal(size=(5, *SHAPE)):
        ahead, behind = (
            model(torch.from_numpy(images + side * step * direction)).numpy() for side in (1, -1)
        )
        wanted = np.einsum("nkj,nj->nk", cotangents, (ahead - behind) / (2 * step))
        got = np.einsum("nkchw,chw->nk", gradients, direction)
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_row_depends_on_its_image_and_cotangent_alone() -> None:
    run = session(lower_gradient(random_network("mnist-cnn", "ccn")))
    images, cotangents = noise(5), slopes(5, 4)
    _, together = run.run(None, {"images": images, "cotangents": cotangents})
    for i in range(5):
        for k in range(4):
            feeds = {"images": images[i : i + 1], "cotangents": cotangents[i : i + 1, k : k + 1]}
            alone = run.run(None, feeds)[1]
            assert error(together[i : i + 1, k : k + 1], alone).max() < 1e-5


# Ties


def even_handed(model: Classifier, x: Tensor) -> Tensor:
    """The network with every output summed in one order, so that equal patches stay equal.

    PyTorch's convolution in float64 sums in another order at the edge of a tile, which breaks ties
    that are ties in the mathematics, and in every float32 kernel seen so far.
    """

    def conv(x: Tensor, weight: Tensor, layer: nn.Conv2d) -> Tensor:
        columns, flat = F.unfold(x, layer.kernel_size, padding=layer.padding), weight.flatten(1)
        total = torch.zeros((), dtype=x.dtype)
        for i in range(flat.shape[1]):
            total = total + flat[:, i, None] * columns[:, None, i]
        height = x.shape[2] + 2 * layer.padding[0] - layer.kernel_size[0] + 1
        return total.unflatten(2, (height, -1))

    for _, layer in model.named_layers():
        if isinstance(layer, CompactConv2d):
            squares = sum(x[:, c : c + 1].square() for c in range(x.shape[1]))
            norm = guarded_sqrt(conv(squares, torch.ones_like(layer.weight[:1, :1]), layer))
            product = conv(x, layer.weight * layer.alpha, layer)
            x = product / (norm + layer.delta) + layer.bias.view(-1, 1, 1)
        elif isinstance(layer, nn.Conv2d):
            x = conv(x, layer.weight, layer) + layer.bias.view(-1, 1, 1)
        else:
            x = layer(x)
    return x


def tied_images() -> np.ndarray:
    """Zeros, ones, a grey, and two digits on their constant background."""
    test = load_dataset("mnist5k", "test")
    digits = test.images(test.order()[:2])
    flat = [np.full(SHAPE, value, dtype=np.float32) for value in (0.0, 1.0, 0.3)]
    return np.concatenate([np.stack(flat), digits])


@pytest.mark.parametrize("defense", DEFENSES)
def test_of_equal_maxima_the_first_takes_the_gradient(defense: str) -> None:
    model = random_network("mnist-cnn", defense)
    images, cotangents = tied_images(), slopes(5, 2)
    _, gradients = vjp(lower_gradient(model), images, cotangents)

    truth = autograd(lambda x: even_handed(model.double(), x), images, cotangents)
    assert error(gradients, truth).max() < 1e-5


def test_giving_it_to_all_equal_maxima_would_be_seen() -> None:
    model = random_network("mnist-cnn", "sm")
    graph = lower_gradient(model)
    for node in graph.graph.node:
        if node.name in ("pool1.grad.mask", "pool2.grad.mask"):
            node.input[0] = node.input[0].replace("first", "maximal")
    images, cotangents = np.concatenate([tied_images(), noise(1)]), slopes(6, 2)
    _, gradients = vjp(graph, images, cotangents)

    truth = autograd(lambda x: even_handed(model.double(), x), images, cotangents)
    off = error(gradients, truth)
    assert off[:3].min() > 0.1  # constant images
    assert off[5] < 1e-5  # noise has no ties


def test_pool_agrees_with_torch_on_every_pattern_of_ties() -> None:
    values = np.array(np.meshgrid(*[[0.0, 0.5, 1.0]] * 4)).reshape(4, 81).T  # all 2x2 windows
    windows = values.reshape(9, 9, 2, 2).swapaxes(1, 2).reshape(1, 1, 18, 18).astype(np.float32)
    model = small((1, 18, 18), pool1=nn.MaxPool2d(2), flatten=nn.Flatten(), fc1=nn.Linear(81, 3))
    cotangents = slopes(1, 2, 3)
    _, gradients = vjp(lower_gradient(model), windows, cotangents)

    assert gradients == pytest.approx(autograd(model.double(), windows, cotangents), abs=1e-6)


@pytest.mark.parametrize("activation", [nn.ReLU, BoundedReLU])
def test_activations_agree_with_torch_where_they_bend(activation: type[nn.Module]) -> None:
    bends = np.array([-1.0, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0, np.nextafter(1, 2), 2.0])
    x = bends.astype(np.float32).reshape(1, 1, 3, 3)
    model = small((1, 3, 3), act1=activation(), flatten=nn.Flatten(), fc1=nn.Linear(9, 2))
    cotangents = slopes(1, 2, 2)
    _, gradients = vjp(lower_gradient(model), x, cotangents)

    assert gradients == pytest.approx(autograd(model.double(), x, cotangents), abs=1e-6)


# Layers of any shape


def small(shape: tuple[int, int, int], **layers: nn.Module) -> Classifier:
    plan = Architecture("small", "", shape, (), 0, (), 0.0, 2)
    model = Classifier(OrderedDict(layers), plan, BY_NAME["ccn"])
    return model.eval().requires_grad_(False)


# The same examples every time: about one in ten thousand has an activation so close to its bend
# that float32 and float64 fall on either side.
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    channels=st.sampled_from([1, 3, 8, 11]),
    out=st.sampled_from([1, 4, 8]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    pool=st.integers(1, 3),
    compact=st.booleans(),
    bounded=st.booleans(),
    silent=st.booleans(),
    batch=st.integers(1, 3),
    candidates=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_layers_of_any_shape_agree_with_autograd(
    channels: int, out: int, kernel: tuple[int, int], stride: int, padding: int, pool: int,
    compact: bool, bounded: bool, silent: bool, batch: int, candidates: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    shape = (channels, 6 * pool, 6 * pool)
    kind = CompactConv2d if compact else nn.Conv2d
    first = nn.Conv2d(channels, channels, 1)
    conv = kind(channels, out, kernel, stride=stride, padding=padding)
    with torch.no_grad():
        height, width = conv(torch.zeros(1, channels, 6, 6)).shape[2:]
        if compact:
            conv.alpha.fill_(2.5)
    features = out * height * width
    model = small(
        shape,
        mean=SubtractMean(),
        conv1=first,
        act1=BoundedReLU() if bounded else nn.ReLU(),
        pool1=nn.MaxPool2d(pool),
        conv2=conv,
        flatten=nn.Flatten(),
        fc1=CompactLinear(features, 5) if compact else nn.Linear(features, 5),
        act2=nn.ReLU(),
        fc2=nn.Linear(5, 3),
    )
    images = noise(batch, shape, seed)
    if silent:  # constant areas; the first convolution may map them to zero patches
        first.bias.zero_()
        images[:, :, : 3 * pool] = 0.5
    graph = lower_gradient(model)
    check_gradient(graph, Graph(lower(model)))
    cotangents = slopes(batch, candidates, 3, seed)
    feeds = {"images": images, "cotangents": cotangents}
    (by_definition,) = ReferenceEvaluator(graph).run(["gradients"], feeds)
    _, gradients = vjp(graph, images, cotangents)

    truth = autograd(model.double(), images, cotangents)
    # The floor under the norm of an all-zero patch moves it by 1e-6 / delta.
    scale = np.abs(truth).max() + 1e-6
    for got in (by_definition, gradients):
        assert np.isfinite(got).all()
        assert np.abs(got - truth).max() < (3e-4 if silent else 2e-5) * scale


def test_zero_patches_have_the_slope_of_the_equation() -> None:
    conv = CompactConv2d(2, 3, 2)
    model = small((2, 2, 2), conv1=conv, flatten=nn.Flatten(), fc1=nn.Linear(3, 3))
    with torch.no_grad():
        model.get_submodule("fc1").weight.copy_(torch.eye(3))
    zeros = np.zeros((1, 2, 2, 2), dtype=np.float32)
    _, gradients = vjp(lower_gradient(model), zeros, np.eye(3, dtype=np.float32)[None])

    # Equation 6 at 0: alpha * W / delta.
    assert gradients[0] == pytest.approx(conv.weight.numpy() / 0.01, rel=1e-6)


def test_pools_may_overlap_be_padded_or_leave_a_border() -> None:
    for pool in (nn.MaxPool2d(3, 2), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(4)):
        side = pool(torch.zeros(1, 1, 7, 7)).shape[2]
        flat = nn.Linear(side * side, 2)
        model = small((1, 7, 7), pool1=pool, flatten=nn.Flatten(), fc1=flat)
        images, cotangents = np.round(noise(2, (1, 7, 7)) * 3) / 3, slopes(2, 2, 2)
        _, gradients = vjp(lower_gradient(model), images, cotangents)
        assert error(gradients, autograd(model.double(), images, cotangents)).max() < 1e-5


# Structure


@pytest.mark.parametrize("defense", DEFENSES)
def test_shapes_follow_from_symbolic_images_and_candidates(defense: str) -> None:
    model = random_network("mnist-cnn", defense, classes=7)
    graph = lower_gradient(model)
    check_gradient(graph, Graph(lower(model)))
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in onnx.shape_inference.infer_shapes(graph, data_prop=True).graph.value_info
    }
    product = "conv2.product" if "conv2.norm" in shapes else "conv2"
    conv, flat = shapes[f"{product}.grad.unfolded"], shapes["flatten.grad.shaped"]
    assert conv[0] == flat[0] == "candidates"
    assert (conv[2:], flat[2:]) == ([32, 26, 26], [64, 4, 4])
    assert {node.domain for node in graph.graph.node} == {""}
    assert not [n for n in graph.graph.node if n.op_type == "MaxPool" and len(n.output) > 1]


def test_the_forward_pass_is_the_forward_graph_and_every_step_back_is_named_so() -> None:
    model = random_network("vgg11-cifar10", "ccn")
    forward, graph = lower(model), lower_gradient(model)
    count = len(forward.graph.node)

    assert list(graph.graph.node[:count]) == list(forward.graph.node)
    names = [node.name for node in graph.graph.node[count:]]
    assert names[0] == "cotangents.turned" and names[-1] == "gradients"
    assert all(".grad" in name for name in names[1:-1] if name != "cotangents.candidates")
    assert len(set(names)) == len(names)
    assert all(node.name == node.output[0] for node in graph.graph.node[count:])


def _node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name == name)


def _another_forward(g: onnx.GraphProto) -> None:
    _node(g, "conv1.norm").op_type = "Abs"


def _another_weight(g: onnx.GraphProto) -> None:
    constant = next(c for c in g.initializer if c.name == "conv3.bias")
    constant.CopyFrom(numpy_helper.from_array(np.zeros((64, 1, 1), np.float32), "conv3.bias"))


def _constant_gone(g: onnx.GraphProto) -> None:
    _node(g, "fc1.product.grad.matmul").input[1] = "fc2.weight"


def _fixed_candidates(g: onnx.GraphProto) -> None:
    g.input[1].type.tensor_type.shape.dim[1].dim_value = 9


def _foreign_op(g: onnx.GraphProto) -> None:
    _node(g, "conv1.quotient.grad.reciprocal").domain = "com.microsoft"


def _stack_trace(g: onnx.GraphProto) -> None:
    g.node[-4].doc_string = "File somewhere, line 3"


@pytest.mark.parametrize(
    "tamper",
    [
        _another_forward, _another_weight, _constant_gone, _fixed_candidates, _foreign_op,
        _stack_trace,
    ],
)  # fmt: skip
def test_structural_checks_find(tamper: Callable[[onnx.GraphProto], None]) -> None:
    model = random_network("mnist-cnn", "ccn")
    graph = lower_gradient(model)
    check_gradient(graph, Graph(lower(model)))
    tamper(graph.graph)
    with pytest.raises(LoweringError):
        check_gradient(graph, Graph(lower(model)))


def _kernel_not_turned(g: onnx.GraphProto) -> None:
    constant = next(c for c in g.initializer if c.name == "conv3.product.grad.turned")
    turned = numpy_helper.to_array(constant)[:, :, ::-1, ::-1]
    constant.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(turned), constant.name))


def _norm_held_fixed(g: onnx.GraphProto) -> None:
    _node(g, "act1.grad").input[1] = "conv2.product.grad.unfolded"
    _node(g, "act1.grad").op_type = "Max"


def _activation_passes_all(g: onnx.GraphProto) -> None:
    _node(g, "act3.grad.greater").op_type = "GreaterOrEqual"


def _layer_skipped(g: onnx.GraphProto) -> None:
    _node(g, "act5.grad.cast").input[0] = "act6.grad.greater"


def _division_by_an_empty_patch(g: onnx.GraphProto) -> None:
    _node(g, "conv1.norm.grad.where").input[2] = "conv1.norm.grad.div"


@pytest.mark.parametrize(
    "tamper",
    [
        _kernel_not_turned, _norm_held_fixed, _activation_passes_all, _layer_skipped,
        _division_by_an_empty_patch,
    ],
)  # fmt: skip
def test_probe_finds_a_sound_graph_of_another_gradient(
    tamper: Callable[[onnx.GraphProto], None],
) -> None:
    model = random_network("mnist-cnn", "ccn")
    graph = lower_gradient(model)
    check_gradient(graph, Graph(lower(model)))
    tamper(graph.graph)
    onnx.checker.check_model(graph, full_check=True)
    with pytest.raises(LoweringError, match="gradient"):
        check_gradient(graph, Graph(lower(model)))


# The runtime


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("b") / "ccn"
    return export_bundle(as_run(random_network("mnist-cnn", "ccn")), path)


def test_runtime_answers_as_the_reference_does(bundle: Bundle) -> None:
    images, cotangents = noise(3), slopes(3, 4)
    with open_runtime(bundle) as deployed, open_runtime(bundle, "torch", "fp64") as reference:
        assert deployed.differentiable
        logits, gradients = deployed.vjp(images, cotangents)
        expected, truth = reference.vjp(images, cotangents)
        forward = deployed.logits(images)
    assert logits.dtype == gradients.dtype == np.float32
    assert logits == pytest.approx(expected, abs=1e-5)
    assert logits == pytest.approx(forward, abs=1e-6)
    assert error(gradients, truth).max() < 1e-5


def test_runtime_splits_batches_and_takes_none(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, cotangents = noise(7), slopes(7, 5)
    with open_runtime(bundle) as runtime:
        logits, gradients = runtime.vjp(images, cotangents)  # 6 images, then 1
        empty, none = runtime.vjp(images[:0], cotangents[:0])
        only_logits, no_rows = runtime.vjp(images, cotangents[:, :0])
        strided = runtime.vjp(images[::2], cotangents[::2])
    assert (empty.shape, none.shape) == ((0, 10), (0, 5, *SHAPE))
    assert no_rows.shape == (7, 0, *SHAPE)
    assert only_logits == pytest.approx(logits, abs=1e-6)
    assert error(strided[1], gradients[::2]).max() < 1e-5
    for limit in (1, 2, 1000):
        monkeypatch.setattr(onnx_runtime_module, "ROWS", limit)
        with open_runtime(bundle, options=RuntimeOptions(max_batch=3)) as split:
            pieces = split.vjp(images, cotangents)
        assert pieces[0] == pytest.approx(logits, abs=1e-6)
        assert error(pieces[1], gradients).max() < 1e-5


@pytest.mark.parametrize(
    ("cotangents", "says"),
    [
        (slopes(2, 3).astype(np.float64), "float32"),
        (slopes(2, 3).tolist(), "float32, got list"),
        (slopes(2, 3)[0], "shape [2, K, 10], got [3, 10]"),
        (slopes(3, 3), "got [3, 3, 10]"),
        (slopes(2, 3, 9), "got [2, 3, 9]"),
        (slopes(2, 3) * np.float32(np.nan), "NaN"),
        (np.full((2, 3, 10), np.inf, dtype=np.float32), "infinite"),
    ],
)
def test_cotangents_outside_their_contract_are_refused(
    bundle: Bundle, cotangents: np.ndarray, says: str
) -> None:
    with open_runtime(bundle) as runtime, pytest.raises(InputError) as refused:
        runtime.vjp(noise(2), cotangents)
    assert says in refused.value.what


def test_images_are_checked_as_for_logits(bundle: Bundle) -> None:
    with open_runtime(bundle) as runtime:
        with pytest.raises(InputError, match=r"outside \[0, 1\]"):
            runtime.vjp(noise(2) + 1, slopes(2, 1))
        with pytest.raises(InputError, match="shape"):
            runtime.vjp(noise(2)[0], slopes(2, 1))


def test_a_bundle_without_the_graph_serves_and_says_that_it_has_no_gradients(
    tmp_path: Path,
) -> None:
    run = as_run(random_network("mnist-cnn", "sm"))
    served = export_bundle(run, tmp_path / "served", gradient=False)
    assert {file.role for file in served.manifest.files} == {"weights", "forward"}
    with open_runtime(served) as runtime:
        assert runtime.logits(noise(1)).shape == (1, 10)
        assert not runtime.differentiable
        with pytest.raises(RuntimeUnavailableError, match="no gradient graph in fp32"):
            runtime.vjp(noise(1), slopes(1, 1))


def test_a_closed_runtime_says_so_before_and_after_its_first_gradient(bundle: Bundle) -> None:
    for calls in (0, 1):
        runtime = open_runtime(bundle)
        for _ in range(calls):
            runtime.vjp(noise(1), slopes(1, 1))
        runtime.close()
        with pytest.raises(UsageError, match="closed"):
            runtime.vjp(noise(1), slopes(1, 1))


def test_threads_that_ask_at_once_get_the_same(bundle: Bundle) -> None:
    images, cotangents = noise(2), slopes(2, 2)
    found: list[np.ndarray] = []
    with open_runtime(bundle) as runtime:

        def ask() -> None:
            found.append(runtime.vjp(images, cotangents)[1])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert all(np.array_equal(gradients, found[0]) for gradients in found)


@pytest.mark.parametrize("spoilt", ["forward graph", "garbage", "other classes"])
def test_a_gradient_graph_that_is_none_is_refused_when_asked_for(
    bundle: Bundle, spoilt: str, tmp_path: Path
) -> None:
    if spoilt == "forward graph":
        graph = bundle.read(bundle.file(Role.FORWARD, "fp32"))
    elif spoilt == "garbage":
        graph = b"\x00\xff not a graph" * 50
    else:
        other = lower_gradient(random_network("mnist-cnn", "ccn", classes=4))
        graph = other.SerializeToString()
    manifest = bundle.manifest
    kept = [NewFile.copy(bundle, file) for file in manifest.files if file.role != "gradient"]
    wrong = write_bundle(
        tmp_path / "wrong",
        card=bundle.card,
        files=[*kept, NewFile("graphs/gradient-fp32.onnx", graph, Role.GRADIENT, "fp32")],
    )
    with open_runtime(wrong) as runtime:
        assert np.isfinite(runtime.logits(noise(1))).all()
        with pytest.raises(IntegrityError, match=r"gradient-fp32\.onnx"):
            runtime.vjp(noise(1), slopes(1, 1))


def test_a_gradient_graph_in_another_precision_does_not_count(bundle: Bundle) -> None:
    files = tuple(
        msgspec.structs.replace(file, precision="fp16") if file.role == "gradient" else file
        for file in bundle.manifest.files
    )
    relabelled = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, files=files))
    with open_runtime(relabelled) as runtime:
        assert not runtime.differentiable


def test_an_attack_needs_nothing_but_the_runtime(bundle: Bundle) -> None:
    images = torch.from_numpy(noise(2))
    with open_runtime(bundle) as runtime, open_runtime(bundle, "torch", "fp64") as reference:
        model = foolbox_model(runtime, None, gradient="native")
        leaf = images.clone().requires_grad_(True)
        loss = F.cross_entropy(model(leaf), torch.tensor([3, 4]), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        logits = torch.from_numpy(reference.logits(images.numpy()))
        slope = logits.softmax(1) - F.one_hot(torch.tensor([3, 4]), 10)
        _, truth = reference.vjp(images.numpy(), slope[:, None].float().numpy())
    assert error(gradient.numpy(), truth[:, 0]).max() < 1e-5


# Another library


@pytest.mark.parametrize("defense", ["sm", "ccn"])
def test_tensorrt_rtx_builds_an_engine(defense: str) -> None:
    trt = pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'ccn-deploy[rtx]'"
    )
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    graph = lower_gradient(random_network("mnist-cnn", defense))
    read = parser.parse(graph.SerializeToString())
    assert read, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *((n, *SHAPE) for n in (1, 8, 32)))
    profile.set_shape("cotangents", (1, 1, 10), (8, 9, 10), (32, 10, 10))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None and engine.nbytes > 1_000_000
