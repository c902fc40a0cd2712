"""The networks of the paper (section 6, table 10), as flat stacks of named layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn

from ccn_deploy.architectures import Architecture, architecture_named
from ccn_deploy.defenses import Defense, defense_named
from ccn_deploy.layers import BoundedReLU, CompactConv2d, CompactLinear, SubtractMean


class Classifier(nn.Sequential):
    """A stack of named layers from images in [0, 1] to logits.

    ``mean``, then ``conv1``, ``act1``, ``pool1`` ..., ``flatten``, ``fc1``, ``act5`` ..., and a
    last linear layer without activation. Batch normalisation is ``norm1`` before ``act1``, local
    response normalisation ``norm1`` after it. The names are those of the weights file, of the
    tensors in the exported graph and of per-layer parity.

    Shapes: float [N, C, H, W] in [0, 1] -> float [N, classes] (logits, never softmax).
    """

    def __init__(
        self, layers: OrderedDict[str, nn.Module], architecture: Architecture, defense: Defense
    ) -> None:
        super().__init__(layers)
        self.architecture = architecture
        self.defense = defense

    def named_layers(self) -> list[tuple[str, nn.Module]]:
        """Return (name, layer) in order of execution."""
        return list(self.named_children())

    @property
    def classes(self) -> int:
        """Number of logits."""
        last = list(self.children())[-1]
        assert isinstance(last, nn.Linear)
        return last.out_features


def build_model(
    architecture: str,
    defense: str,
    *,
    compact: str | Collection[str] | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> Classifier:
    """Build a network with fresh weights.

    Weights are He-normal (linear gain for the last layer), biases 0, every alpha 1, drawn from a
    generator of its own: the same seed gives the same weights whatever ran before, whichever
    layers are compact. Batch normalisation starts as torch has it: scale 1, shift 0.

    Args:
        architecture: A name in :data:`ccn_deploy.architectures.ARCHITECTURES`.
        defense: A name in :data:`ccn_deploy.defenses.DEFENSES`.
        compact: Which layers are compact instead of those that the defense says, see
            :meth:`ccn_deploy.architectures.Architecture.choose_layers` (paper, table 13).
        classes: Number of logits; the architecture's own if not given.
        seed: Of the weights.

    Raises:
        UsageError: An unknown name; the hint suggests the nearest, or lists the layers.
    """
    plan, kind = architecture_named(architecture), defense_named(defense)
    chosen = plan.choose_layers(kind.compact if compact is None else compact)
    layers = _stack(plan, kind, chosen, classes or plan.classes)
    model = Classifier(layers, plan, kind)
    _initialise(model, torch.Generator().manual_seed(seed))
    return model


def _stack(
    plan: Architecture, defense: Defense, compact: Collection[str], classes: int
) -> OrderedDict[str, nn.Module]:
    """Lay out the layers in order; those named in ``compact`` are compact."""
    activation = nn.ReLU if defense.activation == "relu" else BoundedReLU

    layers: OrderedDict[str, nn.Module] = OrderedDict(mean=SubtractMean())
    convs = acts = pools = 0
    channels = plan.input_shape[0]
    for item in plan.features:
        if isinstance(item, str):
            pools += 1
            layers[f"pool{pools}"] = nn.MaxPool2d(2)
            continue
        convs, acts = convs + 1, acts + 1
        conv = CompactConv2d if f"conv{convs}" in compact else nn.Conv2d
        layers[f"conv{convs}"] = conv(channels, item, kernel_size=3, padding=plan.padding)
        if defense.normalization == "batch":
            layers[f"norm{acts}"] = nn.BatchNorm2d(item)
        layers[f"act{acts}"] = activation()
        if defense.normalization == "local-response":
            layers[f"norm{acts}"] = _local_response_norm()
        channels = item
    layers["flatten"] = nn.Flatten()

    features = plan.flat_features()
    for index, units in enumerate(plan.hidden, start=1):
        acts += 1
        linear = CompactLinear if f"fc{index}" in compact else nn.Linear
        layers[f"fc{index}"] = linear(features, units)
        if defense.normalization == "batch":
            layers[f"norm{acts}"] = nn.BatchNorm1d(units)
        layers[f"act{acts}"] = activation()
        if plan.dropout:
            layers[f"dropout{index}"] = nn.Dropout(plan.dropout)
        features = units
    last = (plan.bottleneck, classes) if plan.bottleneck else (classes,)
    for index, units in enumerate(last, start=len(plan.hidden) + 1):
        linear = CompactLinear if f"fc{index}" in compact else nn.Linear
        layers[f"fc{index}"] = linear(features, units)
        features = units
    return layers


def _local_response_norm() -> nn.LocalResponseNorm:
    """Return equation 10 with AlexNet's constants: k = 2, n = 5, alpha = 1e-4, beta = 0.75.

    torch divides its alpha by the number of neighbours, which the equation does not.
    """
    neighbours = 5
    return nn.LocalResponseNorm(neighbours, alpha=neighbours * 1e-4, beta=0.75, k=2.0)


def _initialise(model: Classifier, generator: torch.Generator) -> None:
    weighted = [m for m in model.children() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in weighted:
        gain: Literal["linear", "relu"] = "linear" if layer is weighted[-1] else "relu"
        nn.init.kaiming_normal_(layer.weight, nonlinearity=gain, generator=generator)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        if isinstance(layer, CompactConv2d | CompactLinear):
            nn.init.ones_(layer.alpha)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [N, K] with target distributions [N, K]."""
    return -(targets * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()
