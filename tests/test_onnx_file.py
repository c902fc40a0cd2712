"""Somebody's ONNX file becomes a forward graph: what stays, what is added, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ccn_deploy.errors import CcnDeployError, ExitCode, GraphError, LoweringError, UsageError
from ccn_deploy.exporters.sources.agreement import check_agreement, probe_images
from ccn_deploy.exporters.sources.intake import Intake, Layout
from ccn_deploy.exporters.sources.onnx_file import OnnxFile, open_onnx_file
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from tests.foreign_files import CLASSES, HIDDEN, SIZE, classifier

FEATURES = HIDDEN * (SIZE // 2) ** 2
SOFTMAX: tuple[str, dict[str, Any]] = ("Softmax", {"axis": 1})
PLAIN = Intake()

Array = NDArray[Any]


def opened(model: onnx.ModelProto, intake: Intake = PLAIN) -> OnnxFile:
    return open_onnx_file(model.SerializeToString(), intake)


def images(count: int = 4, channels: int = 3, size: int = SIZE) -> NDArray[np.float32]:
    return np.random.default_rng(1).random((count, channels, size, size), dtype=np.float32)


def logits(file: OnnxFile, x: Array, dtype: torch.dtype = torch.float64) -> Array:
    module = GraphModule(file.graph, dtype)
    with torch.inference_mode():
        found: Array = module(torch.from_numpy(x).to(dtype)).numpy()
    return found


def original(model: onnx.ModelProto, fed: Array, output: int = 0) -> Array:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {session.get_inputs()[0].name: fed})[output])


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def foreign_nodes(file: OnnxFile) -> list[bytes]:
    return [
        node.SerializeToString()
        for node in file.graph.model.graph.node
        if not node.name.startswith(("preprocessing", "logits"))
    ]


def added(file: OnnxFile) -> list[str]:
    return [
        node.op_type
        for node in file.graph.model.graph.node
        if node.name.startswith(("preprocessing", "logits"))
    ]


CAFFE = Intake(input_range=(0, 255), mean=(104, 117, 123), channel_order="bgr")
INTAKES: dict[str, tuple[Intake, str, Callable[[Array], Array], list[str]]] = {
    "as it is": (PLAIN, "nchw", lambda x: x, ["Identity"]),
    "bytes": (Intake(input_range=(0, 255)), "nchw", lambda x: x * 255, ["Mul"]),
    "from -1 to 1": (Intake(input_range=(-1, 1)), "nchw", lambda x: x * 2 - 1, ["Mul", "Sub"]),
    "one mean": (
        Intake(mean=(0.5,), std=(0.25,)), "nchw", lambda x: (x - 0.5) / 0.25, ["Sub", "Div"],
    ),
    "ImageNet": (
        Intake(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        "nchw",
        lambda x: (x - np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1))
        / np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1),
        ["Sub", "Div"],
    ),
    "Caffe": (
        CAFFE,
        "nhwc",
        lambda x: x.transpose(0, 2, 3, 1)[..., ::-1] * 255 - np.array([104, 117, 123]),
        ["Gather", "Mul", "Sub", "Transpose"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INTAKES)
def test_the_source_s_format_is_taken_into_the_graph(name: str) -> None:
    intake, layout, feed, ops = INTAKES[name]
    model = classifier(layout=layout)
    file = opened(model, intake)
    x = images()
    fed = np.ascontiguousarray(feed(x.astype(np.float64)), np.float32)
    wanted = original(model, fed)
    np.testing.assert_allclose(softmax(logits(file, x)), wanted, atol=2e-6)
    assert added(file) == [*ops, "Identity"]
    assert file.preprocessing.layout == layout
    assert file.input_shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("name", INTAKES)
def test_the_file_s_nodes_and_constants_stay_as_they_are(name: str) -> None:
    intake, layout, _, _ = INTAKES[name]
    model = classifier(layout=layout)
    file = opened(model, intake)
    assert foreign_nodes(file) == [n.SerializeToString() for n in model.graph.node[:-1]]
    kept = {c.name: c.SerializeToString() for c in file.graph.model.graph.initializer}
    for constant in model.graph.initializer:
        assert kept[constant.name] == constant.SerializeToString()
    assert file.graph.opset == 17


@pytest.mark.parametrize(("layout", "told"), [("nchw", "nhwc"), ("nhwc", "nchw")])
def test_a_layout_that_makes_colours_a_side_is_refused(layout: str, told: Layout) -> None:
    with pytest.raises(UsageError, match=f"layout {told} these are images of {SIZE} channels"):
        opened(classifier(layout=layout), Intake(input_layout=told))


def test_the_signature_is_the_contract_s() -> None:
    graph = opened(classifier()).graph.model.graph
    (image,), (output,) = graph.input, graph.output
    assert (image.name, output.name) == ("images", "logits")
    sizes = [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, SIZE, SIZE]
    sizes = [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim]
    assert sizes == ["batch", CLASSES]
    onnx.checker.check_model(opened(classifier()).graph.model, full_check=True)


def test_equal_files_give_equal_bytes() -> None:
    first, second = (opened(classifier(), CAFFE).graph.model for _ in range(2))
    assert to_bytes(first) == to_bytes(second)


@pytest.mark.parametrize(
    ("head", "removed"),
    [
        ([SOFTMAX], ["Softmax over axis 1"]),
        ([SOFTMAX, ("Identity", {})], ["Softmax over axis 1", "Identity"]),
        ([("Identity", {}), ("Softmax", {})], ["Identity", "Softmax over axis -1"]),
        ([("LogSoftmax", {"axis": -1})], ["LogSoftmax over axis -1"]),
        (
            [("Cast", {"to": 1}), SOFTMAX, ("Cast", {"to": 1})],
            ["Cast", "Softmax over axis 1", "Cast"],
        ),
        ([("Dropout", {}), SOFTMAX], ["Dropout", "Softmax over axis 1"]),
        ([], []),
    ],
)  # fmt: skip
def test_what_normalises_the_logits_is_removed(
    head: list[tuple[str, dict[str, Any]]], removed: list[str]
) -> None:
    model = classifier(head)
    file = opened(model)
    assert list(file.removed) == removed
    bare = classifier([], scores="scores")
    np.testing.assert_allclose(logits(file, images()), original(bare, images()), rtol=1e-4)
    agreement = file.check()
    assert agreement.same_labels == agreement.images == 8
    assert agreement.outputs < 1e-5
    assert agreement.spread > 1e-2


def test_a_softmax_within_the_network_stays() -> None:
    model = classifier([SOFTMAX, ("Neg", {}), SOFTMAX])
    file = opened(model)
    assert file.removed == ("Softmax over axis 1",)
    assert [n.op for n in file.graph.nodes].count("Softmax") == 1
    file.check()


def test_probabilities_that_no_softmax_made_are_pointed_out() -> None:
    file = opened(classifier([SOFTMAX, ("Abs", {})]))
    assert "probabilities" in file.notes[0]
    assert opened(classifier()).notes == opened(classifier([])).notes == ()


@pytest.mark.parametrize("intake", [PLAIN, CAFFE])
@pytest.mark.parametrize(
    ("input_name", "scores"),
    [("images", "logits"), ("logits", "images"), ("images", "s"), ("preprocessing", "logits")],
)
def test_names_that_the_contract_needs_are_made_free(
    intake: Intake, input_name: str, scores: str
) -> None:
    model = classifier([("Relu", {}), SOFTMAX], input_name=input_name, scores=scores)
    file = opened(model, intake)
    onnx.checker.check_model(file.graph.model, full_check=True)
    file.check()
    names = [node.name for node in file.graph.model.graph.node]
    assert len(set(names)) == len(names)
    for change in file.changes:
        assert "is called" in change


def test_logits_that_are_called_so_are_not_bridged() -> None:
    file = opened(classifier(input_name="images", scores="logits"))
    assert added(file) == []
    assert file.changes == ()


# ------------------------------------------------------------------------------------- batch


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("target", [[4, FEATURES], [4, -1], [-1, FEATURES], [0, -1]])
def test_a_fixed_batch_is_opened(batch: int, target: list[int]) -> None:
    target = [batch if size == 4 else size for size in target]
    model = classifier(batch=batch, flatten_to=target)
    file = opened(model)
    agreement = file.check(images(7))
    assert agreement.outputs < 1e-5
    assert f"The batch of {batch} became symbolic." in file.changes
    assert foreign_nodes(file) == [n.SerializeToString() for n in model.graph.node[:-1]]
    changed = [change for change in file.changes if "Reshape" in change]
    assert bool(changed) == (target[0] == batch)


def test_a_target_that_others_read_is_copied() -> None:
    model = classifier(batch=1, flatten_to=[1, FEATURES])
    shape = helper.make_node("Cast", ["target"], ["as_floats"], "other", to=TensorProto.FLOAT)
    total = helper.make_node("ReduceSum", ["as_floats"], ["total"], "sum", keepdims=0)
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    gemm.output[0] = "gemm"
    model.graph.node.insert(5, helper.make_node("Add", ["gemm", "total"], ["scores"], "add"))
    model.graph.node.insert(5, total)
    model.graph.node.insert(5, shape)
    file = opened(model)
    file.check(images(5))
    np.testing.assert_array_equal(file.graph.constants["target"], [1, FEATURES])


def test_heads_of_an_attention_are_opened() -> None:
    model = classifier(batch=1, flatten_to=[1, FEATURES])
    flat = next(i for i, node in enumerate(model.graph.node) if node.name == "flat")
    for name, shape in (("heads", [2, FEATURES // 2]), ("back", [1, HIDDEN, SIZE // 2, SIZE // 2])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(shape), name))
    model.graph.node[flat].input[0] = "back_out"
    model.graph.node.insert(flat, helper.make_node("Reshape", ["h", "back"], ["back_out"], "back"))
    model.graph.node.insert(flat, helper.make_node("Reshape", ["pool", "heads"], ["h"], "heads"))
    opened(model).check(images(5))


def test_a_batch_that_cannot_be_opened_is_refused() -> None:
    model = classifier(batch=1)
    rows = numpy_helper.from_array(np.ones((1, 1, SIZE, SIZE), np.float32), "row")
    model.graph.initializer.append(rows)
    model.graph.node.insert(0, helper.make_node("Concat", ["x", "row"], ["joined"], "join", axis=1))
    model.graph.node[1].input[0] = "joined"
    w = next(c for c in model.graph.initializer if c.name == "w")
    w.CopyFrom(numpy_helper.from_array(np.ones((HIDDEN, 4, 3, 3), np.float32), "w"))
    with pytest.raises(UsageError, match="A batch of 1 is built into the file"):
        opened(model)


# ------------------------------------------------------------------------------ inputs and outputs


def test_of_several_outputs_the_first_or_the_named_one_is_taken() -> None:
    model = classifier([])
    model.graph.node.append(helper.make_node("Neg", ["scores"], ["opposite"], "neg"))
    model.graph.output.append(helper.make_tensor_value_info("opposite", 1, None))
    first, second = opened(model), opened(model, Intake(output="opposite"))
    np.testing.assert_allclose(logits(first, images()), -logits(second, images()))
    assert "Neg" not in [node.op for node in first.graph.nodes]
    assert "Other outputs were dropped: opposite." in first.changes
    with pytest.raises(UsageError, match="no output 'third'"):
        opened(model, Intake(output="third"))


def test_what_the_logits_do_not_need_is_dropped() -> None:
    """Even operators that are never taken in, and inputs that only they read."""
    model = classifier([])
    model.graph.node.append(helper.make_node("RandomNormalLike", ["scores"], ["noise"], "noise"))
    model.graph.node.append(helper.make_node("Add", ["noise", "y"], ["noisy"], "noisy"))
    model.graph.input.append(helper.make_tensor_value_info("y", 1, [1]))
    model.graph.output.append(helper.make_tensor_value_info("noisy", 1, None))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(9, np.float32), "unused"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "y"))
    file = opened(model)
    file.check()
    assert {c.name for c in file.graph.model.graph.initializer} == {"w", "b", "fc_w", "fc_b"}


def test_remarks_are_stripped() -> None:
    model = classifier()
    model.doc_string = model.graph.doc_string = "made at /home/somebody"
    helper.set_model_props(model, {"author": "somebody"})
    model.graph.node[0].doc_string = "/home/somebody/network.py"
    model.graph.node[0].metadata_props.add(key="stack", value="/home/somebody/network.py")
    model.graph.initializer[0].doc_string = "/home/somebody/w.pt"
    file = opened(model)
    assert b"somebody" not in to_bytes(file.graph.model)


def test_constants_among_the_inputs_are_no_inputs() -> None:
    """Files of IR 3 list them there."""
    model = classifier(ir_version=3, opset=9)
    for constant in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(constant.name, constant.data_type, constant.dims)
        )
    file = opened(model)
    file.check()
    assert file.graph.inputs == ("images",)
    assert len(file.graph.model.graph.input) == 1
    assert "The file's format was raised from IR 3 to 8." in file.changes


def test_half_precision_is_cast() -> None:
    file = opened(classifier(element_type=TensorProto.FLOAT16))
    assert added(file) == ["Cast", "Cast"]
    assert file.check().outputs < 1e-2


def test_logits_with_axes_of_size_one_are_flattened() -> None:
    model = classifier([])
    model.graph.initializer.append(
        numpy_helper.from_array(np.array([0, CLASSES, 1, 1]), "to_image")
    )
    model.graph.node.append(helper.make_node("Reshape", ["scores", "to_image"], ["maps"], "maps"))
    model.graph.node.append(helper.make_node("Softmax", ["maps"], ["p"], "p", axis=1))
    model.graph.output[0].name = "p"
    file = opened(model)
    assert added(file)[-1] == "Flatten"
    file.check()
    np.testing.assert_allclose(
        softmax(logits(file, images())),
        original(model, images()).reshape(4, CLASSES),
        atol=1e-6,
    )


def detector() -> onnx.ModelProto:
    model = classifier([])
    model.graph.output[0].name = "pool"
    return model


def labels() -> onnx.ModelProto:
    model = classifier([("ArgMax", {"axis": 1, "keepdims": 1})])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


def two_inputs() -> onnx.ModelProto:
    model = classifier([])
    model.graph.input.append(helper.make_tensor_value_info("temperature", 1, [1]))
    model.graph.node.append(helper.make_node("Div", ["scores", "temperature"], ["t"], "t"))
    model.graph.output[0].name = "t"
    return model


def text() -> onnx.ModelProto:
    table = numpy_helper.from_array(np.ones((9, CLASSES), np.float32), "table")
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["words"], "words"),
        helper.make_node("ReduceMean", ["words"], ["scores"], "mean", axes=[1], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["N", 7])],
        [helper.make_tensor_value_info("scores", 1, None)],
        [table],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def of_bytes() -> onnx.ModelProto:
    model = classifier()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["f"], "f", to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "f"
    return model


def over_the_batch() -> onnx.ModelProto:
    return classifier([("Softmax", {"axis": 0})])


def external() -> onnx.ModelProto:
    model = classifier()
    constant = model.graph.initializer[0]
    constant.ClearField("raw_data")
    constant.data_location = TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="/etc/passwd")
    return model


def custom() -> onnx.ModelProto:
    model = classifier([("Gelu", {})])
    model.graph.node[-1].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def with_function() -> onnx.ModelProto:
    model = classifier([("Mine", {})])
    model.graph.node[-1].domain = "mine"
    model.opset_import.append(helper.make_opsetid("mine", 1))
    body = [helper.make_node("Relu", ["a"], ["b"])]
    model.functions.append(
        helper.make_function("mine", "Mine", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    )
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (detector, ["'pool'", f"[2, {HIDDEN}, 4, 4]", "detectors"]),
        (labels, ["int64", "labels"]),
        (two_inputs, ["2 inputs", "x, temperature"]),
        (text, ["'tokens'", "int64", "images"]),
        (of_bytes, ["'x'", "uint8", "gradient"]),
        (over_the_batch, ["axis 0", "not over the classes"]),
        (lambda: classifier([("Sigmoid", {})], classes=1), ["single value", "behind a Sigmoid"]),
        (lambda: classifier([], classes=1), ["single value", "two logits"]),
        (lambda: classifier(opset=6), ["opset 6", "convert_version"]),
        (lambda: classifier(batch=1 << 40), ["batches of 1024"]),
        (lambda: classifier(sides=(SIZE, 1 << 40)), ["16384 pixels"]),
        (lambda: classifier(batch="N", sides=("H", "W")), ["[?, 3, ?, ?]", "--input-size"]),
        (lambda: classifier(channels=8), ["[?, 8, 8, 8]", "--input-layout"]),
        (lambda: classifier(channels=3, sides=(SIZE, 3)), ["[?, 3, 8, 3]", "--input-layout"]),
    ],
)  # fmt: skip
def test_what_is_no_image_classifier_is_refused(
    make: Callable[[], onnx.ModelProto], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        opened(make())
    check_message(caught.value, words)


@pytest.mark.parametrize(
    ("make", "name"), [(external, "'w'"), (custom, "head0"), (with_function, "'Mine'")]
)
def test_what_is_not_read_is_refused_by_name(
    make: Callable[[], onnx.ModelProto], name: str
) -> None:
    with pytest.raises(GraphError) as caught:
        opened(make())
    check_message(caught.value, [name])


@pytest.mark.parametrize(
    ("intake", "words"),
    [
        ({"mean": (0.5, 0.5)}, ["2", "3 channels"]),
        ({"std": (1.0, 1.0, 1.0, 1.0)}, ["4", "3 channels"]),
        ({"input_size": (9, SIZE)}, ["9x8", "--input-size"]),
        ({"input": "pictures"}, ["'pictures'", "x"]),
    ],
)
def test_what_contradicts_the_file_is_refused(intake: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        opened(classifier(), Intake(**intake))
    check_message(caught.value, words)


@pytest.mark.parametrize(
    ("intake", "words"),
    [
        ({"input_range": (1, 0)}, ["range"]),
        ({"input_range": (0, float("nan"))}, ["finite"]),
        ({"std": (0.0,)}, ["std"]),
        ({"mean": (float("inf"),)}, ["finite"]),
        ({"input_size": (0, 4)}, ["0x4"]),
        ({"channel_order": "brg"}, ["brg"]),
    ],
)
def test_an_intake_that_is_none(intake: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Intake(**intake)
    check_message(caught.value, words)


def test_grey_images_have_no_channel_order() -> None:
    file = opened(classifier(channels=1))
    assert file.input_shape == (1, SIZE, SIZE)
    with pytest.raises(UsageError, match="not BGR"):
        opened(classifier(channels=1), Intake(channel_order="bgr"))


def test_open_sizes_are_given(tmp_path: Path) -> None:
    model = classifier(sides=("H", "W"))
    path = tmp_path / "open.onnx"
    onnx.save(model, path)
    file = open_onnx_file(path, Intake(input_size=(SIZE, SIZE)))
    assert (file.name, file.input_shape) == ("open.onnx", (3, SIZE, SIZE))
    file.check()


def test_a_softmax_of_nothing_is_refused() -> None:
    model = classifier()
    del model.graph.node[-1].input[:]
    with pytest.raises(UsageError):
        opened(model)


def test_names_of_a_foreign_file_do_not_break_messages() -> None:
    model = classifier([])
    model.graph.input.append(helper.make_tensor_value_info("a\nb" * 99, 1, [1]))
    model.graph.node.append(helper.make_node("Div", ["scores", "a\nb" * 99], ["t"], "t"))
    model.graph.output[0].name = "t"
    with pytest.raises(UsageError) as caught:
        opened(model)
    check_message(caught.value, ["2 inputs"])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"not a model", b"\x08\x07"])
def test_bytes_that_are_no_model(data: bytes) -> None:
    with pytest.raises(GraphError) as caught:
        open_onnx_file(data)
    check_message(caught.value, ["The file"])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.onnx", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            open_onnx_file(path)


def check_message(error: CcnDeployError, words: list[str]) -> None:
    """Two lines, what and what to do, with the words in them."""
    assert error.exit_code == ExitCode.USAGE
    lines = str(error).splitlines()
    assert len(lines) == 2
    assert all(lines)
    for word in words:
        assert word in str(error)


# --------------------------------------------------------------------------------- the proof


def fault(name: str, graph: onnx.GraphProto) -> None:
    """Plant what an exporter may get wrong."""
    constants = {c.name: c for c in graph.initializer}

    def change(name: str, how: Callable[[Array], Array]) -> None:
        value = how(numpy_helper.to_array(constants[name]))
        constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))

    match name:
        case "mean of another data set":
            change("preprocessing.sub.by", lambda v: v[:, ::-1])
        case "channels swapped":
            change("preprocessing.gather.by", lambda v: v[::-1])
        case "another range":
            change("preprocessing.mul.by", lambda v: v + 1)
        case "a lost bias":
            change("b", lambda v: v * 0)
        case "a weight off by a thousandth":
            change("fc_w", lambda v: v * 1.001)
        case "a logit too many":
            change("fc_b", lambda v: v + np.eye(CLASSES, dtype=np.float32)[0])


@pytest.mark.parametrize(
    "name",
    [
        "mean of another data set",
        "channels swapped",
        "another range",
        "a lost bias",
        "a weight off by a thousandth",
        "a logit too many",
    ],
)
def test_planted_faults_are_found(name: str) -> None:
    file = opened(classifier(layout="nhwc"), CAFFE)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(file.graph.model)
    fault(name, wrong.graph)
    with pytest.raises(LoweringError) as caught:
        check_agreement(Graph(wrong), file.original, probe_images(file.input_shape))
    assert caught.value.exit_code == ExitCode.GATE_FAILED
    assert "on image" in caught.value.what
    assert "differs by" in caught.value.what
    assert "Nothing was written" in caught.value.hint


def test_a_softmax_that_is_sure_of_itself_hides_nothing() -> None:
    """The probabilities of a saturated softmax agree whatever the logits."""
    model = classifier()
    for constant in model.graph.initializer:
        if constant.name == "fc_b":
            value = np.array([1e3, 0, 0, 0, 0], np.float32)
            constant.CopyFrom(numpy_helper.from_array(value, "fc_b"))
    file = opened(model)
    file.check()
    wrong = onnx.ModelProto()
    wrong.CopyFrom(file.graph.model)
    fault("a weight off by a thousandth", wrong.graph)
    wrong.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.zeros((HIDDEN, 3, 3, 3), np.float32), "w")
    )
    with pytest.raises(LoweringError, match="a logit differs"):
        check_agreement(Graph(wrong), file.original, probe_images(file.input_shape))


def test_outputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(LoweringError, match="not finite on image 0"):
        opened(classifier([("Log", {})])).check()


def test_the_card_says_what_was_done() -> None:
    file = opened(classifier(batch=1, flatten_to=[1, FEATURES]), CAFFE)
    source = file.source(file.check())
    assert source.kind == "onnx"
    assert source.removed == ("Softmax over axis 1",)
    assert len(source.changes) == 2
    assert source.preprocessing.mean == (104, 117, 123)
    assert source.agreement["same_labels"] == source.agreement["images"] == 8
    assert 0 < source.agreement["logits_float64"] < 1e-5


def test_probe_images_tell_channels_apart() -> None:
    shown = probe_images((3, 16, 12))
    assert shown.shape == (8, 3, 16, 12)
    assert shown.dtype == np.float32
    assert 0 <= shown.min() < shown.max() <= 1
    assert (np.ptp(shown, axis=1).max(axis=(1, 2)) > 0.01).all()
