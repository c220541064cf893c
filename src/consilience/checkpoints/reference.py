"""What a user writes to name a model: a path, or a hub reference ``model@revision+adapter@revision``."""

import re
from dataclasses import dataclass
from pathlib import Path

from consilience.checkpoints.files import check_readable, exists, siblings, why_absent
from consilience.errors import InputError, MachineError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")
_WANTED = ["*.safetensors", "*.json", "*.bin", "*.model", "*.txt", "*.jinja", "*.py", "*.md"]


@dataclass(frozen=True, slots=True)
class Reference:
    """A model, and the adapter to put on it, both as local folders or files."""

    model: Path
    adapter: Path | None = None


def _download(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_WANTED))
    except HFValidationError:
        raise InputError(f"{reference}: no such folder here, and no hub id has this form; check the path") from None
    except GatedRepoError:
        raise InputError(
            f"{reference}: is gated; ask for access on its page, then log in with: hf auth login"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise InputError(
            f"{reference}: no such folder here and no such model or revision on the hub; check the name"
        ) from None
    except Exception as error:  # whatever else the client raises is the network's, the hub's or the disk's doing
        why = getattr(error, "strerror", None) or type(error).__name__
        raise MachineError(
            f"{reference}: no such folder here, and the hub cannot be reached ({why}); check the path or the network"
        ) from None


def _existing(text: str, root: Path | None) -> Path | None:
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{text}: the ~ names no user of this machine; write the folder out") from None
    places = [path] if path.is_absolute() or root is None else [path, root / path]
    return next((place for place in places if exists(place)), None)


def _locate(text: str, root: Path | None) -> Path:
    if not text:
        raise InputError("a model's path is empty; name a folder, a file or a hub id")
    found = _existing(text, root)
    if found is not None:
        check_readable(found)
        return found
    path = Path(text).expanduser()
    if is_hub_id(text) and not exists(path.parent):
        return _download(text)
    known = siblings(path) + (siblings(root / path) if root is not None and not path.is_absolute() else [])
    raise InputError(f"{text}: {why_absent(path, known)}")


def resolve(text: str, root: Path | None = None) -> Reference:
    """Return the local paths that ``text`` names, downloading from the hub where it is not a local path.

    Relative paths start from the current folder, or from ``root`` where they do not exist there.

    Raises:
        InputError: nothing local or on the hub has that name.
        MachineError: the hub cannot be reached.
    """
    if "+" not in text or _existing(text, root) is not None:
        return Reference(_locate(text, root))
    cuts = [(text[:at], text[at + 1 :]) for at, character in enumerate(text) if character == "+"]
    model, adapter = next((cut for cut in cuts if cut[0] and _existing(cut[0], root) is not None), cuts[0])
    return Reference(_locate(model, root), _locate(adapter, root))


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form of a hub reference, ``owner/name`` with an optional ``@revision``."""
    return _HUB_ID.match(text) is not None
