"""What a training is asked to do, and what of it is written down. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.architectures import ARCHITECTURES, Architecture, architecture_named
from ccn_deploy.data.dataset import Dataset
from ccn_deploy.defenses import Defense, defense_named, soft_targets
from ccn_deploy.errors import UsageError
from ccn_deploy.trainers.adversary import KINDS, Adversary, changed, default_adversary
from ccn_deploy.trainers.recipes import Recipe, recipe_named

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class TrainConfig:
    """A training by names and numbers.

    Attributes:
        defense: A name in :data:`ccn_deploy.defenses.DEFENSES`; if not given, that is ``"ccn"``.
        dataset: Name of the data set; must be that of the data given to ``train``.
        recipe: A name in :data:`ccn_deploy.trainers.recipes.RECIPES`, or a recipe.
        architecture: A name in :data:`ccn_deploy.architectures.ARCHITECTURES`; if not given, the
            one that takes images of the data set's shape.
        epochs: Instead of the recipe's; its schedule is stretched to fit.
        batch_size: Instead of the recipe's, over all devices together.
        learning_rate: Instead of the recipe's.
        seed: Of the weights, the order of the images and the dropout.
        threads: CPU threads of each process; if not given, those of the run that is resumed, or
            torch's own choice.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"`` (CUDA if there is a GPU, else the CPU).
        devices: Number of processes, one to a GPU.
        network: The factory of a network of the user's own, instead of architecture and defense:
            ``"package.module:factory"`` or ``"path/to/file.py:factory"``.
        compact: Which layers are compact: ``"all"``, ``"last"``, ``"none"`` or names. If not
            given, those that the defense says, and none of a network of the user's own, whose
            layers :func:`ccn_deploy.layers.compactify` names.
        label_smoothing: Share of a target that the other classes get, for a network of the
            user's own.
        adversarial: ``"fgsm"``, ``"pgd"`` or ``"trades"``, instead of the recipe's adversary; see
            :class:`~ccn_deploy.trainers.adversary.Adversary`.
        epsilon: Instead of the adversary's; if neither is given, 0.3 for images of one channel and
            28x28 pixels, and 8/255 for others.
        attack_steps: Instead of the adversary's.
        beta: Instead of that of ``trades``, 6.
        workers: Processes of each device that read and decode images; 0 for threads.
        strict: Whether an image that cannot be read stops the training. If not, it is left out of
            every epoch, named and counted.
    """

    defense: str | None = None
    dataset: str = "mnist5k"
    recipe: str | Recipe = "quick"
    architecture: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    threads: int | None = None
    device: Device = "cpu"
    devices: int = 1
    network: str | None = None
    compact: str | tuple[str, ...] | None = None
    label_smoothing: float = 0.0
    adversarial: str | None = None
    epsilon: float | None = None
    attack_steps: int | None = None
    beta: float | None = None
    workers: int = 0
    strict: bool = False


@dataclass(frozen=True)
class PaperNetwork:
    """A network of this package.

    Attributes:
        architecture: What is trained.
        defense: How it is built and what targets its loss sees.
        compact: Names of its compact layers; None if they are those that the defense says.
    """

    architecture: Architecture
    defense: Defense
    compact: tuple[str, ...] | None = None

    def targets(self, labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
        """Return the training targets, float32 [N, classes]."""
        return self.defense.targets(labels, classes)


@dataclass(frozen=True)
class OwnNetwork:
    """A network of the user's own.

    Attributes:
        factory: Its factory, as it was named.
        compact: Names of the layers that are made compact.
        input_shape: (channels, height, width) of the images.
        label_smoothing: See :class:`TrainConfig`.
    """

    factory: str
    compact: tuple[str, ...]
    input_shape: tuple[int, int, int]
    label_smoothing: float

    def targets(self, labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
        """Return the training targets, float32 [N, classes]."""
        return soft_targets(labels, classes, 1.0 - self.label_smoothing)


@dataclass(frozen=True)
class Plan:
    """A :class:`TrainConfig` with every name looked up and every choice made.

    Attributes:
        network: What is trained.
        recipe: With the overrides in it.
        class_names: One per logit.
        data: Name, digests and sizes of the two splits.
        seed: See :class:`TrainConfig`.
        threads: CPU threads of each process; see :class:`TrainConfig`.
        device: ``"cpu"`` or ``"cuda"``.
        devices: Number of processes.
        torch: Version of torch; another one may round otherwise.
    """

    network: PaperNetwork | OwnNetwork
    recipe: Recipe
    class_names: tuple[str, ...]
    data: dict[str, Any]
    seed: int
    threads: int
    device: Literal["cpu", "cuda"]
    devices: int
    torch: str

    def settings(self) -> dict[str, Any]:
        """Return everything that the final weights depend on, as JSON values."""
        smoothing = (
            {"label_smoothing": self.network.label_smoothing}
            if isinstance(self.network, OwnNetwork)
            else {}
        )
        return {
            **self.data,
            **smoothing,
            "recipe": self.recipe.to_document(),
            "seed": self.seed,
            "threads": self.threads,
            "device": self.device,
            "devices": self.devices,
            "torch": self.torch,
        }


def make_plan(
    config: TrainConfig,
    train: Dataset,
    test: Dataset,
    *,
    threads: int,
    device: Literal["cpu", "cuda"],
    torch: str,
    own: OwnNetwork | None = None,
) -> Plan:
    """Look every name up and check that the parts fit.

    ``own`` is what the configuration's network turned out to be, if it names one.

    Raises:
        UsageError: An unknown name, a number out of range, or data that do not fit the network.
    """
    recipe = recipe_named(config.recipe) if isinstance(config.recipe, str) else config.recipe
    recipe = recipe.override(
        epochs=config.epochs, batch_size=config.batch_size, learning_rate=config.learning_rate
    )
    recipe = replace(recipe, adversary=_adversary(config, recipe, train.input_shape))
    if config.workers < 0:
        raise UsageError(
            f"The number of workers is {config.workers}.", "Give a whole number from 0."
        )
    if config.seed < 0:
        raise UsageError(f"The seed is {config.seed}.", "Give a whole number from 0.")
    for data in (train, test):
        if data.name != config.dataset or not len(data):
            raise UsageError(
                f"The configuration names the data set {config.dataset!r}; the {data.split} split "
                f"given is {data.name!r} with {len(data)} images.",
                "Give both splits of the data set that the configuration names.",
            )
    if len(train.class_names) < 2:
        raise UsageError(
            f"{train.name} has one class only: there is nothing to tell apart.",
            "Give data of two classes or more.",
        )
    return Plan(
        network=own or _paper_network(config, train, recipe),
        recipe=recipe,
        class_names=train.class_names,
        data={
            "dataset": train.name,
            "train_images": len(train),
            "train_digest": train.digest,
            "test_images": len(test),
            "test_digest": test.digest,
        },
        seed=config.seed,
        threads=threads,
        device=device,
        devices=config.devices,
        torch=torch,
    )


def describe_differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the settings in which two documents differ, with both values; empty if none do."""
    old, new = _flatten(before), _flatten(now)
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if "recipe.epochs" in differing and "recipe.drops" in differing:
        differing.remove("recipe.drops")  # they follow from the epochs
    if "recipe.adversary.kind" in differing:  # the other numbers follow from it
        kept = [key for key in differing if not key.startswith("recipe.adversary.")]
        differing = [*kept, "recipe.adversary.kind"]
    return "; ".join(f"{k} was {old.get(k)!r} and is now {new.get(k)!r}" for k in differing)


