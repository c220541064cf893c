"""Scalars of TensorBoard event files: TFRecords of protocol buffers, of which a few fields are read.

A record is its length (uint64), that length's masked CRC-32C, the data, and the data's; an Event has its step in field
2 and a Summary in field 5; a Summary's values (field 1) have a tag (1) and a simple_value (2) or a tensor (8), as in
tensorboard's event.proto, summary.proto and tensor.proto. The lengths' checksums are verified, the data's are not.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from consilience.doctor.evidence.logs.curve import collect, column
from consilience.doctor.evidence.logs.reading import Reading, read_bytes
from consilience.errors import InputError

#: Event files hold pictures and histograms too, so they may be larger than other logs, in bytes.
_LIMIT = 256 << 20
#: Longer records hold no scalar.
_LONGEST = 1 << 16
_FLOAT, _DOUBLE = 1, 2


def read_events(*paths: Path) -> Reading:
    """Read the scalars of a run's event files, in the order they were written; what is cut off at an end is left out.

    A later file that starts at a smaller step is a restart, as in TensorBoard: see ``collect``.

    Raises:
        InputError: a file is none of TensorBoard's, or is damaged.
    """
    rows = [row for path in paths for row in _scalars(path)]
    return Reading(curve=collect(rows, ", ".join(str(path) for path in paths)))


def _scalars(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for record in _records(memoryview(read_bytes(path, _LIMIT)), path):
        try:
            step, values = _event(record)
        except (struct.error, IndexError, ValueError):
            raise InputError(f"{path}: holds a record that is no event; restore the file") from None
        if values:
            yield step, values


def _records(data: memoryview, path: Path) -> Iterator[memoryview]:
    at = 0
    while at + 12 <= len(data):
        length, check = struct.unpack_from("<QI", data, at)
        if _masked(bytes(data[at : at + 8])) != check:
            kind = "holds a damaged record" if at else "is no event file of TensorBoard"
            raise InputError(f"{path}: {kind} (byte {at}); restore the file")
        start, at = at + 12, at + 16 + length
        if at > len(data):
            return
        if length <= _LONGEST:
            yield data[start : start + length]


def _event(record: memoryview) -> tuple[int, dict[str, Any]]:
    step, values = 0, dict[str, Any]()
    for number, value in _fields(record):
        if number == 2 and isinstance(value, int):
            step = value - (1 << 64) if value >> 63 else value
        elif number == 5 and isinstance(value, memoryview):
            for inner, entry in _fields(value):
                if inner == 1 and isinstance(entry, memoryview):
                    values |= _value(entry)
    return step, values


def _value(entry: memoryview) -> dict[str, Any]:
    """Return a summary value's tag and scalar, if it is of a column that is kept."""
    tag, scalar = "", None
    for number, value in _fields(entry):
        if number == 1 and isinstance(value, memoryview):
            tag = bytes(value).decode("utf-8", "replace")
        elif number == 2 and isinstance(value, bytes):
            (scalar,) = struct.unpack("<f", value)
        elif number == 8 and isinstance(value, memoryview):
            scalar = _tensor(value)
    return {tag: scalar} if scalar is not None and column(tag) else {}


def _tensor(tensor: memoryview) -> float | None:
    """Return the one number of a float tensor; None for others."""
    kind, found = 0, None
    for number, value in _fields(tensor):
        if number == 1 and isinstance(value, int):
            kind = value
        elif number in (4, 5, 6) and isinstance(value, memoryview | bytes):
            found = bytes(value)
    if found is None or (kind, len(found)) not in ((_FLOAT, 4), (_DOUBLE, 8)):
        return None
    return struct.unpack("<f" if kind == _FLOAT else "<d", found)[0]


def _fields(message: memoryview) -> Iterator[tuple[int, int | bytes | memoryview]]:
    """Walk a protocol buffer: whole numbers, fixed-width bytes and nested messages by field number."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            value, at = bytes(message[at : at + width]), at + width
        elif kind == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        else:
            raise ValueError(f"wire type {kind}")
        if at > len(message):
            raise ValueError("a field ends beyond its message")
        yield number, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ((1 << 64) - 1), at
    raise ValueError("a number is too long")


def _table() -> tuple[int, ...]:
    found: list[int] = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        found.append(value)
    return tuple(found)


_CRC = _table()


def _masked(data: bytes) -> int:
    """Return the masked CRC-32C of TFRecords."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
