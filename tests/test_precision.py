"""Graphs in low precision against the float32 graph, by ONNX's own definition of the ops."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from ccn_deploy.exporters.checks import check_gradient_graph, check_shapes
from ccn_deploy.exporters.gradient import lower_gradient
from ccn_deploy.exporters.graph import INPUT, to_bytes
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.precision import check_precision, convert
from tests.networks import DEFENSES, difficult_images, random_network

UNITS = {"fp16": 2.0**-11, "bf16": 2.0**-8}


@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("defense", DEFENSES)
def test_half_precision_computes_the_same_network(defense: str, precision: str) -> None:
    model = random_network("mnist-cnn", defense)
    graph = lower(model)
    converted = convert(graph, precision).graph
    check_precision(converted, precision, model)
    check_shapes(converted, model)
    images = difficult_images(model.architecture.input_shape)
    (wanted,) = ReferenceEvaluator(graph).run(None, {INPUT: images})
    (found,) = ReferenceEvaluator(converted).run(None, {INPUT: images})
    assert found.dtype == np.float32
    assert 0 < np.abs(found - wanted).max() < 4 * UNITS[precision] * np.abs(wanted).max()


@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("defense", ["sm", "brelu", "ccn"])
def test_gradient_graph_begins_with_the_very_forward_graph(defense: str, precision: str) -> None:
    model = random_network("mnist-cnn", defense)
    forward = convert(lower(model), precision).graph
    backward = convert(lower_gradient(model), precision).graph
    check_gradient_graph(backward, forward, model)
    check_precision(backward, precision, model)


def test_conversion_is_deterministic_and_leaves_its_input_alone() -> None:
    graph = lower(random_network("mnist-cnn", "ccn"))
    before = to_bytes(graph)
    assert to_bytes(convert(graph, "fp16").graph) == to_bytes(convert(graph, "fp16").graph)
    assert to_bytes(graph) == before
    onnx.checker.check_model(graph)
