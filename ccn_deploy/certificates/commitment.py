"""Commitments: a policy that was fixed for a bundle, kept where evidence is collected.

A commitment is a sealed document ``evidence/policies/KEY.json``. Every batch of evidence that is
measured later carries the commitments of its time in its seal, and a seal vouches for all that is
above it: so evidence itself says which thresholds stood before it was known.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal

from ccn_deploy.bundle import Bundle
from ccn_deploy.certificates.statement import Moment, moment
from ccn_deploy.errors import IntegrityError
from ccn_deploy.records import Digest, Record, decode_sealed, encode_sealed
from ccn_deploy.storage import read_regular, sha256, write_atomic

DIRECTORY = "policies"
MOST = 64
"""Commitments that one bundle may have; a seal names them all."""

_HINT = "Delete it and commit the policy again; evidence that exists was then there before it."


class Commitment(Record, frozen=True):
    """A policy that was fixed for a bundle.

    Attributes:
        policy: SHA-256 of its canonical form.
        bundle: SHA-256 that the manifest has of itself.
        at: When, by the clock of the machine.
    """

    policy: Digest
    bundle: Digest
    at: Moment
    schema: Literal["ccn-deploy/commitment/1"] = "ccn-deploy/commitment/1"

    @property
    def digest(self) -> Digest:
        """SHA-256 of its file, by which seals name it."""
        return sha256(encode_sealed(self))


def find_commitment(bundle: Bundle, policy: Digest) -> Commitment | None:
    """Return the commitment to a policy; None if there is none.

    Raises:
        IntegrityError: Its file was changed, or is of another policy or bundle.
    """
    return next((found for found in commitments(bundle) if found.policy == policy), None)


def commit(bundle: Bundle, policy: Digest, now: datetime) -> Commitment:
    """Commit a bundle to a policy; one that it is committed to already stays as it is.

    Raises:
        IntegrityError: A commitment was changed, or there are too many.
        StorageError: The bundle cannot be written to.
    """
    there = commitments(bundle)
    for found in there:
        if found.policy == policy:
            return found
    if len(there) >= MOST:
        raise IntegrityError(
            f"The bundle is committed to {len(there)} policies, the most that it can be.",
            f"Remove those that are not used from {bundle.evidence / DIRECTORY}.",
        )
    made = Commitment(policy=policy, bundle=bundle.manifest.digest, at=moment(now))
    path = commitment_path(bundle, policy)
    write_atomic(path, encode_sealed(made))
    return made


def commitments(bundle: Bundle) -> tuple[Commitment, ...]:
    """Return what a bundle is committed to, in order of the policies' digests.

    Raises:
        IntegrityError: A file was changed, or is of another policy or bundle than it says.
    """
    directory = bundle.evidence_file(DIRECTORY)
    names = sorted(file.name for file in directory.glob("*.json")) if directory.is_dir() else []
    found = []
    for name in names[: MOST + 1]:
        path = bundle.evidence_file(DIRECTORY, name)
        data = read_regular(path)
        if data is None:  # removed by another process
            continue
        made = decode_sealed(data, Commitment, f"The commitment {path}", _HINT)
        if name != _name(made.policy) or made.bundle != bundle.manifest.digest:
            raise IntegrityError(
                f"The commitment {path} is of another policy or bundle than it stands for.", _HINT
            )
        found.append(made)
    return tuple(found)


def commitment_path(bundle: Bundle, policy: Digest) -> Path:
    """Return where the commitment to a policy is kept, below ``BUNDLE/evidence``.

    Raises:
        IntegrityError: There is a link on the way.
    """
    return bundle.evidence_file(DIRECTORY, _name(policy))


def _name(policy: Digest) -> str:
    return f"{policy[:16]}.json"
