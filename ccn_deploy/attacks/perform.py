"""Running one attack on one batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from eagerpy.astensor import astensor
from eagerpy.tensor.tensor import Tensor as EagerTensor
from foolbox.attacks.base import Attack
from foolbox.attacks.fast_gradient_method import LinfFastGradientAttack
from foolbox.attacks.projected_gradient_descent import LinfProjectedGradientDescentAttack
from foolbox.models.pytorch import PyTorchModel
from numpy.typing import NDArray

from ccn_deploy.attacks.deepfool import L2DeepFool
from ccn_deploy.attacks.spec import AttackSpec

Array = NDArray[Any]


class SeededLinfPGD(LinfProjectedGradientDescentAttack):
    """Foolbox's PGD, with random starts that belong to the image and not to the batch.

    The start of an image is the same whichever other images are attacked beside it, on whichever
    runtime, and whatever the global random state is, so that two runtimes are compared from the
    same starts and an interrupted evaluation continues as if it had not been.

    Args:
        seeds: One sequence of integers per image.
        **settings: As for Foolbox's attack.
    """

    def __init__(self, seeds: NDArray[np.int64], **settings: Any) -> None:
        super().__init__(**settings)
        self.generators = [np.random.default_rng(seed) for seed in seeds]

    def get_random_start(self, x0: EagerTensor, epsilon: float) -> EagerTensor:
        """Return ``x0`` plus uniform noise in [-epsilon, epsilon]; new noise at every restart."""
        shape = x0.shape[1:]
        noise = np.stack([g.uniform(-epsilon, epsilon, shape) for g in self.generators])
        return x0 + astensor(torch.from_numpy(noise.astype(np.float32)).to(x0.raw.device))


def perform(
    spec: AttackSpec, model: PyTorchModel, images: Array, labels: Array, *, seeds: Array
) -> Array:
    """Attack a batch.

    Whether an image fools anything is not said here: score the result on what it is meant to
    fool.

    Args:
        spec: The attack.
        model: From :func:`ccn_deploy.attacks.surrogate.foolbox_model` or ``twin_model``.
        images: float32 [N, C, H, W] in [0, 1].
        labels: int64 [N]; the label to leave.
        seeds: int64 [N, m]; the random state of each image.

    Returns:
        float32 [N, C, H, W]: the attack's last word, adversarial or not.
    """
    if not len(images):
        return images.copy()
    x = torch.from_numpy(images).to(model.device)
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(model.device)
    _, found, _ = _attack(spec, seeds)(model, x, y, epsilons=spec.epsilon)
    result: Array = found.detach().cpu().numpy()
    return result


def _attack(spec: AttackSpec, seeds: Array) -> Attack:
    settings: dict[str, Any] = dict(spec.parameters)
    if spec.name == "fgsm":
        return LinfFastGradientAttack(**settings)
    if spec.name == "pgd":
        restarts = int(settings.pop("restarts"))
        attack = SeededLinfPGD(seeds, **settings)
        return attack.repeat(restarts) if restarts > 1 else attack
    if spec.name == "deepfool":
        return L2DeepFool(clip=spec.clip, **settings)
    raise ValueError(f"no implementation of attack {spec.name!r}")
