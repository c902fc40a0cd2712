"""The practical black-box attack: a substitute learns a classifier's labels and is attacked.

Papernot et al., "Practical black-box attacks against machine learning" (2017),
https://arxiv.org/abs/1602.02697; section 5.2 and table 6 of the paper. The attacker sees labels
alone: it asks for those of a few images, trains a network of its own on them, moves every image
along that network's Jacobian, asks again, and so on. What FGSM makes of test images on the
substitute is then shown to the classifier.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy.attacks.foolbox_model import reference_model
from ccn_deploy.attacks.passes import forward
from ccn_deploy.attacks.perform import craft
from ccn_deploy.attacks.spec import suite
from ccn_deploy.errors import InputError, UsageError
from ccn_deploy.runtimes.base import LARGEST_BATCH
from ccn_deploy.runtimes.torch_runtime import torch_threads

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Oracle = Callable[[Images], Labels]
"""From images float32 [N, C, H, W] in [0, 1] to labels int64 [N]: all that the attacker sees."""

Progress = Callable[[str, float, float], None]
"""Told what is done, how many units of work are, and of how many."""

PERIOD = 3
"""Rounds after which the step turns its sign, as in the authors' program."""

BATCH = 128
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Substitute:
    """A network that imitates an oracle.

    Attributes:
        network: Images float32 [N, C, H, W] to logits [N, classes]; on the CPU, in eval mode, with
            no parameter that asks for gradients.
        queries: Images whose label the oracle gave.
    """

    network: nn.Module
    queries: int

    def labels(self, images: Images) -> Labels:
        """Return its labels int64 [N] of images float32 [N, C, H, W]."""
        pieces = torch.split(torch.from_numpy(images), LARGEST_BATCH)
        with torch.no_grad():
            found = [self.network(piece).argmax(dim=1) for piece in pieces]
        return np.asarray(torch.cat(found).numpy())

    def agreement(self, images: Images, labels: Labels) -> float:
        """Return for which share of some images it gives the oracle's label.

        Args:
            images: float32 [N, C, H, W]; those that it was trained on flatter it.
            labels: int64 [N], the oracle's.
        """
        return float((self.labels(images) == labels).mean())


