"""The gradient of the cross-entropy that ONNX Runtime finds with one forward pass."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from ccn_deploy.attacks import suite
from ccn_deploy.attacks.foolbox_model import NativeModel
from ccn_deploy.attacks.passes import NativePass, forward, slope
from ccn_deploy.attacks.perform import perform
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import InputError, RuntimeUnavailableError, UsageError
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.loss_gradient import with_loss_gradient
from ccn_deploy.runtimes.onnx_runtime import OnnxRuntime
from ccn_deploy.runtimes.torch_runtime import load_reference

ONE_THREAD = RuntimeOptions(threads=1)


def digits(n: int) -> tuple[np.ndarray, np.ndarray]:
    dataset = load_dataset("mnist5k", "test")
    chosen = dataset.order(0)[:n]
    return dataset.images(chosen), dataset.labels[chosen]


def opened(bundle: Bundle, options: RuntimeOptions = ONE_THREAD) -> OnnxRuntime:
    runtime = open_runtime(bundle, "onnxruntime-cpu", options=options)
    assert isinstance(runtime, OnnxRuntime)
    return runtime


@pytest.fixture(params=["sm", "ccn"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.getfixturevalue(f"{request.param}_bundle")


class Halves:
    """A runtime without the method, so that passes ask for logits and gradients one by one."""

    differentiable = True

    def __init__(self, runtime: OnnxRuntime) -> None:
        self.logits, self.vjp, self.spec = runtime.logits, runtime.vjp, runtime.spec


def test_it_is_the_gradient_of_the_cross_entropy_in_float64(bundle: Bundle) -> None:
    images, labels = digits(40)
    reference = load_reference(bundle, torch.float64)
    x = torch.from_numpy(images).double().requires_grad_()
    expected = reference(x)
    loss = torch.nn.functional.cross_entropy(expected, torch.from_numpy(labels), reduction="sum")
    (exact,) = torch.autograd.grad(loss, x)
    with opened(bundle) as runtime:
        logits, found = runtime.cross_entropy(images, labels)
    assert (logits.dtype, found.dtype, found.shape) == (np.float32, np.float32, images.shape)
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4)
    far = np.abs(found - exact.numpy()).reshape(40, -1).max(axis=1)
    # Rounding may turn a ReLU or a tie in a pool of single images.
    assert np.median(far / np.abs(exact.numpy()).reshape(40, -1).max(axis=1)) < 1e-4


@pytest.mark.parametrize("sure", [0.0, 10.0, 20.0, 60.0])
def test_the_slope_is_right_however_sure_the_network_is(sure: float) -> None:
    logits = torch.randn((4, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4)
    logits[torch.arange(4), labels] += sure
    exact = torch.softmax(logits.double(), dim=-1)
    others = exact.scatter(1, labels[:, None], 0.0)
    exact = others.scatter(1, labels[:, None], -others.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(slope(logits, labels).double(), exact, rtol=1e-4, atol=0.0)
    made = _cotangents(logits.numpy(), labels.numpy())
    torch.testing.assert_close(torch.from_numpy(made).double(), exact, rtol=1e-4, atol=0.0)


def _cotangents(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What the graph goes back along, from a network that is the identity."""
    count = logits.shape[1]
    floats = [
        ("images", ["N", count]), ("cotangents", ["N", "K", count]),
        ("logits", ["N", count]), ("gradients", ["N", "K", count]),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in floats]
    nodes = [
        helper.make_node("Identity", ["images"], ["logits"]),
        helper.make_node("Identity", ["cotangents"], ["gradients"]),
    ]
    graph = helper.make_graph(nodes, "identity", ends[:2], ends[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    made = with_loss_gradient(model.SerializeToString(), "cotangents", "logits", count)
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["gradients"], {"images": logits, "labels": labels})[0]
    return found[:, 0]


def test_pieces_of_any_size_give_the_same(ccn_bundle: Bundle) -> None:
    images, labels = digits(37)
    with opened(ccn_bundle) as whole, opened(ccn_bundle, replace(ONE_THREAD, max_batch=5)) as split:
        for a, b in zip(
            whole.cross_entropy(images, labels), split.cross_entropy(images, labels), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert whole.cross_entropy(images[:0], labels[:0])[1].shape == (0, 1, 28, 28)


def test_what_makes_no_sense_is_refused(ccn_bundle: Bundle) -> None:
    images, labels = digits(3)
    with opened(ccn_bundle) as runtime:
        with pytest.raises(InputError, match=r"outside 0\.\.9"):
            runtime.cross_entropy(images, labels + 10)
        with pytest.raises(InputError, match="belong together"):
            runtime.cross_entropy(images, labels[:2])
        with pytest.raises(InputError, match=r"outside \[0, 1\]"):
            runtime.cross_entropy(images + 1, labels)
    with pytest.raises(UsageError, match="closed"):
        runtime.cross_entropy(images, labels)
    files = tuple(file for file in ccn_bundle.manifest.files if file.role != "gradient")
    bare = replace(ccn_bundle, manifest=msgspec.structs.replace(ccn_bundle.manifest, files=files))
    with opened(bare) as runtime, pytest.raises(RuntimeUnavailableError, match="--no-gradient"):
        runtime.cross_entropy(images, labels)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_attacks_find_the_same_images_with_one_forward_pass_as_with_two(
    bundle: Bundle, name: str
) -> None:
    images, labels = digits(24)
    (spec,) = suite([name], [0.15])
    seeds = np.arange(24)[:, None]
    with opened(bundle) as runtime:
        labels = runtime.logits(images).argmax(axis=1)
        once = perform(spec, NativeModel(runtime), images, labels, seeds=seeds)
        twice = perform(spec, NativeModel(Halves(runtime)), images, labels, seeds=seeds)
        fooled = [runtime.logits(made).argmax(axis=1) != labels for made in (once, twice)]
    # A sign near zero is rounding's to choose, and later steps part from there.
    assert (fooled[0] == fooled[1]).mean() >= 0.95
    assert (np.abs(once - twice) < 1e-6).mean() > (0.999 if name == "fgsm" else 0.95)


class Torn:
    """A runtime whose gradient graph takes every image for class 0 and its forward graph knows."""

    differentiable = True

    def logits(self, images: np.ndarray) -> np.ndarray:
        return np.tile(np.float32([0.0, 1.0]), (len(images), 1))

    def cross_entropy(self, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
        logits = np.tile(np.float32([1.0, 0.0]), (len(images), 1))
        logits[images[:, 0, 0, 0] > 0.5] = np.nan
        return logits, np.ones_like(images)


def test_the_forward_graph_says_who_is_fooled_and_no_slope_is_made_of_nan() -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[2] = 1.0
    here = NativePass(Torn(), images, torch.tensor([1, 0, 0]))  # type: ignore[arg-type]
    assert here.logits[:2].argmax(dim=1).tolist() == [1, 0]  # asked only where they seem fooled
    rises = here.loss_gradient(torch.tensor([0, 1, 2]), torch.tensor([1, 0, 0]))
    assert rises[:2].isfinite().all() and rises[2].isnan().all()


def test_a_pass_that_was_not_announced_asks_for_nothing_in_advance(ccn_bundle: Bundle) -> None:
    images, labels = (torch.from_numpy(array) for array in digits(4))
    with opened(ccn_bundle) as runtime:
        rows = torch.arange(4)
        announced = forward(NativeModel(runtime), images, labels=labels).loss_gradient(rows, labels)
        asked = forward(NativeModel(runtime), images).loss_gradient(rows, labels)
    torch.testing.assert_close(announced, asked, rtol=1e-3, atol=1e-5)


def test_the_logits_may_stand_anywhere_in_the_graph() -> None:
    # What reads the cotangents comes before the logits are made: gradient = cotangents @ W.
    weights = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["cotangents", "W"], ["gradients"]),
        helper.make_node("MatMul", ["images", "V"], ["logits"]),
    ]
    value = helper.make_tensor_value_info
    images = value("images", TensorProto.FLOAT, ["batch", 4])
    cotangents = value("cotangents", TensorProto.FLOAT, ["batch", "candidates", 3])
    outputs = [
        value("logits", TensorProto.FLOAT, ["batch", 3]),
        value("gradients", TensorProto.FLOAT, ["batch", "candidates", 4]),
    ]
    constants = [
        onnx.numpy_helper.from_array(weights, "W"),
        onnx.numpy_helper.from_array(np.ascontiguousarray(weights.T), "V"),
    ]
    graph = helper.make_graph(nodes, "line", [images, cotangents], outputs, constants)
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    changed = with_loss_gradient(model.SerializeToString(), "cotangents", "logits", 3)
    onnx.checker.check_model(onnx.load_model_from_string(changed), full_check=True)
    session = onnxruntime.InferenceSession(changed, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1])
    logits, found = session.run(["logits", "gradients"], {"images": x, "labels": labels})
    p = np.exp(x @ weights.T)
    p = p / p.sum(axis=1, keepdims=True) - np.eye(3)[labels]
    np.testing.assert_allclose(logits, x @ weights.T, rtol=1e-5)
    np.testing.assert_allclose(found[:, 0], p @ weights, rtol=1e-4, atol=1e-5)
