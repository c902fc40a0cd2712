"""From a forward graph to the graph of its input gradients: reverse mode, one rule an op.

The graph maps images [batch, C, H, W] and cotangents [batch, candidates, classes] to the logits
and to gradients [batch, candidates, C, H, W]: row k is the gradient of
``sum_j cotangents[n, k, j] * logits[n, j]`` with respect to image n. It begins with the nodes of
the canonical forward graph, which run once for all candidates. Standard ops only; both leading
sizes are symbolic.

On the way back the candidates come first: the gradient of a tensor of shape S is
[candidates, *S]. So what is computed for an image broadcasts over its candidates as it is, and no
rule needs to know where the batch is in S, or whether a reshape joined it to something else.

Added nodes are called ``<forward node>.grad.<part>``; ``<tensor>.grad`` adds up the gradients of
a tensor that several nodes read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from ccn_deploy.errors import NoGradientError
from ccn_deploy.exporters.canonical import canonical
from ccn_deploy.exporters.vjp.table import RULES
from ccn_deploy.exporters.vjp.tape import STILL_WORKS, Gradient, Site, Tape, no_gradient
from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.graph.graph import Graph, Node
from ccn_deploy.graph.signature import BATCH, CANDIDATES, COTANGENTS, GRADIENTS, INPUT, OUTPUT

FLAT = frozenset({"Sign", "Floor", "Ceil", "Round", "Hardmax"})
"""Ops that give floats and whose derivative is 0 wherever there is one; nothing goes back."""


def gradient_graph(forward: Graph) -> onnx.ModelProto:
    """Return the graph of a network's logits and input gradients in float32.

    Equal graphs give equal bytes. It takes one image or more, and one candidate or more.

    Args:
        forward: A forward graph: ``images`` [batch, C, H, W] to ``logits`` [batch, classes].

    Raises:
        NoGradientError: An op on the way from the logits to the images has no rule, or its rule
            does not cover this node; the message names both.
    """
    forward = canonical(forward)
    tape = Tape(forward)
    live = _live(forward)
    if OUTPUT not in live:
        raise NoGradientError(
            "No gradient graph: the logits do not depend on the images, or by steps alone.",
            STILL_WORKS,
        )
    turned = tape.node("Transpose", [COTANGENTS], f"{COTANGENTS}.turned", perm=[1, 0, 2])
    found: dict[str, list[Gradient]] = {OUTPUT: [Gradient(turned[0])]}
    for node in reversed(forward.nodes):
        _step_back(tape, node, live, found)
    gradient = _whole(tape, INPUT, _sum(tape, INPUT, found))
    rank = len(forward.shapes[INPUT])
    tape.nodes.append(
        helper.make_node(
            "Transpose", [gradient], [GRADIENTS], name=GRADIENTS, perm=[1, 0, *range(2, rank + 1)]
        )
    )
    return _model(tape)


def _live(forward: Graph) -> frozenset[str]:
    """Return the float tensors that depend on the images by more than steps."""
    live = {INPUT}
    for node in forward.nodes:
        if node.op not in FLAT and any(tensor in live for tensor in node.inputs):
            _check_precision(forward, node)
            live.update(tensor for tensor in node.outputs if tensor in forward.floats)
    return frozenset(live)


def _check_precision(forward: Graph, node: Node) -> None:
    """Raise if a node has constants of other floats than float32: so it computes in them."""
    for name in node.inputs:
        kind = forward.constants[name].dtype if name in forward.constants else None
        if kind is not None and kind.kind == "f" and kind != np.float32:
            raise no_gradient(node, f"computes in {kind}")


def _step_back(
    tape: Tape, node: Node, live: frozenset[str], found: dict[str, list[Gradient]]
) -> None:
    """Go back through a node, if the logits depend on it."""
    if not any(tensor in found for tensor in node.outputs if tensor in live):
        return
    rule = RULES.get(node.op)
    if rule is None:
        raise no_gradient(node, "is of an op that has no rule")
    incoming = tuple(
        _sum(tape, tensor, found) if tensor in found else None for tensor in node.outputs
    )
    site = Site(tape, node, incoming, live)
    given, *others = [gradient for gradient in incoming if gradient is not None]
    if node.op != "Split" and (others or given is not incoming[0]):
        raise no_gradient(node, "is used by another output than the first")
    owed: Sequence[Gradient | None] = rule.backward(site, given)
    for tensor, gradient in zip(node.inputs, owed, strict=False):
        if gradient is not None and tensor in live:
            found.setdefault(tensor, []).append(gradient)


def _sum(tape: Tape, tensor: str, found: dict[str, list[Gradient]]) -> Gradient:
    """Return a tensor's gradient: the sum of what its readers sent."""
    first, *others = found[tensor]
    if not others:
        return first
    total = _whole(tape, tensor, first)
    for other in others:
        inputs = [total, _whole(tape, tensor, other)]
        total = tape.node("Add", inputs, f"{tensor}.grad")[0]
    found[tensor] = [Gradient(total)]
    return found[tensor][0]


def _whole(tape: Tape, tensor: str, gradient: Gradient) -> str:
    if gradient.factor is None:
        return gradient.tensor
    inputs = [gradient.tensor, gradient.factor]
    return tape.node("Mul", inputs, f"{tensor}.grad.whole")[0]


def _model(tape: Tape) -> onnx.ModelProto:
    """Return the finished graph, with the inputs and outputs of its signature."""
    source = tape.forward.model
    pixels = [d.dim_value for d in source.graph.input[0].type.tensor_type.shape.dim[1:]]
    classes = tape.forward.classes
    builder = GraphBuilder()
    builder.nodes, builder.constants = tape.nodes, tape.constants
    return builder.model(
        source.graph.name,
        {INPUT: [BATCH, *pixels], COTANGENTS: [BATCH, CANDIDATES, classes]},
        {OUTPUT: [BATCH, classes], GRADIENTS: [BATCH, CANDIDATES, *pixels]},
        opset=tape.forward.opset,
        ir_version=source.ir_version,
    )
