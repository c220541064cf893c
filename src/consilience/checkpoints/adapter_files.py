"""Where an adapter's files are, however they are named: a folder of PEFT's, MLX' or diffusers', or one file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from consilience.checkpoints.files import exists, siblings
from consilience.checkpoints.lora_names import is_lora
from consilience.checkpoints.open import holds_model, open_checkpoint
from consilience.checkpoints.safetensors_file import may_hold_factors
from consilience.errors import InputError, nearest

CONFIG = "adapter_config.json"
#: What programs call an adapter's weights: PEFT, MLX, diffusers.
_WEIGHTS = (
    "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's weights, the config beside them if there is one, and what a user is told of the choice."""

    weights: Path
    config: Path | None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path | None:
        """The folder that is PEFT's own form of an adapter, which PEFT itself can open."""
        own = self.weights.name in _WEIGHTS[:2] and self.config is not None
        return self.weights.parent if own else None

    @property
    def home(self) -> Path:
        """What holds all that the adapter is: the folder where there is a config, else the file."""
        return self.weights if self.config is None else self.weights.parent


def adapter_files(path: Path) -> AdapterFiles | None:
    """Return the files of the adapter that ``path`` names, a folder or a file of weights; None: it is none.

    A folder that holds an adapter beside a model is an adapter: hubs are full of such. One that holds neither, but an
    adapter in a folder of its own (PEFT saves one so that has a name), is that adapter.

    Raises:
        InputError: there are several adapters to choose from, or an adapter's config without its weights.
    """
    if not path.is_dir():
        return _file(path) if path.is_file() else None
    try:
        return _in_folder(path)
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read ({error.strerror}); restore it") from None


def _in_folder(path: Path) -> AdapterFiles | None:
    inside = _inside(path)
    own = _own(path)
    if own is not None:
        others = [f"adapters in {', '.join(folder.name for folder in inside[:5])}"] if inside else []
        others += ["a whole model"] if holds_model(path) else []
        said = f"taken from {own.weights}; {' and '.join(others)} there are left alone"
        return AdapterFiles(own.weights, own.config, (said,) if others else ())
    if _holds_weights(path):
        return None
    if len(inside) > 1:
        raise InputError(
            f"{path}: holds {len(inside)} adapters ({', '.join(folder.name for folder in inside[:8])}); name one, such "
            f"as {inside[0]}"
        )
    if inside:
        found = _own(inside[0])
        assert found is not None
        return AdapterFiles(found.weights, found.config, (f"taken from {found.weights}",))
    if (path / CONFIG).is_file():
        raise InputError(f"{path}: holds no {_WEIGHTS[0]} or {_WEIGHTS[1]}; download it again")
    return None


def locate_adapter(path: Path) -> AdapterFiles:
    """Return the files of the adapter that ``path`` names.

    Raises:
        InputError: it names none.
    """
    if not exists(path):
        raise InputError(f"{path}: no such file or folder{nearest(path.name, siblings(path))}")
    found = adapter_files(path)
    if found is None and path.is_file():
        open_checkpoint(path).storage.close()  # a file that cannot be read is called that
    if found is None:
        raise InputError(f"{path}: is no PEFT adapter (no {CONFIG}) and no other program's LoRA; name an adapter")
    return found


def _config(folder: Path) -> Path | None:
    return folder / CONFIG if (folder / CONFIG).is_file() else None


def _own(folder: Path) -> AdapterFiles | None:
    """Return the adapter whose files are in a folder itself, by their names or as its only weights."""
    for name in _WEIGHTS:
        if (folder / name).is_file() and (name != "adapters.safetensors" or _config(folder) is not None):
            return AdapterFiles(folder / name, _config(folder))
    only = [entry for entry in sorted(folder.iterdir()) if entry.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    only = [entry for entry in only if entry.is_file()]
    return _file(only[0]) if len(only) == 1 and only[0].suffix == ".safetensors" else None


def _file(path: Path) -> AdapterFiles | None:
    """Return the adapter that one file of weights is."""
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        return None
    if path.suffix == ".safetensors" and not may_hold_factors(path):
        return None
    checkpoint = open_checkpoint(path)
    lora = is_lora(checkpoint.tensors)
    checkpoint.storage.close()
    return AdapterFiles(path, _config(path.parent)) if lora else None


def _holds_weights(folder: Path) -> bool:
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json")
    return any(entry.name.endswith(weights) and entry.is_file() for entry in folder.iterdir())


def _inside(folder: Path) -> list[Path]:
    """Return the folders in a folder that hold an adapter."""

    def found() -> Iterator[Path]:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and any((entry / name).is_file() for name in _WEIGHTS) and _config(entry) is not None:
                yield entry

    return list(found())
