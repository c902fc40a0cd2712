"""The fast gradient sign method in Linf, as a Foolbox attack.

Goodfellow et al., "Explaining and harnessing adversarial examples" (2015); equation 7 of the paper.
"""

from __future__ import annotations

import torch
from foolbox.distances import linf
from foolbox.models.base import Model
from torch import Tensor

from ccn_deploy.attacks.losses import sound
from ccn_deploy.attacks.passes import forward
from ccn_deploy.attacks.untargeted import BoundedAttack


class LinfFGSM(BoundedAttack):
    r"""Take one step of size epsilon up the cross-entropy.

    .. math:: x' = \mathrm{clip}\left(x + \epsilon\,\mathrm{sign}\,\nabla_x L(f(x), y)\right)

    It takes the step of Foolbox's ``LinfFastGradientAttack``, and asks for no gradient but the
    input's. Where the network is so sure that float32 has lost its doubt, Foolbox's step is one of
    rounding and this one is not. An image whose gradient is not finite, or zero everywhere,
    becomes NaN: nothing was shown of it.
    """

    title = "FGSM here"
    distance = linf

    def _search(self, model: Model, origin: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        everything = torch.arange(len(origin), device=origin.device)
        gradients = forward(model, origin, labels=labels).loss_gradient(everything, labels)
        moved = (origin + epsilon * gradients.sign()).clamp(*model.bounds)
        _, leads = sound(gradients)
        moved[~leads] = torch.nan
        return moved
