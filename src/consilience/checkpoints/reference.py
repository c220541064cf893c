"""What a user writes to name a model: a path, or a hub reference ``model@revision+adapter@revision``."""

import re
from dataclasses import dataclass
from pathlib import Path

from consilience.errors import InputError, MachineError, nearest

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
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_WANTED))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise InputError(f"{reference}: no such folder here and no such model or revision on the hub") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ConnectionError) as error:
        raise MachineError(
            f"{reference}: no such folder here, and the hub cannot be reached ({type(error).__name__}); check the path or the network"
        ) from None


def _existing(text: str, root: Path | None) -> Path | None:
    path = Path(text).expanduser()
    places = [path] if path.is_absolute() or root is None else [path, root / path]
    return next((place for place in places if place.exists()), None)


def _locate(text: str, root: Path | None) -> Path:
    found = _existing(text, root)
    if found is not None:
        return found
    parent = Path(text).expanduser().parent
    if is_hub_id(text) and not parent.is_dir():
        return _download(text)
    siblings = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    raise InputError(f"{text}: no such file or folder{nearest(Path(text).name, siblings)}")


def resolve(text: str, root: Path | None = None) -> Reference:
    """Return the local paths that ``text`` names, downloading from the hub where it is not a local path.

    Relative paths start from the current folder, or from ``root`` where they do not exist there.

    Raises:
        InputError: nothing local or on the hub has that name.
        MachineError: the hub cannot be reached.
    """
    if "+" not in text or _existing(text, root) is not None:
        return Reference(_locate(text, root))
    model, _, adapter = text.partition("+")
    return Reference(_locate(model, root), _locate(adapter, root))


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form of a hub reference, ``owner/name`` with an optional ``@revision``."""
    return _HUB_ID.match(text) is not None
