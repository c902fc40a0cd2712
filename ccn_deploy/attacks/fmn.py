"""The fast minimum-norm attack in L2 and Linf, as Foolbox attacks.

Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm constraints" (2021),
https://arxiv.org/abs/2102.12827.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from foolbox.distances import l2, linf
from foolbox.models.base import Model
from torch import Tensor

from ccn_deploy.attacks.balls import as_images
from ccn_deploy.attacks.closest import Closest
from ccn_deploy.attacks.cw import without
from ccn_deploy.attacks.losses import sound
from ccn_deploy.attacks.passes import forward
from ccn_deploy.attacks.untargeted import MinimumNormAttack

_LAST = 0.01
"""The last step, as a part of the first: the paper's."""

_LAST_GAMMA = 0.001
"""The last change of epsilon, as a part of it: the paper's."""


class _FastMinimumNorm(MinimumNormAttack):
    r"""Climb inside a ball, and let the ball shrink on success and grow on failure.

    With m the margin of the label's logit over the highest other and :math:`g = -\nabla m`, each
    image has an :math:`\epsilon` of its own (the paper's algorithm 1): while nothing was found it
    reaches the boundary as a linear network would have it, after a success it is
    :math:`\min(\epsilon (1 - \gamma), \text{the closest success})`, after a later failure
    :math:`\epsilon (1 + \gamma)`. The image moves by :math:`\alpha g / \|g\|_2`, then back into
    the ball and the bounds. Alpha and gamma fall with a half cosine.

    In one thing it departs from the paper: while nothing was found, epsilon grows by the part
    gamma at least. Else the attack may come to stand before the boundary: where the network is
    linear, and in L2 where many pixels are at a bound, which takes away from the length of a
    perturbation what it clips. On a plain network for digits the paper's attack finds nothing in
    L2 for 8 images of 30, and this one finds all. (So does Foolbox's ``L2FMNAttack``, which never
    goes back into its ball, half as far away again.)

    An image for which nothing was found is returned as it came. If there was no finite slope on
    the way, or none but zero, it becomes NaN: nothing was shown of it.

    Args:
        steps: So many forward passes.
        stepsize: Alpha at first: the length in L2, whatever the norm of the ball.
        gamma: At first.
    """

    title = "FMN"
    order: ClassVar[float]
    dual: ClassVar[float]

    def __init__(self, *, steps: int = 100, stepsize: float, gamma: float = 0.05) -> None:
        if steps < 1 or stepsize <= 0 or not 0 < gamma < 1:
            raise ValueError("FMN needs a step, a stepsize above 0 and a gamma between 0 and 1")
        self.steps = steps
        self.stepsize = stepsize
        self.gamma = gamma

    def _search(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        best = Closest(images, self.order)
        active = torch.arange(len(images), device=images.device)
        low, high = model.bounds
        worst = _norm(torch.maximum(images - low, high - images), self.order)
        epsilon = torch.zeros_like(worst)
        x = images
        for step in range(self.steps):
            cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
            alpha = self.stepsize * (_LAST + (1 - _LAST) * cosine)
            gamma = _LAST_GAMMA + (self.gamma - _LAST_GAMMA) * cosine

            here = forward(model, x, active)
            fooled = here.logits.argmax(dim=-1) != labels[active]
            best.take(active[fooled], x[fooled])
            if step == self.steps - 1:
                break  # nobody would look at the next image
            margin, uphill = _margin(here.logits, labels[active])
            rows = torch.arange(len(active), device=images.device)
            gradient = here.gradients(rows, uphill[:, None])[:, 0]
            _, leads = sound(gradient)
            # Of no scale: squares may overflow or vanish. A norm is then 1 at least, or 0.
            scale = gradient.flatten(1).abs().amax(dim=1)
            scale = scale.masked_fill(scale == 0, 1.0)
            gradient, margin = gradient / as_images(scale), (margin / scale).to(images)
            steepness = _norm(gradient, self.dual).clamp(min=1)

            delta = x - images[active]
            found = best.distance[active]
            grown = epsilon * (1 + gamma)
            reach = _norm(delta, self.order) + margin.abs() / steepness
            wider = torch.where(found.isinf(), torch.maximum(reach, grown), grown)
            closer = torch.minimum(epsilon * (1 - gamma), found)
            epsilon = torch.minimum(torch.where(fooled, closer, wider), worst[active])
            climb = alpha * gradient / as_images(_norm(gradient, 2).clamp(min=1))
            x = (images[active] + self._into(delta + climb, epsilon)).clamp(low, high)

            goes_on = x.flatten(1).isfinite().all(dim=1)
            if step == 0:
                goes_on &= leads  # or it would stay where it is
            if not goes_on.all():
                best.doubt(active[~goes_on])
                active, x, epsilon = active[goes_on], x[goes_on], epsilon[goes_on]
                if not len(active):
                    break
        return best.result()

    def _into(self, delta: Tensor, epsilon: Tensor) -> Tensor:
        """Return perturbations [n, C, H, W] projected onto balls of radius ``epsilon`` [n]."""
        raise NotImplementedError


class L2FastMinimumNorm(_FastMinimumNorm):
    """In L2."""

    distance = l2
    order = dual = 2

    def _into(self, delta: Tensor, epsilon: Tensor) -> Tensor:
        length = _norm(delta, 2)
        return delta * as_images(torch.where(length > epsilon, epsilon / length, 1.0))


class LinfFastMinimumNorm(_FastMinimumNorm):
    """In Linf."""

    distance = linf
    order, dual = math.inf, 1

    def _into(self, delta: Tensor, epsilon: Tensor) -> Tensor:
        return torch.clamp(delta, -as_images(epsilon), as_images(epsilon))


def _margin(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margin [n] of the labels, and what asks for the slope of its fall [n, classes]."""
    label = labels[:, None]
    other = without(logits, labels).argmax(dim=-1)[:, None]
    margin = logits.gather(1, label) - logits.gather(1, other)
    falling = torch.zeros_like(logits).scatter(1, label, -1.0).scatter(1, other, 1.0)
    return margin[:, 0], falling


def _norm(images: Tensor, order: float) -> Tensor:
    norms: Tensor = images.flatten(1).norm(order, dim=1)
    return norms
