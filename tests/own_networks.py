"""Networks as a user would hand them in: factories in a file that knows nothing of the package."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """A block of ResNet-18, with one ReLU that is called twice."""

    def __init__(self, features: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or features != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(features, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet-18's plan; ``width`` 64 and ``blocks`` (2, 2, 2, 2) give the original."""

    def __init__(
        self, classes: int = 10, channels: int = 3, width: int = 8, blocks: tuple[int, ...] = (1, 1)
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        features = width
        for stage, count in enumerate(blocks):
            parts = []
            for index in range(count):
                out = width * 2**stage
                parts.append(BasicBlock(features, out, 2 if stage and not index else 1))
                features = out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*parts))
        self.stages = len(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


class ClassTokenViT(nn.Module):
    """A vision transformer that reads its answer off a class token; blocks are torch's own."""

    def __init__(self, classes: int = 10, channels: int = 3, size: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16) * 0.5)
        self.places = nn.Parameter(torch.randn(1, 1 + (size // 8) ** 2, 16) * 0.5)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True)
                for _ in range(2)
            )
        )
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1)
        return self.head(self.blocks(tokens + self.places)[:, 0])


def resnet(classes: int = 10) -> nn.Module:
    return ResNet(classes)


def digits(num_classes: int) -> nn.Module:
    """For grey images of 28x28."""
    return ResNet(num_classes, channels=1, width=4)


def vit() -> nn.Module:
    return ClassTokenViT()


def raises() -> nn.Module:
    raise RuntimeError("no such backbone\nsecond line")


def no_module() -> int:
    return 3


a_module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
a_number = 4
