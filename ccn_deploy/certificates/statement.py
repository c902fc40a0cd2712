"""What a certificate says: an in-toto statement whose predicate is the claim and what it rests on.

The outer form is in-toto's Statement v1
(https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md): subjects are files by
their SHA-256, the predicate is ours. Imports nothing that production does not have.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any, Literal

import msgspec

from ccn_deploy.records import Count, Digest, Record, Text
from ccn_deploy.targets import Target
from ccn_deploy.verdict import Verdict

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:ccn-deploy:certificate:1"

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Moment = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
"""A time in UTC, to the second: ``"2026-12-01T09:30:00Z"``."""

ShortVerdict = Literal["pass", "fail", "inconclusive"]


def moment(time: datetime) -> str:
    """Return a time as a :data:`Moment`."""
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def time_of(text: str) -> datetime:
    """Return the time that a :data:`Moment` stands for.

    Raises:
        ValueError: There is no such day or hour.
    """
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)


class FileDigest(Record, frozen=True):
    """The one digest that subjects have."""

    sha256: Digest


class Subject(Record, frozen=True):
    """Something that the statement is about, in-toto's ResourceDescriptor.

    Attributes:
        name: Path in the bundle, or the data set as ``data:NAME/SPLIT``.
        digest: Of its bytes; of a data set, as evidence has it.
    """

    name: Text
    digest: FileDigest


class Proportion(Record, frozen=True):
    """A count of images and what it shows.

    Attributes:
        count: Images that are right, or stay right.
        n: All images.
        ci95: Two-sided interval of the proportion (Clopper and Pearson).
    """

    count: Count
    n: Count
    ci95: tuple[Share, Share]

    @property
    def value(self) -> float:
        """The proportion; 0 without images."""
        return self.count / self.n if self.n else 0.0


class ThreatModel(Record, frozen=True):
    """What an attacker may do.

    Attributes:
        norm: Of the perturbation.
        epsilon: Its largest size in pixel values of [0, 1]; None where the smallest perturbation
            that changes the label is looked for.
        box: The values that pixels may take.
        knowledge: What the attacker has of the network: gradients (white box), scores or labels
            (black box); of an audit, the most that any stage has.
        goal: What the attacker wants.
        taxonomy: Its class in NIST AI 100-2 (E2025).
    """

    norm: Literal["linf", "l2"]
    epsilon: Annotated[float, msgspec.Meta(gt=0)] | None
    box: tuple[float, float]
    knowledge: Literal["gradients", "scores", "labels"]
    goal: Text
    taxonomy: Text


class AttackResult(Record, frozen=True):
    """One attack on reference and target, each attacked by itself.

    Attributes:
        label: Its name and strength in evidence, for example ``"linf-0.1-audit"``.
        title: What tables call it.
        threat: What the attacker may do.
        settings: Its parameters by name; of an audit, by stage.
        distance: For an attack without an epsilon, the distance at which accuracy is counted.
        reference: Images that stay right on the reference.
        target: Images that stay right on what is deployed.
        invalid: Images for which the attack returned no legal image.
        queries: Logits and gradients that the attack asked the target for, of one image each.
        drop_upper95: One-sided 95 % upper bound of the drop from reference to target.
        verdict: Whether the target is no worse than the reference by more than is allowed.
    """

    label: Text
    title: Text
    threat: ThreatModel
    settings: dict[str, Any]
    distance: float | None
    reference: Proportion
    target: Proportion
    invalid: Count
    queries: tuple[Count, Count]
    drop_upper95: float
    verdict: ShortVerdict


class ParityFigures(Record, frozen=True):
    """How far a target is from the float64 reference.

    Attributes:
        verdict: By the policy of its precision.
        checks: Comparisons judged.
        failures: Those that do not pass.
        largest_relative: Largest error of a logit, over the scale of the logits.
        largest_units: Largest error in units of what rounding explains.
        allowed_relative: What is allowed of the former.
        allowed_units: And of the latter.
        gradients: Whether slopes were compared too.
    """

    verdict: ShortVerdict
    checks: Count
    failures: Count
    largest_relative: float | None
    largest_units: float | None
    allowed_relative: float
    allowed_units: float
    gradients: bool


class SanityNote(Record, frozen=True):
    """What a reader of the numbers must know.

    Attributes:
        kind: The finding's name.
        word: How grave it is.
        undermines: Whether nothing passes on these numbers.
        sentence: For people.
    """

    kind: Text
    word: Text
    undermines: bool
    sentence: Text


class ClaimResult(Record, frozen=True):
    """A claim, by the name that ``pytest --pyargs ccn_deploy.certification`` gives it.

    Attributes:
        name: For example ``"robust[apgd@0.1>=0.55]"``.
        verdict: ``"void"`` where there is nothing to judge.
        measured: The numbers, one line.
        bound: What they had to keep to, one line.
        waived: Whether it does not hold, and a waiver lets it.
    """

    name: Text
    verdict: Literal["pass", "fail", "inconclusive", "void"]
    measured: Text
    bound: Text
    waived: bool = False


class Hardware(Record, frozen=True):
    """The machine that a target was measured on, as far as it decides what is computed.

    Attributes:
        system: ``"linux"``, ``"windows"`` or ``"darwin"``.
        architecture: ``"x86_64"`` or ``"aarch64"``.
        processor: What it calls itself.
        instruction_sets: Those by which libraries choose their kernels.
        gpu: Name of the GPU; empty for a target on the CPU.
        compute_capability: Of the GPU; empty likewise.
        driver: Of NVIDIA; empty likewise.
    """

    system: Text
    architecture: Text
    processor: Text
    instruction_sets: tuple[Text, ...]
    gpu: Text = ""
    compute_capability: Text = ""
    driver: Text = ""


class CertifiedTarget(Record, frozen=True):
    """One runtime in one precision, executing one program on one machine.

    Attributes:
        runtime: A name in :data:`ccn_deploy.targets.RUNTIMES`.
        precision: A name in :data:`ccn_deploy.targets.PRECISIONS`.
        program: Path in the bundle of the graph or engine that it executes.
        program_sha256: Of that file.
        library: The distribution that executes it.
        library_version: Its version; of engines, the one that is loaded.
        measured_with: All libraries that shaped the numbers, by name.
        hardware: Where it was measured.
        gradient: Where gradients of the attacks came from: native, reference or transfer.
        origin: Whether evidence was measured by the run that certified or read, and what asking
            again about it showed.
        verdict: Of all its claims, waivers counted.
        clean: Accuracy without an attack, of reference and target.
        worst: The least that any judged attack at the largest strength left of the target;
            None without one.
        worst_attack: Which attack that was, for people; empty without one.
        results: Attack by attack.
        parity: Of the target with the float64 reference.
        claims: Everything that was judged.
        findings: What the numbers give away of themselves.
    """

    runtime: Text
    precision: Text
    program: Text
    program_sha256: Digest
    library: Text
    library_version: Text
    measured_with: dict[str, str]
    hardware: Hardware
    gradient: Text
    origin: Text
    verdict: ShortVerdict
    clean: tuple[Proportion, Proportion]
    worst: Proportion | None
    worst_attack: Text
    results: tuple[AttackResult, ...]
    parity: ParityFigures
    claims: tuple[ClaimResult, ...]
    findings: tuple[SanityNote, ...]

    @property
    def target(self) -> Target:
        """Runtime and precision."""
        return Target(self.runtime, self.precision)


class DataFacts(Record, frozen=True):
    """The images that everything was measured on.

    Attributes:
        name: Of the data set.
        split: Of it.
        sha256: Of its images and labels, as evidence has it.
        samples: Images attacked.
        selection: How they were chosen.
        seed: Of that, and of the attacks.
    """

    name: Text
    split: Text
    sha256: Text
    samples: Count
    selection: Text
    seed: Count


class PolicyFacts(Record, frozen=True):
    """What was demanded, and whether that was fixed before the results were known.

    Attributes:
        name: Of the policy.
        sha256: Of its canonical form, see :mod:`ccn_deploy.certification.policy`.
        document: All of it.
        committed: When it was committed to this bundle; None if it never was.
        commitment: SHA-256 of the commitment's file; empty likewise.
        before_results: Whether every batch of evidence carries the commitment in its seal, so that
            the thresholds stood before any result did.
    """

    name: Text
    sha256: Digest
    document: dict[str, Any]
    committed: Moment | None
    commitment: Text
    before_results: bool


class WaiverUse(Record, frozen=True):
    """A waiver of the policy, and whether something rests on it.

    Attributes:
        claim: Name of the claim that need not hold.
        reason: Why.
        owner: Who answers for it.
        expires: Last day, as ``"2027-01-31"``.
        used: Whether the claim does not hold, so that the verdict rests on the waiver.
        target: Runtime and precision that it is about; empty for all.
    """

    claim: Text
    reason: Text
    owner: Text
    expires: Text
    used: bool
    target: Text = ""

    def lets(self, claim: ClaimResult, target: Target) -> bool:
        """Whether a claim about a target need not hold because of it."""
        return claim.waived and claim.name == self.claim and self.target in ("", str(target))


class LineageFact(Record, frozen=True):
    """Whether a graph was derived again.

    Attributes:
        path: In the bundle.
        status: ``"same"``, or why it could not be said.
    """

    path: Text
    status: Text


class EvidenceFile(Record, frozen=True):
    """A file of evidence; what is appended to it later is none of this certificate's.

    Attributes:
        path: Relative to the bundle.
        bytes: How long it was.
        sha256: Of so many bytes.
    """

    path: Text
    bytes: Count
    sha256: Digest


class Certificate(Record, frozen=True):
    """The predicate: what is claimed, for how long, and everything that it rests on.

    Attributes:
        claim: What was shown, or that it was not; one sentence for a manager.
        tier: Empirical: the strongest attack that was tried got no further. No proof.
        verdict: Of all targets.
        assumptions: What the claim takes for granted, one sentence each.
        not_claimed: What a reader could take it for and must not, one sentence each.
        network: Title, shape of images, number of classes, and where it came from, by topic.
        bundle: SHA-256 that the manifest has of itself: the identity of what is served.
        targets: What was certified, in the policy's order.
        data: What it was measured on.
        policy: What was demanded.
        waivers: What need not hold.
        lineage: Which graphs were derived again.
        evidence: The files that the results were read from.
        intended_use: As the policy has it; ``fallback`` and ``monitoring`` likewise.
        tester: Who measured.
        issued: When.
        expires: When it ends.
        versions: Of this package, and of Python.
    """

    claim: Text
    tier: Literal["empirical"]
    verdict: ShortVerdict
    assumptions: tuple[Text, ...]
    not_claimed: tuple[Text, ...]
    network: dict[str, str]
    bundle: Digest
    targets: tuple[CertifiedTarget, ...]
    data: DataFacts
    policy: PolicyFacts
    waivers: tuple[WaiverUse, ...]
    lineage: tuple[LineageFact, ...]
    evidence: tuple[EvidenceFile, ...]
    intended_use: Text
    fallback: Text
    monitoring: Text
    tester: Text
    issued: Moment
    expires: Moment
    versions: dict[str, str]

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("a certificate needs a target")
        if time_of(self.expires) < time_of(self.issued):
            raise ValueError("it ends before it begins")
        for target in self.targets:
            _ = target.target  # an unknown runtime or precision is an error

    @property
    def outcome(self) -> Verdict:
        """The verdict, as the type."""
        return Verdict(self.verdict)


class Statement(Record, frozen=True, rename={"type_": "_type", "predicate_type": "predicateType"}):
    """The document that is signed.

    Attributes:
        subject: The manifest, the reference graph, each program, and the data.
        predicate: The claim.
    """

    subject: Annotated[tuple[Subject, ...], msgspec.Meta(min_length=1)]
    predicate: Certificate
    type_: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
    predicate_type: Literal["urn:ccn-deploy:certificate:1"] = "urn:ccn-deploy:certificate:1"
