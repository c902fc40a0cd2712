"""Parity of networks of any architecture: healthy ones pass, planted faults are placed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from ccn_deploy.exporters.canonical import canonical
from ccn_deploy.exporters.vjp import gradient_graph
from ccn_deploy.graph.graph import Graph
from ccn_deploy.parity import ParityRequest, ParityResult, collect, judge
from ccn_deploy.verdict import Verdict
from tests import modules
from tests.foreign_bundles import foreign_bundle, pictures

MEAN, STD = (0.45, 0.5, 0.4), (0.22, 0.25, 0.3)
REQUEST = ParityRequest(pictures(), samples=9, per_layer=True, threads=1)

Edit = Callable[["Network"], None]


class Network(nn.Module):
    """A network with its preprocessing, as an exporter that takes it in writes it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.order: list[int] | None = None
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        if self.order is not None:
            images = images[:, self.order]
        return self.body((images - self.mean) / self.std)


@cache
def healthy(name: str) -> onnx.ModelProto:
    return graph(name)


def graph(name: str, edit: Edit | None = None) -> onnx.ModelProto:
    network = Network(modules.module(name))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.bias.normal_(0.0, 0.2, generator=generator)
        if edit is not None:
            edit(network)
    return modules.exported(network.eval())


def measure(path: Path, name: str, deployed: onnx.ModelProto | None = None) -> ParityResult:
    return judge(collect(foreign_bundle(path, healthy(name), deployed), REQUEST))


@pytest.mark.parametrize("name", ["resnet", "vit", "convnext", "mobilenet"])
def test_a_healthy_network_passes(name: str, tmp_path: Path) -> None:
    result = measure(tmp_path / name, name)
    assert result.verdict is Verdict.PASS, [finding.reasons for finding in result.failures]
    assert result.first_departure is None
    assert result.layers is not None
    units = [finding.row.deviation.units for finding in (*result.inputs, *result.layers)]
    assert 0.05 < max(units) < 2.0  # a unit that explains everything would explain faults too


def second_stage(network: Network) -> nn.Sequential:
    """Return the last residual block's two convolutions with what normalises each."""
    block = network.body.get_submodule("5.body")
    assert isinstance(block, nn.Sequential)
    return block


def lose_bias(network: Network) -> None:
    second_stage(network)[1].bias.zero_()


def other_epsilon(network: Network) -> None:
    second_stage(network)[4].eps = 1e-3


def swap_channels(network: Network) -> None:
    weight = second_stage(network)[3].weight
    weight[:, [0, 1]] = weight[:, [1, 0]]


def turn_colours(network: Network) -> None:
    network.order = [2, 1, 0]


def other_mean(network: Network) -> None:
    network.mean.copy_(torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1))


FAULTS: dict[str, tuple[Edit, str]] = {
    "a lost bias": (lose_bias, "node_Conv_102"),
    "another epsilon": (other_epsilon, "node_Conv_104"),
    "swapped channels": (swap_channels, "node_Conv_104"),
    "BGR for RGB": (turn_colours, "node_div"),
    "the mean of another data set": (other_mean, "node_sub"),
}
"""Each with the layer that it is planted in; the exporter folds BatchNorm into convolutions."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_at_its_layer(fault: str, tmp_path: Path) -> None:
    edit, layer = FAULTS[fault]
    result = measure(tmp_path / "faulty", "resnet", graph("resnet", edit))
    assert result.verdict is Verdict.FAIL
    assert result.first_departure is not None
    assert result.first_departure.subject == layer


def scaled_head(network: Network, by: float) -> None:
    head = network.body.get_submodule("8")
    head.weight.mul_(by)
    head.bias.mul_(by)


@pytest.mark.parametrize("by", [1e-25, 1e25])
def test_tolerances_are_relative_to_tiny_and_huge_logits(by: float, tmp_path: Path) -> None:
    forward = graph("resnet", lambda network: scaled_head(network, by))
    request = replace(REQUEST, per_layer=False)
    result = judge(collect(foreign_bundle(tmp_path / "scaled", forward), request))
    assert result.verdict is Verdict.PASS, [finding.reasons for finding in result.failures]
    faulty = onnx.ModelProto()
    faulty.CopyFrom(forward)
    (bias,) = (c for c in faulty.graph.initializer if c.name == "body.8.bias")
    bias.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32(1.01), bias.name)
    )
    result = judge(collect(foreign_bundle(tmp_path / "wrong", forward, faulty), request))
    assert result.verdict is Verdict.FAIL


def test_a_head_of_zeros_proves_nothing(tmp_path: Path) -> None:
    forward = graph("resnet", lambda network: scaled_head(network, 0.0))
    result = judge(collect(foreign_bundle(tmp_path / "zeros", forward), REQUEST))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert {reason for finding in result.failures for reason in finding.reasons} == {
        "every logit is 0, of the reference as of the runtime: an untrained head?"
    }
    json.dumps(result.document(), allow_nan=False)


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime-cpu"])
def test_true_gradients_pass(name: str, runtime: str, tmp_path: Path) -> None:
    """They differ from float64 autograd by more than rounding only where a kink is near."""
    forward = healthy(name)
    gradient = gradient_graph(canonical(Graph(forward)))
    bundle = foreign_bundle(tmp_path / name, forward, gradient=gradient)
    result = judge(collect(bundle, replace(REQUEST, runtime=runtime, per_layer=False)))
    assert result.verdict is Verdict.PASS, [finding.reasons for finding in result.failures]
    assert result.gradients is not None
    assert sum(finding.row.slopes.judged for finding in result.gradients) > 0


def test_gradients_of_another_network_fail(tmp_path: Path) -> None:
    """One epsilon differs, in the gradient graph only."""
    other = canonical(Graph(graph("resnet", other_epsilon)))
    bundle = foreign_bundle(tmp_path / "b", healthy("resnet"), gradient=gradient_graph(other))
    result = judge(collect(bundle, replace(REQUEST, per_layer=False)))
    assert result.verdict is Verdict.FAIL
    assert result.gradients is not None and any(finding.reasons for finding in result.gradients)
    assert all(f.verdict is Verdict.PASS for f in (*result.inputs, *result.invariance))
