"""The safetensors header, read strictly, and written.

The format (8 bytes of little-endian header length, a JSON header, then the tensors' bytes without holes) is specified
by the safetensors project. The reader here exists because a merge reads *slices into its own buffers*, and because a
header comes from strangers: every offset is checked against the file before anything is read.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.dtypes import DTYPES, DType
from consilience.checkpoints.files import mistaken, regular_size
from consilience.checkpoints.json_files import parse_object
from consilience.checkpoints.lora_names import hints_at_factors
from consilience.errors import InputError

#: The safetensors library refuses longer headers, so no readable file has one.
HEADER_LIMIT = 100_000_000
#: No size, count of elements or offset of a real file reaches this (the format's integers are 64 bits wide).
_SIZE_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its name, type, shape and the absolute offset of its first byte."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements (1 for a scalar)."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _SIZE_LIMIT


def _overflows(shape: list[int]) -> bool:
    """Whether a running product of the sizes gets absurd, even where a later 0 would hide it."""
    elements = 1
    for size in shape:
        elements *= size
        if elements >= _SIZE_LIMIT:
            return True
    return False


def _entry(path: Path, name: str, raw: Any, data_start: int) -> tuple[Entry, int, int]:
    where = f"{path}: tensor {name!r}"
    if not isinstance(raw, dict) or set(cast(dict[str, Any], raw)) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: header entry must hold dtype, shape and data_offsets; restore the file")
    spec = cast(dict[str, Any], raw)
    dtype = DTYPES.get(spec["dtype"]) if isinstance(spec["dtype"], str) else None
    if dtype is None:
        raise InputError(f"{where}: dtype {spec['dtype']!r} is not one this version reads; convert the file")
    shape, offsets = spec["shape"], spec["data_offsets"]
    if not isinstance(shape, list) or not all(_is_count(n) for n in cast(list[Any], shape)):
        raise InputError(f"{where}: shape {shape!r} is not a list of sizes; restore the file")
    if _overflows(cast(list[int], shape)):
        raise InputError(f"{where}: shape {shape!r} has more elements than any file holds; restore the file")
    if (
        not isinstance(offsets, list)
        or len(cast(list[Any], offsets)) != 2
        or not all(map(_is_count, cast(list[Any], offsets)))
    ):
        raise InputError(f"{where}: data_offsets {offsets!r} are not [begin, end]; restore the file")
    begin, end = cast(list[int], offsets)
    entry = Entry(name, dtype, tuple(cast(list[int], shape)), data_start + begin)
    if begin > end or entry.nbytes != end - begin:
        raise InputError(
            f"{where}: shape {list(entry.shape)} of {dtype.name} needs {entry.nbytes} bytes but data_offsets span "
            f"{end - begin}; restore the file"
        )
    return entry, begin, end


def _plain_entry(name: str, raw: Any, data_start: int) -> tuple[Entry, int, int] | None:
    """Return what ``_entry`` does for an entry with nothing odd about it, quickly; None: have ``_entry`` look at it."""
    if type(raw) is not dict or len(cast(dict[str, Any], raw)) != 3:
        return None
    spec = cast(dict[str, Any], raw)
    code, shape, offsets = spec.get("dtype"), spec.get("shape"), spec.get("data_offsets")
    dtype = DTYPES.get(code) if type(code) is str else None
    if dtype is None or type(shape) is not list or type(offsets) is not list or len(cast(list[Any], offsets)) != 2:
        return None
    elements = 1
    for size in cast(list[Any], shape):
        if type(size) is not int or not 0 <= size < _SIZE_LIMIT:
            return None
        elements *= size
        if elements >= _SIZE_LIMIT:
            return None
    begin, end = cast(list[Any], offsets)
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end < _SIZE_LIMIT:
        return None
    if elements * dtype.itemsize != end - begin:
        return None
    return Entry(name, dtype, tuple(cast(list[int], shape)), data_start + begin), begin, end


def may_hold_factors(path: Path) -> bool:
    """Whether a safetensors file may have an adapter's factors, from its header as it is written: never a false no."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, os.fstat(file.fileno()).st_size - 8):
                return True
            text = file.read(length)
    except OSError:
        return True
    return not text.startswith(b"{") or b"\\" in text or hints_at_factors(text.decode("utf-8", "replace"))


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors of a safetensors file, in file order, and its string metadata.

    Raises:
        InputError: the file is truncated, over-long, or its header is malformed, overlapping or holed.
    """
    size = regular_size(path)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                known = mistaken(head + file.read(256))
                if known is not None:
                    raise InputError(f"{path}: {known}")
                raise InputError(
                    f"{path}: truncated or not a safetensors file ({size} bytes, header wants {length}); "
                    "download it again"
                )
            if length > HEADER_LIMIT:
                raise InputError(
                    f"{path}: header of {length} bytes exceeds the format's limit of {HEADER_LIMIT}; restore the file"
                )
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    if not text.startswith(b"{"):
        raise InputError(f"{path}: header does not start with '{{': not a safetensors file; restore it")
    raw = parse_object(text, f"{path}: header")
    metadata: Any = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in cast(dict[str, Any], metadata).values()):
        raise InputError(f"{path}: __metadata__ must map strings to strings; restore the file")
    start = 8 + length
    spans = [_plain_entry(name, spec, start) or _entry(path, name, spec, start) for name, spec in raw.items()]
    spans.sort(key=lambda span: (span[1], span[2]))
    _check_cover(path, spans, size - 8 - length)
    return {entry.name: entry for entry, _, _ in spans}, cast(dict[str, str], metadata)


def _check_cover(path: Path, spans: list[tuple[Entry, int, int]], size: int) -> None:
    """Refuse overlaps, holes, and data that ends before or after the file does."""
    position = 0
    for entry, begin, end in spans:
        if begin < position:
            raise InputError(f"{path}: tensor {entry.name!r}: its bytes overlap another tensor's; restore the file")
        if begin > position:
            raise InputError(
                f"{path}: tensor {entry.name!r}: {begin - position} unclaimed bytes before it; restore the file"
            )
        position = end
    if position > size:
        raise InputError(
            f"{path}: tensor {spans[-1][0].name!r}: file is truncated by {position - size} bytes; download it again"
        )
    if position < size:
        raise InputError(f"{path}: {size - position} bytes after the last tensor; restore the file")


def encode_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, list[int]]:
    """Return the bytes before the data (length, JSON, padding to 8 bytes) and each tensor's absolute offset."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begins: list[int] = []
    position = 0
    for name, dtype, shape in tensors:
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [position, position + size]}
        begins.append(position)
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, [len(prefix) + begin for begin in begins]
