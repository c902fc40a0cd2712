"""Who runs an attack, and how: every program gets the same options in its own words.

A program only crafts; whether an image fools its victim is asked by us, outside of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import foolbox
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.libraries import PACKAGES, library
from benchmarks.subjects import ONE_THREAD
from ccn_deploy.attacks import ATTACKS, AttackSpec
from ccn_deploy.attacks.foolbox_model import foolbox_model, reference_model
from ccn_deploy.attacks.perform import perform
from ccn_deploy.bundle import Bundle
from ccn_deploy.runtimes import open_runtime
from ccn_deploy.runtimes.torch_runtime import load_reference

EPSILON = 0.2
PGD_STEPS, PGD_STEP = 40, 1 / 30
DEEPFOOL_STEPS, CANDIDATES, OVERSHOOT = 50, 10, 0.02
CW = {"steps": 1000, "rounds": 6, "stepsize": 0.1, "const": 1.0}

MANY = 7
"""Runs at most of what is quick. What is slow runs twice if it is what others are measured by, and
else once."""

Craft = Callable[[Tensor, Tensor], Tensor]
"""From images [N, C, H, W] and the labels to leave [N] to the attack's last word."""

Victim = Callable[[Tensor], Tensor]
"""From images to logits."""


@dataclass(frozen=True)
class Program:
    """One library's way to run one attack.

    Attributes:
        name: What the table calls it.
        craft: The attack; None if the library is not installed.
        victim: What it attacks, and is scored on.
        rounds: How often it may run at most.
        images: How many of the images it gets, because it is slow; all if None.
        note: What is not as in the other programs.
    """

    name: str
    craft: Craft | None
    victim: Victim
    rounds: int = MANY
    images: int | None = None
    note: str = ""


class Network:
    """One bundle's network in every form that is attacked.

    Args:
        bundle: An open bundle with a gradient graph.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.tuned = load_reference(bundle)
        self.plain = load_reference(bundle).to(memory_format=torch.contiguous_format)
        self.plain.requires_grad_(True)
        self._runtime = open_runtime(bundle, options=ONE_THREAD)
        self.native = foolbox_model(self._runtime, None, gradient="native")

    def deployed(self, images: Tensor) -> Tensor:
        """Return the logits of the deployed runtime."""
        return torch.from_numpy(self._runtime.logits(images.numpy()))

    @cached_property
    def art(self) -> Any:
        """The network as ART's classifier."""
        classification = library("art.estimators.classification")
        assert classification is not None
        return classification.PyTorchClassifier(
            model=self.tuned,
            loss=nn.CrossEntropyLoss(),
            input_shape=self._bundle.card.input_shape,
            nb_classes=self._bundle.card.classes,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )


def fgsm(network: Network) -> Iterator[Program]:
    """One step of 0.2."""
    attack = foolbox.attacks.LinfFastGradientAttack()
    yield from _foolbox(network, attack, epsilon=EPSILON)
    yield from _ours(network, _spec("fgsm", EPSILON))
    yield _art(network, "FastGradientMethod", eps=EPSILON, rounds=MANY)
    yield _torchattacks(network, "FGSM", eps=EPSILON, rounds=MANY)


def pgd(network: Network) -> Iterator[Program]:
    """40 steps within 0.2 from a random start."""
    attack = foolbox.attacks.LinfPGD(steps=PGD_STEPS, rel_stepsize=PGD_STEP)
    yield from _foolbox(network, attack, rounds=2, epsilon=EPSILON)
    constant = {"rel_stepsize": PGD_STEP, "decay": False}
    yield from _ours(network, _spec("pgd", EPSILON, **constant), rounds=2)
    step = PGD_STEP * EPSILON
    settings = {"eps": EPSILON, "eps_step": step, "max_iter": PGD_STEPS, "num_random_init": 1}
    yield _art(network, "ProjectedGradientDescent", **settings, verbose=False)
    yield _torchattacks(network, "PGD", eps=EPSILON, alpha=step, steps=PGD_STEPS)
    yield _adv_lib(
        network,
        "pgd_linf",
        **{"ε": EPSILON, "steps": PGD_STEPS, "relative_step_size": PGD_STEP},
    )


def deepfool(network: Network) -> Iterator[Program]:
    """L2 on logits, 10 candidates, 50 steps, overshoot 0.02."""
    attack = foolbox.attacks.L2DeepFoolAttack(
        steps=DEEPFOOL_STEPS, candidates=CANDIDATES, overshoot=OVERSHOOT, loss="logits"
    )
    yield from _foolbox(network, attack, rounds=2)
    yield from _ours(network, _spec("deepfool"), rounds=2)
    yield from _ours(network, _spec("deepfool-fast"), name="ours, skipping", rounds=2)
    yield _adv_lib(network, "df", steps=DEEPFOOL_STEPS, overshoot=OVERSHOOT, rounds=2)
    settings = {"max_iter": DEEPFOOL_STEPS, "epsilon": OVERSHOOT, "nb_grads": CANDIDATES}
    yield _art(network, "DeepFool", **settings, verbose=False, images=32)
    yield _torchattacks(network, "DeepFool", steps=DEEPFOOL_STEPS, overshoot=OVERSHOOT, images=32)


