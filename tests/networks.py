"""Networks with random weights, alphas and biases, as runs and bundles, without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from ccn_deploy.bundle import Source
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.layers import CompactConv2d, CompactLinear
from ccn_deploy.models import Classifier, build_model
from ccn_deploy.records import encode
from ccn_deploy.runs import RUN, WEIGHTS, Finished, RunRecord, TrainedRun
from ccn_deploy.storage import sha256
from tests.cards import a_card

DEFENSES = ("sm", "brelu", "l2sm", "ccn", "bn", "lrn")
"""Every kind of network; label smoothing is training's alone, so ls is sm and ccn+ls is ccn."""


def random_network(
    architecture: str,
    defense: str,
    *,
    compact: tuple[str, ...] | None = None,
    classes: int = 10,
) -> Classifier:
    model = build_model(architecture, defense, compact=compact, classes=classes, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.copy_(1 + torch.rand((), generator=generator))
            if name.endswith("bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        for layer in model.children():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5, generator=generator)
                layer.running_mean.normal_(0, 0.5, generator=generator)
                layer.running_var.uniform_(0.2, 2.0, generator=generator)
    return model.eval().requires_grad_(False)


def random_graph(
    architecture: str, defense: str, dtype: torch.dtype = torch.float64
) -> GraphModule:
    """Return the forward graph of :func:`random_network`."""
    return GraphModule(Graph(lower(random_network(architecture, defense))), dtype)


def as_lowered(model: Classifier) -> Classifier:
    """Return the network with the constants of its graph: alpha folded, all rounded to float32.

    It is float64, changed in place.
    """
    with torch.no_grad():
        for layer in model.children():
            if isinstance(layer, CompactConv2d | CompactLinear):
                layer.weight.mul_(layer.alpha)
                layer.alpha.fill_(1.0)
                layer.delta = float(np.float32(layer.delta))
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.eps = float(np.float32(layer.eps))
            if isinstance(layer, nn.LocalResponseNorm):
                layer.alpha = float(np.float32(layer.alpha))
    return model.double()


def as_run(model: Classifier, path: Path = Path("nowhere")) -> TrainedRun:
    weights = save(model.state_dict())
    card = a_card(
        input_shape=model.architecture.input_shape,
        class_names=tuple(str(label) for label in range(model.classes)),
        architecture=model.architecture.name,
        defense=model.defense.name,
        training={"dataset": "none", "seed": 3},
        source=Source(kind="run", sha256=sha256(weights)),
    )
    return TrainedRun(path, card, weights)


def write_run(run: TrainedRun, *, finished: bool = True) -> Path:
    record = RunRecord(
        schema="ccn-deploy/run/1",
        architecture=run.card.architecture,
        defense=run.card.defense,
        class_names=run.card.class_names,
        training=run.card.training,
        finished=Finished(sha256(run.weights), 1, 1, 0.5, 0.5) if finished else None,
    )
    run.path.mkdir(parents=True)
    (run.path / RUN).write_bytes(encode(record))
    (run.path / WEIGHTS).write_bytes(run.weights)
    return run.path


def difficult_images(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Zeros, ones, the mean (every patch all-zero inside), the mean and a breath, and noise."""
    noise = np.random.default_rng(5).random((2, *shape), dtype=np.float32)
    constant = [np.full(shape, value, dtype=np.float32) for value in (0.0, 1.0, 0.5)]
    return np.stack([*constant, 0.5 + np.float32(1e-4) * noise[0], noise[1]])
