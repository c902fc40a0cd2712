"""A network that is trained on noise: it looks robust to weak attacks, and is not."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch.nn import functional as F

from ccn_deploy.architectures import architecture_named
from ccn_deploy.bundle import Bundle, ModelCard, Source
from ccn_deploy.data import Dataset
from ccn_deploy.exporters import export_bundle
from ccn_deploy.models import build_model
from ccn_deploy.runs import TrainedRun
from ccn_deploy.storage import sha256

DEVIATION = 0.3
EPOCHS = 5


def trained_on_noise(data: Dataset, output: Path) -> Bundle:
    """Train the paper's MNIST network, plain, on images with Gaussian noise, and export it.

    Args:
        data: Training images.
        output: Directory of the bundle.
    """
    torch.manual_seed(0)
    order = data.order()
    images, labels = torch.from_numpy(data.images(order)), torch.from_numpy(data.labels[order])
    network = build_model("mnist-cnn", "sm", classes=10).train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(128):
            x, y = images[rows], labels[rows].long()
            noisy = (x + DEVIATION * torch.randn_like(x)).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(network(noisy), y).backward()
            optimizer.step()
    weights = save(network.state_dict())
    card = ModelCard(
        name="mnist-cnn-noise",
        input_shape=architecture_named("mnist-cnn").input_shape,
        class_names=data.class_names,
        architecture="mnist-cnn",
        defense="sm",
        training={"dataset": data.name, "seed": 0},
        source=Source(kind="run", sha256=sha256(weights)),
    )
    return export_bundle(TrainedRun(output, card, weights), output)
