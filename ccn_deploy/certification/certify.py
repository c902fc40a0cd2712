"""From a policy to a certificate: every claim judged, and what was shown written down.

The claims are those that ``pytest --pyargs ccn_deploy.certification`` runs, from the same
evidence, by the same functions.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import ccn_deploy
from ccn_deploy.attacks.spec import ATTACKS, AttackSpec, Norm
from ccn_deploy.bundle import MANIFEST, Bundle
from ccn_deploy.certificates.commitment import Commitment, commit, commitment_path
from ccn_deploy.certificates.statement import (
    AttackResult,
    Certificate,
    CertifiedTarget,
    ClaimResult,
    DataFacts,
    EvidenceFile,
    FileDigest,
    Hardware,
    LineageFact,
    ParityFigures,
    PolicyFacts,
    Proportion,
    SanityNote,
    Statement,
    Subject,
    ThreatModel,
    WaiverUse,
    moment,
)
from ccn_deploy.certificates.wording import HEADLINES
from ccn_deploy.certification.findings import Finding
from ccn_deploy.certification.policy import Policy
from ccn_deploy.certification.session import Certification, Options
from ccn_deploy.data import Dataset
from ccn_deploy.errors import StorageError, unknown
from ccn_deploy.machine import instruction_sets, processor, this_machine
from ccn_deploy.parity import ParityResult
from ccn_deploy.parity.comparison import finite_or_none
from ccn_deploy.parity.evidence import evidence_path as parity_path
from ccn_deploy.records import document
from ccn_deploy.robustness import RobustnessResult
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.collect import Progress
from ccn_deploy.robustness.evidence import Evidence
from ccn_deploy.robustness.kept_images import images_path
from ccn_deploy.robustness.non_inferiority import NonInferiorityTest
from ccn_deploy.robustness.non_inferiority import Proportion as Counted
from ccn_deploy.robustness.result import listed
from ccn_deploy.robustness.thresholds import Threshold
from ccn_deploy.robustness.worst_case import worst_case
from ccn_deploy.storage import sha256, sha256_file
from ccn_deploy.tables import NORMS
from ccn_deploy.targets import Target
from ccn_deploy.verdict import Verdict
from ccn_deploy.workers import Tell, Workers

if TYPE_CHECKING:
    from ccn_deploy.exporters.rederive import Rederived

ASSUMPTIONS = (
    "Images that are met are like those of the data that it was measured on.",
    "Attackers change pixels of the images that the program is given, within the bounds that are "
    "named, and nothing else.",
    "The machine that is served on executes the program as the machine named here did.",
    "The clock was right, and nobody measured a copy of the bundle before the policy was "
    "committed: neither can be seen from a file.",
)
"""What every certificate takes for granted."""


@dataclass(frozen=True)
class Certified:
    """A certificate, and what it was drawn up from.

    Attributes:
        statement: To be sealed and written.
        results: Of the attacks, one a target.
        parities: Of parity, likewise.
        dataset: What it was measured on.
    """

    statement: Statement
    results: tuple[RobustnessResult, ...]
    parities: tuple[ParityResult, ...]
    dataset: Dataset

    @property
    def certificate(self) -> Certificate:
        """The predicate of the statement."""
        return self.statement.predicate


def certify(
    bundle: Bundle,
    policy: Policy,
    *,
    now: Callable[[], datetime],
    tester: str = "",
    data_dir: Path | None = None,
    threads: int | None = None,
    recheck: str | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Certified:
    """Judge a bundle by a policy, collecting the evidence that is missing.

    The policy is committed to the bundle first, if it is not yet. Evidence is kept after every
    batch: interrupted and called again, this goes on where it was.

    Args:
        bundle: An open bundle.
        policy: What is demanded.
        now: The clock, in UTC.
        tester: Who measures; may be empty.
        data_dir: Where the files of a named data set are.
        threads: CPU threads; the runtime's own choice if None.
        recheck: How many images of evidence that was read to ask again about, ``"all"`` or a
            number; a tenth if None.
        jobs: Processes that collect evidence, an attack on a target each; cores are shared out
            among them unless ``threads`` is given. One a core if None, or a single one where a
            target is on a GPU. What is measured does not depend on it.
        progress: Told what is being measured, and how far it is.

    Raises:
        UsageError: The policy means nothing, a waiver has ended, or data do not fit the bundle.
        IntegrityError: A graph is not what its pass makes, or evidence was changed.
        RuntimeUnavailableError: A target cannot be had here.
        StorageError: The bundle cannot be written to.
    """
    from ccn_deploy.exporters.rederive import refuse_differences

    policy.check(now().date())
    cores = os.cpu_count() or 1
    on_gpu = any(target.on_gpu for target in policy.targets)
    jobs = jobs or (1 if on_gpu else cores)
    if jobs > 1 and threads is None:
        threads = max(1, cores // jobs)
    sessions = sessions_of(
        policy, bundle.path, progress, data_dir=data_dir, threads=threads, recheck=recheck
    )
    commitment = commit(bundle, policy.digest, now())
    lineage = sessions[0].lineage()
    refuse_differences(lineage)
    if jobs > 1:
        _collect(sessions, jobs, progress)
    judged = [_Judged.of(session, policy, bundle) for session in sessions]
    if any(session.note for session in sessions):
        raise StorageError(
            f"{bundle.path} cannot be written to, so that evidence could not be kept.",
            "Certify a copy of the bundle that can be; what a certificate rests on stays with it.",
        )
    targets = tuple(one.facts for one in judged)
    verdict = Verdict.all_of(Verdict(target.verdict) for target in targets)
    evidence = _files(bundle, judged, commitment)
    issued = now()
    first = judged[0].robustness.measurement
    digest = policy.digest
    certificate = Certificate(
        claim=_claim(bundle, verdict, judged),
        tier="empirical",
        verdict=verdict.value,
        assumptions=ASSUMPTIONS,
        not_claimed=tuple(_not_claimed(policy, judged, bundle, lineage)),
        network={
            "title": bundle.card.title,
            "images": "x".join(map(str, bundle.card.input_shape)),
            "classes": str(bundle.card.classes),
            **bundle.card.source.told(),
        },
        bundle=bundle.manifest.digest,
        targets=targets,
        data=DataFacts(
            name=first.dataset["name"],
            split=first.dataset["split"],
            sha256=first.dataset["digest"],
            samples=first.n,
            selection="the first images of the permutation that the seed gives",
            seed=first.seed,
        ),
        policy=PolicyFacts(
            name=policy.name,
            sha256=digest,
            document=document(policy),
            committed=commitment.at,
            commitment=commitment.digest,
            before_results=all(
                commitment.digest in found.policies for one in judged for found in one.evidence
            ),
        ),
        waivers=tuple(
            WaiverUse(
                claim=waiver.claim,
                reason=waiver.reason,
                owner=waiver.owner,
                expires=waiver.expires.isoformat(),
                used=any(
                    claim.waived and policy.waiver_for(claim.name, target.target) is waiver
                    for target in targets
                    for claim in target.claims
                ),
                target="" if isinstance(waiver.target, msgspec.UnsetType) else waiver.target,
            )
            for waiver in policy.waiver
        ),
        lineage=tuple(
            LineageFact(
                path=file.path,
                status=file.status if file.status == "same" else f"{file.status}: {file.why}",
            )
            for file in lineage
        ),
        evidence=evidence,
        intended_use=policy.intended_use,
        fallback=policy.fallback,
        monitoring=policy.monitoring,
        tester=tester,
        issued=moment(issued),
        expires=moment(issued + timedelta(days=policy.valid_days)),
        versions={"ccn-deploy": ccn_deploy.__version__, "python": platform.python_version()},
    )
    return Certified(
        Statement(subject=tuple(_subjects(bundle, judged)), predicate=certificate),
        tuple(one.robustness for one in judged),
        tuple(one.parity for one in judged),
        sessions[0].dataset(),
    )


def _collect(sessions: Sequence[Certification], jobs: int, progress: Progress | None) -> None:
    """Collect evidence in several processes, the longest pieces first."""
    lacking = [(session, session.missing()) for session in sessions]
    attacks = [
        (session.options, spec)
        for session, found in lacking
        for spec in dict.fromkeys(spec for spec, _ in found)
    ]
    if len(attacks) < 2:  # nothing to share out
        return
    attacks.sort(key=lambda piece: -piece[1].cost)
    parity: list[tuple[Options, AttackSpec | None]] = [(s.options, None) for s in sessions]
    every = [partial(_piece, options, spec) for options, spec in [*parity, *attacks]]
    shares = [0.0] * len(every)

    def heard(place: int, what: str, done: float, total: float) -> None:
        shares[place] = done / total if total else 1.0
        if progress is not None:
            progress(what, sum(shares), len(every))

    with Workers(min(jobs, len(every))) as workers:
        workers.run(every, heard)
    for session, found in lacking:
        session.told_measured([which for which, count in found.items() if count == 0])


def _piece(options: Options, spec: AttackSpec | None, tell: Tell) -> None:
    """Collect the evidence of one attack, or of parity, in a process of its own."""
    session = Certification(options, tell)
    if spec is None:
        session.parity_result()
    else:
        session.measure(spec)


def sessions_of(
    policy: Policy, bundle: Path, progress: Progress | None = None, **here: Any
) -> tuple[Certification, ...]:
    """Return the claims of a policy about a bundle, a session a target; nothing is measured.

    Args:
        policy: Checked already.
        bundle: Path of the bundle.
        progress: As for :class:`~ccn_deploy.certification.session.Certification`.
        here: What is this machine's to say, as :meth:`Policy.options` takes it.

    Raises:
        UsageError: A waiver is of a claim that nobody makes: it would let nothing pass, silently.
    """
    sessions = tuple(
        Certification(policy.options(bundle, target, **here), progress) for target in policy.targets
    )
    names = dict.fromkeys(name for session in sessions for name, _ in session.claims())
    for waiver in policy.waiver:
        if waiver.claim not in names:
            raise unknown("claim to waive", waiver.claim, names)
    return sessions


@dataclass(frozen=True)
class _Judged:
    """Everything that was found of one target."""

    facts: CertifiedTarget
    robustness: RobustnessResult
    parity: ParityResult
    worst: tuple[Norm, Mapping[float, Counted]]

    @property
    def evidence(self) -> list[Evidence]:
        """Of the attacks, on reference and target."""
        pairs = self.robustness.measurement.pairs
        return [side for pair in pairs for side in (pair.reference, pair.runtime)]

    @classmethod
    def of(cls, session: Certification, policy: Policy, bundle: Bundle) -> _Judged:
        """Judge every claim about a target; a waived one that does not hold counts as holding."""
        target = session.target
        claims = [
            _claim_result(name, check(), policy.waiver_for(name, target) is not None)
            for name, check in session.claims()
        ]
        result, parity = session.robustness_result(), session.parity_result()
        binding = [Verdict(c.verdict) for c in claims if c.verdict != "void" and not c.waived]
        runtime = result.measurement.pairs[0].runtime
        path, digest = _program(bundle, runtime, target)
        library, version = _library(target)
        norm, left = worst_case(result)
        strongest = max(left, default=None)
        facts = CertifiedTarget(
            runtime=target.runtime,
            precision=target.precision,
            program=path,
            program_sha256=digest,
            library=library,
            library_version=version,
            measured_with={k: v for k, v in runtime.header["versions"].items() if v is not None},
            hardware=_hardware(target),
            gradient=result.measurement.gradient,
            origin=result.origin,
            verdict=Verdict.all_of(binding).value,
            clean=(_proportion(result.clean.reference), _proportion(result.clean.runtime)),
            worst=None if strongest is None else _proportion(left[strongest]),
            worst_attack=""
            if strongest is None
            else f"{result.attacks}, within {strongest:g} in the {NORMS[norm]}",
            results=tuple(_results(result)),
            parity=_parity(parity),
            claims=tuple(claims),
            findings=tuple(
                SanityNote(
                    kind=found.code,
                    word=found.word,
                    undermines=found.undermines,
                    sentence=found.sentence,
                )
                for found in result.findings
            ),
        )
        return cls(facts, result, parity, (norm, left))


def _claim_result(name: str, finding: Finding, waived: bool) -> ClaimResult:
    verdict: Any = "void" if finding.void else finding.verdict.value
    return ClaimResult(
        name=name,
        verdict=verdict,
        measured=finding.void or finding.measured,
        bound=finding.bound,
        waived=waived and verdict in ("fail", "inconclusive"),
    )


def _results(result: RobustnessResult) -> Iterator[AttackResult]:
    evidence = {pair.spec: pair.runtime for pair in result.measurement.pairs}
    for row in result.bounded:
        assert row.spec is not None
        sides = row.reference, row.runtime
        yield _attack(row.spec, None, sides, row.gate, evidence[row.spec])
    for attack in result.minimal:
        if not attack.clip:  # outside the box is for comparison with the paper, and not judged
            continue
        for d, gate in attack.gates.items():
            sides = attack.reference.accuracy_at[d], attack.runtime.accuracy_at[d]
            yield _attack(attack.spec, d, sides, gate, evidence[attack.spec])


def _attack(
    spec: AttackSpec,
    distance: float | None,
    sides: tuple[Counted, Counted],
    gate: NonInferiorityTest,
    evidence: Evidence,
) -> AttackResult:
    return AttackResult(
        label=spec.label,
        title=spec.title,
        threat=threat_model(spec),
        settings={stage.name: dict(stage.parameters) for stage in spec.stages}
        or dict(spec.parameters),
        distance=distance,
        reference=_proportion(sides[0]),
        target=_proportion(sides[1]),
        invalid=int((evidence.status == "invalid").sum()),
        queries=(int(evidence.forward.sum()), int(evidence.backward.sum())),
        drop_upper95=gate.upper95,
        verdict=gate.verdict.value,
    )


def threat_model(spec: AttackSpec) -> ThreatModel:
    """Return what an attacker may do who attacks like this."""
    kinds = [ATTACKS[s.name] for s in (spec.stages or (spec,)) if s.name in ATTACKS]
    order = ("gradients", "scores", "labels")
    knowledge = min((kind.knowledge for kind in kinds), key=order.index)
    box = "white-box" if knowledge == "gradients" else "black-box"
    return ThreatModel(
        norm=spec.norm,
        epsilon=spec.epsilon,
        box=(0.0, 1.0),
        knowledge=knowledge,
        goal="any wrong label",
        taxonomy=f"evasion, {box} (NIST AI 100-2e2025)",
    )


def _proportion(found: Counted) -> Proportion:
    return Proportion(count=found.count, n=found.n, ci95=found.ci95)


def _parity(result: ParityResult) -> ParityFigures:
    rows = [finding.row.deviation for finding in (*result.inputs, *result.invariance)]
    return ParityFigures(
        verdict=result.verdict.value,
        checks=len(result.checks),
        failures=len(result.failures),
        largest_relative=finite_or_none(max(row.relative for row in rows)),
        largest_units=finite_or_none(max(row.units for row in rows)),
        allowed_relative=result.policy.max_relative,
        allowed_units=result.policy.max_units,
        gradients=result.gradients is not None,
    )


def _program(bundle: Bundle, evidence: Evidence, target: Target) -> tuple[str, str]:
    """Return path and digest of the file that was executed, as its evidence has it."""
    digest = evidence.header["bundle"]["program"]
    own = [file for file in bundle.manifest.files if file.sha256 == digest]
    best = next((file for file in own if file.runtime == target.runtime), own[0])
    return best.path, digest


def _library(target: Target) -> tuple[str, str]:
    """Return the distribution that executes a target here, and its version."""
    packages = this_machine().packages
    names = (target.kind.distribution, "onnxruntime-gpu")
    found = next((name for name in names if name in packages), names[0])
    return found, packages.get(found, "")


def _hardware(target: Target) -> Hardware:
    machine = this_machine()
    on_gpu = target.on_gpu and bool(machine.gpus)
    return Hardware(
        system=machine.system,
        architecture=machine.architecture,
        processor=processor(),
        instruction_sets=instruction_sets(),
        gpu=machine.gpus[0].name if on_gpu else "",
        compute_capability=machine.gpus[0].compute_capability if on_gpu else "",
        driver=(machine.driver or "") if on_gpu else "",
    )


def _files(
    bundle: Bundle, judged: Iterable[_Judged], commitment: Commitment
) -> tuple[EvidenceFile, ...]:
    paths = [commitment_path(bundle, commitment.policy)]
    for one in judged:
        paths.append(parity_path(bundle, one.parity.evidence.setting))
        if (diagnosed := one.robustness.measurement.diagnosed) is not None:
            paths.append(diagnosed)
        for evidence in one.evidence:
            if evidence.path is not None:
                paths += [evidence.path, images_path(evidence.path)]
    return tuple(
        EvidenceFile(
            path=path.relative_to(bundle.path).as_posix(),
            bytes=path.stat().st_size,
            sha256=sha256_file(path),
        )
        for path in dict.fromkeys(paths)
    )


def _subjects(bundle: Bundle, judged: Sequence[_Judged]) -> Iterator[Subject]:
    files = {file.path: file.sha256 for file in bundle.manifest.files}
    paths = [bundle.program(REFERENCE).path]
    for one in judged:
        header = one.robustness.measurement.pairs[0].runtime.header["bundle"]
        executed = (header["program"], header["gradient"])
        paths += [path for path, digest in files.items() if digest in executed]
    manifest = sha256((bundle.path / MANIFEST).read_bytes())
    yield Subject(name=MANIFEST, digest=FileDigest(sha256=manifest))
    for path in dict.fromkeys(paths):
        yield Subject(name=path, digest=FileDigest(sha256=files[path]))
    data = judged[0].robustness.measurement.dataset
    name = f"data:{data['name']}/{data['split']}"
    yield Subject(name=name, digest=FileDigest(sha256=data["digest"]))


def _claim(bundle: Bundle, verdict: Verdict, judged: Sequence[_Judged]) -> str:
    """Return what was shown, in one sentence that cannot be taken for its opposite."""
    which = f"{bundle.card.title}, deployed as {listed([str(o.facts.target) for o in judged])}"
    n = judged[0].robustness.measurement.n
    if verdict is Verdict.PASS:
        let = [claim.name for one in judged for claim in one.facts.claims if claim.waived]
        said = [
            f"at least {100 * limit.share:g} % right under {limit.where}"
            for limit in (test.threshold for test in judged[0].robustness.thresholds)
            if not any(name.startswith(_claim_about(limit)) for name in let)
        ]
        left = f"it keeps {listed(said)}, shown at 95 % confidence on {n} images" if said else ""
        if not said and any(name.startswith("no-worse[") for name in let):
            left = "it is what it was exported as; nothing of its robustness is claimed"
        elif not said:
            left = (
                f"it is no worse under attack than its reference, on {n} images; how robust either "
                "is, is not claimed"
            )
        many = "demand was" if len(let) == 1 else "demands were"
        waived = f" {len(let)} {many} waived: {listed(let)}." if let else ""
        return f"{HEADLINES['pass']}: {which}: {left}.{waived}"
    broken = [
        claim
        for one in judged
        for claim in one.facts.claims
        if claim.verdict == verdict.value and not claim.waived
    ]
    broken.sort(key=lambda claim: not claim.name.startswith("sane["))  # the cause of others
    measured = broken[0].measured.rstrip(".")
    more = f", and {len(broken) - 1} more demands are not" if len(broken) > 1 else ""
    how = "met" if verdict is Verdict.FAIL else "shown"
    return (
        f"{HEADLINES[verdict.value]}: {which}: {broken[0].name} is not {how}{more}. "
        f"Measured: {measured}."
    )


def _claim_about(limit: Threshold) -> str:
    """Return what the name of the claim about a threshold begins with."""
    return "accurate[" if limit.attack is None else f"robust[{limit.label}]"


def _not_claimed(
    policy: Policy, judged: Sequence[_Judged], bundle: Bundle, lineage: Sequence[Rederived]
) -> Iterator[str]:
    yield "This is no proof: an attack that was not tried may do more than those that were."
    norm, left = judged[0].worst
    if left:
        yield f"Nothing is said of perturbations above {max(left):g} in the {NORMS[norm]}."
    if not any(threshold.attack for threshold in policy.limits):
        yield (
            "How robust the network is, is not claimed: the policy demands only that what is "
            "deployed is no worse than its reference."
        )
    yield (
        "Nothing is said of other changes: patches, rotations, weather, noise of cameras, images "
        "of other things, poisoned training data or back doors."
    )
    yield (
        "Nothing is said of another runtime, precision, library version, processor or GPU than "
        "those named here."
    )
    forward = bundle.program(REFERENCE).path
    if any(file.path == forward and file.status != "same" for file in lineage):
        yield (
            "Where the network came from is not shown: its forward graph begins with the bundle."
        )
