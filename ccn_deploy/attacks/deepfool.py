"""DeepFool in L2, as a Foolbox attack.

Moosavi-Dezfooli et al., "DeepFool: a simple and accurate method to fool deep neural networks";
used by the paper in section 5.1 (equations 8 and 9).
"""

from __future__ import annotations

import math

import torch
from foolbox.distances import l2
from foolbox.models.base import Model
from torch import Tensor

from ccn_deploy.attacks.passes import Pass, forward
from ccn_deploy.attacks.untargeted import MinimumNormAttack

_STABILITY = 1e-4
"""Added to a step's length, a distance between images, so that one on the boundary moves."""


class L2DeepFool(MinimumNormAttack):
    r"""Step to the nearest linearised decision boundary until the label changes.

    With :math:`f_k` the logits, :math:`k_0` the label at the start and
    :math:`g_k = \nabla (f_k - f_{k_0})(x_i)`, a step adds

    .. math:: r_i = \left(d_l + 10^{-4}\right) g_l / \|g_l\|, \qquad
              d_k = |f_k - f_{k_0}| / \|g_k\|, \qquad l = \arg\min_k d_k

    over the ``candidates`` highest logits at the start, and
    :math:`x_{i+1} = x_0 + (1 + \text{overshoot}) \sum_j r_j`.

    It takes the steps that Foolbox's ``L2DeepFoolAttack(loss="logits")`` takes, with less work:
    one forward pass a step serves all candidates, no gradients of weights are computed when they
    are frozen, and a sample leaves the batch as soon as it is adversarial. A sample at which there
    is no finite gradient becomes NaN: nothing was shown of it. Where the attack failed, its last
    iterate is returned.

    Args:
        steps: At most so many steps.
        candidates: How many of the classes with the highest logits to consider, with the label.
        overshoot: By which part of the perturbation to go beyond the boundary.
        slack: Skip, at a step, candidates whose boundary is more than so many times as far as the
            nearest, both measured by the norms that the gradients had when they were last
            computed; at the first step none is skipped, and with infinity never. It is 1 or more.
            What is skipped could win only if the norms changed by more than this in one step.
        clip: Whether to clip every iterate to the model's bounds.
    """

    title = "DeepFool"
    distance = l2

    def __init__(
        self,
        *,
        steps: int = 50,
        candidates: int = 10,
        overshoot: float = 0.02,
        slack: float = math.inf,
        clip: bool = True,
    ) -> None:
        if candidates < 2:
            raise ValueError(f"DeepFool needs at least 2 candidates, got {candidates}")
        if not slack >= 1:
            raise ValueError(f"a slack below 1 skips the nearest candidate, got {slack}")
        self.steps = steps
        self.candidates = candidates
        self.overshoot = overshoot
        self.slack = slack
        self.clip = clip

    def _search(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        result = images.clone()
        total = torch.zeros_like(images)
        active = torch.arange(len(images), device=images.device)
        here = forward(model, images)
        ranked = here.logits.argsort(dim=-1).flip(dims=(-1,))[:, : self.candidates]
        pruned = _Pruned(self.slack, images.new_full((len(images), ranked.shape[1] - 1), torch.inf))
        for step in range(self.steps):
            if not len(active):
                break
            if step:
                here = forward(model, result[active], active)
            # Only now: what is done needs no gradient.
            rows = (here.logits.argmax(dim=-1) == labels[active]).nonzero()[:, 0]
            if not len(rows):
                break
            active = active[rows]
            classes = ranked[active]
            picked = here.logits[rows].gather(1, classes)
            losses = picked[:, 1:] - picked[:, :1]
            cotangents = _cotangents(classes, here.logits.shape[1])
            if math.isinf(self.slack):
                total[active] += _step(losses, here.gradients(rows, cotangents))
            else:
                total[active] += pruned.step(losses, cotangents, here, rows, active)
            moved = images[active] + (1.0 + self.overshoot) * total[active]
            result[active] = moved.clamp(*model.bounds) if self.clip else moved
            active = active[moved.flatten(1).isfinite().all(dim=1)]
        return result


class _Pruned:
    """Steps for which hopeless candidates are not asked.

    Args:
        slack: See :class:`L2DeepFool`.
        norms: [N, K], infinite; becomes the norm that each candidate's gradient last had.
    """

    def __init__(self, slack: float, norms: Tensor) -> None:
        self.slack = slack
        self.norms = norms

    def step(
        self, losses: Tensor, cotangents: Tensor, here: Pass, rows: Tensor, active: Tensor
    ) -> Tensor:
        """Return the step [n, C, H, W] to the nearest boundary among the hopeful candidates.

        Args:
            losses: ``f_k - f_k0`` [n, K].
            cotangents: What asks for their gradients [n, K, classes].
            here: The pass of this step.
            rows: Places in the pass, int64 [n].
            active: Places in the batch, int64 [n].
        """
        far = _distances(losses, self.norms[active])  # zero where nothing is known yet
        hopeful = far <= self.slack * far.min(dim=1, keepdim=True).values
        step: Tensor | None = None
        counts = hopeful.sum(dim=1)
        for count in sorted(set(counts.tolist())):  # those that ask for as many go together
            group = (counts == count).nonzero()[:, 0]
            chosen = hopeful[group].nonzero()[:, 1].view(-1, count)
            asked = cotangents[group[:, None], chosen]
            gradients = here.gradients(rows[group], asked)
            self.norms[active[group, None], chosen] = _norms(gradients)
            if step is None:
                step = gradients.new_empty((len(rows), *gradients.shape[2:]))
            step[group] = _step(losses[group[:, None], chosen], gradients)
        assert step is not None  # there is a row, and its nearest candidate is hopeful
        return step


def _cotangents(classes: Tensor, count: int) -> Tensor:
    """Return what asks for the gradients of ``f_k - f_k0``: [N, K-1, count] for classes [N, K]."""
    chosen = torch.nn.functional.one_hot(classes, count).float()
    return chosen[:, 1:] - chosen[:, :1]


def _step(losses: Tensor, gradients: Tensor) -> Tensor:
    """Return the step [N, C, H, W] to the nearest of the linearised boundaries.

    Args:
        losses: ``f_k - f_k0`` [N, K].
        gradients: Theirs [N, K, C, H, W].
    """
    norms = _norms(gradients)
    distances, nearest = _distances(losses, norms).min(dim=1)
    rows = torch.arange(len(nearest), device=nearest.device)
    scale = (distances + _STABILITY) / norms[rows, nearest]
    step: Tensor = scale.view(-1, 1, 1, 1) * gradients[rows, nearest]
    return step


def _norms(gradients: Tensor) -> Tensor:
    """Return the norms [N, K] of gradients [N, K, C, H, W].

    Squares are of parts of the largest entry: of the gradients themselves they would overflow or
    vanish in float32 where logits are scaled by 1e25 or 1e-25.
    """
    flat = gradients.flatten(2)
    largest = flat.abs().amax(dim=-1)
    parts = flat / largest.clamp_min(torch.finfo(flat.dtype).tiny)[..., None]
    norms: Tensor = largest * parts.norm(dim=-1)
    return norms


def _distances(losses: Tensor, norms: Tensor) -> Tensor:
    """Return how far linearised boundaries are [N, K]: infinitely, where there is no slope."""
    return torch.where(norms == 0, torch.inf, losses.abs() / norms)
