"""Write the table of tied weights from transformers' own classes: ``python -m tools.tied_weights``.

Every architecture is built on the meta device, in the shape of its default config, and asked which of its weights are
one; its config class says whether they are tied where config.json does not, and whether they are whatever it says.
Architectures that need a package that is not installed, or whose default config builds nothing, go by what the class
declares. Ties whose names depend on the number of layers (detection heads) are left out.
"""

import contextlib
import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE = Path("src/consilience/experts/tied_weights.json")
_DEPTHS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layer", "num_decoder_layers")


def architectures() -> Iterator[Any]:
    """Yield every model class that an auto class of transformers knows, and its siblings."""
    transformers: Any = importlib.import_module("transformers")
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    names: set[str] = set()
    for key, mapping in vars(auto).items():
        if key.startswith("MODEL_") and key.endswith("_NAMES"):
            for value in mapping.values():
                names.update([value] if isinstance(value, str) else value)
    modules: set[str] = set()
    for name in sorted(names):
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            modules.add(cls.__module__)
    for module in sorted(modules):
        for name in sorted(getattr(sys.modules[module], "__all__", ())):
            cls = getattr(sys.modules[module], name)
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.config_class:
                yield cls


def declared(cls: Any) -> tuple[dict[str, str], bool, bool]:
    """Return what an architecture ties, whether it does where config.json says nothing, and whatever that says.

    Raises:
        Exception: whatever its config or its constructor raises.
    """
    config, untied = cls.config_class(), cls.config_class()
    with contextlib.suppress(Exception):
        untied = cls.config_class(tie_word_embeddings=False)
    ties = dict(cls._tied_weights_keys or {})
    flags = [config]
    with contextlib.suppress(Exception):
        ties, flags = _built(cls, config)
    names = {alias: source for alias, source in ties.items() if _is_name(alias) and _is_name(source)}
    default = any(getattr(flag, "tie_word_embeddings", None) for flag in flags)
    forced = flags == [config] and default and bool(getattr(untied, "tie_word_embeddings", False))
    return dict(sorted(names.items())), default, forced


def _built(cls: Any, config: Any) -> tuple[dict[str, str], list[Any]]:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        for key in _DEPTHS:
            if isinstance(getattr(part, key, None), int) and not getattr(part, "layer_types", None):
                setattr(part, key, 2)
    with torch.device("meta"):
        model = cls(config)
    ties: dict[str, str] = {}
    flags: list[Any] = []
    for prefix, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, transformers.PreTrainedModel) and part._tied_weights_keys:
            start = f"{prefix}." if prefix else ""
            ties |= {f"{start}{alias}": f"{start}{source}" for alias, source in part._tied_weights_keys.items()}
            flags.append(part.config)
    held = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    flags = flags if any(flag is not config for flag in flags) else [config]
    return {alias: source for alias, source in ties.items() if alias in held and source in held}, flags


def _is_name(text: str) -> bool:
    return all(part.replace("_", "").isalnum() for part in text.split(".")) and text.endswith(("weight", "bias"))


def table() -> dict[str, Any]:
    """Return the table: sets of ties, each with the architectures that have them."""
    found: dict[str, dict[str, list[str]]] = {}
    for cls in architectures():
        try:
            ties, default, forced = declared(cls)
        except Exception as error:
            sys.stderr.write(f"{cls.__name__}: {type(error).__name__}\n")
            continue
        if ties:
            entry = found.setdefault(json.dumps(ties), {"always": [], "by_default": [], "if_said": []})
            entry["always" if forced else "by_default" if default else "if_said"].append(cls.__name__)
    sets = [{"ties": json.loads(ties)} | {k: sorted(v) for k, v in entry.items()} for ties, entry in found.items()]
    sets.sort(key=lambda entry: (-sum(map(len, entry.values())), json.dumps(entry)))
    return {"transformers": importlib.import_module("transformers").__version__, "sets": sets}


def render() -> str:
    """Return the table as JSON, one set a line."""
    content = table()
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in content.pop("sets"))
    head = json.dumps(content, indent=2).rstrip("\n}").rstrip()
    return f'{head},\n  "sets": [\n{lines}\n  ]\n}}\n'


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    importlib.import_module("transformers").logging.set_verbosity_error()
    TABLE.write_text(render(), encoding="utf-8")
    sys.stdout.write(f"wrote {TABLE}\n")
