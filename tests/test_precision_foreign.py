"""Low precision of networks that others wrote, against ONNX's own definitions and autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ccn_deploy.errors import LoweringError, UsageError
from ccn_deploy.exporters.precision import (
    Calibration,
    Converted,
    check_precision,
    convert,
    numeric_report,
)
from ccn_deploy.exporters.precision.types import tensor_types
from ccn_deploy.exporters.tensorrt.build import Batches, build_engine
from ccn_deploy.exporters.vjp import gradient_graph
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.signature import COTANGENTS, GRADIENTS, INPUT, OUTPUT
from tests.modules import MODULES, foreign_graph

Nodes = Sequence[tuple[str, Sequence[str], str, dict[str, Any]]]

UNITS = {"fp16": 2.0**-11, "bf16": 2.0**-8}
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def noise(n: int, shape: Sequence[int | str]) -> NDArray[np.float32]:
    sizes = [int(size) for size in shape]
    return np.random.default_rng(7).random((n, *sizes), dtype=np.float32)


def by_definition(graph: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(ReferenceEvaluator(graph).run([OUTPUT], {INPUT: images})[0])


def in_runtime(graph: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    return np.asarray(session.run([OUTPUT], {INPUT: images})[0])


def small(
    nodes: Nodes, constants: dict[str, Any], shape: tuple[int, ...] = (3, 6, 6), opset: int = 20
) -> Graph:
    """Return a graph of nodes (op, inputs, name, attributes); the last one makes the logits."""
    made = [
        helper.make_node(op, list(inputs), [OUTPUT if name == nodes[-1][2] else name], name, **more)
        for op, inputs, name, more in nodes
    ]
    graph = helper.make_graph(
        made,
        "small",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", None])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return Graph(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def weights(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 3


# Half precisions


@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("name", MODULES)
def test_half_precision_computes_the_same_network(name: str, precision: str) -> None:
    graph = foreign_graph(name)
    converted = convert(graph, precision).graph
    check_precision(converted, precision)
    images = noise(4, graph.input_shape)
    wanted = GraphModule(graph, torch.float64)(torch.from_numpy(images)).numpy()
    scale = np.abs(wanted).max()
    found = by_definition(converted, images)
    assert found.dtype == np.float32
    # bf16 of mobilenet: its logits are differences of features that are 20 times as large
    assert 0 < np.abs(found - wanted).max() < 20 * UNITS[precision] * scale
    if precision == "fp16":
        assert np.abs(in_runtime(converted, images) - wanted).max() < 4 * UNITS["fp16"] * scale


@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("name", MODULES)
def test_gradient_is_that_of_the_rounded_weights(name: str, precision: str) -> None:
    graph = foreign_graph(name)
    backward = convert(Graph(gradient_graph(graph)), precision).graph
    check_precision(backward, precision)
    forward = convert(graph, precision).graph
    assert list(backward.graph.node)[: len(forward.graph.node)] == list(forward.graph.node)
    constants = {constant.name: constant for constant in backward.graph.initializer}
    assert all(constants[constant.name] == constant for constant in forward.graph.initializer)

    images = noise(2, graph.input_shape)
    cotangents = np.random.default_rng(1).standard_normal((2, 3, 10)).astype(np.float32) * 1e-9
    if precision == "fp16":
        session = onnxruntime.InferenceSession(backward.SerializeToString())
    else:
        session = ReferenceEvaluator(backward)
    (found,) = session.run([GRADIENTS], {INPUT: images, COTANGENTS: cotangents})
    truth = autograd(rounded(graph, forward), images, cotangents)
    cosine = (found * truth).sum() / np.linalg.norm(found) / np.linalg.norm(truth)
    smooth = name in ("convnext", "vit")
    assert cosine > (1 - 8 * UNITS[precision] if smooth else 0.97)  # a unit near 0 may switch


def rounded(graph: Graph, low: onnx.ModelProto) -> Graph:
    """Return the float32 graph with the constants of a low one, in float32."""
    kinds = {constant.name: constant for constant in low.graph.initializer}
    copy = onnx.ModelProto()
    copy.CopyFrom(graph.model)
    for constant in copy.graph.initializer:
        lower = kinds.get(constant.name)
        if lower is not None and lower.data_type in TYPES.values():
            value = numpy_helper.to_array(lower).astype(np.float32)
            constant.CopyFrom(numpy_helper.from_array(value, constant.name))
    return Graph(copy)


def autograd(
    graph: Graph, images: NDArray[np.float32], cotangents: NDArray[np.float32]
) -> NDArray[np.float64]:
    leaf = torch.from_numpy(images).double().requires_grad_(True)
    logits = GraphModule(graph, torch.float64)(leaf)
    gradients = [
        torch.autograd.grad(logits, leaf, torch.from_numpy(row).double(), retain_graph=True)[0]
        for row in cotangents.swapaxes(0, 1)
    ]
    return np.asarray(torch.stack(gradients, 1).numpy())


def test_manifest_says_what_computes_each_layer() -> None:
    layers = convert(foreign_graph("vit"), "fp16").layers
    graph = foreign_graph("vit")
    for node in graph.nodes:
        if node.op in ("LayerNormalization", "Softmax"):
            assert layers[node.name] == {"compute": "fp32", "norm": "fp32"}
        if node.op in ("MatMul", "Gelu", "Gemm", "Conv"):
            assert layers[node.name] == {"compute": "fp16"}


# Islands


def normalised(form: str) -> Graph:
    """Return convolution, a normalisation in some form, ReLU and a linear layer."""
    constants: dict[str, Any] = {
        "w": weights(8, 3, 3, 3), "v": weights(8, 5), "gamma": weights(8, seed=3),
        "beta": weights(8, seed=4), "epsilon": np.float32(1e-5), "two": np.float32(2),
        "half": np.float32(0.5), "axes": np.array([1]), "space": np.array([2, 3]),
        "minus": np.float32(-0.5), "size": np.array([0, 8]),
    }  # fmt: skip
    mean: Nodes = [
        ("ReduceMean", ["x", "axes"], "n.mean", {}),
        ("Sub", ["x", "n.mean"], "n.centred", {}),
    ]
    forms: dict[str, Nodes] = {
        "layer": [
            *mean,
            ("Pow", ["n.centred", "two"], "n.square", {}),
            ("ReduceMean", ["n.square", "axes"], "n.variance", {}),
            ("Add", ["n.variance", "epsilon"], "n.safe", {}),
            ("Sqrt", ["n.safe"], "n.root", {}),
            ("Div", ["n.centred", "n.root"], "n", {}),
        ],
        "layer, moments": [
            ("ReduceMean", ["x", "axes"], "n.mean", {}),
            ("Mul", ["n.mean", "n.mean"], "n.meansquare", {}),
            ("Mul", ["x", "x"], "n.square", {}),
            ("ReduceMean", ["n.square", "axes"], "n.moment", {}),
            ("Sub", ["n.moment", "n.meansquare"], "n.variance", {}),
            ("Add", ["n.variance", "epsilon"], "n.safe", {}),
            ("Sqrt", ["n.safe"], "n.root", {}),
            ("Sub", ["x", "n.mean"], "n.centred", {}),
            ("Div", ["n.centred", "n.root"], "n", {}),
        ],
        "rms": [
            ("Mul", ["x", "x"], "n.square", {}),
            ("ReduceMean", ["n.square", "axes"], "n.variance", {}),
            ("Add", ["n.variance", "epsilon"], "n.safe", {}),
            ("Pow", ["n.safe", "minus"], "n.inverse", {}),
            ("Mul", ["x", "n.inverse"], "n", {}),
        ],
        "rms, reciprocal": [
            ("ReduceSumSquare", ["x", "axes"], "n.square", {}),
            ("Add", ["n.square", "epsilon"], "n.safe", {}),
            ("Sqrt", ["n.safe"], "n.root", {}),
            ("Reciprocal", ["n.root"], "n.inverse", {}),
            ("Mul", ["n.inverse", "x"], "n", {}),
        ],
        "length": [
            ("ReduceL2", ["x", "axes"], "n.length", {}),
            ("Max", ["n.length", "epsilon"], "n.safe", {}),
            ("Div", ["x", "n.safe"], "n", {}),
        ],
        "instance": [
            ("InstanceNormalization", ["x", "gamma", "beta"], "n", {}),
        ],
        "channels": [
            ("BatchNormalization", ["x", "gamma", "beta", "beta", "positive"], "n", {}),
        ],
        "local": [("LRN", ["x"], "n", {"size": 3})],
        "unit": [("LpNormalization", ["x"], "n", {"axis": 1})],
        "softmax": [("Softmax", ["x"], "n", {"axis": 1})],
        "softmax, by hand": [
            ("Exp", ["x"], "n.exp", {}),
            ("ReduceSum", ["n.exp", "axes"], "n.sum", {}),
            ("Div", ["n.exp", "n.sum"], "n", {}),
        ],
    }
    constants["positive"] = np.abs(constants["gamma"]) + np.float32(1)
    nodes: Nodes = [
        ("Conv", [INPUT, "w"], "x", {"pads": [1, 1, 1, 1]}),
        *forms[form],
        ("Relu", ["n"], "relu", {}),
        ("GlobalMaxPool", ["relu"], "pool", {}),
        ("Reshape", ["pool", "size"], "flat", {}),
        ("MatMul", ["flat", "v"], "linear", {}),
    ]
    read = {tensor for _, inputs, _, _ in nodes for tensor in inputs}
    return small(nodes, {name: value for name, value in constants.items() if name in read})


FORMS = (
    "layer", "layer, moments", "rms", "rms, reciprocal", "length", "instance", "channels", "local",
    "unit", "softmax", "softmax, by hand",
)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_normalisations_stay_float32_and_a_cast_inside_is_found(form: str, precision: str) -> None:
    graph = normalised(form)
    images = noise(4, (3, 6, 6))
    converted = convert(graph, precision, Calibration(images)).graph
    check_precision(converted, precision)
    wanted = by_definition(graph.model, images)
    assert np.abs(by_definition(converted, images) - wanted).max() < 0.03 * np.abs(wanted).max()
    types = tensor_types(converted)
    inside = [node for node in converted.graph.node if node.name == "n" or ".root" in node.name]
    inside += [node for node in converted.graph.node if node.name in ("n.square", "n.mean")]
    assert inside
    for node in inside:
        assert {types[name] for name in (*node.input, *node.output)} <= {
            TensorProto.FLOAT, TensorProto.INT64,
        }  # fmt: skip

    for spoilt in (*rounded_edges(converted), *narrow_ops(converted)):
        onnx.checker.check_model(spoilt, full_check=True)
        with pytest.raises(LoweringError, match=r"every precision"):
            check_precision(spoilt, precision)


def rounded_edges(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """Yield copies in which one node of a normalisation reads another's result rounded to fp16."""
    for at, node in enumerate(model.graph.node):
        for place, tensor in enumerate(node.input):
            dividend = node.op_type in ("Div", "Sub") and place == 0 and node.name != "n.variance"
            moments = tensor == "n.mean" and node.name == "n.centred" and at > 4
            inside = tensor.startswith("n.") and node.name.startswith("n")
            if not inside or dividend or tensor == "n.centred" or moments or node.op_type == "Cast":
                continue
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            copy.graph.node[at].input[place] = "up"
            if node.op_type == "Mul" and node.input[0] == node.input[1]:
                copy.graph.node[at].input[1 - place] = "up"
            cast = helper.make_node("Cast", ["down"], ["up"], "up", to=TensorProto.FLOAT)
            copy.graph.node.insert(at, cast)
            cast = helper.make_node("Cast", [tensor], ["down"], "down", to=TensorProto.FLOAT16)
            copy.graph.node.insert(at, cast)
            yield copy


