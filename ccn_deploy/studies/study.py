"""What a study is: which networks, asked what, in a table. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ccn_deploy.attacks.spec import AttackSpec
from ccn_deploy.studies.published import Numbers

Quantity = Literal["clean", "accuracy", "rho", "rho-percent", "l2", "success"]
"""What a cell shows of a network under an attack: accuracy without it and under it (percent), the
mean relative and absolute L2 distance (paper, equation 9; tables 11 and 12), and for how many
images it found something (percent)."""

DISTANCES = ("rho", "rho-percent", "l2")
"""The quantities that are no percentages."""


@dataclass(frozen=True)
class System:
    """A network of a study: how it is trained, or the bundle that is there.

    Attributes:
        defense: A name in :data:`ccn_deploy.defenses.DEFENSES`.
        architecture: A name in :data:`ccn_deploy.architectures.ARCHITECTURES`; the one for the
            data's images if None.
        compact: Names of its compact layers, where the defense does not say it.
        adversarial: The kind of adversarial training; None for none.
        recipe: A name in :data:`ccn_deploy.trainers.recipes.RECIPES`; the budget's if None.
        bundle: A bundle that is measured as it is; nothing is trained then.
    """

    defense: str = ""
    architecture: str | None = None
    compact: tuple[str, ...] | None = None
    adversarial: str | None = None
    recipe: str | None = None
    bundle: Path | None = None

    @property
    def name(self) -> str:
        """Name of its directories, such as ``"sm-compact-conv1"``."""
        if self.bundle is not None:
            return self.bundle.name
        compact = ["compact", *self.compact] if self.compact else []
        parts = [self.defense, self.architecture, *compact, self.adversarial, self.recipe]
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Attacked:
    """Measured by attacking the deployed network itself.

    Attributes:
        spec: The attack.
        quantity: What is shown.
        d: Largest relative perturbation of an attack without epsilon, for ``"accuracy"``.
    """

    spec: AttackSpec
    quantity: Quantity = "accuracy"
    d: float | None = None

    @property
    def strength(self) -> float | None:
        """Epsilon, or d; None without an attack, or where no strength is asked."""
        return None if self.quantity == "clean" else self.spec.epsilon or self.d


@dataclass(frozen=True)
class FromSubstitute:
    """Accuracy under FGSM on a substitute that was trained on the network's labels."""

    epsilon: float


@dataclass(frozen=True)
class Transferred:
    """Accuracy under an attack that was made on another network of the study."""

    spec: AttackSpec
    crafted_on: System


Measure = Attacked | FromSubstitute | Transferred


@dataclass(frozen=True)
class Column:
    """What is asked of every network.

    Attributes:
        head: Of the column.
        measure: How it is answered.
        extra: Whether the paper has no such column.
    """

    head: str
    measure: Measure
    extra: bool = False

    @property
    def is_percentage(self) -> bool:
        """Whether its numbers are percentages."""
        return not (isinstance(self.measure, Attacked) and self.measure.quantity in DISTANCES)


@dataclass(frozen=True)
class Claim:
    """What the paper says of a column, to be held against our numbers.

    Attributes:
        text: In words.
        column: Head of the column.
        order: Groups of rows: every number of one is above every number of the next.
        factor: By how much the first group must exceed the last at least; 1 for just larger.
    """

    text: str
    column: str
    order: tuple[tuple[str, ...], ...]
    factor: float = 1.0

    def holds(self, values: Mapping[str, float | None]) -> bool | None:
        """Return whether numbers by row agree; None where one is missing."""
        groups = [[values.get(row) for row in rows] for rows in self.order]
        numbers = [[value for value in group if value is not None] for group in groups]
        if numbers != groups:
            return None
        falling = all(min(a) > max(b) for a, b in itertools.pairwise(numbers))
        return falling and min(numbers[0]) >= self.factor * max(numbers[-1])


def ranking(*rows: str) -> tuple[tuple[str, ...], ...]:
    """Return the order of a claim in which every group is one row."""
    return tuple((row,) for row in rows)


@dataclass(frozen=True)
class Study:
    """A table: networks down, questions across.

    Attributes:
        name: What the user types, such as ``"table1"``.
        title: What it shows.
        rows: The network of every row, by what the row is called.
        columns: One a question.
        published: The paper's numbers by row, in the order of the columns that are not extra.
        claims: What the paper says of them.
        first: Head of the first column.
        ranked: Whether a leaderboard is made of it.
    """

    name: str
    title: str
    rows: Mapping[str, System]
    columns: tuple[Column, ...]
    published: Numbers = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    first: str = "Network"
    ranked: bool = False

    def paper(self, row: str, column: Column) -> float | None:
        """Return the paper's number for a cell, if it has one."""
        numbers = self.published.get(row, ())
        own = [c for c in self.columns if not c.extra]
        if column.extra or column not in own or own.index(column) >= len(numbers):
            return None
        return numbers[own.index(column)]


def systems_of(studies: Sequence[Study]) -> tuple[System, ...]:
    """Return every network that studies need, each once."""
    found: dict[System, None] = {}
    for study in studies:
        found.update(dict.fromkeys(study.rows.values()))
        for column in study.columns:
            if isinstance(column.measure, Transferred):
                found[column.measure.crafted_on] = None
    return tuple(found)
