"""Factories and weights as users have them, right and wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ccn_deploy.errors import UsageError
from ccn_deploy.exporters.sources.module import input_shape_of
from ccn_deploy.factory import load_factory, load_weights
from tests.own_networks import ResNet

FILE = str(Path(__file__).with_name("own_networks.py"))


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("place", ["tests.own_networks", FILE])
def test_a_factory_in_a_package_or_a_file(place: str) -> None:
    assert load_factory(f"{place}:resnet").fc.out_features == 10
    assert load_factory(f"{place}:resnet", classes=4).fc.out_features == 4
    assert load_factory(f"{place}:digits", classes=3).fc.out_features == 3  # num_classes
    assert load_factory(f"{place}:ResNet", classes=2).fc.out_features == 2
    assert isinstance(load_factory(f"{place}:vit", classes=7), nn.Module)  # takes none
    assert isinstance(load_factory(f"{place}:a_module"), nn.Sequential)


def test_a_file_may_import_its_neighbours_and_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text("WIDTH = 3\n")
    file = tmp_path / "json.py"  # a name that is taken
    file.write_text("from torch import nn\nimport my_parts\ndef make(): return nn.Linear(2, 3)\n")
    assert load_factory(f"{file}:make").out_features == 3
    import json

    assert json.dumps([1]) == "[1]"


def test_a_module_of_this_directory_that_is_not_installed_is_pointed_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets").mkdir()
    (tmp_path / "my_nets" / "small.py").write_text("from torch import nn\nnet = nn.Linear(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_factory("my_nets.small:net")
    assert caught.value.hint == "Give the file: my_nets/small.py:net"
    assert load_factory("my_nets/small.py:net").out_features == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet", "names no factory.\nGive package.module:factory or"),
        (":resnet", "names no factory"),
        ("missing.py:resnet", r"no file missing\.py"),
        ("no_such_package:resnet", "no_such_package cannot be imported: ModuleNotFoundError"),
        (f"{FILE}:resnt", "has no 'resnt'.\nIt has: BasicBlock, ResNet"),
        (f"{FILE}:a_number", "is a int, which cannot be called"),
        (f"{FILE}:no_module", r"returns a int, not a torch\.nn\.Module"),
        (f"{FILE}:raises", r"called with \(\): RuntimeError: no such backbone\.\n"),
        (f"{FILE}:digits", r"digits\(\) missing 1 required positional argument: 'num_classes'"),
    ],
)
def test_a_wrong_factory_is_refused_in_two_lines(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        load_factory(name)
    assert len(str(caught.value).splitlines()) == 2 and caught.value.exit_code == 2


def test_a_file_that_raises(tmp_path: Path) -> None:
    file = tmp_path / "broken_network.py"
    file.write_text("import torch\n1 / 0\n")
    for _ in range(2):
        with pytest.raises(UsageError, match="raises when it is imported: ZeroDivisionError"):
            load_factory(f"{file}:make")
    file.write_text("import no_such_thing_at_all\n")
    with pytest.raises(UsageError, match="No module named 'no_such_thing_at_all'"):
        load_factory(f"{file}:make")
    file.write_text("def make(:\n")
    with pytest.raises(UsageError, match="SyntaxError"):
        load_factory(f"{file}:make")


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return ResNet()


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "module.", "both", "old"])
def test_forms_of_weights(form: str, network: nn.Module, tmp_path: Path) -> None:
    state: dict[str, Any] = network.state_dict()
    if form in ("module.", "both"):
        state = {f"module.{name}": value for name, value in state.items()}
    if form == "old":
        state = {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}
    if form in ("state_dict", "model", "both"):
        state = {"model" if form == "model" else "state_dict": state, "epoch": 3}
    torch.save(state, tmp_path / "w.pth")
    torch.manual_seed(2)
    other = ResNet()
    assert not same(other, network)
    changes = load_weights(other, tmp_path / "w.pth")
    assert same(other, network)
    assert len(changes) == {"plain": 0, "old": 0, "both": 2}.get(form, 1)


def test_safetensors(network: nn.Module, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    other = ResNet(blocks=(1, 1))
    assert load_weights(other, tmp_path / "w.safetensors") == ()
    assert same(other, network)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("EVIL",)


def test_nothing_in_a_file_is_executed(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (network, Evil(), {"state_dict": Evil()}):
        torch.save(content, "w.pth")
        with pytest.raises(UsageError, match=r"running code .*\n.*weights_only=False"):
            load_weights(network, "w.pth")
    assert not Path("EVIL").exists()


def test_weights_that_do_not_fit_are_named_and_nothing_changes(
    network: nn.Module, tmp_path: Path
) -> None:
    before = {n: v.clone() for n, v in network.state_dict().items()}
    state = network.state_dict()
    state["head.weight"] = state.pop("fc.weight")
    state["conv1.weight"] = torch.zeros(8, 1, 3, 3)
    torch.save(state, tmp_path / "w.pt")
    says = (
        r"1 missing: fc\.weight; 1 spare: head\.weight; 1 of another shape: "
        r"conv1\.weight \[8, 1, 3, 3\] for \[8, 3, 3, 3\]"
    )
    with pytest.raises(UsageError, match=says):
        load_weights(network, tmp_path / "w.pt")
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("content", "suffix", "says"),
    [
        ([1, 2], ".pth", "holds a list, not a state dict"),
        ({"a": 1}, ".pth", "holds no state dict: 'a' is no tensor"),
        ({}, ".pt", "it is empty"),
        (b"garbage", ".pth", "or is damaged"),
        (b"garbage", ".safetensors", "is no safetensors file"),
        (b"garbage", ".h5", "of no known format"),
        (None, ".pth", "There is no file"),
    ],
)
def test_what_holds_no_weights(
    content: Any, suffix: str, says: str, network: nn.Module, tmp_path: Path
) -> None:
    file = tmp_path / f"w{suffix}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(UsageError, match=says) as caught:
        load_weights(network, file)
    assert len(str(caught.value).splitlines()) == 2


def test_the_shape_of_the_images() -> None:
    network = ResNet()
    assert input_shape_of(network, (24, 32)) == (3, 24, 32)
    with pytest.raises(UsageError, match="--input-size HxW"):
        input_shape_of(network)
    network.pretrained_cfg = {"input_size": (3, 224, 224)}
    assert input_shape_of(network) == (3, 224, 224)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="no convolution"):
        input_shape_of(flat, (2, 2))
    flat.input_shape = (1, 2, 2)
    assert input_shape_of(flat) == (1, 2, 2)