def train_substitute(
    oracle: Oracle,
    seeds: Images,
    *,
    classes: int,
    rounds: int = 6,
    epochs: int = 10,
    step: float = 0.1,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Substitute:
    r"""Train a :func:`lenet` on the labels that an oracle gives.

    The oracle labels the seeds. Then, in each round, the substitute is trained on all images so
    far, and each of them is joined by one more, which the oracle labels as well:

    .. math:: x' = \mathrm{clip}\left(x + \lambda_\rho\,\mathrm{sign}\,J_{O(x)}(x)\right), \qquad
        \lambda_\rho = \lambda\,(-1)^{\lfloor\rho/3\rfloor}

    where J is the gradient of the probability that the substitute gives to the oracle's label O(x).
    After the last round it is trained once more: rounds + 1 times, on the images of all rounds,
    each time from where it stood, with Adam, a learning rate of 0.001 and batches of 128 (settings
    of the authors' program, ``mnist_blackbox.py`` of https://github.com/cleverhans-lab/cleverhans).

    The same arguments give the same bits where torch uses as many threads; no random state but its
    own is used.

    Args:
        oracle: Gives labels. It is asked for N 2^rounds of them, each image once.
        seeds: float32 [N, C, H, W] in [0, 1]; none that will be attacked. Papernot et al. take 150
            test images.
        classes: Number of the oracle's labels, from 0.
        rounds: Of augmentation; each doubles the images, in memory too.
        epochs: Of each training.
        step: Lambda of the first rounds, in pixel values of [0, 1]: the first three rounds move
            images towards their label, and three later ones away. A negative one starts the other
            way, as the authors' program does.
        seed: Of the weights and of the order of images.
        threads: CPU threads of torch; as many as it uses if None.
        progress: Told after every epoch how many images of how many were learned from.

    Raises:
        InputError: Seeds or labels outside their contract.
        UsageError: A number that means nothing.
    """
    _check_settings(classes, rounds, epochs, step)
    _check_seeds(seeds)
    generator = torch.Generator().manual_seed(seed)
    tell = progress or (lambda what, done, total: None)
    work = float(len(seeds) * (2 ** (rounds + 1) - 1) * epochs)
    done = 0.0
    with torch_threads(threads):
        network = lenet(seeds.shape[1:], classes, generator)
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        images, labels = torch.from_numpy(seeds), _ask(oracle, seeds, classes)
        for place in range(rounds + 1):
            network.requires_grad_(True)
            for _ in range(epochs):
                _learn(network, optimizer, images, labels, generator)
                done += len(images)
                tell("substitute", done, work)
            network.requires_grad_(False)
            if place < rounds:
                made = augmented(network, images, labels, step * (-1) ** (place // PERIOD))
                labels = torch.cat([labels, _ask(oracle, made.numpy(), classes)])
                images = torch.cat([images, made])
    return Substitute(network, len(images))


def substitute_fgsm(
    substitute: Substitute, images: Images, labels: Labels, epsilons: Sequence[float]
) -> dict[float, Images]:
    """Craft FGSM images on a substitute, to be shown to the oracle.

    They leave the true label, as every FGSM of the paper does: an attacker knows what the image
    shows that it means to be mistaken for something else. A label of the oracle or the substitute
    would spend the attack on images that are wrong already.

    Args:
        substitute: What is attacked.
        images: float32 [N, C, H, W] in [0, 1], none of which it was trained on.
        labels: int64 [N], true ones.
        epsilons: Strengths in pixel values of [0, 1].

    Returns:
        By epsilon, float32 [N, C, H, W] in [0, 1], at most epsilon away in Linf. NaN where the
        substitute has no slope: nothing was tried on that image.
    """
    model = reference_model(substitute.network)
    unused = np.zeros((len(images), 1), dtype=np.int64)  # FGSM draws no random numbers
    return {
        spec.epsilon: craft(spec, model, images, labels, seeds=unused)
        for spec in suite(["fgsm"], epsilons)
        if spec.epsilon is not None
    }


def augmented(network: nn.Module, images: Tensor, labels: Tensor, step: float) -> Tensor:
    """Return images moved by ``step`` along the sign of the Jacobian's row of their label.

    The row is that of the softmax. It has the sign of the gradient of its logarithm, which float32
    can still tell where the probability itself has come to one.

    Args:
        network: In eval mode, with no parameter that asks for gradients.
        images: float32 [N, C, H, W] in [0, 1].
        labels: int64 [N].
        step: In pixel values of [0, 1].

    Returns:
        float32 [N, C, H, W], clipped to [0, 1].
    """
    model = reference_model(network)
    moved = []
    pieces = (torch.split(whole, LARGEST_BATCH) for whole in (images, labels))
    for x, y in zip(*pieces, strict=True):
        descent = forward(model, x, labels=y).loss_gradient(torch.arange(len(x)), y)
        moved.append((x - step * descent.sign()).clamp(0.0, 1.0))
    return torch.cat(moved)


def lenet(shape: Sequence[int], classes: int, generator: torch.Generator) -> nn.Module:
    """Build LeNet-5, the substitute's architecture, in eval mode.

    LeCun et al., "Gradient-based learning applied to document recognition" (1998), section II.B,
    http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf: images centred in 32 x 32 (larger ones stay
    as they are), a convolution of 6 filters 5 x 5, pooling 2 x 2, a convolution of 16 filters
    5 x 5, pooling 2 x 2, fully connected layers of 120 and 84 units, one logit a class. As is usual
    today, the activations are ReLU, pooling takes the maximum, all filters see all channels, and
    the last layer is linear.

    Args:
        shape: (channels, height, width).
        classes: Number of logits.
        generator: Draws the weights: He-normal, with the gain of a linear layer for the last;
            biases are zero.
    """
    channels, height, width = shape
    top, left = (max(32 - side, 0) // 2 for side in (height, width))
    bottom, right = (max(32 - height, 0) - top, max(32 - width, 0) - left)
    sides = [((max(side, 32) - 4) // 2 - 4) // 2 for side in (height, width)]
    with torch.device("meta"):  # torch would draw weights of its own from the global state
        network = nn.Sequential(
            OrderedDict(
                pad=nn.ZeroPad2d((left, right, top, bottom)),
                conv1=nn.Conv2d(channels, 6, 5),
                act1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),
                act2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(16 * math.prod(sides), 120),
                act3=nn.ReLU(),
                fc2=nn.Linear(120, 84),
                act4=nn.ReLU(),
                fc3=nn.Linear(84, classes),
            )
        )
    network.to_empty(device="cpu")
    for name, layer in network.named_children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            gain: Literal["linear", "relu"] = "linear" if name == "fc3" else "relu"
            nn.init.kaiming_normal_(layer.weight, nonlinearity=gain, generator=generator)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return network.eval()


def _learn(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
) -> None:
    """Take one epoch of steps."""
    for rows in torch.split(torch.randperm(len(images), generator=generator), BATCH):
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _ask(oracle: Oracle, images: Images, classes: int) -> Tensor:
    """Return the oracle's labels, int64 [N].

    Raises:
        InputError: Something else came back.
    """
    labels = np.asarray(oracle(images))
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"The oracle gave {labels.dtype} {list(labels.shape)} for {len(images)} images.",
            "It must give one integer label an image, and nothing else.",
        )
    strange = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(strange):
        raise InputError(
            f"The oracle gave label {labels[strange[0]]}, one of {len(strange)} that are not "
            f"0 to {classes - 1}.",
            "Give the number of its classes; -1 stands for logits that are not finite.",
        )
    return torch.from_numpy(labels.astype(np.int64))


def _check_settings(classes: int, rounds: int, epochs: int, step: float) -> None:
    lowest = {"classes": (classes, 2), "rounds": (rounds, 0), "epochs": (epochs, 1)}
    for name, (value, low) in lowest.items():
        if value < low:
            raise UsageError(f"{name} is {value}.", f"Give a number of at least {low}.")
    if not (math.isfinite(step) and step != 0.0):
        raise UsageError(
            f"step is {step}: no image would move.", "Give a step such as 0.1, or -0.1."
        )


def _check_seeds(seeds: Images) -> None:
    fits = (
        isinstance(seeds, np.ndarray)
        and seeds.dtype == np.float32
        and seeds.ndim == 4
        and seeds.size > 0
    )
    if not fits:
        raise InputError(
            "Seeds must be at least one image in a NumPy array of float32 [N, C, H, W].",
            "Take some of a data set, as in dataset.images(range(150)).",
        )
    if not (seeds.min() >= 0.0 and seeds.max() <= 1.0):  # NaN is neither
        raise InputError(
            "Seeds have values that are NaN or outside [0, 1].", "Divide 8-bit pixels by 255."
        )