def default_threads(devices: int, torch_threads: int) -> int:
    """Return the CPU threads of each of ``devices`` processes, at least 1."""
    return max(1, min(torch_threads, os.cpu_count() or 1) // devices)


def _flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested document as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def check_network(config: TrainConfig) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: A network of the package's and of the user's own at once, or a number out of
            range.
    """
    if config.network is None:
        if config.label_smoothing:
            raise UsageError(
                "The option --label-smoothing is for a network of your own.",
                "Name it with --network, or choose --defense ls or ccn+ls.",
            )
        return
    for option, value in (("architecture", config.architecture), ("defense", config.defense)):
        if value is not None:
            raise UsageError(
                f"A network of your own has no {option} of this package.",
                f"Leave out --{option}; --compact says which layers are made compact.",
            )
    if not 0 <= config.label_smoothing < 1:
        raise UsageError(
            f"The label smoothing is {config.label_smoothing}.",
            "Give a number from 0 to below 1; the paper's is 0.1.",
        )


def _adversary(
    config: TrainConfig, recipe: Recipe, input_shape: tuple[int, int, int]
) -> Adversary | None:
    """Return the adversary that is asked for: of a kind, or the recipe's with other numbers."""
    adversary = recipe.adversary
    if config.adversarial is not None and (
        adversary is None or adversary.kind != config.adversarial.lower()
    ):
        adversary = default_adversary(config.adversarial, input_shape)
    epsilon, steps, beta = config.epsilon, config.attack_steps, config.beta
    if adversary is not None:
        return changed(adversary, epsilon=epsilon, steps=steps, beta=beta)
    if (epsilon, steps, beta) != (None, None, None):
        raise UsageError(
            "An epsilon, attack steps or a beta belong to adversarial training; none is asked for.",
            f"Choose it with --adversarial: {', '.join(KINDS)}.",
        )
    return None


def _paper_network(config: TrainConfig, train: Dataset, recipe: Recipe) -> PaperNetwork:
    defense = defense_named("ccn" if config.defense is None else config.defense)
    architecture = _architecture_for(config.architecture, train)
    if defense.normalization == "batch":
        _check_shares(len(train), recipe.batch_size, config.devices)
    compact = None if config.compact is None else architecture.choose_layers(config.compact)
    if compact == architecture.choose_layers(defense.compact):
        compact = None
    return PaperNetwork(architecture, defense, compact)


def _check_shares(images: int, batch_size: int, devices: int) -> None:
    """Refuse batches that leave a process one image: batch normalisation needs two."""
    sizes = (min(images, batch_size), images % batch_size or batch_size)
    if min(sizes) // devices < 2:
        among = f" among {devices} processes" if devices > 1 else ""
        raise UsageError(
            f"{images} images in batches of {batch_size}{among} leave one image alone, and batch "
            "normalisation needs two.",
            "Give another --batch-size.",
        )


def _architecture_for(name: str | None, data: Dataset) -> Architecture:
    fitting = [a for a in ARCHITECTURES.values() if a.input_shape == data.input_shape]
    if name is None:
        if not fitting:
            known = ", ".join(f"{a.name} {a.input_shape}" for a in ARCHITECTURES.values())
            raise UsageError(
                f"No architecture takes images of shape {data.input_shape}, which {data.name} has.",
                f"There are: {known}; or give a network of your own with --network.",
            )
        return fitting[0]
    architecture = architecture_named(name)
    if architecture.input_shape != data.input_shape:
        fit = f"Use --architecture {fitting[0].name}, or" if fitting else "Use"
        raise UsageError(
            f"{architecture.name} takes images of shape {architecture.input_shape}; "
            f"those of {data.name} have {data.input_shape}.",
            f"{fit} a data set with images of that shape.",
        )
    return architecture
