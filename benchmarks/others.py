"""Forward and input gradients of networks that other people use, against PyTorch itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gradients import FORMATS, autograd
from benchmarks.subjects import ONE_THREAD, Subjects
from benchmarks.tables import Row, ratios
from benchmarks.timing import compare
from ccn_deploy.exporters import export_bundle
from ccn_deploy.exporters.sources.intake import Intake
from ccn_deploy.exporters.sources.opening import SourceOptions, open_source
from ccn_deploy.runtimes import open_runtime

CLASSES = 1000
SIZE = 224
BATCH = 8


def others(subjects: Subjects, rounds: int) -> Iterator[str]:
    """One gradient an image of 224x224, batch 8; the module in evaluation mode, frozen."""
    return ratios(_rows(subjects, rounds))


def _rows(subjects: Subjects, rounds: int) -> Iterator[Row]:
    random = np.random.default_rng(0)
    images = random.random((BATCH, 3, SIZE, SIZE), dtype=np.float32)
    cotangents = random.standard_normal((BATCH, 1, CLASSES)).astype(np.float32)
    options = SourceOptions(intake=Intake(input_size=(SIZE, SIZE)))
    for title, make in NETWORKS.items():
        opened = open_source(f"{__name__}:{make.__name__}", options)
        bundle = export_bundle(opened, subjects.scratch / make.__name__)
        runtime = open_runtime(bundle, "onnxruntime-cpu", options=ONE_THREAD)

        def native(runtime=runtime) -> object:  # the loop's own
            return runtime.vjp(images, cotangents)

        for peer, memory_format in FORMATS.items():
            module = make().eval().requires_grad_(False).to(memory_format=memory_format)
            ratio = compare(autograd(module, images, cotangents), native, rounds=rounds)
            yield f"forward and 1 gradient, batch {BATCH}", title, peer, "ONNX Runtime", ratio


def resnet18() -> nn.Module:
    """Return ResNet-18 (He et al. 2016) with random weights."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    inner = 64
    for outer in (64, 128, 256, 512):
        blocks += [Residual(inner, outer, outer // inner), Residual(outer, outer, 1)]
        inner = outer
    return nn.Sequential(
        *_conv(3, 64, 7, 2, act=nn.ReLU),
        nn.MaxPool2d(3, 2, 1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, CLASSES),
    )


def mobilenet_v3_small() -> nn.Module:
    """Return MobileNetV3-Small (Howard et al. 2019, table 2) with random weights."""
    torch.manual_seed(0)
    relu, swish = nn.ReLU, nn.Hardswish
    plan: list[tuple[int, int, int, int, int, bool, Activation]] = [
        # kernel, in, expanded, out, stride, squeeze and excitation, activation
        (3, 16, 16, 16, 2, True, relu),
        (3, 16, 72, 24, 2, False, relu),
        (3, 24, 88, 24, 1, False, relu),
        (5, 24, 96, 40, 2, True, swish),
        (5, 40, 240, 40, 1, True, swish),
        (5, 40, 240, 40, 1, True, swish),
        (5, 40, 120, 48, 1, True, swish),
        (5, 48, 144, 48, 1, True, swish),
        (5, 48, 288, 96, 2, True, swish),
        (5, 96, 576, 96, 1, True, swish),
        (5, 96, 576, 96, 1, True, swish),
    ]
    return nn.Sequential(
        *_conv(3, 16, 3, 2, act=swish),
        *(Inverted(*row) for row in plan),
        *_conv(96, 576, 1, act=swish),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(576, 1024),
        nn.Hardswish(),
        nn.Linear(1024, CLASSES),
    )


Activation = Callable[[], nn.Module]

NETWORKS = {"ResNet-18": resnet18, "MobileNetV3-Small": mobilenet_v3_small}


class Residual(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv(inner, outer, 3, stride, act=nn.ReLU), *_conv(outer, outer, 3)
        )
        same = inner == outer and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(*_conv(inner, outer, 1, stride))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return (self.body(x) + self.skip(x)).relu()


class Squeeze(nn.Module):
    """Squeeze and excitation: every channel is weighted by what all of them are on average."""

    def __init__(self, features: int) -> None:
        super().__init__()
        narrow = (features // 4 + 7) // 8 * 8
        self.weights = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(features, narrow, 1),
            nn.ReLU(),
            nn.Conv2d(narrow, features, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        weighted: Tensor = x * self.weights(x)
        return weighted


class Inverted(nn.Module):
    """The block of MobileNetV3: expand, filter every channel alone, weight, project."""

    def __init__(
        self,
        kernel: int,
        inner: int,
        wide: int,
        outer: int,
        stride: int,
        squeeze: bool,
        act: Activation,
    ) -> None:
        super().__init__()
        self.same = inner == outer and stride == 1
        self.body = nn.Sequential(
            *(_conv(inner, wide, 1, act=act) if wide != inner else ()),
            *_conv(wide, wide, kernel, stride, groups=wide, act=act),
            *([Squeeze(wide)] if squeeze else ()),
            *_conv(wide, outer, 1),
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.body(x)
        return x + y if self.same else y


def _conv(
    inner: int,
    outer: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    act: Activation | None = None,
) -> Iterator[nn.Module]:
    """Yield a convolution, its batch normalisation, and an activation if there is one."""
    yield nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    yield nn.BatchNorm2d(outer)
    if act is not None:
        yield act()
