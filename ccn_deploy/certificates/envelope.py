"""The envelope that a certificate is signed in: DSSE v1 around an in-toto statement.

https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md. Written out here and not taken
from a library: a machine that checks a certificate needs the base install and ``cryptography``, and
what is read here is stricter than the specification, which allows two base64 alphabets, key ids
that are hints, and JSON in any layout. A byte that was changed anywhere is an error.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from ccn_deploy.certificates.keys import key_id
from ccn_deploy.certificates.statement import PREDICATE_TYPE, STATEMENT_TYPE, Statement
from ccn_deploy.errors import EnvironmentUnfitError, IntegrityError, UsageError
from ccn_deploy.records import LARGEST, Digest, Record, decode, encode, plain_object

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

PAYLOAD_TYPE = "application/vnd.in-toto+json"
"""Of in-toto statements: https://github.com/in-toto/attestation/blob/main/spec/v1/envelope.md."""

LARGEST_ENVELOPE = LARGEST
"""Bytes of the largest certificate that is parsed."""

DAMAGED = "Get the certificate again from who issued it; nothing in it was used."
_WHAT = "The certificate"


class Signature(Record, frozen=True):
    """One signature of an envelope.

    Attributes:
        keyid: :func:`~ccn_deploy.certificates.keys.key_id` of the key that made it.
        sig: Its 64 bytes in base64.
    """

    keyid: Digest
    sig: Annotated[str, msgspec.Meta(max_length=88)]


class Envelope(Record, frozen=True, rename={"payload_type": "payloadType"}):
    """A DSSE envelope, as it is in the file.

    Attributes:
        payload: The statement in base64.
        payload_type: What the payload is.
        signatures: One, or none: then nobody vouches for it.
    """

    payload: str
    signatures: Annotated[tuple[Signature, ...], msgspec.Meta(max_length=1)]
    payload_type: Literal["application/vnd.in-toto+json"] = "application/vnd.in-toto+json"


def pae(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """Return DSSE's pre-authentication encoding: what is signed in place of a payload."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal(statement: Statement, private_key: Ed25519PrivateKey | None) -> bytes:
    """Return the file of a certificate.

    Args:
        statement: What it says.
        private_key: Signs it; nobody vouches for it if None.

    Raises:
        TypeError, ValueError: A value that its type does not allow, or more than :func:`opened`
            reads.
    """
    payload = encode(statement)
    signatures: tuple[Signature, ...] = ()
    if private_key is not None:
        made = private_key.sign(pae(payload))
        signatures = (Signature(keyid=key_id(private_key.public_key()), sig=_text(made)),)
    return encode(Envelope(payload=_text(payload), signatures=signatures))


def opened(data: bytes, public_key: Ed25519PublicKey | None) -> tuple[Statement, str | None]:
    """Read the file of a certificate. With a key, its signature is checked before it is parsed.

    Args:
        data: The file.
        public_key: Of who vouches for it; a signature is not looked at if None.

    Returns:
        What it says, and the id of the key that vouches for it; None without a key.

    Raises:
        IntegrityError: Not the bytes that were signed, not signed, or signed by another key.
        EnvironmentUnfitError: It was written by a newer version of this package.
        UsageError: It is a statement of another kind.
    """
    envelope = decode(data, Envelope, _WHAT, DAMAGED)
    payload = _bytes(envelope.payload)
    signer = None if public_key is None else _check(envelope, payload, public_key)
    _check_type(payload)
    return decode(payload, Statement, f"{_WHAT}'s statement", DAMAGED), signer


def _check(envelope: Envelope, payload: bytes, key: Ed25519PublicKey) -> str:
    """Return the id of the key that an envelope is signed with.

    Raises:
        IntegrityError: It is not signed, or not with this key.
    """
    from cryptography.exceptions import InvalidSignature

    wanted = key_id(key)
    if not envelope.signatures:
        raise IntegrityError(
            f"{_WHAT} carries no signature, so that nobody vouches for it.",
            "Sign it when it is issued: ccn-deploy certify --sign KEY",
        )
    (signature,) = envelope.signatures
    if signature.keyid != wanted:
        raise IntegrityError(
            f"{_WHAT} is signed with the key {signature.keyid}, and not with {wanted}.",
            "Give the public key of who issued it, if you trust them.",
        )
    try:
        key.verify(_bytes(signature.sig), pae(payload))
    except InvalidSignature as error:
        raise IntegrityError(
            f"The signature of {_WHAT.lower()} does not hold: it was changed.", DAMAGED
        ) from error
    return wanted


def _check_type(payload: bytes) -> None:
    """Refuse a statement of another kind or version, before its content is held against ours.

    Raises:
        EnvironmentUnfitError: Of a newer version.
        UsageError: Of another kind.
    """
    plain = plain_object(payload, f"{_WHAT}'s statement", DAMAGED)
    for field, ours in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        found = plain.get(field)
        if found == ours:
            continue
        family = ours.rstrip("v0123456789")  # the version stands last in both
        if isinstance(found, str) and found.startswith(family):
            raise EnvironmentUnfitError(
                f"{_WHAT} is of {found[:100]!r}; this version reads {ours!r}.",
                "Upgrade with: pip install --upgrade ccn-deploy",
            )
        raise UsageError(
            f"The file is a statement, and no certificate: its {field} is {str(found)[:100]!r}.",
            "Give the file that `ccn-deploy certify` wrote.",
        )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    """Return what base64 stands for; the spare bits at its end have to be those of the encoder."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise IntegrityError(f"{_WHAT} is damaged: no base64.", DAMAGED) from error
    if _text(data) != text:
        raise IntegrityError(f"{_WHAT} is damaged: no base64 of its own.", DAMAGED)
    return data
