"""Networks that are trained to hold: on noise, and on PGD's images (Madry et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy.architectures import architecture_named
from ccn_deploy.bundle import Bundle, ModelCard, Source
from ccn_deploy.data import Dataset
from ccn_deploy.exporters import export_bundle
from ccn_deploy.models import build_model
from ccn_deploy.runs import TrainedRun
from ccn_deploy.storage import sha256

EPSILON = 0.2
NOISE = 0.3
STEPS = 4
Harden = Callable[[nn.Module, Tensor, Tensor], Tensor]


def noise(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the images with Gaussian noise."""
    return (x + NOISE * torch.randn_like(x)).clamp(0, 1)


def pgd(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return images after a few long steps up the loss."""
    found = (x + torch.empty_like(x).uniform_(-EPSILON, EPSILON)).clamp(0, 1)
    for _ in range(STEPS):
        found.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(network(found), y), found)
        moved = found.detach() + EPSILON / 2.5 * slope.sign()
        found = (x + (moved - x).clamp(-EPSILON, EPSILON)).clamp(0, 1)
    return found


EPOCHS: dict[Harden, int] = {noise: 5, pgd: 8}


def hardened(harden: Harden, data: Dataset, output: Path) -> Bundle:
    """Train the paper's MNIST network, plain, on changed images, and export it.

    Args:
        harden: What changes a batch: :func:`noise` or :func:`pgd`.
        data: Training images.
        output: Directory of the bundle.
    """
    torch.manual_seed(0)
    order = data.order()
    images, labels = torch.from_numpy(data.images(order)), torch.from_numpy(data.labels[order])
    network = build_model("mnist-cnn", "sm", classes=10).train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(EPOCHS[harden]):
        for rows in torch.randperm(len(images)).split(128):
            x, y = images[rows], labels[rows].long()
            changed = harden(network, x, y)
            optimizer.zero_grad()
            F.cross_entropy(network(changed), y).backward()
            optimizer.step()
    weights = save(network.state_dict())
    card = ModelCard(
        name=f"mnist-cnn-{harden.__name__}",
        input_shape=architecture_named("mnist-cnn").input_shape,
        class_names=data.class_names,
        architecture="mnist-cnn",
        defense="sm",
        training={"dataset": data.name, "seed": 0},
        source=Source(kind="run", sha256=sha256(weights)),
    )
    return export_bundle(TrainedRun(output, card, weights), output)
