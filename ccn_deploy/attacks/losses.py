"""What gradient attacks climb: losses of the logits, with their slopes in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ccn_deploy.attacks.cw import without
from ccn_deploy.attacks.passes import Pass


class Loss(Protocol):
    """A loss that is high where an image is misclassified."""

    climbs_cross_entropy: bool
    """Whether a pass should be told the labels, as :func:`~ccn_deploy.attacks.passes.forward`
    takes them."""

    def value(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        """Return the loss of each image, float64 [n].

        Args:
            logits: [n, classes].
            labels: To be left, int64 [n].
            targets: To move towards, int64 [n]; None for the highest other class.
        """
        ...

    def slope(self, here: Pass, rows: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        """Return the input gradients [n, C, H, W] of the images at ``rows`` of a pass."""
        ...


class CrossEntropy:
    """Minus the logarithm of the label's probability."""

    climbs_cross_entropy = True

    def value(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        """Return it without cancellation: it is above zero however sure the network is."""
        z = logits.double()
        own = z.gather(1, labels[:, None])[:, 0]
        return F.softplus(without(z, labels).logsumexp(dim=1) - own)

    def slope(self, here: Pass, rows: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        """Ask the pass, which may know it already."""
        return here.loss_gradient(rows, labels)


@dataclass(frozen=True)
class Margin:
    r"""The difference of two logits, :math:`z_t - z_y`, over a spread of the highest logits.

    Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks" (2020), equations 6 and 7, https://arxiv.org/abs/2003.01690: dividing
    by a spread makes the loss blind to the scale of the logits. A network with fewer logits than
    the spread has weights keeps the difference itself: the direction of the slope is what counts.

    Attributes:
        spread: Weights of the logits from the highest down; none for the difference itself.
    """

    spread: tuple[float, ...] = ()
    climbs_cross_entropy = False

    def value(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        """Return the loss."""
        margin, _, scale, _ = self._parts(logits.double(), labels, targets)
        return margin / scale

    def slope(self, here: Pass, rows: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        """Ask for the gradient along one cotangent."""
        z = here.logits[rows].double()
        margin, along, scale, weights = self._parts(z, labels, targets)
        cotangents = along / scale[:, None] - (margin / scale.square())[:, None] * weights
        return here.gradients(rows, cotangents.to(here.logits.dtype)[:, None])[:, 0]

    def _parts(
        self, z: Tensor, labels: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return numerator [n] and denominator [n], each followed by its slope [n, classes]."""
        rivals = without(z, labels).argmax(dim=1) if targets is None else targets
        along = torch.zeros_like(z)
        along.scatter_(1, rivals[:, None], 1.0).scatter_(1, labels[:, None], -1.0)
        weights = torch.zeros_like(z)
        if len(self.spread) <= z.shape[1]:
            ranked = z.argsort(dim=1, descending=True)[:, : len(self.spread)]
            weights.scatter_(1, ranked, z.new_tensor(self.spread).expand_as(ranked))
        scale = (weights * z).sum(dim=1)
        return (along * z).sum(dim=1), along, scale.where(scale > 0, 1.0), weights


CROSS_ENTROPY = CrossEntropy()
MARGIN = Margin()
DLR = Margin((1.0, 0.0, -1.0))
TARGETED_DLR = Margin((1.0, 0.0, -0.5, -0.5))


def sound(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return which gradients [n, C, H, W] are finite, and which of those lead anywhere, bool [n].

    The sign of NaN is zero in torch, so that an attack along it would stand still and look as if
    the image had held.
    """
    flat = gradients.flatten(1)
    finite = flat.isfinite().all(dim=1)
    return finite, finite & (flat != 0).any(dim=1)


def ranked_targets(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the most likely classes but the label, int64 [n, at most ``count``]."""
    order = without(logits, labels).argsort(dim=1, descending=True)
    return order[:, : min(count, logits.shape[1] - 1)]
