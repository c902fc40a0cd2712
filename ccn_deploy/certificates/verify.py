"""Whether a certificate holds: of this bundle, on this machine, today.

From what is signed to what is said: the signature, then the bundle, then the evidence, and only
then the clock, the machine and the verdict. Nothing is measured here, and no runtime is loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

from ccn_deploy.bundle import MANIFEST, Bundle, open_bundle
from ccn_deploy.bundle.manifest import check_path
from ccn_deploy.bundle.reader import EVIDENCE
from ccn_deploy.certificates.envelope import DAMAGED, LARGEST_ENVELOPE, opened
from ccn_deploy.certificates.keys import load_public
from ccn_deploy.certificates.reading import open_regular
from ccn_deploy.certificates.statement import (
    Certificate,
    CertifiedTarget,
    EvidenceFile,
    Statement,
    WaiverUse,
    moment,
    time_of,
)
from ccn_deploy.certificates.wording import LATE
from ccn_deploy.errors import (
    EnvironmentUnfitError,
    GateError,
    IntegrityError,
)
from ccn_deploy.machine import Machine, instruction_sets, processor, this_machine
from ccn_deploy.records import document
from ccn_deploy.storage import read_regular, sha256
from ccn_deploy.targets import Target
from ccn_deploy.verdict import Verdict

SCHEMA = "ccn-deploy/verify/1"

DATA = "data:"
"""What the name of a subject begins with that is a data set; no path in a bundle has a colon."""

_ANOTHER = "This machine is not set up as the one that was certified."
_OTHER = "Give the bundle that was certified, or certify this one: ccn-deploy certify"


@dataclass(frozen=True)
class Checked:
    """A certificate that is whole and of this bundle, and what it comes to.

    Attributes:
        certificate: What was signed.
        signer: Id of the key that vouches for it; None if nobody was asked for.
        targets: Those that were asked for.
        verdict: Of these, today.
        notes: What a reader must know beside it, one sentence each.
    """

    certificate: Certificate
    signer: str | None
    targets: tuple[CertifiedTarget, ...]
    verdict: Verdict
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict.value,
            "signed_by": self.signer,
            "targets": [str(certified.target) for certified in self.targets],
            "notes": list(self.notes),
            "certificate": document(self.certificate),
        }


def check(
    certificate: str | os.PathLike[str],
    bundle: Bundle | str | os.PathLike[str],
    key: str | os.PathLike[str] | None,
    *,
    target: Target | None = None,
    evidence: bool = True,
    anywhere: bool = False,
    now: datetime | None = None,
) -> Checked:
    """Check a certificate against a bundle, its evidence, the clock and this machine.

    Args:
        certificate: The file.
        bundle: An open bundle, or the path of one.
        key: Public key of who vouches for it; if None nobody does, and a note says so.
        target: The only one to ask about; all that are certified if None.
        evidence: Whether to check the files that the results were read from.
        anywhere: Whether a machine that differs from the certified one is only a note.
        now: The clock; this machine's if None.

    Returns:
        What it comes to. A pass is inconclusive once the certificate or a waiver that it rests on
        has ended.

    Raises:
        IntegrityError: The certificate, the bundle or the evidence was changed, or they do not
            belong together, or it is not signed with the key.
        EnvironmentUnfitError: The clock is before the issue, this is another machine, or the
            certificate is of a newer version.
        GateError: The target is not certified.
        UsageError: A file is not there or is something else.
        MissingExtraError: ``cryptography`` is not installed.
    """
    now = now or datetime.now(timezone.utc)
    said, signer, whole = read_certificate(certificate, bundle, key)
    notes = [] if signer else ["It was not asked who signed: nobody vouches for what is said here."]
    if evidence:
        for file in said.evidence:
            _check_evidence(whole, file)
    else:
        notes.append("The evidence was not checked.")
    _check_begun(said, now)
    targets = said.targets if target is None else (_certified(said, target),)
    notes += _check_machine(targets, this_machine(), 0, anywhere)
    verdict, ended, found = _judge(said, targets, now)
    if target is None:
        verdict = Verdict.all_of((verdict, said.outcome))
    return Checked(said, signer, targets, verdict, (*ended, *notes, *found))


def read_certificate(
    certificate: str | os.PathLike[str],
    bundle: Bundle | str | os.PathLike[str],
    key: str | os.PathLike[str] | None,
) -> tuple[Certificate, str | None, Bundle]:
    """Read a certificate and hold it against a bundle: signature first, then every digest.

    Returns:
        What was signed, the id of the key that vouches for it (None without one), and the bundle.

    Raises:
        CcnDeployError: As :func:`check`, but for evidence, clock, targets and machine.
    """
    public = None if key is None else load_public(Path(key))
    hint = "Give the file that `ccn-deploy certify` wrote."
    with open_regular(Path(certificate), "The certificate", hint) as file:
        data = file.read(LARGEST_ENVELOPE + 1)
    statement, signer = opened(data, public)
    whole = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    _check_bundle(statement, whole)
    return statement.predicate, signer, whole


def admit(
    certificate: Certificate,
    target: Target,
    machine: Machine,
    *,
    device: int = 0,
    now: datetime | None = None,
) -> CertifiedTarget:
    """Return what is certified of a target, if it may serve on a machine now.

    Args:
        certificate: From :func:`read_certificate`.
        target: What is to serve.
        machine: Where.
        device: Index of the GPU.
        now: The clock; this machine's if None.

    Raises:
        GateError: It is not certified, or its verdict is no pass, or no longer.
        EnvironmentUnfitError: The clock is before the issue, or it was certified on another
            machine.
    """
    now = now or datetime.now(timezone.utc)
    _check_begun(certificate, now)
    found = _certified(certificate, target)
    _check_machine((found,), machine, device, anywhere=False)
    verdict, ended, _ = _judge(certificate, (found,), now)
    if verdict is not Verdict.PASS:
        raise GateError(
            f"The certificate's verdict on {target} is {verdict.value}. "
            f"{ended[0] if ended else certificate.claim}",
            "Certify the bundle again: ccn-deploy certify",
        )
    return found


def differences(
    certified: CertifiedTarget, machine: Machine, *, device: int = 0
) -> tuple[str, ...]:
    """Return in what a machine is another than the one that a target was certified on.

    Compared is what decides which numbers come out: another kernel may round otherwise.

    Args:
        certified: The target.
        machine: This one, or another.
        device: Index of the GPU.
    """
    was, on_gpu = certified.hardware, certified.target.on_gpu
    gpu = machine.gpus[device] if on_gpu and device < len(machine.gpus) else None
    library = certified.library
    compared = [
        ("system", was.system, machine.system),
        ("architecture", was.architecture, machine.architecture),
        (library, certified.library_version, machine.packages.get(library, "")),
    ]
    if on_gpu:
        compared += [
            ("GPU", was.gpu, gpu.name if gpu else ""),
            ("compute capability", was.compute_capability, gpu.compute_capability if gpu else ""),
            ("driver", was.driver, machine.driver or ""),
        ]
    else:
        then, here = set(was.instruction_sets), set(instruction_sets())
        compared.append(
            ("instruction sets beside the common ones", _list(then - here), _list(here - then))
        )
    return tuple(
        f"{what} {then or 'none'} there and {here or 'none'} here"
        for what, then, here in compared
        if then != here
    )


def _list(names: Iterable[str]) -> str:
    return " ".join(sorted(names))


def _check_bundle(statement: Statement, bundle: Bundle) -> None:
    """Refuse the certificate of another bundle.

    Raises:
        IntegrityError: It is.
    """
    certificate, files = statement.predicate, {f.path: f for f in bundle.manifest.files}
    if certificate.bundle != bundle.manifest.digest:
        raise IntegrityError(
            f"The certificate is of the bundle {certificate.bundle}, and this is "
            f"{bundle.manifest.digest}.",
            _OTHER,
        )
    digests = {path: file.sha256 for path, file in files.items()}
    digests[MANIFEST] = sha256(read_regular(bundle.path / MANIFEST) or b"")
    for subject in statement.subject:
        if subject.name.startswith(DATA):
            continue  # not part of a bundle
        if digests.get(subject.name) != subject.digest.sha256:
            raise IntegrityError(
                f"The certificate is about {subject.name!r}, which is "
                f"{'another file in' if subject.name in digests else 'not in'} this bundle.",
                _OTHER,
            )
    for certified in certificate.targets:
        record = files.get(certified.program)
        if (
            record is None
            or record.sha256 != certified.program_sha256
            or record not in bundle.programs(certified.target)
        ):
            raise IntegrityError(
                f"The certificate says that {certified.target} executes {certified.program!r}, and "
                "in this bundle it does not.",
                _OTHER,
            )


def _check_evidence(bundle: Bundle, file: EvidenceFile) -> None:
    """Refuse evidence that is not what the results were read from; more may stand behind it.

    Raises:
        IntegrityError: It has gone, was changed or cut, is a link, or lies elsewhere.
    """
    hint = (
        "Get the bundle with its evidence from who certified it; with --no-evidence the rest is "
        "checked."
    )
    try:
        parts = check_path(file.path).parts
    except IntegrityError:
        parts = ()
    if len(parts) < 2 or parts[0] != EVIDENCE:
        raise IntegrityError(
            f"The certificate names evidence outside {EVIDENCE}/: {file.path!r}.", DAMAGED
        )
    digest, left = hashlib.sha256(), file.bytes
    path = bundle.evidence_file(*parts[1:])
    with open_regular(path, "The evidence", hint, refusal=IntegrityError) as stream:
        while left and (block := stream.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    if left:
        raise IntegrityError(
            f"The evidence {file.path} has {file.bytes - left:,} bytes, of the {file.bytes:,} that "
            "the certificate rests on.",
            hint,
        )
    if digest.hexdigest() != file.sha256:
        raise IntegrityError(
            f"The evidence {file.path} is not what the certificate rests on: it was changed.", hint
        )


def _check_begun(certificate: Certificate, now: datetime) -> None:
    """Refuse a clock by which a certificate is not issued yet: what it says of expiry is void.

    Raises:
        EnvironmentUnfitError: It is such a clock.
    """
    if now < time_of(certificate.issued):
        raise EnvironmentUnfitError(
            f"The certificate was issued at {certificate.issued}, and the clock says "
            f"{moment(now)}, which is before.",
            "Set the clock of this machine.",
        )


def _certified(certificate: Certificate, target: Target) -> CertifiedTarget:
    """Return what is certified of a target.

    Raises:
        GateError: Nothing is.
    """
    for found in certificate.targets:
        if found.target == target:
            return found
    have = ", ".join(str(found.target) for found in certificate.targets)
    raise GateError(
        f"The certificate says nothing of {target}: it certifies {have}.",
        "Name one of these, or add it to the policy and certify again.",
    )


def _check_machine(
    targets: Sequence[CertifiedTarget], machine: Machine, device: int, anywhere: bool
) -> list[str]:
    """Return what to note about this machine.

    Raises:
        EnvironmentUnfitError: It is another than was certified, and that is not to be passed over.
    """
    found = [
        (certified.target, differences(certified, machine, device=device)) for certified in targets
    ]
    told = " ".join(f"{target}: {'; '.join(which)}." for target, which in found if which)
    if told and not anywhere:
        raise EnvironmentUnfitError(
            f"{_ANOTHER} {told}",
            "Certify on a machine like this one; ccn-deploy verify --any-machine checks the rest.",
        )
    notes = [f"{_ANOTHER} {told}"] if told else []
    here = processor()
    others = dict.fromkeys(
        certified.hardware.processor
        for certified in targets
        if not certified.target.on_gpu and certified.hardware.processor != here
    )
    notes += [f"It was certified on the processor {other}, and this is {here}." for other in others]
    return notes


def _judge(
    certificate: Certificate, targets: Sequence[CertifiedTarget], now: datetime
) -> tuple[Verdict, list[str], list[str]]:
    """Return the verdict on targets today, what of it has ended, and what else is to be said.

    Raises:
        IntegrityError: The last day of a waiver is no day.
    """
    verdict = Verdict.all_of(Verdict(certified.verdict) for certified in targets)
    ended, notes = [], []
    left = time_of(certificate.expires) - now
    if left.total_seconds() < 0:
        ended.append(f"It ended at {certificate.expires}, and the clock says {moment(now)}.")
    else:
        notes.append(f"It is good for {left.days} more days, until {certificate.expires}.")
    for waiver in _used(certificate, targets):
        text = (
            f"Waived is {waiver.claim}, by {waiver.owner} until {waiver.expires}: {waiver.reason}"
        )
        if now.astimezone(timezone.utc).date() > _last_day(waiver):
            ended.append(f"A waiver that the verdict rests on has ended. {text}")
        else:
            notes.append(text)
    if not certificate.policy.before_results:
        notes.append(LATE)
    if ended and verdict is Verdict.PASS:
        verdict = Verdict.INCONCLUSIVE
    return verdict, ended, notes


def _used(certificate: Certificate, targets: Sequence[CertifiedTarget]) -> Iterator[WaiverUse]:
    """Yield the waivers that the verdict on targets rests on."""
    return (
        waiver
        for waiver in certificate.waivers
        if any(waiver.lets(claim, one.target) for one in targets for claim in one.claims)
    )


def _last_day(waiver: WaiverUse) -> date:
    try:
        return date.fromisoformat(waiver.expires)
    except ValueError as error:
        raise IntegrityError(
            f"The waiver of {waiver.claim} ends on {waiver.expires!r}, which is no day.", DAMAGED
        ) from error
