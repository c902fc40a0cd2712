"""Graphs in low precision against the float32 graph, by ONNX's own definition of the ops."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from ccn_deploy.architectures import Architecture
from ccn_deploy.bundle import open_bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.defenses import defense_named
from ccn_deploy.errors import LoweringError, RuntimeUnavailableError, UsageError
from ccn_deploy.exporters import lowering
from ccn_deploy.exporters.precision import (
    METHODS,
    PRECISIONS,
    Calibration,
    check_precision,
    convert,
    numeric_report,
)
from ccn_deploy.exporters.vjp import gradient_graph
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.signature import COTANGENTS, INPUT
from ccn_deploy.layers import CompactConv2d, CompactLinear, SubtractMean
from ccn_deploy.models import Classifier
from ccn_deploy.runtimes.base import RuntimeOptions
from ccn_deploy.runtimes.onnx_runtime import make_session
from tests.equation_10 import LRN
from tests.networks import DEFENSES, difficult_images, random_network
from tests.patterns import assert_shapes
from tests.precise import digits, forward_graph

UNITS = {"fp16": 2.0**-11, "bf16": 2.0**-8}
SHAPE = (1, 28, 28)


def noise(n: int, shape: tuple[int, int, int] = SHAPE) -> NDArray[np.float32]:
    return np.random.default_rng(7).random((n, *shape), dtype=np.float32)


def lower(model: Classifier) -> Graph:
    return Graph(lowering.lower(model))


def by_definition(graph: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    (found,) = ReferenceEvaluator(graph, new_ops=[LRN]).run(None, {INPUT: images})
    return np.asarray(found)


def in_runtime(graph: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    options = RuntimeOptions(threads=1)
    session = make_session(onnxruntime, to_bytes(graph), "graph", "onnxruntime-cpu", options)
    found: NDArray[np.float32] = session.run(None, {INPUT: images})[0]
    return found


# Half precision


@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("defense", DEFENSES)
def test_half_precision_computes_the_same_network(defense: str, precision: str) -> None:
    model = random_network("mnist-cnn", defense)
    graph = lower(model)
    converted = convert(graph, precision)
    check_precision(converted.graph, precision)
    assert_shapes(converted.graph, model.classes)
    images = difficult_images(SHAPE)[1::2]
    wanted, found = by_definition(graph.model, images), by_definition(converted.graph, images)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - wanted).max() < 4 * UNITS[precision] * np.abs(wanted).max()


@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("defense", ["sm", "brelu", "ccn"])
def test_gradient_graph_begins_with_the_very_forward_graph(defense: str, precision: str) -> None:
    model = random_network("mnist-cnn", defense)
    forward = convert(lower(model), precision).graph
    backward = convert(Graph(gradient_graph(lower(model))), precision).graph
    assert list(backward.graph.node)[: len(forward.graph.node)] == list(forward.graph.node)
    constants = {constant.name: constant for constant in backward.graph.initializer}
    for constant in forward.graph.initializer:
        assert constants[constant.name] == constant
    check_precision(backward, precision)


@pytest.mark.parametrize("defense", ["sm", "brelu", "ccn"])
def test_gradient_of_half_precision_points_where_float32_does(defense: str) -> None:
    graph = Graph(gradient_graph(lower(random_network("mnist-cnn", defense))))
    feeds = {
        INPUT: noise(3),
        # An attack's cotangents on a confident network are this small, and 0 in fp16.
        COTANGENTS: 1e-9 * np.random.default_rng(1).standard_normal((3, 2, 10)).astype(np.float32),
    }
    found, wanted = (
        onnxruntime.InferenceSession(to_bytes(each)).run(["gradients"], feeds)[0].reshape(6, -1)
        for each in (convert(graph, "fp16").graph, graph.model)
    )
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    assert ((found * wanted).sum(axis=1) / lengths).min() > 0.95  # a unit near 0 may switch


def test_manifest_says_what_computes_each_layer() -> None:
    graph = lower(random_network("mnist-cnn", "ccn"))
    assert convert(graph, "fp16").layers == {
        **{name: {"compute": "fp16", "norm": "fp32"} for name in COMPACT},
        **{name: {"compute": "fp16"} for name in ACTS},
        "mean": {"compute": "fp32"},
    }
    layers = convert(graph, "int8", Calibration(noise(2))).layers
    assert layers["conv1"] == {"compute": "fp32", "norm": "fp32"}
    assert layers["conv2"] == {"compute": "int8", "norm": "fp32"}
    assert layers["act1"] == {"compute": "fp32"}


COMPACT = ("conv1", "conv2", "conv3", "conv4", "fc1", "fc2", "fc3")
ACTS = (*(f"act{at}" for at in range(1, 7)), "pool1", "pool2")


# The rule


def narrow_division(graph: onnx.GraphProto) -> None:
    """Let conv2 divide in fp16, with casts that make it a valid graph."""
    nodes = {node.name: node for node in graph.node}
    at = list(graph.node).index(nodes["conv2.quotient"])
    cast = helper.make_node("Cast", ["conv2.divisor"], ["narrow"], "narrow", to=TensorProto.FLOAT16)
    up = helper.make_node("Cast", ["conv2.quotient"], ["up"], "up", to=TensorProto.FLOAT)
    nodes["conv2.quotient"].input[:] = ["conv2.product", "narrow"]
    nodes["conv2"].input[0] = "up"
    graph.node.insert(at + 1, up)
    graph.node.insert(at, cast)


def narrow_squares(graph: onnx.GraphProto) -> None:
    """Let conv2 sum its squares in fp16."""
    nodes = {node.name: node for node in graph.node}
    at = list(graph.node).index(nodes["conv2.squares"])
    up = helper.make_node("Cast", ["conv2.squares"], ["up"], "up", to=TensorProto.FLOAT)
    nodes["conv2.squares"].input[0] = "act1"
    nodes["conv2.patches"].input[0] = "up"
    graph.node.insert(at + 1, up)


def quantise_norm(graph: onnx.GraphProto) -> None:
    """Round the norm of conv2 to fp16 between two nodes that are float32."""
    nodes = {node.name: node for node in graph.node}
    at = list(graph.node).index(nodes["conv2.divisor"])
    down = helper.make_node("Cast", ["conv2.norm"], ["down"], "down", to=TensorProto.FLOAT16)
    up = helper.make_node("Cast", ["down"], ["up"], "up", to=TensorProto.FLOAT)
    nodes["conv2.divisor"].input[0] = "up"
    graph.node.insert(at, up)
    graph.node.insert(at, down)


@pytest.mark.parametrize("spoil", [narrow_division, narrow_squares, quantise_norm])
def test_rule_is_asserted_apart_from_the_conversion(
    spoil: Callable[[onnx.GraphProto], None],
) -> None:
    model = random_network("mnist-cnn", "ccn")
    converted = convert(lower(model), "fp16").graph
    spoil(converted.graph)
    with pytest.raises(LoweringError, match="conv2"):
        check_precision(converted, "fp16")


def test_rule_wants_the_precision_too() -> None:
    model = random_network("mnist-cnn", "sm")
    graph = lower(model)
    for precision in PRECISIONS:
        with pytest.raises(LoweringError, match="conv"):
            check_precision(graph.model, precision)


def unprotected(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Cast everything to fp16, as a converter does that knows nothing of norms."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for constant in copy.graph.initializer:
        if constant.data_type == TensorProto.FLOAT:
            half = numpy_helper.to_array(constant).astype(np.float16)
            constant.CopyFrom(numpy_helper.from_array(half, constant.name))
    for node in copy.graph.node:
        node.input[:] = ["narrow" if tensor == INPUT else tensor for tensor in node.input]
        node.output[:] = ["wide" if tensor == "logits" else tensor for tensor in node.output]
    narrow = helper.make_node("Cast", [INPUT], ["narrow"], "narrow", to=TensorProto.FLOAT16)
    wide = helper.make_node("Cast", ["wide"], ["logits"], "wide", to=TensorProto.FLOAT)
    copy.graph.node.insert(0, narrow)
    copy.graph.node.append(wide)
    return copy


def wide_network() -> Classifier:
    """Two compact convolutions, of which the first reads 512 channels, and a compact classifier."""
    generator = torch.Generator().manual_seed(0)
    layers = OrderedDict[str, nn.Module](
        mean=SubtractMean(),
        conv1=CompactConv2d(512, 32, 3, padding=1),
        act1=nn.ReLU(),
        conv2=CompactConv2d(32, 16, 3),
        flatten=nn.Flatten(),
        fc1=CompactLinear(16 * 3 * 3, 10),
    )
    plan = Architecture("wide", "wide", (512, 5, 5), (32, 16), 1, (), 0.0, 10)
    model = Classifier(layers, plan, defense_named("ccn"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_normal_(parameter, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
            else:
                parameter.fill_(30.0)  # alpha brings a direction back to the scale of activations
    return model.eval().requires_grad_(False)


def test_512_channels_of_deviation_6_need_the_protected_branch() -> None:
    model = wide_network()
    graph = lower(model)
    inputs = (0.5 + 6 * np.random.default_rng(0).standard_normal((8, 512, 5, 5))).astype(np.float32)
    reference = model.double()(torch.from_numpy(inputs).double()).numpy()
    scale = np.abs(reference).max()

    def error(candidate: onnx.ModelProto) -> float:
        return float(np.abs(by_definition(candidate, inputs) - reference).max() / scale)

    def quotients(candidate: onnx.ModelProto) -> NDArray[np.float32]:
        shown = onnx.ModelProto()
        shown.CopyFrom(candidate)
        shown.graph.output.append(onnx.ValueInfoProto(name="conv1.quotient"))
        return np.asarray(ReferenceEvaluator(shown).run(["conv1.quotient"], {INPUT: inputs})[0])

    protected = convert(graph, "fp16").graph
    check_precision(protected, "fp16")
    found = quotients(protected)
    assert np.isfinite(found).all() and (found != 0).all()
    assert error(protected) < 4 * UNITS["fp16"]

    naive = unprotected(graph.model)
    onnx.checker.check_model(naive, full_check=True)
    assert (quotients(naive) == 0).mean() > 0.2  # divided by infinity: zero, and finite
    assert error(naive) > 0.1
    with pytest.raises(LoweringError, match=r"'conv1\."):
        check_precision(naive, "fp16")
    first, *_ = numeric_report(graph, inputs).warnings
    assert "conv1" in first and "overflow" in first


# Grids


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("defense", ["sm", "brelu", "ccn"])
def test_grid_is_what_onnx_defines_and_the_runtime_computes(defense: str, precision: str) -> None:
    model = random_network("mnist-cnn", defense)
    converted = convert(lower(model), precision, Calibration(noise(8))).graph
    check_precision(converted, precision)
    assert_shapes(converted, model.classes)
    images = noise(3)
    wanted = by_definition(converted, images)
    # Where two roundings of float32 lie on both sides of a tie, whole steps differ.
    assert np.abs(in_runtime(converted, images) - wanted).max() < 0.05 * np.abs(wanted).max()


def test_scales_are_those_of_the_definition() -> None:
    graph = lower(random_network("mnist-cnn", "ccn"))
    images = noise(8)
    converted = convert(graph, "int8", Calibration(images))
    constants = {c.name: numpy_helper.to_array(c) for c in converted.graph.graph.initializer}
    weights = {c.name: numpy_helper.to_array(c) for c in graph.model.graph.initializer}
    shown = onnx.ModelProto()
    shown.CopyFrom(graph.model)
    shown.graph.output.append(onnx.ValueInfoProto(name="pool1"))
    pool1 = ReferenceEvaluator(shown).run(["pool1"], {INPUT: images})[0]
    assert converted.calibration is not None
    limit = converted.calibration["ranges"]["conv3"]
    assert limit == pytest.approx(pool1.max(), rel=1e-5)
    assert constants["conv3.input.scale"] == pytest.approx(limit / 127)
    for name in ("conv3.weight", "fc2.weight"):
        steps, scale = constants[name], constants[f"{name}.scale"]
        assert steps.dtype == np.int8 and scale.shape == steps.shape[:1]
        flat = steps.reshape(len(steps), -1).astype(np.int64)
        assert (np.abs(flat).max(axis=1) == 127).all()
        error = flat * scale[:, None].astype(np.float64) - weights[name].reshape(len(steps), -1)
        assert (np.abs(error) <= 0.5001 * scale[:, None]).all()
        assert not constants[f"{name}.zero"].any()
    assert constants["conv1.weight"].dtype == np.float32


def test_calibration_methods_cut_more_or_less() -> None:
    graph = lower(random_network("mnist-cnn", "sm"))
    found = {}
    for method in METHODS:
        calibration = convert(
            graph, "int8", Calibration(noise(20), method, {"seed": 3})
        ).calibration
        assert calibration is not None
        assert (calibration["method"], calibration["seed"]) == (method, 3)
        found[method] = calibration["ranges"]
    assert found["min-max"].keys() == {"conv2", "conv3", "conv4", "fc1", "fc2", "fc3"}
    for layer, largest in found["min-max"].items():
        assert 0 < found["percentile"][layer] < largest
        assert 0 < found["entropy"][layer] <= largest * 1.01


def test_conversion_is_deterministic_and_leaves_its_input_alone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    graph = lower(random_network("mnist-cnn", "ccn"))
    before = to_bytes(graph.model)
    for precision in PRECISIONS:
        first, second = (convert(graph, precision, Calibration(noise(4), "entropy")) for _ in "ab")
        assert to_bytes(first.graph) == to_bytes(second.graph)
        assert (first.layers, first.calibration) == (second.layers, second.calibration)
    assert to_bytes(graph.model) == before
    assert capfd.readouterr().out == ""  # the library that calibrates talks


def test_what_cannot_be_converted() -> None:
    model = random_network("mnist-cnn", "sm")
    graph = lower(model)
    with pytest.raises(UsageError, match="int7"):
        convert(graph, "int7")
    with pytest.raises(UsageError, match="images"):
        convert(graph, "int8")
    with pytest.raises(UsageError, match="slope zero"):
        convert(Graph(gradient_graph(graph)), "int8", Calibration(noise(2)))
    with pytest.raises(UsageError, match="median"):
        Calibration(noise(2), "median")
    large = lower(model)
    for constant in large.model.graph.initializer:
        if constant.name == "conv3.weight":
            value = 1e6 * numpy_helper.to_array(constant)
            constant.CopyFrom(numpy_helper.from_array(value.astype(np.float32), constant.name))
    with pytest.raises(LoweringError, match=r"conv3\.weight.*fp16") as refused:
        convert(large, "fp16")
    assert "--keep-fp32 conv3" in refused.value.hint
    kept = convert(large, "fp16", keep_fp32=["conv3"]).graph
    check_precision(kept, "fp16", ["conv3"])
    for constant in graph.model.graph.initializer:
        if constant.name.startswith("conv1."):
            zero = np.zeros_like(numpy_helper.to_array(constant))
            constant.CopyFrom(numpy_helper.from_array(zero, constant.name))
    with pytest.raises(LoweringError, match="'conv2'"):
        convert(graph, "int8", Calibration(noise(2)))


def test_runtime_without_a_kernel_says_so() -> None:
    graph = convert(lower(random_network("mnist-cnn", "ccn")), "bf16").graph
    with pytest.raises(RuntimeUnavailableError, match="graphs/forward-bf16"):
        make_session(
            onnxruntime,
            to_bytes(graph),
            "graphs/forward-bf16.onnx",
            "onnxruntime-cpu",
            RuntimeOptions(),
        )


def test_int8_keeps_labels_and_robustness(exported: Callable[[str], Path]) -> None:
    bundle = open_bundle(exported("ccn"))
    graph = Graph(forward_graph(bundle))
    data = load_dataset("mnist5k", "test")
    images, labels = data.images(np.arange(len(data))), data.labels
    from ccn_deploy.runtimes.torch_runtime import load_reference

    leaf = torch.from_numpy(images).requires_grad_(True)
    nn.functional.cross_entropy(load_reference(bundle)(leaf), torch.from_numpy(labels)).backward()
    assert leaf.grad is not None
    attacked = np.clip(images + np.float32(0.3) * leaf.grad.sign().numpy(), 0, 1)
    int8 = convert(graph, "int8", digits()).graph

    def answers(candidate: onnx.ModelProto, inputs: NDArray[np.float32]) -> NDArray[np.int64]:
        pieces = (inputs[at : at + 50] for at in range(0, len(inputs), 50))
        return np.concatenate([in_runtime(candidate, piece).argmax(axis=1) for piece in pieces])

    assert (answers(graph.model, images) == answers(int8, images)).mean() >= 0.99
    before, after = ((answers(g, attacked) == labels).mean() for g in (graph.model, int8))
    assert abs(before - after) <= 0.02


# The numeric report


def test_numeric_report_is_what_numpy_counts() -> None:
    model = random_network("mnist-cnn", "ccn")
    images = noise(3)
    report = numeric_report(lower(model), images)
    assert [layer.layer for layer in report.layers] == list(COMPACT)
    x = images.astype(np.float64)[:, 0] - 0.5
    sums = sum(x[:, i : i + 26, j : j + 26] ** 2 for i in range(3) for j in range(3))
    first = report.layers[0]
    assert first.largest_sum == pytest.approx(sums.max(), rel=1e-5)
    assert first.smallest_sum == pytest.approx(sums.min(), rel=1e-5)
    assert first.smallest_divisor == pytest.approx(np.sqrt(sums.min()) + 0.01, rel=1e-5)
    assert first.headroom == pytest.approx(65504 / sums.max(), rel=1e-5)
    assert report.warnings == ()
    assert numeric_report(lower(random_network("mnist-cnn", "sm")), images).layers == ()


def test_numeric_report_warns_of_what_vanishes() -> None:
    graph = lower(random_network("mnist-cnn", "ccn"))
    faint = np.full((2, *SHAPE), 0.5, np.float32)
    assert not any("conv1" in warning for warning in numeric_report(graph, faint).warnings)  # all 0
    faint[:, :, ::2] += 1e-5
    (warning,) = (w for w in numeric_report(graph, faint).warnings if w.startswith("conv1"))
    assert "0 in fp16" in warning
