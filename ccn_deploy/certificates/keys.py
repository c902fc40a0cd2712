"""Ed25519 keys (RFC 8032) as PEM files: made, read, and named.

Private keys are PKCS#8 (RFC 5958), public ones SubjectPublicKeyInfo (RFC 8410), as openssl reads
and writes them.
"""

from __future__ import annotations

import getpass
import os
import re
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccn_deploy.certificates.reading import open_regular
from ccn_deploy.errors import StorageError, UsageError
from ccn_deploy.extras import require
from ccn_deploy.storage import sha256

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

LARGEST = 16 << 10
"""Bytes of the largest key that is parsed; one of Ed25519 has 120 to 300."""

PASSPHRASE = "CCN_DEPLOY_KEY_PASSPHRASE"
"""Environment variable with the passphrase of a private key, where nobody can be asked."""

IN_ENVIRONMENT = "env:"
"""What a source begins with that names an environment variable."""

LONGEST_PASSPHRASE = 1023
"""Bytes of the longest passphrase that OpenSSL takes."""

_NEW = "Make a pair with: ccn-deploy key new PATH"
_PAIR = "ccn-deploy key new PATH writes the private key to PATH and the public one to PATH.pub."


def new_key(path: Path, passphrase: str | None = None) -> str:
    """Make a pair of keys: the private one at ``path``, the public one at ``path`` with ``.pub``.

    The private file can be read by nobody else from its first moment.

    Args:
        path: Where nothing is yet.
        passphrase: Encrypts the private key; it is written in the clear if None.

    Returns:
        :func:`key_id` of the pair.

    Raises:
        UsageError: Something is at one of the two paths, or the passphrase is empty or too long.
        StorageError: The directory cannot be written to; nothing is left there.
        MissingExtraError: ``cryptography`` is not installed.
    """
    _require()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        KeySerializationEncryption,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    encryption: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        secret = passphrase.encode()
        if not 0 < len(secret) <= LONGEST_PASSPHRASE:
            raise UsageError(
                f"A passphrase of {len(secret)} bytes cannot be taken.",
                f"Give one of 1 to {LONGEST_PASSPHRASE} bytes, or none.",
            )
        encryption = BestAvailableEncryption(secret)
    public = public_path(path)
    for taken in (path, public):
        if os.path.lexists(taken):
            raise _taken(taken)
    key = Ed25519PrivateKey.generate()
    _create(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), 0o600)
    try:
        shown = key.public_key()
        _create(public, shown.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    except BaseException:
        path.unlink()
        raise
    return key_id(shown)


def public_path(path: Path) -> Path:
    """Return where :func:`new_key` writes the public key of a pair."""
    return path.with_name(f"{path.name}.pub")


def key_id(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of a public key's DER form (SubjectPublicKeyInfo), lower-case hex."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def load_private(source: str) -> Ed25519PrivateKey:
    """Read a private key.

    An encrypted one is opened with the passphrase in :data:`PASSPHRASE`, or else with the one that
    is typed where there is a terminal.

    Args:
        source: Path of a PEM file that only its owner can read, or ``"env:NAME"``: the environment
            variable that holds the PEM.

    Raises:
        UsageError: No such file or variable, others can read it, it is too large, holds a public
            key or one of another kind, or the passphrase is wrong.
        EnvironmentUnfitError: It cannot be read.
        MissingExtraError: ``cryptography`` is not installed.
    """
    _require()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    what = f"The private key {source}"
    data = _from_environment(source) if source.startswith(IN_ENVIRONMENT) else _from_file(source)
    label = _label(data, what)
    if label.endswith("PUBLIC KEY"):
        raise UsageError(f"{what} is a public key, which cannot sign.", _PAIR)
    if label not in ("PRIVATE KEY", "ENCRYPTED PRIVATE KEY"):
        raise _other_kind(what, label.removesuffix(" PRIVATE KEY"))
    encrypted = label.startswith("ENCRYPTED")
    try:
        key = load_pem_private_key(data, _passphrase(what) if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{what} cannot be opened: "
            + ("the passphrase is wrong, or it is damaged." if encrypted else "it is damaged."),
            f"Check {PASSPHRASE}, or what was typed." if encrypted else _NEW,
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _other_kind(what, _kind(key))
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        UsageError: No such file, it is too large, or holds a private key or one of another kind.
        EnvironmentUnfitError: It cannot be read.
        MissingExtraError: ``cryptography`` is not installed.
    """
    _require()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    what = f"The public key {path}"
    with open_regular(path, "The public key", _PAIR) as file:
        data = _bounded(file.read(LARGEST + 1), what)
    label = _label(data, what)
    if label.endswith("PRIVATE KEY"):
        raise UsageError(
            f"{what} is a private key, which is not needed to check and should not be here.", _PAIR
        )
    if label != "PUBLIC KEY":
        raise _other_kind(what, label.removesuffix(" PUBLIC KEY"))
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{what} is damaged.", "Get it again from who signs.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _other_kind(what, _kind(key))
    return key


def ask_passphrase(prompt: str) -> str:
    """Return the passphrase of the environment, or else the one that is typed unseen.

    Raises:
        UsageError: There is neither that variable nor a terminal.
    """
    given = os.environ.get(PASSPHRASE)
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise UsageError(
            "A passphrase is needed and there is no terminal to ask for it.",
            f"Set {PASSPHRASE}.",
        )
    return getpass.getpass(prompt)


def _require() -> None:
    require("cryptography", "certify", "for the signatures of certificates")


def _passphrase(what: str) -> bytes:
    return ask_passphrase(f"Passphrase of {what.removeprefix('The ')}: ").encode()


def _from_environment(source: str) -> bytes:
    name = source.removeprefix(IN_ENVIRONMENT)
    found = os.environ.get(name)
    if found is None:
        raise UsageError(
            f"There is no environment variable {name!r} with a private key.",
            "Set it to the PEM of the key, all its lines.",
        )
    return _bounded(found.encode(errors="surrogateescape"), f"The private key {source}")


def _from_file(source: str) -> bytes:
    with open_regular(Path(source), "The private key", _NEW) as file:
        mode = os.fstat(file.fileno()).st_mode
        # On Windows the bits say nothing of who can read.
        if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError(
                f"The private key {source} can be read by others (mode {mode & 0o777:o}), who can "
                "then sign as you.",
                f"If they did not: chmod 600 {source}. If they might have, make a new one.",
            )
        return _bounded(file.read(LARGEST + 1), f"The private key {source}")


def _bounded(data: bytes, what: str) -> bytes:
    if len(data) > LARGEST:
        raise UsageError(f"{what} has more than {LARGEST:,} bytes, which no key has.", _NEW)
    return data


def _label(data: bytes, what: str) -> str:
    """Return what the PEM says that it holds (RFC 7468), ``"PRIVATE KEY"`` for example."""
    found = re.findall(rb"^-----BEGIN ([A-Z0-9 ]{1,64})-----", data, re.MULTILINE)
    if len(found) != 1:
        what_is_there = f"{len(found)} PEM blocks" if found else "no PEM"
        raise UsageError(f"{what} holds {what_is_there}, and not one key.", _NEW)
    label: bytes = found[0]
    return label.decode()


def _kind(key: Any) -> str:
    """Return ``"RSA"`` of an RSA key, and so on."""
    return re.sub("(Private|Public)Key$", "", type(key).__name__)


def _other_kind(what: str, kind: str) -> UsageError:
    return UsageError(f"{what} is of the kind {kind}; certificates take Ed25519.", _NEW)


def _taken(path: Path) -> UsageError:
    return UsageError(
        f"{path} exists already, and a key is never written over anything.",
        "Choose another path: what was signed with a key can be checked only with its own.",
    )


def _create(path: Path, data: bytes, mode: int) -> None:
    """Write a file that was not there, with no more permissions than ``mode`` at any time."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags, mode)
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError as error:
        raise _unwritten(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:  # a signal that raises, too: half a key is none
        path.unlink()
        if isinstance(error, OSError):
            raise _unwritten(path, error) from error
        raise


def _unwritten(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"Could not write {path}: {error.strerror or error}.",
        "Free space or choose a writable path; nothing was left behind.",
    )
