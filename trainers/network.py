"""The network of a training: one of the package's, or what a factory of the user's own makes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ccn_deploy.data.dataset import Dataset
from ccn_deploy.errors import UsageError, first_line
from ccn_deploy.factory import load_factory, logits_of
from ccn_deploy.layers import CompactConv2d, CompactLinear, compactify
from ccn_deploy.layers.compactify import Where
from ccn_deploy.models import build_model
from ccn_deploy.trainers.batches import first_images
from ccn_deploy.trainers.config import OwnNetwork, Plan

_CHECKED = 2
"""Images that a user's network is tried on before anything is written."""


def make_network(plan: Plan) -> nn.Module:
    """Return the network of a plan with fresh weights: the same seed gives the same ones.

    Raises:
        UsageError: A factory is not there any more or raises.
    """
    classes = len(plan.class_names)
    if isinstance(plan.network, OwnNetwork):
        return _own(plan.network.factory, plan.network.compact, classes, plan.seed)[0]
    network = plan.network
    names = network.architecture.name, network.defense.name
    return build_model(*names, compact=network.compact, classes=classes, seed=plan.seed)


def own_network(
    factory: str, where: Where, label_smoothing: float, data: Dataset, seed: int
) -> OwnNetwork:
    """Make a user's network once, to see that it fits the data and what is made compact in it.

    Raises:
        UsageError: A wrong factory, a layer that is none, or a network that does not make one
            logit a class of these images.
    """
    classes = len(data.class_names)
    network, compact = _own(factory, where, classes, seed)
    images = torch.from_numpy(first_images(data, range(len(data)), _CHECKED))
    network.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        logits = logits_of(network, images)
    if logits.shape[1] != classes:
        raise UsageError(
            f"The network gives {logits.shape[1]} logits; {data.name} has {classes} classes.",
            "Let the factory take `classes` or `num_classes`, which it is then given.",
        )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UsageError(
            f"The network that {factory} makes has no parameter to train.",
            "Leave requires_grad of its parameters as it is.",
        )
    return OwnNetwork(factory, tuple(compact), data.input_shape, label_smoothing)


def _own(factory: str, where: Where, classes: int, seed: int) -> tuple[nn.Module, list[str]]:
    """Call a factory with torch seeded and make layers of its network compact."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = load_factory(factory, classes=classes)
    return network, compactify(network, where)


def scalars(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that weight decay spares: alpha and delta of compact layers."""
    found: dict[int, nn.Parameter] = {}
    for layer in network.modules():
        if isinstance(layer, CompactConv2d | CompactLinear):
            for value in (layer.alpha, layer.delta):
                if isinstance(value, nn.Parameter):
                    found[id(value)] = value
    return list(found.values())


def forward(network: nn.Module, images: Tensor) -> Tensor:
    """Return the logits in training; what a user's code raises becomes one line.

    Raises:
        UsageError: The network raises.
    """
    try:
        logits: Tensor = network(images)
    except (ValueError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"The network raises in training on {len(images)} images: {first_line(error)}",
            "Batch normalisation needs more than one value a channel: try another --batch-size."
            if len(images) == 1
            else "Try the module in training mode on such a batch.",
        ) from error
    return logits
