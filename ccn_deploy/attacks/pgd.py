"""Projected gradient descent in Linf, as a Foolbox attack.

Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from foolbox.attacks.base import FixedEpsilonAttack, raise_if_kwargs
from foolbox.distances import linf
from foolbox.models.base import Model
from numpy.typing import NDArray
from torch import Tensor

from ccn_deploy.attacks.passes import forward, labels_of, tensor_of

_SHORTEST = 0.01
"""What a decaying step comes down to, relative to epsilon."""


class LinfPGD(FixedEpsilonAttack):
    r"""Climb the cross-entropy inside a box of half-width epsilon around the image.

    .. math:: x_{i+1} = \Pi_\epsilon \left( x_i + s\,\epsilon\,
              \mathrm{sign}\, \nabla_x L(f(x_i), y) \right)

    It takes the steps that Foolbox's ``LinfProjectedGradientDescentAttack`` takes from the same
    start, and differs in two ways. An image leaves the batch as soon as it is misclassified:
    less work, and no image is lost again by a later step. And a random start belongs to the
    image, not to the batch or to a global state, so that two runtimes are attacked from the same
    starts and an interrupted evaluation goes on as if it had not been. An image at which there is
    no finite gradient becomes NaN: nothing was shown of it.

    Args:
        steps: At most so many steps.
        rel_stepsize: Length s of a step, relative to epsilon.
        decay: Whether step t of T is s (1 - t/T) + 0.01 long instead: long ones to get anywhere,
            short ones to stay there.
        random_start: Whether to start at a uniform point of the box instead of the image.
        restarts: How often to start, for images that still hold.
        seeds: One sequence of integers per image; the image's place in the batch if None.
    """

    distance = linf

    def __init__(
        self,
        *,
        steps: int = 40,
        rel_stepsize: float = 1 / 30,
        decay: bool = False,
        random_start: bool = True,
        restarts: int = 1,
        seeds: NDArray[np.int64] | None = None,
    ) -> None:
        self.steps = steps
        self.rel_stepsize = rel_stepsize
        self.decay = decay
        self.random_start = random_start
        self.restarts = restarts
        self.seeds = seeds

    def run(
        self, model: Model, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any
    ) -> Any:
        """Return attacked images; where the attack failed, its last iterate.

        Args:
            model: A Foolbox model over torch.
            inputs: Images [N, C, H, W] within the model's bounds.
            criterion: ``Misclassification``, or labels int64 [N].
            epsilon: Half-width of the box.
            **kwargs: None are taken.
        """
        raise_if_kwargs(kwargs)
        labels = labels_of(criterion, "PGD here")
        images, restore_type = tensor_of(inputs)
        return restore_type(self._with_logits(model, images, labels, epsilon))

    def _with_logits(self, model: Model, origin: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        seeds = np.arange(len(origin)) if self.seeds is None else self.seeds
        generators = [np.random.default_rng(seed) for seed in seeds]
        result = origin.clone()
        active = torch.arange(len(origin), device=origin.device)
        for _ in range(self.restarts):
            result[active] = origin[active]
            if self.random_start:
                noise = _noise([generators[at] for at in active.tolist()], origin, epsilon)
                result[active] = (origin[active] + noise).clamp(*model.bounds)
            for step in range(self.steps):
                here = forward(model, result[active], active, labels=labels[active])
                holding = (here.logits.argmax(dim=-1) == labels[active]).nonzero()[:, 0]
                if not len(holding):
                    return result
                active = active[holding]
                direction = here.loss_gradient(holding, labels[active]).sign()
                moved = result[active] + self._length(step) * epsilon * direction
                moved = origin[active] + (moved - origin[active]).clamp(-epsilon, epsilon)
                result[active] = moved.clamp(*model.bounds)
                active = active[moved.flatten(1).isfinite().all(dim=1)]
            if self.restarts > 1:  # before a restart takes their place
                logits = forward(model, result[active], active).logits
                active = active[logits.argmax(dim=-1) == labels[active]]
        return result

    def _length(self, step: int) -> float:
        """Return the length of a step, counted from 0, relative to epsilon."""
        if self.decay:
            return self.rel_stepsize * (1 - step / self.steps) + _SHORTEST
        return self.rel_stepsize


def _noise(generators: list[np.random.Generator], like: Tensor, epsilon: float) -> Tensor:
    """Return uniform noise in [-epsilon, epsilon], one image from each generator."""
    shape = like.shape[1:]
    if not generators:
        return like.new_empty((0, *shape))
    noise = np.stack([g.uniform(-epsilon, epsilon, shape) for g in generators])
    return torch.from_numpy(noise).to(like)
