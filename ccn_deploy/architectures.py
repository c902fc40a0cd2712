"""The architectures of the paper by name, as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ccn_deploy.errors import UsageError, named

POOL = "pool"
"""A 2x2 max-pool with stride 2, between the channel counts of :attr:`Architecture.features`."""


@dataclass(frozen=True)
class Architecture:
    """A convolutional classifier: 3x3 convolutions, 2x2 max-pools, then linear layers.

    Attributes:
        name: What manifests and users call it.
        title: A line for people.
        input_shape: (channels, height, width) of one image.
        features: Output channels of each 3x3 convolution, with ``POOL`` between them.
        padding: Zero padding of every convolution, in pixels.
        hidden: Units of the linear layers before the last one.
        dropout: Probability of dropping a hidden linear activation while training.
        classes: Number of logits, unless the data set says otherwise.
        bottleneck: Units of one more linear layer in front of the last one, without activation
            and dropout; 0 for none.
    """

    name: str
    title: str
    input_shape: tuple[int, int, int]
    features: tuple[int | str, ...]
    padding: int
    hidden: tuple[int, ...]
    dropout: float
    classes: int
    bottleneck: int = 0

    def flat_features(self) -> int:
        """Return the number of features that reach the first linear layer."""
        channels, height, width = self.input_shape
        for item in self.features:
            if isinstance(item, str):
                height, width = height // 2, width // 2
            else:
                channels = item
                height, width = height - 2 + 2 * self.padding, width - 2 + 2 * self.padding
        return channels * height * width

    def weighted_layers(self) -> tuple[str, ...]:
        """Return the names of the layers with weights in order: conv1, ..., fc1, ..."""
        convolutions = sum(item != POOL for item in self.features)
        linear = len(self.hidden) + bool(self.bottleneck) + 1
        return (
            *(f"conv{index}" for index in range(1, convolutions + 1)),
            *(f"fc{index}" for index in range(1, linear + 1)),
        )

    def choose_layers(self, where: str | Collection[str]) -> tuple[str, ...]:
        """Return the names of the layers with weights that are meant, in order of execution.

        Args:
            where: ``"all"``; ``"last"``, the classifier; ``"none"``; or their names.

        Raises:
            UsageError: Another name; the hint lists all.
        """
        names = self.weighted_layers()
        if isinstance(where, str):
            choices = {"all": names, "last": names[-1:], "none": ()}
            if where in choices:
                return choices[where]
            where = (where,)
        for name in where:
            if name not in names:
                raise UsageError(
                    f"{self.name} has no layer {name!r} to be made compact.",
                    f"There are: all, last, none, or of {', '.join(names)}.",
                )
        return tuple(name for name in names if name in where)


_MNIST = Architecture(
    name="mnist-cnn",
    title="MNIST network of table 10, valid padding",
    input_shape=(1, 28, 28),
    features=(32, 32, POOL, 64, 64, POOL),
    padding=0,
    hidden=(200, 200),
    dropout=0.0,
    classes=10,
)

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _MNIST,
        replace(
            _MNIST,
            name="mnist-cnn-2d",
            title="The same with two features in front of the last layer, for figure 2",
            bottleneck=2,
        ),
        Architecture(
            name="vgg11-cifar10",
            title="CIFAR-10 VGG11 of table 10, padding 1",
            input_shape=(3, 32, 32),
            features=(64, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
            padding=1,
            hidden=(512, 512),
            dropout=0.0,
            classes=10,
        ),
        Architecture(
            name="vgg11-imagenet",
            title="ImageNet VGG11 (Simonyan and Zisserman, configuration A)",
            input_shape=(3, 224, 224),
            features=(64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
            padding=1,
            hidden=(4096, 4096),
            dropout=0.5,
            classes=1000,
        ),
    )
}


def architecture_named(name: str) -> Architecture:
    """Look an architecture up by name.

    Raises:
        UsageError: No such architecture; the hint suggests the nearest.
    """
    return named("architecture", name.lower(), ARCHITECTURES)