def narrow_ops(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """Yield copies in which one node of a normalisation computes in fp16."""
    types = tensor_types(model)
    for at, node in enumerate(model.graph.node):
        if node.name not in WIDE_NODES or node.op_type == "Cast":
            continue
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        narrow = copy.graph.node[at]
        cast = helper.make_node("Cast", ["low"], [node.output[0]], "up", to=TensorProto.FLOAT)
        copy.graph.node.insert(at + 1, cast)
        narrow.output[0] = "low"
        for place, tensor in enumerate(node.input):
            if types[tensor] == TensorProto.FLOAT:
                narrow.input[place] = f"low{place}"
                cast = helper.make_node(
                    "Cast", [tensor], [f"low{place}"], f"low{place}", to=TensorProto.FLOAT16
                )
                copy.graph.node.insert(at, cast)
                at += 1
                narrow = copy.graph.node[at]
        yield copy


WIDE_NODES = (
    "n", "n.mean", "n.variance", "n.moment", "n.safe", "n.root", "n.square", "n.length", "n.exp",
)  # fmt: skip


@pytest.mark.parametrize("opset", [20, 21])
def test_group_normalization_changes_its_meaning_with_opset_21(opset: int) -> None:
    scales = 4 if opset == 20 else 8
    graph = small(
        [
            ("Conv", [INPUT, "w"], "conv", {}),
            ("GroupNormalization", ["conv", "gamma", "beta"], "norm", {"num_groups": 4}),
            ("Flatten", ["norm"], "flat", {}),
        ],
        {"w": weights(8, 3, 3, 3), "gamma": weights(scales), "beta": weights(scales, seed=1)},
        opset=opset,
    )
    images = noise(3, (3, 6, 6))
    wanted = GraphModule(graph, torch.float64)(torch.from_numpy(images)).numpy()
    for precision, unit in UNITS.items():
        converted = convert(graph, precision).graph
        check_precision(converted, precision)
        found = by_definition(converted, images)
        assert np.abs(found - wanted).max() < 4 * unit * np.abs(wanted).max()


def test_image_is_not_rounded_before_its_mean_is_subtracted() -> None:
    graph = small(
        [
            ("Transpose", [INPUT], "nchw", {"perm": [0, 3, 1, 2]}),
            ("Mul", ["nchw", "scale"], "scaled", {}),
            ("Sub", ["scaled", "mean"], "centred", {}),
            ("Div", ["centred", "deviation"], "ready", {}),
            ("Conv", ["ready", "w"], "conv", {}),
            ("GlobalAveragePool", ["conv"], "pool", {}),
            ("Flatten", ["pool"], "flat", {}),
        ],
        {
            "scale": np.float32(255), "mean": np.float32([[[103.9]], [[116.8]], [[123.7]]]),
            "deviation": np.float32(58), "w": 100 * weights(4, 3, 3, 3),
        },
        (6, 6, 3),
    )  # fmt: skip
    converted = convert(graph, "fp16").graph
    grey = np.float32([[[103.9, 116.8, 123.7]]]) / 255
    faint = grey + np.float32(1e-4) * (noise(3, (6, 6, 3)) - 0.5)
    wanted = by_definition(graph.model, faint)
    error = np.abs(by_definition(converted, faint) - wanted).max()
    assert error < 5e-3 * np.abs(wanted).max()
    types = tensor_types(converted)
    assert types["ready"] == TensorProto.FLOAT and types["conv"] == TensorProto.FLOAT16


def test_names_keep_nodes_in_float32() -> None:
    graph = foreign_graph("resnet")
    convolutions = [node.name for node in graph.nodes if node.op == "Conv"]
    kept = convert(graph, "fp16", keep_fp32=[convolutions[2]]).graph
    types = tensor_types(kept)
    for name in convolutions:
        wanted = TensorProto.FLOAT if name == convolutions[2] else TensorProto.FLOAT16
        assert types[graph_output(kept, name)] == wanted
    check_precision(kept, "fp16", [convolutions[2]])
    with pytest.raises(LoweringError, match=convolutions[2]):
        check_precision(kept, "fp16")
    images = noise(4, graph.input_shape)
    grid = convert(graph, "int8", Calibration(images), [convolutions[2]])
    check_precision(grid.graph, "int8", [convolutions[2]])
    assert grid.layers[convolutions[2]] == {"compute": "fp32"}
    everything = convert(graph, "fp16", keep_fp32=["node"]).graph  # all names begin with it
    assert TensorProto.FLOAT16 not in tensor_types(everything).values()
    with pytest.raises(UsageError, match="node_Convv") as refused:
        convert(graph, "fp16", keep_fp32=["node_Convv_9"])
    assert "node_Conv_" in refused.value.hint


def graph_output(model: onnx.ModelProto, name: str) -> str:
    return str(next(node.output[0] for node in model.graph.node if node.name == name))


# Other tensors than activations


def test_integers_bounds_and_scales_keep_their_types() -> None:
    graph = small(
        [
            ("Conv", [INPUT, "w"], "conv", {}),
            ("Pad", ["conv", "pads", "value"], "pad", {}),
            ("Resize", ["pad", "", "scales"], "resize", {"mode": "linear"}),
            ("Clip", ["resize", "low", "high"], "clip", {}),
            ("Greater", ["clip", "zero"], "positive", {}),
            ("Where", ["positive", "clip", "low"], "where", {}),
            ("Cast", ["positive"], "mask", {"to": TensorProto.FLOAT}),
            ("Mul", ["where", "mask"], "masked", {}),
            ("Max", ["masked", "tiny"], "max", {}),
            ("ReduceMax", ["max", "space"], "reduced", {"keepdims": 0}),
            ("Gather", ["reduced", "turned"], "gather", {"axis": 1}),
            ("Gemm", ["gather", "v", "b"], "linear", {"transB": 1}),
        ],
        {
            "w": weights(4, 3, 3, 3), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "value": np.float32(0.5), "scales": np.float32([1, 1, 2, 2]), "low": np.float32(-0.25),
            "high": np.float32(0.75), "zero": np.float32(0), "tiny": np.float32(1e-12),
            "space": np.array([2, 3]), "turned": np.array([3, 1, 0, 2]), "v": weights(5, 4),
            "b": weights(5),
        },
    )  # fmt: skip
    images = noise(3, (3, 6, 6))
    wanted = by_definition(graph.model, images)
    for precision, unit in UNITS.items():
        converted = convert(graph, precision).graph
        check_precision(converted, precision)
        types = tensor_types(converted)
        assert types["scales"] == types["mask"] == TensorProto.FLOAT
        wide = TensorProto.FLOAT if precision == "fp16" else TYPES[precision]  # 1e-12 in fp16 is 0
        assert types["tiny"] == types["max"] == wide
        assert types["pads"] == types["turned"] == TensorProto.INT64
        assert types["value"] == types["high"] == types["resize"] == TYPES[precision]
        found = by_definition(converted, images)
        assert np.abs(found - wanted).max() < 8 * unit * np.abs(wanted).max()
    engine(convert(graph, "fp16"))


def test_constant_that_overflows_is_named_with_what_to_do() -> None:
    graph = small(
        [
            ("Conv", [INPUT, "w"], "conv", {}),
            ("Mul", ["conv", "large"], "grown", {}),
            ("Mul", ["grown", "small"], "shrunk", {}),
            ("Flatten", ["shrunk"], "flat", {}),
        ],
        {"w": weights(4, 3, 3, 3), "large": np.float32(1e6), "small": np.float32(1e-6)},
    )
    with pytest.raises(LoweringError, match="'large' of node 'grown'") as refused:
        convert(graph, "fp16")
    assert "--keep-fp32 grown" in refused.value.hint and "bf16" in refused.value.hint
    check_precision(convert(graph, "bf16").graph, "bf16")
    kept = convert(graph, "fp16", keep_fp32=["grown", "shrunk"]).graph
    images = noise(2, (3, 6, 6))
    wanted = by_definition(graph.model, images)
    assert np.abs(by_definition(kept, images) - wanted).max() < 2e-3 * np.abs(wanted).max()


# Grids


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", MODULES)
def test_grid_computes_the_same_network(name: str, precision: str) -> None:
    graph = foreign_graph(name)
    images = noise(6, graph.input_shape)
    converted = convert(graph, precision, Calibration(images)).graph
    check_precision(converted, precision)
    wanted = by_definition(graph.model, images)
    scale = np.abs(wanted).max()
    found = by_definition(converted, images)
    assert 0 < np.abs(found - wanted).max() < (0.03 if precision == "int8" else 0.1) * scale
    if precision == "int8":
        assert np.abs(in_runtime(converted, images) - found).max() < 0.01 * scale


def test_scales_of_weights_lie_along_output_channels() -> None:
    depthwise = weights(4, 1, 3, 3)
    depthwise[2] = 0  # a dead channel
    constants = {
        "w": weights(4, 3, 3, 3), "depthwise": depthwise, "matrix": weights(16, 6, seed=1),
        "turned": weights(7, 6, seed=2), "plain": weights(7, 5, seed=3), "b": weights(5),
    }  # fmt: skip
    graph = small(
        [
            ("Conv", [INPUT, "w"], "conv", {}),
            ("Conv", ["conv", "depthwise"], "deep", {"group": 4}),
            ("Flatten", ["deep"], "flat", {}),
            ("MatMul", ["flat", "matrix"], "matmul", {}),
            ("Gemm", ["matmul", "turned"], "gemm", {"transB": 1}),
            ("Gemm", ["gemm", "plain", "b"], "linear", {}),
        ],
        constants,
    )
    converted = convert(graph, "int8", Calibration(noise(4, (3, 6, 6)))).graph
    check_precision(converted, "int8")
    stored = {c.name: numpy_helper.to_array(c) for c in converted.graph.initializer}
    for name, axis in (("depthwise", 0), ("matrix", 1), ("turned", 0), ("plain", 1)):
        assert stored[name].dtype == np.int8
        scale = stored[f"{name}.scale"]
        assert scale.shape == (constants[name].shape[axis],)
        broad = np.moveaxis(stored[name].astype(np.float64), axis, -1) * scale
        wanted = np.moveaxis(constants[name], axis, -1)
        assert (np.abs(broad - wanted) <= 0.5001 * scale).all()
    assert stored["w"].dtype == np.float32  # it reads the image
    assert not stored["depthwise"][2].any() and stored["depthwise.scale"][2] > 0
    engine(convert(graph, "int8", Calibration(noise(4, (3, 6, 6)))))


def test_skip_connections_and_attention_are_not_rounded() -> None:
    for name in ("resnet", "vit"):
        graph = foreign_graph(name)
        converted = Graph(convert(graph, "int8", Calibration(noise(4, graph.input_shape))).graph)
        for node in converted.nodes:
            above = [converted.made_by.get(tensor) for tensor in node.inputs]
            on_grid = [made is not None and made.op == "DequantizeLinear" for made in above]
            if node.op in ("Conv", "Gemm"):
                assert on_grid[:2] in ([True, True], [False, False])
            elif node.op == "MatMul":
                weighted = node.inputs[1].endswith(".fp32")
                assert on_grid == [weighted, weighted]
            elif node.op != "DequantizeLinear":
                assert not any(on_grid)


def test_nothing_to_quantise_is_said() -> None:
    graph = small(
        [("Flatten", [INPUT], "flat", {}), ("Gemm", ["flat", "v"], "linear", {})],
        {"v": weights(108, 5)},
    )
    with pytest.raises(UsageError, match="quantise nothing"):
        convert(graph, "int8", Calibration(noise(2, (3, 6, 6))))


# The numeric report


def test_report_is_what_numpy_counts_in_any_normalisation() -> None:
    images = noise(4, (3, 6, 6))
    for form in ("layer", "rms", "length", "instance", "local", "unit"):
        graph = normalised(form)
        x = GraphModule(graph, torch.float64).values(torch.from_numpy(images), ["x"])["x"].numpy()
        axes = (2, 3) if form == "instance" else 1
        if form in ("layer", "instance"):
            x = x - x.mean(axis=axes, keepdims=True)
        sums = (x * x).sum(axis=axes)
        if form in ("layer", "rms"):
            sums = (x * x).mean(axis=1) + 1e-5  # what is rooted
        if form == "local":
            padded = np.pad(x * x, [(0, 0), (1, 1), (0, 0), (0, 0)])
            sums = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
        (norm,) = numeric_report(graph, images).layers
        assert norm.largest_sum == pytest.approx(sums.max(), rel=1e-4), form
        assert norm.smallest_sum == pytest.approx(sums.min(), rel=1e-3), form
        assert norm.headroom == pytest.approx(65504 / sums.max(), rel=1e-4)


def test_report_warns_of_activations_that_overflow() -> None:
    graph = small(
        [
            ("Conv", [INPUT, "w"], "conv", {}),
            ("Mul", ["conv", "large"], "grown", {}),
            ("Mul", ["grown", "large"], "large2", {}),
            ("Flatten", ["large2"], "flat", {}),
        ],
        {"w": np.abs(weights(4, 3, 3, 3)), "large": np.float32(500)},
    )
    images = noise(3, (3, 6, 6))
    report = numeric_report(graph, images)
    values = by_definition(graph.model, images)
    assert report.activations["large2"] == pytest.approx(np.abs(values).max(), rel=1e-5)
    warned = [warning.partition(":")[0] for warning in report.warnings]
    assert warned == ["large2", "flat"]
    assert not np.isfinite(by_definition(convert(graph, "fp16").graph, images)).all()
    assert report.document()["activations"] == report.activations


# Engines


def engine(converted: Converted) -> bytes:
    pytest.importorskip("tensorrt_rtx")
    data = converted.graph.SerializeToString()
    return build_engine(data, library="tensorrt-rtx", batch=Batches(1, 2, 4)).plan


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", MODULES)
def test_engines_build(name: str, precision: str) -> None:
    graph = foreign_graph(name)
    images = noise(4, graph.input_shape)
    assert engine(convert(graph, precision, Calibration(images)))[:4] == b"vtrt"
