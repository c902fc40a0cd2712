"""A look at a protobuf file before it is parsed: how many messages it holds, and how deep.

A parser makes an object of every two bytes that say "an empty message follows"; a file of some
megabytes can fill the memory. This walk makes none, and gives up at the first limit.
"""

from __future__ import annotations

from typing import Any

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """Bytes that are no protobuf message, or one beyond a limit; the text says which."""


def check_message(data: bytes, descriptor: Any, *, fields: int, depth: int) -> None:
    """Walk through a message and all messages in it.

    Args:
        data: The serialised message.
        descriptor: Its protobuf descriptor, which says what fields are messages.
        fields: Largest number of fields in all messages together.
        depth: Deepest nesting of messages.

    Raises:
        WireError: The bytes are damaged, or a limit is passed.
    """
    kinds: dict[Any, dict[int, Any]] = {}
    left = fields
    ahead = [(0, len(data), descriptor, 1)]
    while ahead:
        at, end, kind, level = ahead.pop()
        if level > depth:
            raise WireError(f"it is nested deeper than {depth} messages")
        inner = kinds.get(kind.full_name)
        if inner is None:
            inner = kinds[kind.full_name] = {
                field.number: field.message_type for field in kind.fields if field.message_type
            }
        while at < end:
            left -= 1
            if left < 0:
                raise WireError(f"it holds more than {fields:,} fields")
            key, at = _number(data, at, end)
            wire = key & 7
            if wire == _VARINT:
                _, at = _number(data, at, end)
            elif wire == _BYTES:
                size, at = _number(data, at, end)
                message = inner.get(key >> 3)
                if message is not None and size and at + size <= end:
                    ahead.append((at, at + size, message, level + 1))
                at += size
            elif wire in (_FIXED32, _FIXED64):
                at += 4 if wire == _FIXED32 else 8
            else:
                raise WireError("it is no protobuf message")
        if at != end:
            raise WireError("it is cut short or damaged")


def _number(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Read one variable-length integer and return it with the place behind it."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise WireError("it is cut short or damaged")
