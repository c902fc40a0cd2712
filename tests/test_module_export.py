"""Modules of users as forward graphs: the same function, readable, always the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from ccn_deploy.errors import LoweringError, UsageError
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.sources.agreement import module_agreement
from ccn_deploy.exporters.sources.module import export_module
from ccn_deploy.exporters.vjp import gradient_graph
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.graph import Graph
from ccn_deploy.layers import CompactConv2d, CompactLinear, compactify
from ccn_deploy.models import build_model
from tests.modules import module
from tests.own_networks import ClassTokenViT, ResNet

SHAPE = (3, 32, 32)
NETWORKS: dict[str, Any] = {
    "resnet": ResNet,
    "vit": ClassTokenViT,
    "convnext": lambda: module("convnext"),
    "mobilenet": lambda: module("mobilenet"),
}


def network(name: str, *, compact: bool = False) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = NETWORKS[name]()
    if compact:
        compactify(made)
        for part in made.modules():
            if isinstance(part, CompactConv2d | CompactLinear):
                part.alpha.data.uniform_(0.7, 2.0)
    return made


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: onnx.ModelProto, images: Tensor) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(to_bytes(model), options)
    return session.run(["logits"], {"images": images.numpy()})[0]


def deviation(made: nn.Module, model: onnx.ModelProto) -> float:
    figures = module_agreement(made, Graph(model))
    return figures["module"] / figures["scale"]


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_is_the_module_for_every_batch(name: str, compact: bool) -> None:
    made = network(name, compact=compact).train()
    model = export_module(made, SHAPE)
    assert made.training  # nothing of it changes
    onnx.checker.check_model(model, full_check=True)
    images = torch.rand(5, *SHAPE)
    assert deviation(made, model) < 1e-6
    with torch.no_grad():
        expected = made.eval()(images).numpy()
    for count in (1, 2, 5):
        np.testing.assert_allclose(run(model, images[:count]), expected[:count], atol=1e-4)
    given, made_of = model.graph.input[0], model.graph.output[0]
    assert (given.name, made_of.name) == ("images", "logits")
    assert given.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert made_of.type.tensor_type.shape.dim[1].dim_value == 10
    assert not {"Dropout", "Identity", "CompactConv2d", "Clip"} & set(ops(model))


FIGURE_4 = ["ReduceSumSquare", "Conv", "Sqrt", "Add", "Conv", "Div", "Add"]
GROUPED = ["Mul", "Conv", "Sqrt", "Add", "Conv", "Div", "Add"]
LINEAR = ["ReduceSumSquare", "Sqrt", "Add", "Gemm", "Div", "Add"]
LAYERS: dict[str, tuple[Any, list[str]]] = {
    "plain": (lambda: CompactConv2d(4, 4, (2, 3)), FIGURE_4),
    "without_bias": (lambda: CompactConv2d(4, 4, 3, bias=False), FIGURE_4[:-1]),
    "depthwise": (lambda: CompactConv2d(4, 4, 3, groups=4), GROUPED),
    "grouped": (lambda: CompactConv2d(4, 4, 3, groups=2), ["Mul", "Conv", *GROUPED[1:]]),
    "window": (lambda: CompactConv2d(4, 4, 3, 2, (1, 2), dilation=2), FIGURE_4),
    "same": (lambda: CompactConv2d(4, 4, (2, 3), 1, "same", (1, 3)), FIGURE_4),
    "learned": (lambda: CompactConv2d(4, 4, 3, delta=0.3, learn_delta=True), FIGURE_4),
    "reflect": (lambda: CompactConv2d(4, 4, 3, 1, 1, padding_mode="reflect"), FIGURE_4),
    "circular": (lambda: CompactConv2d(4, 4, 3, 1, 1, padding_mode="circular"), FIGURE_4),
    "pixels": (lambda: CompactLinear(9, 5), [op.replace("Gemm", "MatMul") for op in LINEAR]),
    "pixels_without_bias": (
        lambda: CompactLinear(9, 5, bias=False), ["ReduceSumSquare", "Sqrt", "Add", "MatMul", "Div"]
    ),
    "features": (lambda: nn.Sequential(nn.Flatten(), CompactLinear(324, 5)), LINEAR),
    "features_without_bias": (
        lambda: nn.Sequential(nn.Flatten(), CompactLinear(324, 5, bias=False)), LINEAR[:-1]
    ),
}  # fmt: skip


class SideBySide(nn.Module):
    """Every layer on the same images; one export shows them all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (make, _) in LAYERS.items():
            self.add_module(name, make())
        for parameter_name, parameter in self.named_parameters():
            if parameter_name.endswith("alpha"):
                parameter.data.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x).flatten(1) for layer in self.children()], dim=1)


def test_compact_layers_are_exactly_figure_4() -> None:
    made = SideBySide()
    model = export_module(made, (4, 9, 9))
    for name, (_, expected) in LAYERS.items():
        found = [
            n.op_type
            for n in model.graph.node
            if n.name.split(".")[0] == name and n.op_type not in ("Reshape", "Flatten")
        ]
        if name in ("reflect", "circular"):  # padded before, as torch writes it
            found = found[-len(expected) :]
        assert found == expected, name
    assert deviation(made, model) < 1e-6
    images = torch.rand(2, 4, 9, 9)
    (got,) = ReferenceEvaluator(model).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(got, made(images).detach(), atol=1e-5)