def cw(network: Network) -> Iterator[Program]:
    """L2, the paper's setting: 1000 iterations, 6 steps of the search over c, kappa 0.

    Everyone moves towards the class with the second-highest logit at the start. ART is left out:
    its line search takes about a minute for one image.
    """
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        steps=CW["steps"],
        binary_search_steps=CW["rounds"],
        stepsize=CW["stepsize"],
        initial_const=CW["const"],
    )
    yield from _foolbox(network, attack, rounds=1, second=True)
    yield from _ours(network, _spec("cw"), rounds=1)
    yield _adv_lib(
        network,
        "carlini_wagner_l2",
        second=True,
        targeted=True,
        max_iterations=CW["steps"],
        binary_search_steps=CW["rounds"],
        learning_rate=CW["stepsize"],
        initial_const=CW["const"],
    )
    yield _torchattacks(
        network,
        "CW",
        second=True,
        note="no search over c",
        **{"steps": CW["steps"], "lr": CW["stepsize"], "c": CW["const"]},
    )


def _second(network: nn.Module, x: Tensor) -> Tensor:
    """Return the class with the second-highest logit, int64 [N]."""
    with torch.no_grad():
        return network(x).topk(2).indices[:, 1]


def _foolbox(
    network: Network, attack: Any, rounds: int = MANY, second: bool = False, **strength: float
) -> Iterator[Program]:
    def craft(module: nn.Module) -> Craft:
        model = foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu")

        def run(x: Tensor, y: Tensor) -> Tensor:
            goal = foolbox.Misclassification(y)
            if second:
                goal = foolbox.TargetedMisclassification(_second(module, x))
            return attack.run(model, x, goal, **strength)

        return run

    yield Program("Foolbox", craft(network.plain), network.plain, rounds)
    few = rounds if rounds == MANY else 1
    yield Program("Foolbox, tuned", craft(network.tuned), network.tuned, few)


def _ours(
    network: Network, spec: AttackSpec, name: str = "ours", rounds: int = MANY
) -> Iterator[Program]:
    def craft(model: Any) -> Craft:
        def run(x: Tensor, y: Tensor) -> Tensor:
            seeds = np.arange(len(x))[:, None]
            return torch.from_numpy(perform(spec, model, x.numpy(), y.numpy(), seeds=seeds))

        return run

    yield Program(f"{name}, ONNX Runtime", craft(network.native), network.deployed, rounds)
    yield Program(f"{name}, PyTorch", craft(reference_model(network.tuned)), network.tuned, rounds)


def _spec(name: str, epsilon: float | None = None, **changes: float) -> AttackSpec:
    kind = ATTACKS[name]
    return AttackSpec(name, kind.norm, epsilon, True, {**kind.parameters, **changes})


def _art(
    network: Network, attack: str, rounds: int = 1, images: int | None = None, **settings: Any
) -> Program:
    evasion = library("art.attacks.evasion")

    def craft(x: Tensor, y: Tensor) -> Tensor:
        made = getattr(evasion, attack)(network.art, batch_size=len(x), **settings)
        return torch.from_numpy(made.generate(x.numpy(), y.numpy()))

    return _optional("art", evasion, craft, network, rounds, images=images)


def _torchattacks(
    network: Network,
    attack: str,
    rounds: int = 1,
    images: int | None = None,
    note: str = "",
    second: bool = False,
    **settings: Any,
) -> Program:
    torchattacks = library("torchattacks")

    def craft(x: Tensor, y: Tensor) -> Tensor:
        made = getattr(torchattacks, attack)(network.tuned, **settings)
        if second:
            made.set_mode_targeted_by_label(quiet=True)
        return made(x, _second(network.tuned, x) if second else y).detach()

    return _optional("torchattacks", torchattacks, craft, network, rounds, images=images, note=note)


def _adv_lib(
    network: Network, attack: str, rounds: int = 1, second: bool = False, **settings: Any
) -> Program:
    attacks = library("adv_lib.attacks")

    def craft(x: Tensor, y: Tensor) -> Tensor:
        leave = _second(network.tuned, x) if second else y
        return getattr(attacks, attack)(network.tuned, x, leave, **settings).detach()

    return _optional("adv_lib", attacks, craft, network, rounds)


def _optional(
    module: str, found: Any, craft: Craft, network: Network, rounds: int, **details: Any
) -> Program:
    use = None if found is None else craft
    return Program(PACKAGES[module], use, network.tuned, rounds, **details)
