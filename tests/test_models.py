from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ccn_deploy.architectures import ARCHITECTURES, architecture_named
from ccn_deploy.defenses import DEFENSES
from ccn_deploy.errors import ExitCode, UsageError
from ccn_deploy.layers import BoundedReLU, CompactConv2d, CompactLinear, SubtractMean
from ccn_deploy.models import Classifier, build_model, soft_cross_entropy

every_defense = pytest.mark.parametrize("defense", sorted(DEFENSES))

# Table 10 of the paper, layer by layer, written out rather than computed.
MNIST_LAYERS = [
    "mean",
    "conv1", "act1", "conv2", "act2", "pool1",
    "conv3", "act3", "conv4", "act4", "pool2",
    "flatten", "fc1", "act5", "fc2", "act6", "fc3",
]  # fmt: skip
MNIST_WEIGHTS = {
    "conv1": (32, 1, 3, 3),
    "conv2": (32, 32, 3, 3),
    "conv3": (64, 32, 3, 3),
    "conv4": (64, 64, 3, 3),
    "fc1": (200, 1024),
    "fc2": (200, 200),
    "fc3": (10, 200),
}
CIFAR_LAYERS = [
    "mean",
    "conv1", "act1", "conv2", "act2", "pool1",
    "conv3", "act3", "conv4", "act4", "pool2",
    "conv5", "act5", "conv6", "act6", "pool3",
    "conv7", "act7", "conv8", "act8", "pool4",
    "flatten", "fc1", "act9", "fc2", "act10", "fc3",
]  # fmt: skip
CIFAR_WEIGHTS = {
    "conv1": (64, 3, 3, 3),
    "conv2": (128, 64, 3, 3),
    "conv3": (256, 128, 3, 3),
    "conv4": (256, 256, 3, 3),
    "conv5": (512, 256, 3, 3),
    "conv6": (512, 512, 3, 3),
    "conv7": (512, 512, 3, 3),
    "conv8": (512, 512, 3, 3),
    "fc1": (512, 2048),
    "fc2": (512, 512),
    "fc3": (10, 512),
}
# Weights and biases: MNIST 320 + 9248 + 18496 + 36928 + 205000 + 40200 + 2010;
# CIFAR-10 1792 + 73856 + 295168 + 590080 + 1180160 + 3 * 2359808 + 1049088 + 262656 + 5130.
PARAMETERS = {"mnist-cnn": 312_202, "vgg11-cifar10": 10_537_354}


def weights(model: Classifier) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(layer.weight.shape)
        for name, layer in model.named_layers()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }


@pytest.mark.parametrize(
    ("architecture", "layers", "shapes"),
    [
        ("mnist-cnn", MNIST_LAYERS, MNIST_WEIGHTS),
        ("vgg11-cifar10", CIFAR_LAYERS, CIFAR_WEIGHTS),
    ],
)
@pytest.mark.parametrize("defense", ["sm", "ccn"])
def test_the_networks_are_those_of_table_10(
    architecture: str, layers: list[str], shapes: dict[str, tuple[int, ...]], defense: str
) -> None:
    model = build_model(architecture, defense)
    assert [name for name, _ in model.named_layers()] == layers
    assert weights(model) == shapes
    for name, layer in model.named_layers():
        if name.startswith("pool"):
            assert isinstance(layer, nn.MaxPool2d)
            assert (layer.kernel_size, layer.stride) == (2, 2)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS[architecture] + (len(shapes) if defense == "ccn" else 0)


@pytest.mark.parametrize(("defense", "compact"), [("sm", []), ("l2sm", ["fc4"]), ("ccn", ["all"])])
def test_two_features_stand_in_front_of_the_last_layer_of_figure_2(
    defense: str, compact: list[str]
) -> None:
    model = build_model("mnist-cnn-2d", defense)
    layers = model.named_layers()
    assert [name for name, _ in layers] == [*MNIST_LAYERS, "fc4"]  # nothing between fc3 and fc4
    assert weights(model) == MNIST_WEIGHTS | {"fc3": (2, 200), "fc4": (10, 2)}
    found = [name for name, m in layers if isinstance(m, CompactConv2d | CompactLinear)]
    assert found == (list(weights(model)) if compact == ["all"] else compact)


def test_the_imagenet_network_is_vgg11() -> None:
    with torch.device("meta"):  # shapes, without half a gigabyte of weights
        model = build_model("vgg11-imagenet", "sm")
        logits = model(torch.empty(1, 3, 224, 224))
    shapes = weights(model)
    assert [shapes[f"conv{n}"][0] for n in range(1, 9)] == [64, 128, 256, 256, 512, 512, 512, 512]
    assert [shapes[f"fc{n}"] for n in (1, 2, 3)] == [(4096, 25088), (4096, 4096), (1000, 4096)]
    assert sum(name.startswith("pool") for name, _ in model.named_layers()) == 5
    assert sum(p.numel() for p in model.parameters()) == 132_863_336  # configuration A
    assert logits.shape == (1, 1000)


@every_defense
def test_the_defense_says_which_layers_are_compact_and_which_activation(defense: str) -> None:
    model = build_model("mnist-cnn", defense)
    compact = {n for n, m in model.named_layers() if isinstance(m, CompactConv2d | CompactLinear)}
    expected = {
        "sm": set(),
        "ls": set(),
        "brelu": set(),
        "l2sm": {"fc3"},
        "ccn": set(MNIST_WEIGHTS),
        "ccn+ls": set(MNIST_WEIGHTS),
        "bn": set(),
        "lrn": set(),
    }[defense]
    assert compact == expected
    activations = {type(m) for n, m in model.named_layers() if n.startswith("act")}
    assert activations == ({BoundedReLU} if defense == "brelu" else {nn.ReLU})
    normalised = 2 * (32 + 32 + 64 + 64 + 200 + 200) if defense == "bn" else 0
    assert sum(p.numel() for p in model.parameters()) == 312_202 + len(expected) + normalised


