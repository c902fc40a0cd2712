"""The network that the weights of the PyPI package digit-recognizer-py belong to."""

from torch import nn


def digits() -> nn.Module:
    """Return it untrained; the names of its parts are those in the file of weights."""
    convolutions: list[nn.Module] = []
    for inner, outer in ((1, 32), (32, 64), (64, 128)):
        convolutions += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential()
    network.add_module("conv_layers", nn.Sequential(*convolutions))
    network.add_module("flatten", nn.Flatten())
    linear = nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Linear(256, 10)
    network.add_module("fc_layers", nn.Sequential(*linear))
    return network
