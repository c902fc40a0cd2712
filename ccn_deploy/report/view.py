"""What stands on the page, before it is set as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ccn_deploy.report.examples import Example
from ccn_deploy.report.figures import Curve
from ccn_deploy.tables import Mark, Table


@dataclass(frozen=True)
class Fact:
    """A name and what it names; ``code`` for what is read letter by letter."""

    name: str
    value: str
    note: str = ""
    code: bool = False


@dataclass(frozen=True)
class Note:
    """What a reader of the numbers should know; the word says how grave it is."""

    word: str
    text: str


@dataclass(frozen=True)
class Target:
    """What was found of one target.

    Attributes:
        name: Runtime and precision.
        verdict: Of all comparisons with the reference.
        reason: In a sentence.
        curves: Accuracy against the size of the perturbation.
        tables: The comparisons.
    """

    name: str
    verdict: Mark
    reason: str
    curves: Sequence[Curve]
    tables: Sequence[Table]


@dataclass(frozen=True)
class Page:
    """Everything on the page, in its order.

    Attributes:
        verdict: In a few words that promise no more than what was shown.
        reason: What was shown, or why it was not.
        target: What was measured, in the heading.
        precisions: Several precisions side by side, if there are several.
        targets: One for each precision.
        examples: Images and what attacks made of them, with the answers of ``pictured``.
        class_names: Of the answers.
        pictured: The name of a target.
    """

    verdict: Mark
    reason: str
    model: str
    target: str
    reference: str
    facts: Sequence[Fact]
    precisions: Table | None
    targets: Sequence[Target]
    parity: Table | None
    examples: Sequence[Example]
    class_names: Sequence[str]
    pictured: str
    findings: Sequence[Note]
    command: str
    provenance: Sequence[Fact]
    digests: Sequence[Fact]
    version: str
