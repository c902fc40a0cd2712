"""Auto-PGD in Linf and L2, as Foolbox attacks.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks" (2020), section 3 and algorithm 1, https://arxiv.org/abs/2003.01690.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
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

_FIRST_STEP = 2.0
"""Length of a step before it is ever halved, relative to epsilon."""

_MOMENTUM = 0.75
_RISING = 0.75
"""The paper's alpha and rho: the weight of a new step against the one before, and the share of
steps between two checkpoints that must have raised the loss for the step to stay as long."""

_WINDOW, _SHORTER, _SHORTEST = 0.22, 0.03, 0.06
"""Steps to the first checkpoint, by how much fewer they become, and the fewest; of all steps."""

_NEAR = 0.1
_LONG = 100
"""An image is pursued if its loss came so close to zero, where a margin changes sign; by starts of
so many steps, the paper's number. For three digits so near, of 16 starts towards the nearest
class 0, 0 and 1 got there in 50 steps, and 2, 4 and 10 in 100."""


class APGD(BoundedAttack):
    """Climb a loss by steps that are halved, from the best point so far, where they do not help.

    The iterates are those of the authors' program from the same start. An image leaves the batch
    as soon as it is misclassified. Random starts lie on the surface of the ball and belong to the
    image. An image at which there is no finite gradient becomes NaN, and so does one whose
    gradient was zero everywhere whenever it was asked for: nothing was shown of it. Where the
    attack failed, the highest point of its last start is returned.

    Args:
        steps: At most so many steps from each start.
        restarts: How often to start, for images that still hold; with targets, for each of them.
        targets: Move towards each of so many classes in turn, those with the highest logits at
            the image but for the label; 0 for wherever the loss leads.
        pursuits: How often to start once more, with 100 steps and towards the class that was
            nearest, for images that almost fell. With targets and a loss that is a margin.
        loss: What to climb.
        seeds: One sequence of integers per image; the image's place in the batch if None.
    """

    title = "APGD"
    ball: Ball

    def __init__(
        self,
        *,
        steps: int = 100,
        restarts: int = 1,
        targets: int = 0,
        pursuits: int = 0,
        loss: Loss = CROSS_ENTROPY,
        seeds: NDArray[Any] | None = None,
    ) -> None:
        self.steps = steps
        self.restarts = restarts
        self.targets = targets
        self.pursuits = pursuits
        self.loss = loss
        self.seeds = seeds

    def _search(self, model: Model, origin: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        result = origin.clone()
        active = torch.arange(len(origin), device=origin.device)
        aims: list[Tensor | None] = [None]
        if self.targets:
            logits = forward(model, origin).logits
            active = (logits.argmax(dim=-1) == labels).nonzero()[:, 0]
            aims = list(ranked_targets(logits, labels, self.targets).unbind(dim=1))
        led = torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        climb = _Climb(model, self.ball, self.loss, epsilon, origin, labels, result, led)
        generators = generators_of(self.seeds, len(origin))
        highest = torch.full(labels.shape, -torch.inf, dtype=torch.float64, device=origin.device)
        nearest = labels.clone()

        def start(places: Tensor) -> Tensor:
            shape = tuple(origin.shape[1:])
            noise = [self.ball.outermost(generators[i], shape) for i in places.tolist()]
            moved = origin[places] + epsilon * stacked(noise, origin)
            return moved.clamp(*model.bounds)

        for aim in [aim for aim in aims for _ in range(self.restarts)]:
            active, value = climb.run(start(active), active, aim, self.steps)
            if aim is not None:
                nearer = active[value > highest[active]]
                nearest[nearer] = aim[nearer]
            highest[active] = torch.maximum(highest[active], value)
        for _ in range(self.pursuits):
            close = highest[active] > -_NEAR
            left, _ = climb.run(start(active[close]), active[close], nearest, _LONG)
            active = torch.cat([active[~close], left])
        result[active[~led[active]]] = torch.nan
        return result


class LinfAPGD(APGD):
    """Inside a box, by the sign of the gradient."""

    distance = linf
    ball = LinfBall()


class L2APGD(APGD):
    """Inside a ball, by the gradient divided by its norm."""

    distance = l2
    ball = L2Ball()


@dataclass
class _State:
    """Where each image [n, ...] is, and what is known about its way.

    Attributes:
        place: In the batch, int64.
        x, before: This iterate and the one before.
        gradient: At this iterate.
        best, best_gradient, best_value: The highest point so far.
        length: Of a step, relative to epsilon.
        value: The loss at the iterate that was looked at last.
        rises: How many steps raised the loss since the last checkpoint.
        best_before: The highest loss as of the last checkpoint.
        halved: Whether the step was halved there.
    """

    place: Tensor
    x: Tensor
    before: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    length: Tensor
    value: Tensor
    rises: Tensor
    best_before: Tensor
    halved: Tensor

    @classmethod
    def at(cls, start: Tensor, place: Tensor) -> _State:
        """Return that of images [n, C, H, W] about to start."""
        unknown = torch.full((len(start),), -torch.inf, dtype=torch.float64, device=start.device)
        return cls(
            place=place,
            x=start,
            before=start,
            gradient=torch.zeros_like(start),
            best=start.clone(),
            best_gradient=torch.zeros_like(start),
            best_value=unknown,
            length=start.new_full((len(start), 1, 1, 1), _FIRST_STEP),
            value=torch.zeros_like(unknown),
            rises=torch.zeros_like(place),
            best_before=unknown,
            halved=torch.ones_like(place, dtype=torch.bool),
        )

    def of(self, rows: Tensor) -> _State:
        """Return that of some images, int64 [m] in order."""
        if len(rows) == len(self.place):
            return self
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True)
class _Climb:
    """Starts of one batch.

    Attributes:
        model: A Foolbox model over torch.
        ball: To stay in.
        loss: To climb.
        epsilon: Radius of the ball.
        origin: Images [N, C, H, W].
        labels: int64 [N].
        result: Gets the images, [N, C, H, W]; NaN without a finite gradient.
        led: Gets whether a gradient was ever other than zero, bool [N].
    """

    model: Model
    ball: Ball
    loss: Loss
    epsilon: float
    origin: Tensor
    labels: Tensor
    result: Tensor
    led: Tensor

    def run(
        self, start: Tensor, place: Tensor, aim: Tensor | None, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Climb from some points.

        Args:
            start: [n, C, H, W], within ball and bounds.
            place: Whose, int64 [n].
            aim: Classes to move towards, int64 [N], or None.
            steps: At most so many.

        Returns:
            The places of images that hold, int64 [m], and their highest losses, float64 [m].
        """
        state = _State.at(start, place)
        if not len(place):
            return place, state.best_value
        windows = _windows(steps)
        window = next(windows)
        checkpoint = window
        for step in range(steps + 1):
            last = step == steps
            state = self._look(state, aim, first=step == 0, last=last)
            if last or not len(state.place):
                break
            if step == checkpoint:
                self._check(state, window)
                window = next(windows)
                checkpoint += window
            self._step(state, first=step == 0)
        self.result[state.place] = state.best
        return state.place, state.best_value

    def _look(self, state: _State, aim: Tensor | None, *, first: bool, last: bool) -> _State:
        """Take note of the iterates' losses and, but for the last, gradients; return who holds."""
        labels = self.labels[state.place]
        announced = labels if self.loss.climbs_cross_entropy and not last else None
        here = forward(self.model, state.x, state.place, labels=announced)
        holds = here.logits.argmax(dim=-1) == labels
        self.result[state.place[~holds]] = state.x[~holds]
        rows = holds.nonzero()[:, 0]
        if not len(rows):
            return state.of(rows)
        state, labels = state.of(rows), labels[rows]
        towards = None if aim is None else aim[state.place]
        value = self.loss.value(here.logits[rows], labels, towards)
        if not first:
            # The authors' program takes the loss before the first step for zero, and so it is here.
            state.rises += value > state.value
            state.value = value
        better = value > state.best_value
        state.best[better] = state.x[better]
        state.best_value = torch.where(better, value, state.best_value)
        if first:
            state.best_before = value
        if last:
            return state
        state.gradient = self.loss.slope(here, rows, labels, towards)
        state.best_gradient[better] = state.gradient[better]
        finite, leads = sound(state.gradient)
        self.led[state.place] |= leads
        self.result[state.place[~finite]] = torch.nan
        return state.of(finite.nonzero()[:, 0])

    def _check(self, state: _State, window: int) -> None:
        """Halve the steps that do not help, and go on from the best point (conditions 1 and 2)."""
        oscillates = state.rises <= _RISING * window
        rests = ~state.halved & (state.best_before >= state.best_value)
        state.halved = oscillates | rests
        state.best_before = state.best_value
        state.rises = torch.zeros_like(state.rises)
        state.length[state.halved] /= 2
        state.x[state.halved] = state.best[state.halved]
        state.gradient[state.halved] = state.best_gradient[state.halved]

    def _step(self, state: _State, *, first: bool) -> None:
        stride = state.length * self.epsilon * self.ball.direction(state.gradient)
        moved = self._within(state, state.x + stride)
        if not first:
            moved = (
                state.x + _MOMENTUM * (moved - state.x) + (1 - _MOMENTUM) * (state.x - state.before)
            )
            moved = self._within(state, moved)
        state.before, state.x = state.x, moved

    def _within(self, state: _State, points: Tensor) -> Tensor:
        drawn = self.ball.project(self.origin[state.place], points, self.epsilon)
        return drawn.clamp(*self.model.bounds)


def _windows(steps: int) -> Iterator[int]:
    """Yield the numbers of steps from one checkpoint to the next, without end."""
    window, shorter, shortest = (
        max(int(share * steps), 1) for share in (_WINDOW, _SHORTER, _SHORTEST)
    )
    while True:
        yield window
        window = max(window - shorter, shortest)
