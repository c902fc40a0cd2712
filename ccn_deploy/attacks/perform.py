"""Running one attack on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack
from foolbox.models.pytorch import PyTorchModel

from ccn_deploy.attacks.apgd import L2APGD, LinfAPGD
from ccn_deploy.attacks.cw import L2CarliniWagner
from ccn_deploy.attacks.deepfool import L2DeepFool
from ccn_deploy.attacks.fgsm import LinfFGSM
from ccn_deploy.attacks.fmn import L2FastMinimumNorm, LinfFastMinimumNorm
from ccn_deploy.attacks.hopskipjump import HopSkipJump
from ccn_deploy.attacks.losses import CROSS_ENTROPY, DLR, MARGIN, TARGETED_DLR, Loss
from ccn_deploy.attacks.passes import QueryCounter
from ccn_deploy.attacks.pgd import L2PGD, LinfPGD
from ccn_deploy.attacks.spec import AttackSpec
from ccn_deploy.attacks.square import L2SquareAttack, LinfSquareAttack
from ccn_deploy.runtimes.base import Array


def perform(
    spec: AttackSpec,
    model: PyTorchModel | QueryCounter,
    images: Array,
    labels: Array,
    *,
    seeds: Array,
) -> Array:
    """Attack a batch.

    Whether an image fools anything is not said here: score the result on what it is meant to
    fool.

    Args:
        spec: The attack.
        model: From :mod:`ccn_deploy.attacks.foolbox_model`, or one of
            those :class:`~ccn_deploy.attacks.passes.QueryCounter`.
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
    strength = {} if spec.epsilon is None else {"epsilon": spec.epsilon}
    # Not through __call__, which would ask the model once more whether it was fooled.
    found = attack_of(spec, seeds).run(model, x, y, **strength)
    result: Array = found.detach().cpu().numpy()
    return result


def craft(
    spec: AttackSpec,
    model: PyTorchModel,
    images: Array,
    labels: Array,
    *,
    seeds: Array,
    batch: int = 100,
) -> Array:
    """Attack any number of images, ``batch`` at a time; the rest is as for :func:`perform`."""
    made = np.empty_like(images)
    for at in range(0, len(images), batch):
        rows = slice(at, at + batch)
        made[rows] = perform(spec, model, images[rows], labels[rows], seeds=seeds[rows])
    return made


Attack = FixedEpsilonAttack | MinimizationAttack


def attack_of(spec: AttackSpec, seeds: Array) -> Attack:
    """Return the Foolbox attack that a specification without stages describes."""
    return _MAKERS[spec.name](spec, dict(spec.parameters), seeds)


def _deepfool(spec: AttackSpec, settings: dict[str, Any], _: Array) -> Attack:
    return L2DeepFool(clip=spec.clip, **settings)


Maker = Callable[[AttackSpec, dict[str, Any], Array], Attack]


def _climbing(attack: Callable[..., Attack], loss: Loss) -> Maker:
    return lambda _, settings, seeds: attack(loss=loss, seeds=seeds, **settings)


_MAKERS: Mapping[str, Maker] = {
    "fgsm": lambda _, settings, seeds: LinfFGSM(**settings),
    "pgd": _climbing(LinfPGD, CROSS_ENTROPY),
    "pgd-margin": _climbing(LinfPGD, MARGIN),
    "pgd-targeted": _climbing(LinfPGD, MARGIN),
    "pgd-l2": _climbing(L2PGD, CROSS_ENTROPY),
    "apgd": _climbing(LinfAPGD, CROSS_ENTROPY),
    "apgd-dlr": _climbing(LinfAPGD, DLR),
    "apgd-t": _climbing(LinfAPGD, TARGETED_DLR),
    "apgd-l2": _climbing(L2APGD, CROSS_ENTROPY),
    "apgd-dlr-l2": _climbing(L2APGD, DLR),
    "apgd-t-l2": _climbing(L2APGD, TARGETED_DLR),
    "deepfool": _deepfool,
    "deepfool-fast": _deepfool,
    "cw": lambda _, settings, seeds: L2CarliniWagner(**settings),
    "fmn": lambda _, settings, seeds: L2FastMinimumNorm(**settings),
    "fmn-linf": lambda _, settings, seeds: LinfFastMinimumNorm(**settings),
    "square": lambda _, settings, seeds: LinfSquareAttack(seeds=seeds, **settings),
    "square-l2": lambda _, settings, seeds: L2SquareAttack(seeds=seeds, **settings),
    "hopskipjump": lambda _, settings, seeds: HopSkipJump(seeds=seeds, **settings),
}
"""One for every attack in :data:`ccn_deploy.attacks.spec.ATTACKS` without stages."""
