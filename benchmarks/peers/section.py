"""The tables: how fast each library attacks, and how well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.peers import programs
from benchmarks.peers.programs import Network, Program
from benchmarks.peers.scores import Score, score
from benchmarks.subjects import DEFENSES, Subjects
from benchmarks.tables import table
from benchmarks.timing import Times, in_turn

BATCH = 256
CW_IMAGES = 8
"""As many as the paper's setting allows in minutes: 6000 forward and backward passes an image."""

BASES = ("Foolbox", "Foolbox, tuned")
"""The programs that the others are measured in."""

_SPEED = ("network", "attack", "program", "images", "images/s", *(f"in {b}'s" for b in BASES))


def bounded(subjects: Subjects, rounds: int) -> Iterator[str]:
    """FGSM and PGD at epsilon 0.2 from the true labels; the verdict is the robust accuracy."""

    def verdict(found: Score) -> tuple[str, ...]:
        return (f"{1 - found.adversarial:.1%}",)

    attacks = {"FGSM": programs.fgsm, "PGD-40": programs.pgd}
    rows = _rows(subjects, rounds, attacks, BATCH, programs.EPSILON, verdict)
    return table((*_SPEED, "robust accuracy"), rows)


def deepfool(subjects: Subjects, rounds: int) -> Iterator[str]:
    """DeepFool from the model's own labels."""
    return _smallest(subjects, rounds, {"DeepFool": programs.deepfool}, BATCH)


def cw(subjects: Subjects, rounds: int) -> Iterator[str]:
    """C&W from the model's own labels, on few images."""
    return _smallest(subjects, rounds, {"C&W": programs.cw}, CW_IMAGES)


Attack = Callable[[Network], Iterator[Program]]


def _smallest(
    subjects: Subjects, rounds: int, attacks: dict[str, Attack], images: int
) -> Iterator[str]:
    def verdict(found: Score) -> tuple[str, ...]:
        share = f"{found.adversarial:.1%}"
        return share, f"{found.rho:.4f}", f"{found.l2:.3f}", f"{found.black}"

    rows = _rows(subjects, rounds, attacks, images, None, verdict)
    return table((*_SPEED, "adversarial", "mean rho", "mean L2", "black"), rows)


def _rows(
    subjects: Subjects,
    rounds: int,
    attacks: dict[str, Attack],
    images: int,
    epsilon: float | None,
    verdict: Callable[[Score], tuple[str, ...]],
) -> Iterator[tuple[str, ...]]:
    x = torch.from_numpy(subjects.images[:images])
    for defense in DEFENSES:
        network = Network(subjects.bundles[defense])
        y = torch.from_numpy(subjects.labels[:images])
        if epsilon is None:
            with torch.no_grad():
                y = network.tuned(x).argmax(dim=1)
        _warm_up(network, x)
        for title, attack in attacks.items():
            everyone = list(attack(network))
            times = _measure(everyone, x, y, rounds)
            for program in everyone:
                cells = defense.upper(), title, _named(program)
                if program.name not in times:
                    yield *cells, "not installed"
                    continue
                n, speed = _share(program, x), times[program.name]
                found = score(program.victim, x[:n], y[:n], speed.result, epsilon)
                ratios = (f"{_ratio(speed, n, times[base], images):.2f}" for base in BASES)
                yield *cells, f"{n}", _rate(n / speed.median), *ratios, *verdict(found)


def _measure(everyone: list[Program], x: Tensor, y: Tensor, rounds: int) -> dict[str, Times]:
    """Run all programs that are installed in turn."""
    present = [program for program in everyone if program.craft is not None]
    works = {program.name: partial(_craft, program, x, y) for program in present}
    return in_turn(works, {program.name: min(rounds, program.rounds) for program in present})


def _craft(program: Program, x: Tensor, y: Tensor) -> Tensor:
    assert program.craft is not None
    n = _share(program, x)
    return program.craft(x[:n].clone(), y[:n].clone())


def _ratio(program: Times, images: int, base: Times, base_images: int) -> float:
    """Return how many images it attacks while the base attacks one."""
    return program.faster_than(base) * images / base_images


def _share(program: Program, x: Tensor) -> int:
    return min(len(x), program.images or len(x))


def _named(program: Program) -> str:
    return f"{program.name} ({program.note})" if program.note else program.name


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:.0f}" if images_per_second >= 100 else f"{images_per_second:.3g}"


def _warm_up(network: Network, x: Tensor) -> None:
    """Open sessions and fill caches before anything is timed."""
    for program in programs.fgsm(network):
        if program.craft is not None:
            program.craft(x[:32].clone(), network.tuned(x[:32]).argmax(dim=1))
