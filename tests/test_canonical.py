from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.parser import parse_model

from ccn_deploy.exporters.canonical import canonical
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.graph.builder import IR_VERSION, OPSET, to_bytes
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from tests.networks import DEFENSES, random_network
from tests.vjp_cases import CASES


def parsed(body: str, opset: int = 20, ir: int = 9, **constants: np.ndarray) -> Graph:
    model = parse_model(
        f'<ir_version: {ir}, opset_import: ["" : {opset}]>'
        f"small (float[batch,2,4,4] images) => (float[batch,classes] logits) {{ {body} }}"
    )
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return Graph(model)


def off(before: Graph, after: Graph) -> float:
    images = torch.rand(3, *before.shapes["images"][1:], dtype=torch.float64)
    with torch.no_grad():
        wanted = GraphModule(before, torch.float64)(images)
        got = GraphModule(after, torch.float64)(images)
    return float((got - wanted).abs().max())


def ops(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.model.graph.node]


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("architecture", ["mnist-cnn", "vgg11-cifar10"])
def test_our_own_lowering_comes_out_byte_for_byte(architecture: str, defense: str) -> None:
    model = lower(random_network(architecture, defense))
    assert to_bytes(canonical(Graph(model)).model) == to_bytes(model)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_stays_the_same_function(case) -> None:  # type: ignore[no-untyped-def]
    before = case.graph()
    after = canonical(before)
    assert off(before, after) < 1e-13
    assert after.opset >= OPSET
    assert to_bytes(canonical(Graph(after.model)).model) == to_bytes(after.model)
    assert canonical(after) is after


def test_the_graph_that_is_given_is_left_alone() -> None:
    graph = parsed("a = Identity(images) logits = Flatten(a)", opset=13)
    before = to_bytes(graph.model)
    canonical(graph)
    assert to_bytes(graph.model) == before


def test_shape_arithmetic_is_folded() -> None:
    graph = parsed(
        "s = Shape(images) b = Gather<axis = 0>(s, zero) c = Unsqueeze(b, first)"
        " t = Concat<axis = 0>(c, rest) logits = Reshape(images, t)",
        zero=np.int64(0),
        first=np.array([0]),
        rest=np.array([-1]),
    )
    after = canonical(graph)
    assert ops(after) == ["Reshape"]
    assert off(graph, after) == 0


def test_folded_integers_keep_their_type() -> None:
    graph = parsed(
        "s = Shape(images) i = Cast<to = 6>(s) c = Gather(i, one) f = Cast<to = 1>(c)"
        " y = Div(images, f) logits = Flatten(y)",
        one=np.int64(1),
    )
    after = canonical(graph)
    onnx.checker.check_model(after.model, full_check=True)
    assert ops(after) == ["Div", "Flatten"]
    assert off(graph, after) == 0


def test_only_what_float32_holds_exactly_is_folded() -> None:
    graph = parsed(
        "h = Mul(w, two) t = Mul(w, third) a = Add(images, h) b = Mul(a, t) logits = Flatten(b)",
        w=np.float32([1, 3, 5, 7]),
        two=np.float32(2),
        third=np.float32(1 / 3),
    )
    after = canonical(graph)
    assert ops(after) == ["Mul", "Add", "Mul", "Flatten"]
    assert after.constants["h"].tolist() == [2, 6, 10, 14]
    assert off(graph, after) == 0


def test_constants_in_nodes_become_initializers() -> None:
    graph = parsed("c = Constant<value_float = 0.5>() a = Mul(images, c) logits = Flatten(a)")
    after = canonical(graph)
    assert ops(after) == ["Mul", "Flatten"]
    assert after.constants["c"] == np.float32(0.5)


def test_identity_dropout_and_what_nobody_needs_go() -> None:
    graph = parsed(
        "a = Identity(images) b = Relu(a) u = Sin(b) c = Dropout(b) d = Flatten(c)"
        " logits = Identity(d)"
    )
    after = canonical(graph)
    assert ops(after) == ["Relu", "Flatten"]
    assert after.outputs == ("logits",)
    assert off(graph, after) == 0


def test_an_identity_that_names_the_images_stays() -> None:
    graph = parsed(
        "f = Flatten(images) a = Identity(f) b = Sin(f) c = Mul(a, b) logits = Identity(c)"
    )
    assert ops(canonical(graph)) == ["Flatten", "Sin", "Mul"]


def test_a_file_of_an_old_format_is_raised() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 2, 3, 3)).astype(np.float32)
    graph = parsed(
        "y = Conv<kernel_shape = [3, 3]>(images, w) z = Clip<min = 0.0, max = 0.5>(y)"
        " d = Dropout<ratio = 0.5>(z) u = Unsqueeze<axes = [1]>(d) v = Squeeze<axes = [1]>(u)"
        " p = Pad<pads = [0, 0, 1, 0, 0, 0, 0, 2]>(v) m = ReduceMean<axes = [1]>(p)"
        " f = Flatten(m) logits = Softmax<axis = 1>(f)",
        opset=8,
        ir=3,
        w=weight,
    )
    listed = graph.model.graph.input.add()  # as old files list their constants
    listed.CopyFrom(onnx.helper.make_tensor_value_info("w", 1, weight.shape))
    after = canonical(graph)
    assert after.opset == OPSET and after.model.ir_version == IR_VERSION
    assert [i.name for i in after.model.graph.input] == ["images"]
    assert not {"Dropout", "Constant"} & set(ops(after))
    assert off(graph, after) < 1e-15
    onnx.checker.check_model(after.model, full_check=True)


def test_comments_and_metadata_go() -> None:
    graph = parsed("a = Relu(images) logits = Flatten(a)")
    graph.model.doc_string = "made by"
    graph.model.graph.node[0].doc_string = "line 5"
    graph.model.graph.node[0].metadata_props.add(key="path", value="/home/me")
    graph.model.metadata_props.add(key="author", value="me")
    graph.model.graph.value_info.append(onnx.helper.make_tensor_value_info("a", 1, None))
    plain = parsed("a = Relu(images) logits = Flatten(a)")
    assert to_bytes(canonical(graph).model) == to_bytes(canonical(plain).model)


def test_another_function_would_be_seen() -> None:
    graph = parsed("a = Mul(images, w) logits = Flatten(a)", w=np.float32(1 / 3))
    nearby = np.nextafter(np.float32(1 / 3), np.float32(1))
    other = parsed("a = Mul(images, w) logits = Flatten(a)", w=nearby)
    assert off(graph, other) > 1e-9
