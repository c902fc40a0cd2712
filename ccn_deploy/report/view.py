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
        precisions: Several precisions side by side, a table for each runtime that has several.
        targets: One for each runtime and precision.
        parity: What each computes of the reference, as far as that was measured.
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
    precisions: Sequence[Table]
    targets: Sequence[Target]
    parity: Sequence[Table]
    examples: Sequence[Example]
    class_names: Sequence[str]
    pictured: str
    findings: Sequence[Note]
    command: str
    provenance: Sequence[Fact]
    digests: Sequence[Fact]
    version: str


@dataclass(frozen=True)
class WorstCase:
    """What is left of a target if every attack counts: the number that a certificate is about.

    Attributes:
        target: Runtime and precision.
        verdict: On all that was demanded of it.
        percent: Of the images, such as ``"55.4"``; empty where no attack has a strength.
        interval: Both ends of its 95 % interval, in percent.
        count: Images that stay right.
        n: All images.
        attack: Which attacks, and how strong.
    """

    target: str
    verdict: Mark
    percent: str = ""
    interval: tuple[float, float] = (0.0, 0.0)
    count: int = 0
    n: int = 0
    attack: str = ""


@dataclass(frozen=True)
class Demand:
    """A claim, what it asks for, and what was reached.

    Attributes:
        name: As pytest has it.
        demanded: The bound, one line.
        reached: The numbers, one line.
        mark: Met, not met, or waived.
        waiver: Who let it go, why and until when; empty without one.
    """

    name: str
    demanded: str
    reached: str
    mark: Mark
    waiver: str = ""


@dataclass(frozen=True)
class Demands:
    """Everything that was demanded of a target.

    Attributes:
        target: Runtime and precision.
        summary: How many are met, in a sentence.
        first: What does not hold, and then the thresholds of accuracy.
        others: All that are met besides; folded on a screen.
    """

    target: str
    summary: str
    first: Sequence[Demand]
    others: Sequence[Demand]


@dataclass(frozen=True)
class CertificatePage(Page):
    """A page that begins with a certificate.

    Attributes:
        worst: One for each target, the largest figures on the page.
        not_claimed: What a reader could take it for and must not; beside the figures.
        assumptions: What it takes for granted.
        use: What the network is for, what happens where it fails, how it is watched.
        demands: One for each target.
        check: The command that checks the certificate.
        machines: What was measured on, fact by fact, with a title for each target.
    """

    worst: Sequence[WorstCase]
    not_claimed: Sequence[str]
    assumptions: Sequence[str]
    use: Sequence[Fact]
    demands: Sequence[Demands]
    check: str
    machines: Sequence[tuple[str, Sequence[Fact]]]
