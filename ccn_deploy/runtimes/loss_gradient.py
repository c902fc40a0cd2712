"""A gradient graph that finds the slope of the cross-entropy by itself.

Attacks that climb the cross-entropy need the logits before they can say along which cotangent to
go back, so on the graph of the bundle a step runs the network forward twice. Here the cotangent is
a few more nodes of the graph, and once is enough: softmax(logits), with minus the sum of the others
in the label's place. Its own value less one would be rounding where the network is sure.
"""

from __future__ import annotations

from ccn_deploy.extras import require

LABELS = "labels"
"""The input that takes the place of the cotangents: int64 [N]."""


def with_loss_gradient(graph: bytes, cotangents: str, logits: str, classes: int) -> bytes:
    """Return a gradient graph from images and labels instead of images and cotangents.

    Args:
        graph: A gradient graph with its logits in float32.
        cotangents: Name of its input [N, K, classes].
        logits: Name of its output [N, classes].
        classes: How many.

    Raises:
        MissingExtraError: onnx is not installed.
    """
    onnx = require("onnx", "train", "to climb the cross-entropy")
    require("onnx.helper", "train", "to climb the cross-entropy")
    helper = onnx.helper
    model = onnx.load_model_from_string(graph)
    body = model.graph

    def constant(part: str, kind: int, shape: list[int], values: list[float]) -> str:
        body.initializer.append(helper.make_tensor(f"{LABELS}.{part}", kind, shape, values))
        return f"{LABELS}.{part}"

    integer, floating = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    depth = constant("depth", integer, [1], [classes])
    values = constant("values", floating, [2], [0.0, 1.0])
    axis = constant("axis", integer, [1], [1])
    steps = [
        helper.make_node("Softmax", [logits], [f"{LABELS}.softmax"], axis=-1),
        helper.make_node("OneHot", [LABELS, depth, values], [f"{LABELS}.onehot"]),
        helper.make_node("Mul", [f"{LABELS}.softmax", f"{LABELS}.onehot"], [f"{LABELS}.own"]),
        helper.make_node("Sub", [f"{LABELS}.softmax", f"{LABELS}.own"], [f"{LABELS}.others"]),
        helper.make_node("ReduceSum", [f"{LABELS}.others", axis], [f"{LABELS}.sum"]),
        helper.make_node("Mul", [f"{LABELS}.onehot", f"{LABELS}.sum"], [f"{LABELS}.label"]),
        helper.make_node("Sub", [f"{LABELS}.others", f"{LABELS}.label"], [f"{LABELS}.slope"]),
        helper.make_node("Unsqueeze", [f"{LABELS}.slope", axis], [cotangents]),
    ]
    # What needs no cotangents comes first, the logits among it.
    after = {cotangents}
    before, back = [], []
    for node in body.node:
        if after.isdisjoint(node.input):
            before.append(node)
        else:
            after.update(node.output)
            back.append(node)
    del body.node[:]
    body.node.extend([*before, *steps, *back])
    (given,) = (value for value in body.input if value.name == cotangents)
    (images,) = (value for value in body.input if value.name != cotangents)
    (batch, *_) = images.type.tensor_type.shape.dim
    body.input.remove(given)
    body.input.append(helper.make_tensor_value_info(LABELS, integer, [batch.dim_param]))
    result: bytes = model.SerializeToString()
    return result
