"""What a graph file may hold, and how each other thing is refused."""

import time

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ccn_deploy.errors import ExitCode, GraphError
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.graph.reader import Limits, read_graph
from tests.networks import random_network

FLOAT = TensorProto.FLOAT


def small(*nodes, constants=(), opset=20, **settings):
    """Return a model of some nodes: from ``images`` to ``logits``, plus one weight ``w``."""
    graph = helper.make_graph(
        nodes or [helper.make_node("Mul", ["images", "w"], ["logits"], name="scale")],
        "small",
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.ones(4, np.float32), "w"), *constants],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9, **settings
    )


def inner_graph(value=None):
    """Return a graph for control flow, with an initialiser of its own."""
    tensor = value or numpy_helper.from_array(np.ones(4, np.float32), "inner")
    return helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", FLOAT, [4])],
        [tensor],
    )


def external(name):
    tensor = numpy_helper.from_array(np.ones(4, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def node(op, inputs=("images",), name="odd", outputs=("logits",), **attributes):
    return helper.make_node(op, list(inputs), list(outputs), name=name, **attributes)


def with_branch(tensor=None):
    condition = numpy_helper.from_array(np.array(True), "yes")
    branch = inner_graph(tensor)
    return small(node("If", ["yes"], then_branch=branch, else_branch=branch), constants=[condition])


def with_function():
    function = helper.make_function(
        "own",
        "Twice",
        ["x"],
        ["y"],
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [helper.make_opsetid("", 20)],
    )
    model = small(node("Twice", domain="own"), functions=[function])
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


def changed(change):
    model = small()
    change(model)
    return model


def cut_weights(model):
    model.graph.initializer[0].raw_data = b"1234"


def huge_shape(model):
    model.graph.initializer[0].dims[0] = 2**40


def negative_shape(model):
    model.graph.initializer[0].dims[0] = -4


def text_weights(model):
    model.graph.initializer[0].CopyFrom(helper.make_tensor("w", TensorProto.STRING, [1], [b"x"]))


def sequence_input(model):
    kind = helper.make_tensor_sequence_value_info("images", FLOAT, None)
    model.graph.input[0].CopyFrom(kind)


def sparse_weights(model):
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    places = numpy_helper.from_array(np.array([0]), "s_places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))


def future(model):
    model.opset_import[0].version = 999


def no_output(model):
    model.graph.output[0].name = "nowhere"


REFUSED = {
    "external data": (
        changed(lambda m: m.graph.initializer.append(external("far"))),
        "'far'.*external",
    ),
    "external attribute": (
        small(node("Constant", [], value=external("far"))),
        "'odd'.*external data",
    ),
    "external in a subgraph": (with_branch(external("inner")), "'odd'.*control flow"),
    "control flow": (with_branch(), "'odd'.*control flow"),
    "loop": (small(node("Loop", ["", "", "images"], body=inner_graph())), "'odd'.*control flow"),
    "subgraph of an operator that has none": (
        small(node("Relu", body=inner_graph())),
        "'odd'.*graph of its own",
    ),
    "local function": (with_function(), "function of its own, 'Twice'"),
    "custom domain": (small(node("Gelu", domain="com.microsoft")), "'odd'.*'com.microsoft'"),
    "random": (small(node("RandomNormalLike")), "'odd'.*random"),
    "random without inputs": (small(node("RandomNormal", [], shape=[4])), "'odd'.*random"),
    "unknown operator": (small(node("Det")), "'odd' is Det.*not supported"),
    "no such operator": (small(node("Frobnicate")), "'odd' is Frobnicate"),
    "sparse weights": (changed(sparse_weights), "'s' is sparse"),
    "text": (changed(text_weights), "'w' holds no numbers"),
    "text attribute": (small(node("Constant", [], value_string="x")), "'odd'.*holds text"),
    "a sequence": (changed(sequence_input), "'images' is no tensor but a sequence"),
    "cut weights": (changed(cut_weights), "'w' does not hold the 4 elements"),
    "huge shape": (changed(huge_shape), "'w' has 1,099,511,627,776 elements"),
    "negative shape": (changed(negative_shape), r"'w' has the shape \[-4\]"),
    "operators of the future": (changed(future), "999"),
    "no output": (changed(no_output), "'nowhere'"),
    "an input that nothing makes": (small(node("Relu", ["gone"])), "'odd'.*'gone'"),
    "a tensor made twice": (small(node("Relu"), node("Neg", name="again")), "'again'.*'logits'"),
    "a wrong attribute": (small(node("Relu", alpha=1.0)), "no valid ONNX model.*alpha"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name) -> None:
    model, message = REFUSED[name]
    with pytest.raises(GraphError, match=message) as found:
        read_graph(model.SerializeToString(), "the file")
    assert found.value.exit_code == ExitCode.USAGE
    assert found.value.what.startswith("The file")
    assert "\n" not in found.value.what
    assert found.value.hint


@pytest.mark.parametrize("name", ["line\nbreak", "carriage\rreturn", "red\x1b[31m", "next\u2028"])
def test_what_names_hold_does_not_reach_the_terminal(name: str) -> None:
    """A file of somebody else's could write lines of its own into the message, or over it."""
    with pytest.raises(GraphError) as caught:
        read_graph(small(node(name)).SerializeToString())
    what, hint = str(caught.value).split("\n")
    assert (what + hint).isprintable()
    assert name[:3] in what


def test_takes_what_is_fine() -> None:
    graph = read_graph(small().SerializeToString())
    assert [n.name for n in graph.nodes] == ["scale"]
    assert graph.inputs == ("images",)
    assert graph.outputs == ("logits",)


def test_takes_a_lowered_network() -> None:
    model = lower(random_network("mnist-cnn", "ccn"))
    assert read_graph(model.SerializeToString()).model == model


def test_takes_a_file_that_lists_its_constants_as_inputs() -> None:
    model = small(opset=9)
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [4]))
    assert read_graph(model.SerializeToString()).inputs == ("images",)


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"%PDF-1.7 and more", b"\xff" * 1000])
def test_refuses_bytes_that_are_no_model(data) -> None:
    with pytest.raises(GraphError, match="The graph is"):
        read_graph(data)


def test_refuses_every_shortened_file() -> None:
    data = lower(random_network("mnist-cnn", "sm")).SerializeToString()
    for size in (*range(1, 200, 7), len(data) // 2, len(data) - 1):
        with pytest.raises(GraphError):
            read_graph(data[:size])


def test_no_flipped_byte_does_more_than_raise_its_own_error() -> None:
    data = small().SerializeToString()
    for at in range(len(data)):
        for value in (0, 0x7F, 0xFF):
            try:
                read_graph(data[:at] + bytes([value]) + data[at + 1 :])
            except GraphError:
                continue


def test_refuses_too_many_nodes() -> None:
    chain = [node("Neg", [f"t{i}"], f"n{i}", [f"t{i + 1}"]) for i in range(30)]
    chain = [node("Neg", name="first", outputs=["t0"]), *chain, node("Neg", ["t30"])]
    with pytest.raises(GraphError, match="has 32 nodes; at most 20"):
        read_graph(small(*chain).SerializeToString(), limits=Limits(nodes=20))


def length(size: int) -> bytes:
    """Return a length as protobuf writes it."""
    found = b""
    while size > 0x7F:
        found += bytes([size & 0x7F | 0x80])
        size >>= 7
    return found + bytes([size])


def test_refuses_deep_nesting_at_once() -> None:
    """100,000 graphs, each in an attribute of a node of the graph around it."""
    pieces, size = [], 0
    for _ in range(100_000):
        for field in (0x32, 0x2A, 0x0A):  # attribute.g, node.attribute, graph.node
            head = bytes([field]) + length(size)
            pieces.append(head)
            size += len(head)
    data = b"\x08\x09\x3a" + length(size) + b"".join(reversed(pieces))
    started = time.perf_counter()
    with pytest.raises(GraphError, match="nested deeper than 12"):
        read_graph(data)
    assert time.perf_counter() - started < 5


def test_refuses_a_file_of_empty_messages_before_it_fills_the_memory() -> None:
    nodes = b"\x0a\x00" * 5_000_000  # ten megabytes that parse into gigabytes
    data = b"\x08\x09\x3a" + length(len(nodes)) + nodes
    with pytest.raises(GraphError, match=r"more than 4,000,000 fields"):
        read_graph(data)


def test_refuses_a_file_above_the_limit() -> None:
    with pytest.raises(GraphError, match="has 11 bytes; at most 10"):
        read_graph(b"\x00" * 11, limits=Limits(size=10))
