"""Networks of which an image's answer is the same bit for bit in every batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from foolbox.models.pytorch import PyTorchModel
from torch import Tensor, nn


class Rowwise(nn.Module):
    """A small smooth network in float64 that takes image by image, and notes what it is shown."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        seed: int = 0,
        classes: int = 5,
        answer: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        pixels = shape[0] * shape[1] * shape[2]
        inner = torch.randn(24, pixels, generator=generator) * (16 / pixels) ** 0.5
        outer = torch.randn(classes, 24, generator=generator)
        self.inner, self.outer = (
            nn.Parameter(w.double(), requires_grad=False) for w in (inner, outer)
        )
        self.answer = answer
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return torch.stack([self.one(image) for image in x])

    def one(self, image: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner @ (image.double().flatten() - 0.5))
        return self.answer(self.outer @ hidden)


def model_of(network: nn.Module) -> PyTorchModel:
    return PyTorchModel(network.eval(), bounds=(0, 1), device=torch.device("cpu"))


def images_of(network: nn.Module, shape: tuple[int, int, int], n: int) -> tuple[Tensor, Tensor]:
    """Return random images well inside [0, 1] and the labels that the network gives them."""
    generator = torch.Generator().manual_seed(7)
    images = 0.3 + 0.4 * torch.rand(n, *shape, generator=generator)
    return images, network(images).argmax(dim=1)
