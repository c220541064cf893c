"""What the content of an output's file is known by, so that it is known again in a copy that has other times.

That is a hash of the file. For large weights whose tensors' fingerprints the output's lineage already has, it is a hash
of their header and of those fingerprints: to hash gigabytes once more would take as long as to write them.
"""

import contextlib
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

from consilience.errors import InputError

_LARGE = 1 << 24
_TENSORS, _BYTES = "tensors:", "bytes:"


def known_by(path: Path, fingerprints: Mapping[str, str]) -> str:
    """Return what a file is known by that has just been written.

    Args:
        path: the file.
        fingerprints: what is known of the output's tensors.

    Raises:
        OSError: it cannot be read.
    """
    if path.suffix == ".safetensors" and path.stat().st_size > _LARGE:
        from consilience.checkpoints.safetensors_file import read_header

        with contextlib.suppress(InputError):
            names = list(read_header(path)[0])
            if names and all(name in fingerprints for name in names):
                return _of_tensors(path, {name: fingerprints[name] for name in names})
    return _of_bytes(path)


def is_still(path: Path, known: str) -> bool:
    """Whether a file still has the content that it was known by.

    Raises:
        OSError: it cannot be read.
        InputError: it is no longer what its name says.
    """
    if not known.startswith(_TENSORS):
        return _of_bytes(path) == known
    from consilience.checkpoints.open import open_checkpoint
    from consilience.engine.lineage import checkpoint_fingerprints

    checkpoint = open_checkpoint(path)
    try:
        return _of_tensors(path, checkpoint_fingerprints(checkpoint)) == known
    finally:
        checkpoint.storage.close()


def tensor_fingerprints(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprints of an output's tensors that its lineage has; none if that says nothing of tensors."""
    output: Any = lineage.get("output")
    found: Any = cast(dict[str, Any], output).get("tensors") if isinstance(output, dict) else None
    return cast(dict[str, str], found) if isinstance(found, dict) else {}


def _of_tensors(path: Path, fingerprints: Mapping[str, str]) -> str:
    with path.open("rb") as file:
        head = file.read(8)
        found = blake2b(head + file.read(int.from_bytes(head, "little")), digest_size=16)
    for name, fingerprint in sorted(fingerprints.items()):
        found.update(f"{name} {fingerprint}\n".encode())
    return _TENSORS + found.hexdigest()


def _of_bytes(path: Path) -> str:
    found = blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return _BYTES + found.hexdigest()