@every_defense
def test_it_returns_logits_not_probabilities(defense: str) -> None:
    model = build_model("mnist-cnn", defense, seed=1)
    with torch.no_grad():
        model.fc3.bias.copy_(torch.arange(10.0) - 7)  # passes through a logit unchanged
        x = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        logits = model(x)
        model.fc3.bias.zero_()
        assert torch.allclose(logits - model(x), torch.arange(10.0) - 7, atol=1e-5)
    assert logits.shape == (5, 10)
    assert not isinstance(list(model.children())[-1], nn.Softmax | nn.LogSoftmax)


def test_the_mean_is_subtracted_inside() -> None:
    model = build_model("mnist-cnn", "sm", seed=1)
    layers = list(model.children())
    assert isinstance(layers[0], SubtractMean)
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), nn.Sequential(*layers[1:])(x - 0.5))


def test_each_image_is_on_its_own() -> None:
    model = build_model("mnist-cnn", "ccn", seed=1).double()
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(image[None]) for image in x])
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-12)


def test_the_number_of_classes_can_be_chosen() -> None:
    model = build_model("mnist-cnn", "ccn", classes=3)
    assert model.classes == 3
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 3)


@every_defense
def test_a_black_image_has_finite_logits_and_gradient(defense: str) -> None:
    x = torch.full((1, 1, 28, 28), 0.5, requires_grad=True)  # zero once the mean is gone
    build_model("mnist-cnn", defense).eval()(x).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def parameters(model: nn.Module) -> Iterator[torch.Tensor]:
    return (parameter for parameter in model.state_dict().values())


@every_defense
def test_a_seed_gives_the_same_weights_whatever_ran_before(defense: str) -> None:
    first = build_model("mnist-cnn", defense, seed=5)
    torch.rand(17)
    second = build_model("mnist-cnn", defense, seed=5)
    other = build_model("mnist-cnn", defense, seed=6)
    assert all(map(torch.equal, parameters(first), parameters(second)))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_a_seed_gives_every_defense_the_same_kernels() -> None:
    kernels = [build_model("mnist-cnn", defense, seed=5).fc2.weight for defense in DEFENSES]
    assert all(torch.equal(kernels[0], kernel) for kernel in kernels)


def test_alphas_start_at_one_and_biases_at_zero() -> None:
    for layer in build_model("mnist-cnn", "ccn").children():
        if isinstance(layer, CompactConv2d | CompactLinear):
            assert float(layer.alpha.detach()) == 1.0
            assert layer.bias is not None
            assert not layer.bias.any()


def test_he_normal_weights_have_the_variance_of_their_fan_in() -> None:
    model = build_model("mnist-cnn", "sm", seed=2)
    for name, gain in [("conv2", 2.0), ("conv4", 2.0), ("fc1", 2.0), ("fc3", 1.0)]:
        weight = getattr(model, name).weight.detach().double()
        fan_in = weight[0].numel()
        spread = 5 * (2 / weight.numel()) ** 0.5  # five standard errors of a variance
        assert float(weight.var()) * fan_in / gain == pytest.approx(1.0, abs=spread)


@pytest.mark.parametrize(
    ("architecture", "defense", "nearest"),
    [
        ("mnist-cnn", "cnn", "'ccn'"),
        ("mnist-cnn", "l2-sm", "'l2sm'"),
        ("mnist-cn", "ccn", "'mnist-cnn'"),
        ("vgg11-cifar", "ccn", "'vgg11-cifar10'"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(
    architecture: str, defense: str, nearest: str
) -> None:
    with pytest.raises(UsageError, match="Did you mean") as caught:
        build_model(architecture, defense)
    assert f"Did you mean {nearest}?" in caught.value.hint
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_name_like_no_other_lists_them_all() -> None:
    with pytest.raises(UsageError) as caught:
        architecture_named("zzz")
    assert "Did you mean" not in caught.value.hint
    assert all(name in caught.value.hint for name in ARCHITECTURES)


def test_soft_cross_entropy_of_hard_targets_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 10, generator=generator, dtype=torch.float64) * 5
    labels = torch.randint(10, (6,), generator=generator)
    hard = nn.functional.one_hot(labels, 10).double()
    expected = nn.functional.cross_entropy(logits, labels)
    assert float(soft_cross_entropy(logits, hard)) == pytest.approx(float(expected), rel=1e-12)


def test_soft_cross_entropy_by_definition() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    targets = torch.tensor([[0.05, 0.05, 0.9]], dtype=torch.float64)
    probabilities = logits.exp() / logits.exp().sum()
    expected = -(targets * probabilities.log()).sum()
    assert float(soft_cross_entropy(logits, targets)) == pytest.approx(float(expected), rel=1e-12)


HEAVY = ["torch", "onnx", "onnxruntime", "foolbox", "scipy", "matplotlib", "PIL", "pandas"]


@pytest.mark.parametrize(
    "module",
    [
        "ccn_deploy",
        "ccn_deploy.architectures",
        "ccn_deploy.bundle",
        "ccn_deploy.data",
        "ccn_deploy.defenses",
        "ccn_deploy.statistics",
    ],
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
