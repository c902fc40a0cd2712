"""The one codec of documents: typed records to canonical JSON and back.

What is written can be read: :func:`encode` checks types as :func:`decode` does. What is read was
written: bytes in any other form than the canonical one are refused, so that a digest of the bytes
is a digest of the content.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import msgspec

from ccn_deploy.errors import CcnDeployError, IntegrityError
from ccn_deploy.storage import canonical_json, sha256

LARGEST = 16 << 20
"""Bytes of the largest document that is parsed."""

DEEPEST = 32
"""Levels of objects and arrays that a document may nest."""

_STRING = re.compile(rb'"[^"]*"?')
_NO_BRACKET = bytes(sorted(set(range(256)) - set(b"[]{}")))

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
"""A number of things: never negative, exact in every JSON reader."""

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 in lower-case hex."""

Text = Annotated[str, msgspec.Meta(max_length=4096)]
"""A name or a line for people."""


if TYPE_CHECKING:
    Extended: TypeAlias = float
else:
    Extended = float | None
"""A float that need not be finite: JSON has null for it, which is read as infinity."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every document and of its parts: immutable, without unknown fields."""


class Measured(Record, frozen=True):
    """Base of records whose every null is an :data:`Extended` number that was not finite."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) is None:
                msgspec.structs.force_setattr(self, name, math.inf)


R = TypeVar("R", bound=Record)


def encode(record: Record) -> bytes:
    """Return the canonical JSON of a record, see :func:`ccn_deploy.storage.canonical_json`.

    Raises:
        TypeError, ValueError: A value that its type does not allow, NaN or infinity, text that is
            no Unicode, or more or deeper than :func:`decode` reads.
    """
    return _readable(canonical_json(_checked(record)))


def encode_line(record: Record) -> bytes:
    """Return a record as one line of JSON lines, keys sorted, with its newline.

    Raises:
        TypeError, ValueError: As :func:`encode`.
    """
    return _readable(json_line(_checked(record)))


def document(record: Record) -> dict[str, Any]:
    """Return a record as the plain objects that JSON has, each value checked against its type.

    Raises:
        TypeError, ValueError: A value that its type does not allow.
    """
    plain: dict[str, Any] = json.loads(json_line(_checked(record)))
    return plain


def decode(data: bytes, record: type[R], what: str, hint: str) -> R:
    """Read a record from the bytes that :func:`encode` wrote.

    Args:
        data: The file.
        record: The type to read.
        what: Begins the error: ``"manifest.json"``.
        hint: What to do about a damaged document.

    Raises:
        IntegrityError: Too large or too deep, no JSON, a field missing, unknown or of another
            type or range, or not in canonical form.
    """
    return _decode(data, record, what, hint, limit=LARGEST, form=canonical_json)


def decode_line(data: bytes, record: type[R], what: str, hint: str, *, limit: int = 1 << 16) -> R:
    """Read a record from the line that :func:`encode_line` wrote; see :func:`decode`.

    Raises:
        IntegrityError: As :func:`decode`.
    """
    return _decode(data, record, what, hint, limit=limit, form=json_line)


def encode_sealed(record: Record) -> bytes:
    """Return :func:`encode` of a record with one more field: the digest of all others.

    Raises:
        TypeError, ValueError: As :func:`encode`.
    """
    plain = _checked(record)
    return _readable(canonical_json({**plain, "digest": sha256(canonical_json(plain))}))


def decode_sealed(data: bytes, record: type[R], what: str, hint: str) -> R:
    """Read a record from the bytes that :func:`encode_sealed` wrote.

    Raises:
        IntegrityError: As :func:`decode`, or the digest is not that of the content.
    """
    plain = unseal(data, what, hint)
    try:
        found = msgspec.convert(plain, record)
    except (msgspec.MsgspecError, ValueError, CcnDeployError) as error:
        raise _damaged(what, error, hint) from error
    if canonical_json(_plain(found)) != canonical_json(plain):
        raise IntegrityError(f"{what} has numbers of another type than its schema.", hint)
    return found


def unseal(data: bytes, what: str, hint: str) -> dict[str, Any]:
    """Return the content of a sealed document as plain objects, whatever its schema.

    Raises:
        IntegrityError: As :func:`plain_object`, not in canonical form, or the digest is not that
            of the content.
    """
    plain = plain_object(data, what, hint)
    try:
        canonical = canonical_json(plain) == data
    except ValueError as error:
        raise _damaged(what, error, hint) from error
    if not canonical or plain.pop("digest", None) != sha256(canonical_json(plain)):
        raise IntegrityError(f"{what} does not match its own digest: it was changed.", hint)
    return plain


def plain_object(data: bytes, what: str, hint: str) -> dict[str, Any]:
    """Return a JSON object as it is, whatever is in it.

    Raises:
        IntegrityError: Too large, too deep, or no JSON object.
    """
    _check_bounds(data, what, hint, LARGEST)
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _damaged(what, error, hint) from error


def json_line(document: Any) -> bytes:
    """Return plain objects as one line of JSON lines, keys sorted, with its newline."""
    return (json.dumps(document, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def _decode(
    data: bytes,
    record: type[R],
    what: str,
    hint: str,
    *,
    limit: int,
    form: Callable[[Any], bytes],
) -> R:
    _check_bounds(data, what, hint, limit)
    try:
        found = msgspec.json.decode(data, type=record)
        canonical = form(_plain(found)) == data
    except (msgspec.MsgspecError, ValueError, RecursionError, CcnDeployError) as error:
        raise _damaged(what, error, hint) from error
    if not canonical:
        raise IntegrityError(f"{what} is not in the form that it was written in.", hint)
    return found


def _checked(record: Record) -> dict[str, Any]:
    return _plain(msgspec.convert(_plain(record), type(record)))


def _plain(record: Record) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(_with_nulls(record))
    return plain


def _with_nulls(value: Any) -> Any:
    """Return a copy in which the :data:`Extended` numbers that are not finite are None."""
    if isinstance(value, tuple):
        return tuple(map(_with_nulls, value))
    if not isinstance(value, Record):
        return value
    copied = copy.copy(value)  # does not call __post_init__
    for name in value.__struct_fields__:
        field = _with_nulls(getattr(value, name))
        if isinstance(value, Measured) and isinstance(field, float) and not math.isfinite(field):
            field = None
        msgspec.structs.force_setattr(copied, name, field)
    return copied


def _readable(data: bytes) -> bytes:
    """Return bytes that were written, unless nobody could read them."""
    try:
        _check_bounds(data, "The document", "", LARGEST)
    except IntegrityError as error:
        raise ValueError(error.what) from error
    msgspec.json.decode(data)
    return data


def _check_bounds(data: bytes, what: str, hint: str, limit: int) -> None:
    """Refuse what would cost a parser time or memory, before one sees it."""
    if len(data) > limit:
        raise IntegrityError(f"{what} has {len(data):,} bytes, more than {limit:,}.", hint)
    # An escaped backslash first: in \\" the quote is not escaped. Left to right, as JSON reads.
    outside = _STRING.sub(b"", data.replace(rb"\\", b"").replace(rb"\"", b""))
    depth = 0
    for bracket in outside.translate(None, _NO_BRACKET):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEEPEST:
            raise IntegrityError(f"{what} nests more than {DEEPEST} levels.", hint)


def _damaged(what: str, error: Exception, hint: str) -> IntegrityError:
    reason = error.what if isinstance(error, CcnDeployError) else str(error)
    return IntegrityError(f"{what} is damaged: {' '.join(reason.split()).rstrip('.')}.", hint)
