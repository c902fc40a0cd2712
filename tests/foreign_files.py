"""Small ONNX classifiers as strangers might export them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 8
CLASSES = 5
HIDDEN = 6


def classifier(
    head: Sequence[tuple[str, dict[str, Any]]] = (("Softmax", {"axis": 1}),),
    *,
    layout: str = "nchw",
    channels: int = 3,
    batch: int | str = "N",
    sides: tuple[int | str, int | str] = (SIZE, SIZE),
    opset: int = 17,
    ir_version: int = 8,
    input_name: str = "x",
    scores: str = "scores",
    flatten_to: Sequence[int] | None = None,
    element_type: int = TensorProto.FLOAT,
    classes: int = CLASSES,
    seed: int = 0,
) -> onnx.ModelProto:
    """Return Conv, Relu, MaxPool, Reshape or Flatten, Gemm, and a head."""
    rng = np.random.default_rng(seed)
    kind = helper.tensor_dtype_to_np_dtype(element_type)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / 3).astype(kind), name)

    features = HIDDEN * (SIZE // 2) ** 2
    constants = [
        constant("w", HIDDEN, channels, 3, 3),
        constant("b", HIDDEN),
        constant("fc_w", features, classes),
        constant("fc_b", classes),
    ]
    nodes = []
    x = input_name
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [x], ["x_nchw"], "to_nchw", perm=[0, 3, 1, 2]))
        x = "x_nchw"
    nodes += [
        helper.make_node("Conv", [x, "w", "b"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"], "relu"),
        helper.make_node(
            "MaxPool", ["relu"], ["pool"], "pool", kernel_shape=[2, 2], strides=[2, 2]
        ),
    ]
    if flatten_to is None:
        nodes.append(helper.make_node("Flatten", ["pool"], ["flat"], "flat"))
    else:
        constants.append(numpy_helper.from_array(np.array(flatten_to, np.int64), "target"))
        nodes.append(helper.make_node("Reshape", ["pool", "target"], ["flat"], "flat"))
    nodes.append(helper.make_node("Gemm", ["flat", "fc_w", "fc_b"], [scores], "fc"))
    last = scores
    for i, (op, attributes) in enumerate(head):
        nodes.append(helper.make_node(op, [last], [f"head{i}"], f"head{i}", **attributes))
        last = f"head{i}"
    height, width = sides
    axes = (
        [batch, channels, height, width] if layout == "nchw" else [batch, height, width, channels]
    )
    graph = helper.make_graph(
        nodes,
        "somebody's",
        [helper.make_tensor_value_info(input_name, element_type, axes)],
        [helper.make_tensor_value_info(last, element_type, None)],
        constants,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )
