"""Carlini and Wagner's attack in L2, as a Foolbox attack.

Carlini and Wagner, "Towards evaluating the robustness of neural networks" (2017), as the paper
uses it in section 7 (equations 11 and 12, tables 11 and 12).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from foolbox.attacks.base import MinimizationAttack, get_criterion, raise_if_kwargs
from foolbox.criteria import Misclassification, TargetedMisclassification
from foolbox.distances import l2
from foolbox.models.base import Model
from torch import Tensor

from ccn_deploy.attacks.closest import Closest
from ccn_deploy.attacks.passes import Pass, forward, tensor_of

_INSIDE = 0.999999
"""Pixels are drawn in by this factor before the inverse of tanh, infinite at the bounds."""

_PROGRESS = 0.995
_WINDOWS = 40
_SHORTEST = 20
"""A sample has come to rest if its best loss in a fortieth of the steps, of 20 at least, is above
this part of its best loss before."""

_SLOWER = 0.2
"""A sample that comes to rest goes on with steps so much shorter, and leaves when it comes to rest
again. On digits that takes a fifth of the steps that are allowed, where Foolbox's attack takes two
fifths for a mean distance that is no smaller."""

_BETA = 0.9, 0.999
_EPSILON = 1e-8
"""Of Adam, as its authors give them."""


class L2CarliniWagner(MinimizationAttack):
    r"""Minimise the distance and a margin of the logits together, in the space of tanh.

    With :math:`x' = \frac12 (\tanh(w) + 1)` and Z the logits, Adam minimises over w

    .. math:: \|x' - x\|_2^2 + c\,\max(\max_{i \ne t} Z(x')_i - Z(x')_t, -\kappa)

    and a search over c, one for each sample, looks for the smallest that succeeds: ten times as
    much after a failure, the middle between the largest that failed and the smallest that did not
    after a success. The closest image that was seen to succeed in all of the search is the result.

    A sample whose loss has come to rest gets shorter steps, and leaves the round, by itself, when
    it rests again. Where the margin is won its gradient is zero, and none is asked for.

    A sample for which nothing was found is returned as it came: its label is the same, and that is
    how a failure is told. (Foolbox's own attack returns a black image, whose label may well be
    another.) If there was no finite gradient on the way it becomes NaN: nothing was shown of it.

    Args:
        steps: At most so many steps of Adam in each round.
        binary_search_steps: Rounds of the search over c.
        stepsize: Of Adam, at first.
        confidence: The paper's kappa; a success is a margin of at least this.
        follow: Whether to move towards the highest other class of every moment, as Foolbox does,
            instead of that of the start, as the paper does. Any other label is a success in both.
        initial_const: The first c.
    """

    distance = l2

    def __init__(
        self,
        *,
        steps: int = 1000,
        binary_search_steps: int = 6,
        stepsize: float = 0.1,
        confidence: float = 0.0,
        follow: bool = False,
        initial_const: float = 1.0,
    ) -> None:
        if steps < 1 or binary_search_steps < 1 or initial_const <= 0 or confidence < 0:
            raise ValueError("C&W needs a step, a round, a constant above 0 and no kappa below 0")
        self.steps = steps
        self.binary_search_steps = binary_search_steps
        self.stepsize = stepsize
        self.confidence = confidence
        self.follow = follow
        self.initial_const = initial_const

    def run(
        self,
        model: Model,
        inputs: Any,
        criterion: Any,
        *,
        early_stop: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return adversarial images; where the attack failed, the image it was given.

        Args:
            model: A Foolbox model over torch.
            inputs: Images [N, C, H, W] within the model's bounds.
            criterion: ``Misclassification``, or labels int64 [N] to leave: the target is then the
                class with the highest logit of the others at the start. Or
                ``TargetedMisclassification``.
            early_stop: Unused; the search is for the smallest perturbation.
            **kwargs: None are taken.

        Raises:
            RuntimeUnavailableError: The model gives no gradients.
        """
        raise_if_kwargs(kwargs)
        images, restore_type = tensor_of(inputs)
        criterion = get_criterion(criterion)
        if isinstance(criterion, TargetedMisclassification):
            goal = _Goal(None, criterion.target_classes.raw)
        elif isinstance(criterion, Misclassification):
            labels = criterion.labels.raw
            second = without(forward(model, images).logits, labels).argmax(dim=-1)
            goal = _Goal(labels, None if self.follow else second)
        else:
            raise ValueError(f"C&W cannot serve {criterion!r}")
        return restore_type(self._search(model, images, goal))

    def _search(self, model: Model, images: Tensor, goal: _Goal) -> Tensor:
        best = Closest(images, 2)
        consts = images.new_full((len(images),), self.initial_const)
        lower, upper = torch.zeros_like(consts), torch.full_like(consts, torch.inf)
        for _ in range(self.binary_search_steps):
            won = self._descend(model, images, goal, consts, best)
            upper, lower = torch.where(won, consts, upper), torch.where(won, lower, consts)
            consts = torch.where(upper.isinf(), 10 * consts, (lower + upper) / 2)
        return best.result()

    def _descend(
        self, model: Model, images: Tensor, goal: _Goal, consts: Tensor, best: Closest
    ) -> Tensor:
        """Run one round from the images themselves; return who succeeded at least once [N]."""
        space = _TanhSpace(model.bounds)
        start = space.enter(images)
        won = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        active = torch.arange(len(images), device=images.device)
        adam = _Adam(start, self.stepsize)
        rest = _Rest(start, every=max(_SHORTEST, math.ceil(self.steps / _WINDOWS)))
        w, origin = start.clone(), space.leave(start)
        for _ in range(self.steps):
            x = space.leave(w)
            here = forward(model, x, active)
            succeeded = goal.reached(here.logits, active, self.confidence)
            won[active] |= succeeded
            best.take(active[succeeded], x[succeeded])

            away = x - origin
            rival, wanted = goal.classes(here.logits, active)
            margin = _pick(here.logits, rival) - _pick(here.logits, wanted)
            hinge = (margin + self.confidence).clamp(min=0.0)
            loss = away.flatten(1).square().sum(dim=1) + consts[active] * hinge
            slope = 2 * away + consts[active].view(-1, 1, 1, 1) * _hinge_slope(
                here, rival, wanted, hinge
            )
            w = adam.step(w, slope * space.slope(w))
            resting = ~rest.moving(loss)
            sound = loss.isfinite() & w.flatten(1).isfinite().all(dim=1)
            best.doubt(active[~sound])
            keep = ~(resting & adam.slowed) & sound
            adam.slow(resting)
            if not keep.all():
                if not keep.any():
                    break
                active, w, origin = active[keep], w[keep], origin[keep]
                adam.keep(keep)
                rest.keep(keep)
        return won


def without(logits: Tensor, classes: Tensor) -> Tensor:
    """Return logits [N, classes] with minus infinity at one class of each sample."""
    return logits.scatter(1, classes[:, None], -torch.inf)


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def _hinge_slope(here: Pass, rival: Tensor, wanted: Tensor, hinge: Tensor) -> Tensor:
    """Return the gradient [N, C, H, W] of the hinge, asking only where it is above zero."""
    rows = (hinge > 0).nonzero()[:, 0]
    cotangents = torch.zeros_like(here.logits[rows])
    cotangents.scatter_(1, rival[rows, None], 1.0)
    cotangents.scatter_(1, wanted[rows, None], -1.0)
    if not len(rows):
        return hinge.new_zeros((len(hinge), 1, 1, 1))
    found = here.gradients(rows, cotangents[:, None])[:, 0]
    result = found.new_zeros((len(hinge), *found.shape[1:]))
    result[rows] = found
    return result


class _Goal:
    """What the attack is after, for each sample.

    Args:
        labels: To be left, int64 [N]; None if one target must be reached.
        targets: To move towards, int64 [N]; None for the highest other class at every moment.
    """

    def __init__(self, labels: Tensor | None, targets: Tensor | None) -> None:
        self._labels = labels
        self._targets = targets

    def classes(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two classes [n] whose margin is to shrink: the rival and the wanted one."""
        if self._targets is not None:
            wanted = self._targets[rows]
            return without(logits, wanted).argmax(dim=-1), wanted
        assert self._labels is not None
        rival = self._labels[rows]
        return rival, without(logits, rival).argmax(dim=-1)

    def reached(self, logits: Tensor, rows: Tensor, confidence: float) -> Tensor:
        """Return who is there by at least ``confidence``, bool [n]; a tie counts as not."""
        sign, classes = 1, self._labels
        if classes is None:
            sign, classes = -1, self._targets
        assert classes is not None
        classes = classes[rows]
        ahead = sign * (without(logits, classes).amax(dim=-1) - _pick(logits, classes))
        return (ahead > 0) & (ahead >= confidence)


class _TanhSpace:
    """Images within bounds as the whole space: ``x = middle + half * tanh(w)``."""

    def __init__(self, bounds: tuple[float, float]) -> None:
        self.middle, self.half = sum(bounds) / 2, (bounds[1] - bounds[0]) / 2

    def enter(self, x: Tensor) -> Tensor:
        """Return w."""
        return ((x - self.middle) / self.half * _INSIDE).arctanh()

    def leave(self, w: Tensor) -> Tensor:
        """Return x."""
        return self.middle + self.half * w.tanh()

    def slope(self, w: Tensor) -> Tensor:
        """Return the derivative of x with respect to w."""
        return self.half * (1 - w.tanh().square())


class _Adam:
    """Kingma and Ba's optimiser, of samples that may leave."""

    def __init__(self, like: Tensor, stepsize: float) -> None:
        self.stepsize = like.new_full((len(like), 1, 1, 1), stepsize)
        self.slowed = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        self.mean, self.square, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def slow(self, rows: Tensor) -> None:
        """Shorten the steps of some samples, bool [N], from now on; once each."""
        self.stepsize[rows & ~self.slowed] *= _SLOWER
        self.slowed |= rows

    def step(self, w: Tensor, gradient: Tensor) -> Tensor:
        """Return w after one step."""
        self.count += 1
        self.mean.lerp_(gradient, 1 - _BETA[0])
        self.square.lerp_(gradient.square(), 1 - _BETA[1])
        root = (self.square / (1 - _BETA[1] ** self.count)).sqrt_().add_(_EPSILON)
        return w - self.stepsize / (1 - _BETA[0] ** self.count) * self.mean / root

    def keep(self, rows: Tensor) -> None:
        """Let the other samples go."""
        self.mean, self.square = self.mean[rows], self.square[rows]
        self.stepsize, self.slowed = self.stepsize[rows], self.slowed[rows]


class _Rest:
    """Tells which losses still fall: their best of a window against their best before."""

    def __init__(self, like: Tensor, every: int) -> None:
        self.every = every
        self.count = 0
        self.window = like.new_full((len(like),), torch.inf)
        self.before = self.window.clone()

    def moving(self, loss: Tensor) -> Tensor:
        """Return which samples are to go on, bool [N]."""
        self.count += 1
        self.window = torch.minimum(self.window, loss)
        if self.count % self.every:
            return torch.ones_like(loss, dtype=torch.bool)
        falling = (self.window <= _PROGRESS * self.before) | self.before.isinf()
        self.before = torch.minimum(self.before, self.window)
        self.window = torch.full_like(loss, torch.inf)
        return falling

    def keep(self, rows: Tensor) -> None:
        """Let the other samples go."""
        self.window, self.before = self.window[rows], self.before[rows]
