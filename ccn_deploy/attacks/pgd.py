"""Projected gradient descent in Linf and L2, as Foolbox attacks.

Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018),
https://arxiv.org/abs/1706.06083.
"""

from __future__ import annotations

from typing import Any

import torch
from foolbox.distances import l2, linf
from foolbox.models.base import Model
from numpy.typing import NDArray
from torch import Tensor

from ccn_deploy.attacks.balls import Ball, L2Ball, LinfBall, generators_of, stacked
from ccn_deploy.attacks.losses import CROSS_ENTROPY, Loss, ranked_targets, sound
from ccn_deploy.attacks.passes import forward
from ccn_deploy.attacks.untargeted import BoundedAttack

_SHORTEST = 0.01
"""What a decaying step comes down to, relative to epsilon."""


class PGD(BoundedAttack):
    r"""Climb a loss inside a ball of radius epsilon around the image.

    .. math:: x_{t+1} = \Pi_\epsilon \left( x_t + s_t\,\epsilon\,
              d(\nabla_x L(f(x_t), y)) \right)

    with d the sign in Linf and the division by the norm in L2. With a constant step it takes the
    steps that Foolbox's ``LinfProjectedGradientDescentAttack`` and
    ``L2ProjectedGradientDescentAttack`` take from the same start, and differs in two ways. An
    image leaves the batch as soon as it is misclassified: less work, and no image is lost again by
    a later step. And a random start belongs to the image, not to the batch or to a global state,
    so that two runtimes are attacked from the same starts and an interrupted evaluation goes on as
    if it had not been. An image at which there is no finite gradient becomes NaN, and so does one
    whose gradient was zero everywhere whenever it was asked for: nothing was shown of it. Where the
    attack failed, its last iterate is returned.

    Args:
        steps: At most so many steps from each start; with targets, from all of them together.
        rel_stepsize: Length s of a step, relative to epsilon.
        decay: Whether step t of T is s (1 - t/T) + 0.01 long instead: long ones to get anywhere,
            short ones to stay there.
        random_start: Whether to start at a uniform point of the ball instead of the image.
        restarts: How often to start, for images that still hold.
        targets: Move towards each of so many classes in turn, those with the highest logits at
            the image but for the label; 0 for wherever the loss leads.
        loss: What to climb.
        seeds: One sequence of integers per image; the image's place in the batch if None.
    """

    title = "PGD here"
    ball: Ball

    def __init__(
        self,
        *,
        steps: int = 40,
        rel_stepsize: float = 1 / 30,
        decay: bool = False,
        random_start: bool = True,
        restarts: int = 1,
        targets: int = 0,
        loss: Loss = CROSS_ENTROPY,
        seeds: NDArray[Any] | None = None,
    ) -> None:
        self.steps = steps
        self.rel_stepsize = rel_stepsize
        self.decay = decay
        self.random_start = random_start
        self.restarts = restarts
        self.targets = targets
        self.loss = loss
        self.seeds = seeds

    def _search(self, model: Model, origin: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        generators = generators_of(self.seeds, len(origin))
        result = origin.clone()
        active = torch.arange(len(origin), device=origin.device)
        led = torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        aims: list[Tensor | None] = [None]
        if self.targets:
            logits = forward(model, origin).logits
            active = (logits.argmax(dim=-1) == labels).nonzero()[:, 0]
            aims = list(ranked_targets(logits, labels, self.targets).unbind(dim=1))
        starts = [aim for aim in aims for _ in range(self.restarts)]
        steps = max(1, self.steps // len(aims)) if self.targets else self.steps
        for at, aim in enumerate(starts):
            result[active] = origin[active]
            if self.random_start:
                shape = tuple(origin.shape[1:])
                noise = [self.ball.inside(generators[i], shape) for i in active.tolist()]
                moved = origin[active] + epsilon * stacked(noise, origin)
                result[active] = moved.clamp(*model.bounds)
            for step in range(steps):
                if not len(active):
                    return result
                announced = labels[active] if self.loss.climbs_cross_entropy else None
                here = forward(model, result[active], active, labels=announced)
                rows = (here.logits.argmax(dim=-1) == labels[active]).nonzero()[:, 0]
                active = active[rows]
                if not len(active):
                    return result
                towards = None if aim is None else aim[active]
                gradients = self.loss.slope(here, rows, labels[active], towards)
                finite, leads = sound(gradients)
                led[active] |= leads
                length = self._length(step, steps) * epsilon
                moved = result[active] + length * self.ball.direction(gradients)
                moved = self.ball.project(origin[active], moved, epsilon)
                result[active] = moved.clamp(*model.bounds)
                result[active[~finite]] = torch.nan
                active = active[finite]
            if at + 1 < len(starts):  # before the next start takes their place
                logits = forward(model, result[active], active).logits
                active = active[logits.argmax(dim=-1) == labels[active]]
        if steps:
            result[active[~led[active]]] = torch.nan
        return result

    def _length(self, step: int, steps: int) -> float:
        """Return the length of a step, counted from 0, relative to epsilon."""
        if self.decay:
            return self.rel_stepsize * (1 - step / steps) + _SHORTEST
        return self.rel_stepsize


class LinfPGD(PGD):
    """Inside a box, by the sign of the gradient."""

    distance = linf
    ball = LinfBall()


class L2PGD(PGD):
    """Inside a ball, by the gradient divided by its norm."""

    distance = l2
    ball = L2Ball()
