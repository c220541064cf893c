"""What the options of ``merge``, ``check`` and ``doctor`` ask to merge: a recipe, or a base and its experts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.checkpoints.files import exists
from consilience.errors import InputError, nearest

if TYPE_CHECKING:
    from consilience.recipe.schema import Recipe

#: Options that a recipe's key of another name stands for.
_KEYS = {"--dtype": "out_dtype"}


def parse_assignment(text: str, option: str) -> tuple[str, str]:
    """Split ``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise InputError(f"{option} {text!r}: write it as {'NAME=PATH' if option == '-e' else 'KEY=VALUE'}")
    return key, value


def parse_values(settings: list[str]) -> dict[str, Any]:
    """Return the values of ``--set`` options by key.

    Raises:
        InputError: a key is given twice, or a value is not written as YAML has it.
    """
    from consilience.recipe.yaml_file import parse_yaml

    values: dict[str, Any] = {}
    for text in settings:
        key, raw = parse_assignment(text, "--set")
        if key in values:
            raise InputError(f"--set {key}: is given twice; keep one")
        values[key] = parse_yaml(raw, f"--set {key}")
    return values


def parse_settings(settings: list[str], experts: dict[str, str]) -> dict[str, Any]:
    """Return the method's parameters from ``--set`` options; per-expert ones as mappings by expert name."""
    from consilience.recipe.overrides import split_key

    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for key, value in parse_values(settings).items():
        name, parameter = split_key(key)
        if name is not None and name not in experts:
            raise InputError(f"--set {key}: there is no expert {name!r}{nearest(name, list(experts))}")
        if name is not None:
            own.setdefault(parameter, {})[name] = value
        else:
            shared[key] = value
    for parameter, values in own.items():
        if parameter in shared:
            values |= {name: shared[parameter] for name in experts if name not in values}
        shared[parameter] = values
    return shared


def choices(
    config: list[str] | None, tokenizer: str | None, chat_template: str | None, private: list[str] | None
) -> dict[str, Any]:
    """Return what the options choose beside the weights, by option."""
    from consilience.recipe.yaml_file import parse_yaml

    chosen: Any = None
    if config and len(config) == 1 and "=" not in config[0]:
        chosen = config[0]
    elif config:
        pairs = [parse_assignment(text, "--config") for text in config]
        chosen = {key: parse_yaml(value, f"--config {key}") for key, value in pairs}
    return {"--config": chosen, "--tokenizer": tokenizer, "--chat-template": chat_template, "--private": private}


def named_experts(texts: list[str]) -> dict[str, str]:
    """Return the experts of ``-e NAME=PATH`` and ``-e PATH`` by name; without one it is the end of the path.

    Raises:
        InputError: a name is given twice or is no name, or a path is missing.
    """
    from consilience.experts.expert_set import expert_names

    given = [_name_and_path(text) for text in texts]
    seen: set[str] = set()
    for text, (name, _) in zip(texts, given, strict=True):
        if name is not None and name in seen:
            raise InputError(f"-e {text!r}: expert {name!r} is named twice; choose another name")
        seen |= {name} if name is not None else set()
    names = expert_names([(path, name) for name, path in given], "-e")
    return dict(zip(names, (path for _, path in given), strict=True))


def _name_and_path(text: str) -> tuple[str | None, str]:
    """Split ``NAME=PATH``. A path alone may hold ``=`` after a folder, or where only the whole exists."""
    name, equals, path = text.partition("=")
    whole = "/" in name or (bool(path) and not exists(Path(path)) and exists(Path(text)))
    if text and (not equals or whole):
        return None, text
    return parse_assignment(text, "-e")


def _files(calibration: list[str] | None, statistics: list[str] | None) -> dict[str, dict[str, str]]:
    """Return each expert's files by the name of their key in ``data``."""
    data: dict[str, dict[str, str]] = {}
    for key, texts in (("calibration", calibration), ("statistics", statistics)):
        for text in texts or []:
            name, path = parse_assignment(text, f"--{key}")
            if key in data.get(name, {}):
                raise InputError(f"--{key} {text!r}: expert {name!r} has a file already; give one file per expert")
            data.setdefault(name, {})[key] = path
    return data


def read_input(
    recipe: str,
    experts: list[str] | None,
    method: str | None,
    settings: list[str] | None,
    extra: dict[str, Any],
    calibration: list[str] | None = None,
    target: list[str] | None = None,
    statistics: list[str] | None = None,
) -> "Path | Recipe":
    """Return what the user asked to merge: a recipe's file, one with values replaced, or one made of ``-e`` options."""
    from consilience.api import build_recipe, override_recipe

    chosen: dict[str, Any] = {
        _KEYS.get(option, option.removeprefix("--").replace("-", "_")): value
        for option, value in extra.items()
        if value is not None and value != []
    }
    data = _files(calibration, statistics)
    if target:
        chosen["target"] = dict(parse_assignment(text, "--target") for text in target)
    if not experts:
        path = Path(recipe)
        if path.is_dir():
            raise InputError(f"{recipe}: is a folder; name experts with -e NAME=PATH, or pass a recipe file")
        if not (method or settings or chosen or data):
            return path
        return override_recipe(path, parse_values(settings or []), method=method, data=data, **chosen)
    if Path(recipe).suffix in (".yaml", ".yml") and not Path(recipe).is_dir():
        raise InputError(
            f"{recipe}: is a recipe, which names its experts, and -e names experts of a base; pass the recipe alone, "
            "or the base with -e"
        )
    named = named_experts(experts)
    base = None if recipe in ("none", "-") else recipe
    default = "coefficients" if "coefficients" in chosen else "task_arithmetic"
    return build_recipe(method or default, base, named, parse_settings(settings or [], named), data=data, **chosen)