def test_compact_layers_are_those_of_our_own_lowering() -> None:
    model = build_model("mnist-cnn", "ccn", seed=2)
    ours, theirs = lower(model), export_module(model, (1, 28, 28))
    exported = {n.name: n for n in theirs.graph.node}
    constants = {c.name: c for c in theirs.graph.initializer}
    for node in ours.graph.node:
        if node.name.startswith(("conv", "fc")):
            assert exported[node.name].op_type == node.op_type
            assert list(exported[node.name].output) == list(node.output)
            assert exported[node.name].attribute == node.attribute
    for constant in ours.graph.initializer:
        if constant.name.startswith(("conv", "fc")):
            assert constants[constant.name] == constant
    assert theirs.opset_import == ours.opset_import and theirs.ir_version == ours.ir_version


def test_a_layer_that_is_called_twice_and_a_weight_that_is_used_elsewhere() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = CompactLinear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(self.fc(x.flatten(1)))
            return x @ self.fc.weight

    made = Twice()
    made.fc.alpha.data.fill_(2.0)
    model = export_module(made, (1, 4, 4))
    assert deviation(made, model) < 1e-6
    assert ops(model).count("Sqrt") == 2


@pytest.mark.parametrize("size", [3, (4, None), (9, 2)])
def test_adaptive_averages_of_uneven_windows_have_gradients(
    size: int | tuple[int | None, int | None],
) -> None:
    pool = nn.AdaptiveAvgPool2d(size)
    flat = pool(torch.zeros(1, 2, 7, 8)).numel()
    module = nn.Sequential(nn.Conv2d(1, 2, 1), pool, nn.Flatten(), nn.Linear(flat, 4))
    model = export_module(module, (1, 7, 8))
    assert deviation(module, model) < 1e-5
    assert set(ops(model)) == {"Conv", "MatMul", "Reshape", "Gemm"}
    images = torch.rand(2, 1, 7, 8, requires_grad=True)
    module(images).sum().backward()
    graph = ReferenceEvaluator(gradient_graph(Graph(model)))
    ones = np.ones((2, 1, 4), np.float32)
    given = {"images": images.detach().numpy(), "cotangents": ones}
    (slopes,) = graph.run(["gradients"], given)
    assert images.grad is not None
    assert slopes[:, 0] == pytest.approx(images.grad.numpy(), abs=1e-6)


def test_the_batch_may_be_asked_for_by_its_length() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = CompactConv2d(1, 2, 2), CompactLinear(18, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).view(len(x), -1))

    made = Own()
    model = export_module(made, (1, 4, 4))
    assert deviation(made, model) < 1e-6
    assert ops(model) == [*FIGURE_4, "Reshape", *LINEAR]


def test_names_are_the_modules_own() -> None:
    names = [node.name for node in export_module(network("resnet"), SHAPE).graph.node]
    assert names == [
        "conv1", "relu", "maxpool",
        "layer1.0.conv1", "layer1.0.relu", "layer1.0.conv2", "layer1.0.add", "layer1.0.relu_2",
        "layer2.0.conv1", "layer2.0.relu", "layer2.0.conv2", "layer2.0.downsample.0",
        "layer2.0.add", "layer2.0.relu_2", "avgpool", "reshape", "fc",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["vit"])
def test_the_bytes_are_the_same_in_another_process_and_hold_no_traces(name: str) -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); from tests.test_module_export import *;"
        "from pathlib import Path; torch.set_num_threads(1);"
        f"sys.stdout.buffer.write(to_bytes(export_module(network({name!r}, compact=True), SHAPE)))"
    )
    root = Path(__file__).parents[1]
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=root, check=True)
    made = network(name, compact=True)
    data = to_bytes(export_module(made, SHAPE))
    assert data == other.stdout
    model = onnx.load_from_string(data)
    assert not model.metadata_props and not model.functions and not model.graph.value_info
    for node in model.graph.node:
        assert not node.metadata_props and not node.doc_string and not node.domain
    for trace in (b"/root", b"site-packages", b".py", b"pkg.torch", b"network."):
        assert trace not in data


class Wrong(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.fc = what, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x.flatten(1))
        if self.what == "raises":
            raise KeyError("no 'head' here")
        if self.what == "branch":
            return y if y.sum() > -100 else y * 2
        if self.what == "fixed":
            return self.fc(x.reshape(2, 12))
        return {
            "tuple": (y, y), "dict": {"logits": y}, "rank": x, "labels": y.argmax(1),
            "integers": y.long(), "random": y + torch.rand_like(y), "batch": y - y.mean(0),
            "nan": y / 0 * 0, "constant": torch.ones(x.shape[0], 3), "one": y.sum(1),
        }[self.what]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("raises", r"raises on images of shape \[3, 3, 2, 2\]: KeyError: \"no 'head' here\""),
        ("tuple", "returns a tuple, not a tensor"),
        ("dict", "returns a dict, not a tensor"),
        ("rank", r"returns shape \[3, 3, 2, 2\] for images of shape"),
        ("one", r"returns shape \[3\] for images"),
        ("labels", "returns torch.int64, not floating-point"),
        ("integers", "returns torch.int64"),
        ("random", "is random in evaluation mode"),
        ("batch", "depend on the other images of its batch"),
        ("nan", "no numbers"),
        ("constant", "every image the same logits"),
        ("branch", "torch.onnx cannot export the module: "),
        ("fixed", "raises on images of shape"),
    ],
)
def test_what_is_no_classifier_is_refused_in_two_lines(what: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        export_module(Wrong(what), (3, 2, 2))
    assert len(str(caught.value).splitlines()) == 2
    assert caught.value.exit_code == 2


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(UsageError, match=r"is a function, not a torch\.nn\.Module"):
        export_module(lambda x: x, (1, 1, 1))  # type: ignore[arg-type]


def test_another_function_does_not_agree() -> None:
    made = network("resnet")
    model = export_module(made, SHAPE)
    made.fc.bias.data += 1e-3  # type: ignore[union-attr, operator]
    with pytest.raises(LoweringError, match="is off by"):
        deviation(made, model)
