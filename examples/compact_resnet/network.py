"""A narrow ResNet-18 for grey images of 28x28 pixels."""

from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy.layers import SubtractMean


class Block(nn.Module):
    """The basic block: two convolutions beside a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            convolution = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the block makes of [N, inner, H, W]: [N, outer, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: int = 16, classes: int = 10) -> nn.Module:
    """Return an untrained ResNet-18 for images [N, 1, 28, 28] in [0, 1].

    Args:
        width: Channels of the first stage; the last has eight times as many. ResNet-18 has 64.
        classes: Number of logits.
    """
    stages: list[nn.Module] = []
    inner = width
    for stage in range(4):
        outer = width << stage
        stages += [Block(inner, outer, 1 if stage == 0 else 2), Block(outer, outer, 1)]
        inner = outer
    return nn.Sequential(
        SubtractMean(),  # or a compact layer would blow up the noise of a black background
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inner, classes),
    )
