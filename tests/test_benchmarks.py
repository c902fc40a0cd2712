"""What the benchmark says of other people's attacks is measured right."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks.peers import libraries, section
from benchmarks.peers.programs import Program
from benchmarks.peers.scores import score
from benchmarks.timing import Times, in_turn


def brightness(images: Tensor) -> Tensor:
    """Class 1 where the mean pixel is above a half."""
    mean = images.flatten(1).mean(dim=1)
    return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def flat(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


CLEAN, LABELS = flat(0.4, 0.4, 0.6, 0.6), torch.tensor([0, 0, 1, 1])


def test_only_images_that_fool_and_are_near_count_as_adversarial() -> None:
    found = score(brightness, CLEAN, LABELS, flat(0.55, 0.45, 0.45, 0.1), epsilon=0.2)
    assert found.adversarial == 0.5  # fooled, held, fooled, too far
    assert found.l2 == pytest.approx(0.3)
    assert found.rho == pytest.approx((0.15 / 0.4 + 0.15 / 0.6) / 2)


def test_images_out_of_the_box_and_nan_fool_nobody_and_black_ones_are_counted() -> None:
    attacked = flat(1.2, math.nan, 0.0, 0.6)
    found = score(brightness, CLEAN, LABELS, attacked, epsilon=None)
    assert (found.adversarial, found.black) == (0.25, 1)  # the black image does fool this victim


def test_programs_run_in_turn_and_ratios_are_of_the_same_round() -> None:
    ran: list[str] = []
    works = {name: lambda name=name: ran.append(name) or name for name in "abc"}
    found = in_turn(works, {"a": 2, "b": 3, "c": 1})
    assert "".join(ran) == "abcabb"
    assert [len(found[name].seconds) for name in "abc"] == [2, 3, 1]
    assert found["b"].result == "b"
    # 1 s against 4 s in a good round, 10 s against 20 s in a bad one; the third has no partner.
    assert Times([1.0, 10.0, 1.0]).faster_than(Times([4.0, 20.0])) == 3.0


def test_a_library_that_is_missing_is_a_row_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert libraries.library("no_such_attack_library") is None
    assert libraries.library("no_such_attack_library.attacks") is None

    class Network:
        tuned = staticmethod(brightness)

        def __init__(self, _: object) -> None: ...

    def attack(_: Network) -> list[Program]:
        here = Program("Foolbox", lambda x, y: 1 - x, brightness, rounds=1)
        few = Program("slow", lambda x, y: 1 - x, brightness, rounds=1, images=2)
        return [here, Program("gone", None, brightness), few]

    class Subjects:
        bundles = dict.fromkeys(section.DEFENSES)
        images, labels = CLEAN.numpy(), LABELS.numpy()

    monkeypatch.setattr(section, "Network", Network)
    monkeypatch.setattr(section, "_warm_up", lambda *_: None)
    monkeypatch.setattr(section, "BASES", ("Foolbox",))
    rows = section._rows(Subjects(), 1, {"A": attack}, 4, 0.2, lambda s: (f"{s.adversarial}",))
    (foolbox, gone, slow), _ = zip(*[iter(rows)] * 3, strict=True)
    assert (foolbox[:4], foolbox[-1]) == (("SM", "A", "Foolbox", "4"), "1.0")
    assert gone == ("SM", "A", "gone", "not installed")
    assert (slow[:4], slow[-1]) == (("SM", "A", "slow", "2"), "1.0")


def test_placeholders_are_gone_after_the_import() -> None:
    with libraries._placeholders("no_such", "no_such.models"):
        import no_such  # type: ignore[import-not-found]

        assert no_such.models is sys.modules["no_such.models"]
    assert not {"no_such", "no_such.models"} & sys.modules.keys()


def test_sections_are_chosen_by_name() -> None:
    assert command._chosen(None) == list(command.SECTIONS)
    assert command._chosen("peers, memory") == ["memory", *command.PEERS]
    with pytest.raises(KeyError, match="speed"):
        command._chosen("speed")
