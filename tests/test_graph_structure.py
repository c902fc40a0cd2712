"""Normalisations that are found by structure in networks of many forms."""

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ccn_deploy.exporters.lowering import lower
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.layers import layer_outputs
from ccn_deploy.graph.reader import read_graph
from ccn_deploy.graph.structure import find_norms
from tests.networks import random_network


@functools.cache
def export(kind, opset):
    program = torch.onnx.export(
        kind().eval(),
        (torch.rand(2, 3, 16, 16),),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    return read_graph(program.model_proto.SerializeToString())


def kinds(graph):
    return dict(Counter(norm.kind for norm in find_norms(graph)))


def test_compact_layers_of_our_own_lowering() -> None:
    graph = Graph(lower(random_network("mnist-cnn", "ccn")))
    found = find_norms(graph)
    assert [norm.kind for norm in found] == ["compact"] * 7
    assert [norm.name for norm in found] == [
        *(f"conv{i}" for i in (1, 2, 3, 4)),
        *(f"fc{i}" for i in (1, 2, 3)),
    ]
    conv = found[1]
    parts = ("squares", "patches", "norm", "divisor", "quotient")
    assert conv.nodes == (*(f"conv2.{part}" for part in parts), "conv2")
    assert (conv.squared, conv.summed, conv.divisor, conv.product, conv.result) == (
        "act1",
        "conv2.patches",
        "conv2.divisor",
        "conv2.product",
        "conv2",
    )
    assert found[-1].result == "logits"


def test_a_plain_network_has_none() -> None:
    assert find_norms(Graph(lower(random_network("mnist-cnn", "sm")))) == ()


def compact_form(**parts):
    """Return a compact convolution as an exporter might write it, and x that it reads."""
    settings = {"square": "Pow", "cast": False, "kernel": 1.0, "other": False, **parts}

    def constant(name, value, dtype=np.float32):
        return numpy_helper.from_array(np.asarray(value, dtype), name)

    squares = {
        "Pow": [
            helper.make_node("Pow", ["x", "two"], ["squared"], name="square"),
            helper.make_node("ReduceSum", ["squared", "axes"], ["sums"], name="sum"),
        ],
        "Mul": [
            helper.make_node("Mul", ["x", "x"], ["squared"], name="square"),
            helper.make_node("ReduceSum", ["squared", "axes"], ["sums"], name="sum"),
        ],
        "ReduceSumSquare": [
            helper.make_node("ReduceSumSquare", ["x", "axes"], ["sums"], name="square"),
        ],
    }[settings["square"]]
    nodes = [
        helper.make_node("Relu", ["images"], ["x"], name="before"),
        helper.make_node("Neg", ["images"], ["z"], name="elsewhere"),
        *squares,
        helper.make_node("Conv", ["sums", "ones"], ["patches"], name="patches"),
        helper.make_node("Clip", ["patches", "floor"], ["clipped"], name="clip"),
        helper.make_node("Sqrt", ["clipped"], ["norm"], name="root"),
        helper.make_node("Add", ["norm", "delta"], ["divisor"], name="delta"),
        helper.make_node("Conv", ["z" if settings["other"] else "x", "w"], ["p"], name="product"),
        helper.make_node("Cast", ["p"], ["same"], name="cast", to=TensorProto.FLOAT),
        helper.make_node(
            "Div", ["same" if settings["cast"] else "p", "divisor"], ["q"], name="quotient"
        ),
        helper.make_node("Add", ["q", "bias"], ["logits"], name="bias"),
    ]
    graph = helper.make_graph(
        nodes,
        "compact",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 6, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, 4, 4])],
        [
            constant("two", 2),
            constant("axes", [1], np.int64),
            constant("ones", np.full((1, 1, 3, 3), settings["kernel"])),
            constant("floor", 1e-12),
            constant("delta", 0.01),
            constant("w", np.ones((2, 3, 3, 3))),
            constant("bias", np.ones((2, 1, 1))),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return read_graph(model.SerializeToString())


@pytest.mark.parametrize("square", ["Pow", "Mul", "ReduceSumSquare"])
@pytest.mark.parametrize("cast", [False, True])
def test_forms_of_a_compact_convolution(square, cast) -> None:
    (norm,) = find_norms(compact_form(square=square, cast=cast))
    assert norm.kind == "compact"
    assert norm.squared == "x"
    assert norm.summed == "clipped"
    assert norm.nodes[0] == "square"
    assert norm.nodes[-3:] == ("delta", "quotient", "bias")
    assert "product" not in norm.nodes


@pytest.mark.parametrize("fault", [{"kernel": 0.5}, {"other": True}])
def test_what_only_looks_compact(fault) -> None:
    """A weighted sum of squares, or a product of another tensor, is no compact layer."""
    (norm,) = find_norms(compact_form(**fault))
    assert norm.kind == "root"


class Blocks(nn.Module):
    """Layer norms, attention, RMS norm by hand, group and instance norm, LRN, L2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.group = nn.GroupNorm(2, 8)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.local = nn.LocalResponseNorm(3)
        self.layer = nn.LayerNorm(8)
        self.batch = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        x = self.local(self.instance(self.group(self.batch(self.stem(images)))))
        x = self.layer(x.flatten(2).transpose(1, 2)).unsqueeze(1)
        x = nn.functional.scaled_dot_product_attention(x, x, x).squeeze(1).mean(1)
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.head(nn.functional.normalize(x))


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.filterwarnings("ignore")
def test_normalisations_of_a_torch_export(opset) -> None:
    graph = export(Blocks, opset)
    wanted = {"group": 1, "instance": 1, "lrn": 1, "layer": 2, "softmax": 1, "rms": 1, "lp": 1}
    assert kinds(graph) == wanted
    for norm in find_norms(graph):
        names = {node.name for node in graph.nodes}
        assert set(norm.nodes) <= names
        assert norm.result in graph.made_by
        for tensor in (norm.squared, norm.summed, norm.divisor, norm.product):
            assert not tensor or tensor in graph.floats


@pytest.mark.filterwarnings("ignore")
def test_layers_show_a_normalisation_once() -> None:
    graph = export(Blocks, 20)
    shown = layer_outputs(graph)
    inner = {name for norm in find_norms(graph) for name in norm.nodes if name != norm.name}
    assert not inner & set(shown)
    assert list(shown.values())[-1] == "logits"
    assert set(shown.values()) <= graph.floats


def chain(*nodes, constants):
    graph = helper.make_graph(
        [helper.make_node(op, i, o, name=o[0], **a) for op, i, o, a in nodes],
        "chain",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 6])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def test_softmax_by_hand() -> None:
    graph = chain(
        ("Exp", ["images"], ["power"], {}),
        ("ReduceSum", ["power", "axes"], ["total"], {}),
        ("Div", ["power", "total"], ["logits"], {}),
        constants={"axes": np.array([1])},
    )
    (norm,) = find_norms(graph)
    assert (norm.kind, norm.nodes) == ("softmax", ("power", "total", "logits"))


def test_roots_of_constants_and_of_sums_that_are_no_squares_are_none() -> None:
    graph = chain(
        ("Sqrt", ["variance"], ["spread"], {}),
        ("Div", ["images", "spread"], ["scaled"], {}),
        ("Abs", ["scaled"], ["size"], {}),
        ("Sqrt", ["size"], ["root"], {}),
        ("Div", ["scaled", "root"], ["logits"], {}),
        constants={"variance": np.ones(6, np.float32)},
    )
    assert find_norms(graph) == ()


def test_a_norm_that_divides_nothing_is_a_root() -> None:
    graph = chain(
        ("ReduceL2", ["images", "axes"], ["length"], {}),
        ("Mul", ["images", "length"], ["logits"], {}),
        constants={"axes": np.array([1])},
    )
    (norm,) = find_norms(graph)
    assert (norm.kind, norm.nodes, norm.product) == ("root", ("length",), "")


def test_light_networks_keep_theirs() -> None:
    folder = Path(onnx.__file__).parent / "backend/test/data/light"
    graph = read_graph((folder / "light_bvlc_alexnet.onnx").read_bytes())
    assert kinds(graph) == {"lrn": 2, "softmax": 1}
