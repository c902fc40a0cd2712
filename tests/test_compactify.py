"""Replacing the layers of modules that other people wrote."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ccn_deploy.errors import UsageError
from ccn_deploy.layers import CompactConv2d, CompactLinear, compactify, left_plain
from tests.modules import ConvNeXtBlock, module
from tests.own_networks import ClassTokenViT, ResNet

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain(network: nn.Module) -> list[str]:
    return [n for n, m in network.named_modules() if type(m) in (nn.Conv2d, nn.Linear)]


def by_hand(layer: nn.Module, x: Tensor) -> Tensor:
    """Equation 6 with unfold, in the layer's own dtype; groups one after another."""
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, nn.Linear):
        return x @ weight.T / (x.norm(dim=-1, keepdim=True) + 0.01) + (0 if bias is None else bias)
    parts, out = [], len(weight) // layer.groups
    for group, part in enumerate(x.chunk(layer.groups, dim=1)):
        patches = nn.functional.unfold(
            part, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )
        kernels = weight[group * out : (group + 1) * out].flatten(1)
        parts.append(kernels @ patches / (patches.norm(dim=1, keepdim=True) + 0.01))
    y = torch.cat(parts, dim=1) + (0 if bias is None else bias[:, None])
    rows = (
        x.shape[2] + 2 * layer.padding[0] - layer.dilation[0] * (layer.kernel_size[0] - 1) - 1
    ) // layer.stride[0] + 1
    return y.unflatten(2, (rows, -1))


class ByHand(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = [layer]  # hidden from torch

    def forward(self, x: Tensor) -> Tensor:
        return by_hand(self.layer[0], x)


def replaced_by_hand(network: nn.Module, names: list[str]) -> nn.Module:
    network = copy.deepcopy(network)
    for name in names:
        owner, _, child = name.rpartition(".")
        parent = network.get_submodule(owner)
        setattr(parent, child, ByHand(getattr(parent, child)))
    return network


NETWORKS = {
    "resnet": lambda: ResNet(blocks=(2, 2)),
    "convnext": lambda: module("convnext"),
    "mobilenet": lambda: module("mobilenet"),
    "vit": lambda: module("vit"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_becomes_equation_6_and_keeps_its_parameters(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval().double()
    names, before = plain(network), dict(network.named_parameters())
    expected = replaced_by_hand(network, names)
    assert compactify(network) == names
    assert plain(network) == [] and left_plain(network) == []
    after = dict(network.named_parameters())
    assert after.keys() == before.keys() | {f"{n}.alpha" for n in names}
    assert all(after[n] is before[n] for n in before)
    assert all(after[f"{n}.alpha"].item() == 1.0 for n in names)
    assert not any(m.training for m in network.modules())
    images = IMAGES.double()
    with torch.no_grad():
        got, want = network(images), expected(images)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * float(want.abs().max()))


def test_a_convnext_block_has_a_norm_a_channel_in_its_depthwise_layer() -> None:
    block = ConvNeXtBlock()
    assert compactify(block) == ["mix", "up", "down"]
    assert isinstance(block.mix, CompactConv2d) and isinstance(block.up, CompactLinear)
    assert block.mix.ones.shape == (16, 1, 7, 7)


@pytest.mark.parametrize(
    "where", ["last", ["fc"], lambda name, layer: isinstance(layer, nn.Linear)]
)
def test_a_choice_of_layers(where: object) -> None:
    network = ResNet()
    assert compactify(network, where) == ["fc"]  # type: ignore[arg-type]
    assert isinstance(network.fc, CompactLinear) and type(network.conv1) is nn.Conv2d


def test_names_come_back_in_the_modules_order_and_none_changes_nothing() -> None:
    network = ResNet()
    assert compactify(network, "none") == [] and compactify(network, []) == []
    assert compactify(network, {"fc": 0, "layer1.0.conv2": 0}) == ["layer1.0.conv2", "fc"]
    assert compactify(network, lambda name, layer: True) == plain(ResNet())[:2] + [
        n for n in plain(ResNet())[3:] if n != "fc"
    ]


def test_no_random_number_is_drawn() -> None:
    network = ResNet()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    compactify(network)
    assert torch.equal(torch.rand(1), expected)


def test_dtype_mode_and_freezing_are_the_layers() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2))
    network.to(torch.bfloat16).requires_grad_(False)
    network[0].eval()
    compactify(network)
    assert network[0].alpha.dtype == network[0].ones.dtype == torch.bfloat16
    assert not network[0].alpha.requires_grad and network[0].bias is None
    assert not network[0].training and network[2].training


def test_a_layer_with_two_names_stays_one() -> None:
    shared = nn.Linear(4, 4)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    assert compactify(network, ["2"]) == ["0", "2"]
    assert network[0] is network[2] and isinstance(network[0], CompactLinear)


def test_transformer_layers_call_their_compact_parts_in_evaluation_too() -> None:
    torch.manual_seed(0)
    network = ClassTokenViT()
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    for block in network.blocks:
        block.self_attn.dropout = 0.0
    plain_logits = network.eval()(IMAGES)
    names = compactify(network)
    assert names == [
        "patches", "blocks.0.linear1", "blocks.0.linear2", "blocks.1.linear1", "blocks.1.linear2",
        "head",
    ]  # fmt: skip
    with torch.no_grad():
        evaluated = network.eval()(IMAGES)  # where torch would take its fused path
        trained = network.train()(IMAGES)
    assert torch.allclose(evaluated, trained, atol=1e-5)
    assert not torch.allclose(evaluated, plain_logits, atol=1e-2)
    assert left_plain(network) == [
        f"blocks.{i}.self_attn{n}"
        for i in (0, 1)
        for n in (" (MultiheadAttention)", ".out_proj (NonDynamicallyQuantizableLinear)")
    ]


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (["fcc"], "has no layer 'fcc'.*\n.*mean 'fc'"),
        (["layer1.0.conv3"], "\n.*'layer1.0.conv2' or 'layer1.0.conv1'|'layer1.0.conv1' or"),
        (["xyzzy"], "\n.*There are 7 such layers: conv1, .*, \\.\\.\\."),
        (["bn1"], "'bn1' is a BatchNorm2d and cannot"),
        ("fc", "Unknown choice of layers 'fc'"),
    ],
)
def test_a_name_that_is_none_is_refused(where: object, says: str) -> None:
    network = ResNet()
    with pytest.raises(UsageError, match=says):
        compactify(network, where)  # type: ignore[arg-type]
    assert plain(network) == plain(ResNet())


@pytest.mark.parametrize("where", ["all", "last"])
def test_nothing_to_replace_is_no_success(where: str) -> None:
    with pytest.raises(UsageError, match="no layer that can be made compact"):
        compactify(nn.Sequential(nn.Flatten(), nn.ReLU()), where)
    with pytest.raises(UsageError, match="no layer that can be made compact"):
        compactify(nn.Linear(2, 2), where)  # cannot be replaced in place


def test_hooks_are_not_lost_silently() -> None:
    network = ResNet()
    network.fc.register_forward_hook(lambda layer, inputs, output: output * 2)
    with pytest.raises(UsageError, match="'fc' has hooks"):
        compactify(network)
    assert plain(network) == plain(ResNet())


def test_other_kinds_of_layers_are_named() -> None:
    class Own(nn.Conv2d):
        pass

    network = nn.Sequential(nn.Conv2d(3, 4, 1), Own(4, 4, 1), nn.ConvTranspose2d(4, 4, 1))
    assert compactify(network) == ["0"]
    assert left_plain(network) == ["1 (Own)", "2 (ConvTranspose2d)"]
