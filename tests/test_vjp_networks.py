from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from ccn_deploy.errors import EngineBuildError
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.tensorrt.build import Batches, build_engine
from ccn_deploy.exporters.vjp import RULES, gradient_graph
from ccn_deploy.exporters.vjp.table import Rule
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from tests.networks import DEFENSES, random_network
from tests.test_vjp import autograd, off, on_onnxruntime, slopes
from tests.vjp_networks import NETWORKS, exported


def paper(architecture: str, defense: str) -> Graph:
    return Graph(lower(random_network(architecture, defense)))


def images_for(graph: Graph, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *graph.input_shape), dtype=np.float32)


def errors(graph: Graph, count: int, candidates: int) -> tuple[float, float]:
    """Return relative l2 errors of the gradient graph and of float32 autograd."""
    images, cotangents = images_for(graph, count), slopes(count, candidates, graph.classes)
    truth = autograd(GraphModule(graph, torch.float64), images, cotangents)
    _, got = on_onnxruntime(gradient_graph(graph), images, cotangents)
    single = autograd(GraphModule(graph, torch.float32), images, cotangents, torch.float32)
    return off(got, truth), off(single, truth)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_others_agree_with_autograd(name: str) -> None:
    for count, candidates in ((3, 4), (1, 1)):
        ours, torchs = errors(exported(name), count, candidates)
        assert ours < max(2 * torchs, 1e-6)


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("architecture", ["mnist-cnn", "vgg11-cifar10"])
def test_the_papers_networks_agree_with_autograd(architecture: str, defense: str) -> None:
    ours, torchs = errors(paper(architecture, defense), 2, 3)
    assert ours < max(2 * torchs, 1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_depends_on_its_image_and_cotangent_alone(name: str) -> None:
    graph = exported(name)
    images, cotangents = images_for(graph, 3), slopes(3, 2, graph.classes)
    model = gradient_graph(graph)
    _, together = on_onnxruntime(model, images, cotangents)
    for i in range(3):
        for k in range(2):
            _, alone = on_onnxruntime(model, images[i : i + 1], cotangents[i : i + 1, k : k + 1])
            assert off(together[i : i + 1, k : k + 1], alone) < 1e-5


def test_gradients_are_finite_differences_of_the_logits() -> None:
    graph = exported("vit")
    images, cotangents = images_for(graph, 2), slopes(2, 3, graph.classes)
    _, gradients = on_onnxruntime(gradient_graph(graph), images, cotangents)
    module, step = GraphModule(graph, torch.float64), 1e-6
    for direction in np.random.default_rng(4).normal(size=(3, *graph.input_shape)):
        ahead, behind = (
            module(torch.from_numpy(images + side * step * direction)).numpy() for side in (1, -1)
        )
        wanted = np.einsum("nkj,nj->nk", cotangents, (ahead - behind) / (2 * step))
        got = np.einsum("nkchw,chw->nk", gradients, direction)
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("op", ["ReduceMean", "Conv", "Add"])
def test_a_wrong_rule_is_caught_in_a_network(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES[op]

    def wrong(at, g):  # type: ignore[no-untyped-def]
        first, *rest = right.backward(at, g)
        return [first and at.times(first, 1.01), *rest]

    monkeypatch.setitem(RULES, op, Rule(wrong))
    ours, torchs = errors(exported("resnet"), 2, 2)
    assert ours > max(100 * torchs, 1e-4)


# Structure


@pytest.mark.parametrize("name", NETWORKS)
def test_both_leading_sizes_are_symbolic_and_ops_are_standard(name: str) -> None:
    model = gradient_graph(exported(name))
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in [*model.graph.input, *model.graph.output]
    }
    assert shapes == {
        "images": ["batch", 3, 32, 32],
        "cotangents": ["batch", "candidates", 7],
        "logits": ["batch", 7],
        "gradients": ["batch", "candidates", 3, 32, 32],
    }
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not [n for n in model.graph.node if n.op_type == "MaxPool" and len(n.output) > 1]


def test_it_begins_with_the_forward_graph() -> None:
    forward = lower(random_network("mnist-cnn", "ccn"))
    model = gradient_graph(Graph(forward))
    count = len(forward.graph.node)
    assert list(model.graph.node[:count]) == list(forward.graph.node)
    assert list(model.graph.initializer[: len(forward.graph.initializer)]) == list(
        forward.graph.initializer
    )
    added = [node.name for node in model.graph.node[count:]]
    assert len(set(added)) == len(added)
    layers = {node.name for node in forward.graph.node}
    assert all(
        name.partition(".grad")[0] in layers | {"images", "logits"}
        for name in added
        if name not in ("cotangents.turned", "cotangents.candidates", "gradients")
    )


def test_what_candidates_share_is_multiplied_once() -> None:
    """Between two convolutions one product touches all candidates, whatever lies there."""
    model = gradient_graph(paper("mnist-cnn", "sm"))
    wide = [n for n in model.graph.node if n.op_type == "Mul" and n.name.endswith("whole")]
    layers = {n.name for n in lower(random_network("mnist-cnn", "sm")).graph.node}
    convs = [n for n in model.graph.node if n.name not in layers and "Conv" in n.op_type]
    assert len(wide) <= len(convs) + 2


BYTES = """
import hashlib
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.vjp import gradient_graph
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.graph import Graph
from tests.networks import random_network
print(hashlib.sha256(to_bytes(gradient_graph(Graph(lower(random_network("mnist-cnn", "ccn")))))).hexdigest())
"""  # fmt: skip  # noqa: E501


def test_equal_graphs_give_equal_bytes_in_every_process() -> None:
    here = [
        hashlib.sha256(to_bytes(gradient_graph(paper("mnist-cnn", "ccn")))).hexdigest()
        for _ in range(2)
    ]
    there = subprocess.run(
        [sys.executable, "-c", BYTES], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert here == [there, there]


# Another library


@pytest.mark.parametrize("name", ["sm", "ccn", *NETWORKS])
def test_tensorrt_rtx_builds_an_engine(name: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'ccn-deploy[rtx]'")
    graph = exported(name) if name in NETWORKS else paper("mnist-cnn", name)
    try:
        engine = build_engine(
            to_bytes(gradient_graph(graph)),
            library="tensorrt-rtx",
            batch=Batches(1, 4, 8),
            candidates=Batches(1, 2, 4),
        )
    except EngineBuildError as error:
        pytest.fail(str(error))
    assert len(engine.plan) > 50_000
