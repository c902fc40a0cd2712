"""The fast gradient sign method in Linf, as a Foolbox attack.

Goodfellow et al., "Explaining and harnessing adversarial examples" (2015); equation 7 of the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from foolbox.attacks.base import FixedEpsilonAttack, raise_if_kwargs
from foolbox.distances import linf
from foolbox.models.base import Model

from ccn_deploy.attacks.losses import sound
from ccn_deploy.attacks.passes import forward, labels_of, tensor_of


class LinfFGSM(FixedEpsilonAttack):
    r"""Take one step of size epsilon up the cross-entropy.

    .. math:: x' = \mathrm{clip}\left(x + \epsilon\,\mathrm{sign}\,\nabla_x L(f(x), y)\right)

    It takes the step of Foolbox's ``LinfFastGradientAttack``, and asks for no gradient but the
    input's. Where the network is so sure that float32 has lost its doubt, Foolbox's step is one of
    rounding and this one is not. An image whose gradient is not finite, or zero everywhere,
    becomes NaN: nothing was shown of it.
    """

    distance = linf

    def run(
        self, model: Model, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any
    ) -> Any:
        """Return attacked images.

        Args:
            model: A Foolbox model over torch.
            inputs: Images [N, C, H, W] within the model's bounds.
            criterion: ``Misclassification``, or labels int64 [N].
            epsilon: Size of the step.
            **kwargs: None are taken.
        """
        raise_if_kwargs(kwargs)
        labels = labels_of(criterion, "FGSM here")
        images, restore_type = tensor_of(inputs)
        everything = torch.arange(len(images), device=images.device)
        gradients = forward(model, images, labels=labels).loss_gradient(everything, labels)
        moved = (images + epsilon * gradients.sign()).clamp(*model.bounds)
        _, leads = sound(gradients)
        moved[~leads] = torch.nan
        return restore_type(moved)
