"""The library's front door: everything the command line does, a function does."""

import contextlib
import gc
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from consilience.checkpoints.files import path_of
from consilience.errors import InputError, nearest, option
from consilience.numbers import check_threads, is_count

if TYPE_CHECKING:
    from torch import Tensor, nn

    from consilience.coefficients import Coefficients
    from consilience.doctor.diagnosis import Diagnosis
    from consilience.engine.adapter_output import AdapterSummary, Kind
    from consilience.engine.load_check import LoadCheck
    from consilience.engine.plan import Plan
    from consilience.engine.summary import Summary
    from consilience.experts.state_dict import StateDict
    from consilience.mixing.matching import AlignedModel, AlignmentReport
    from consilience.mixing.symmetry import Axes
    from consilience.progress import Progress, ProgressOption
    from consilience.recipe.schema import Recipe
    from consilience.tasks.rows import Task
    from consilience.workdir import Workdir

PathLike = str | Path


def _named(experts: Any) -> dict[str, Any]:
    """Return experts by name.

    Raises:
        InputError: they are not a mapping or a list of paths or state dicts.
    """
    if isinstance(experts, str | Path) or not isinstance(experts, Iterable):
        raise InputError(f"experts: is a {type(experts).__name__}; give a list of experts, or a mapping by name")
    if isinstance(experts, set | frozenset):
        raise InputError("experts: a set has no order; give a list of experts, or a mapping by name")
    if isinstance(experts, Mapping):
        mapping = cast(Mapping[Any, Any], experts)
        odd = next((name for name in mapping if not isinstance(name, str)), None)
        if odd is not None:
            raise InputError(f"experts: the name {odd!r} is no text; give one such as 'math'")
        if mapping and all(_is_tensor(value) for value in mapping.values()):
            raise InputError("experts: is one state dict; give a list of state dicts, or a mapping of them by name")
        return dict(mapping)
    values = list(cast(Iterable[Any], experts))
    if all(isinstance(value, str | Path) for value in values):
        from consilience.experts.expert_set import expert_names

        return dict(zip(expert_names([(str(v), None) for v in values], "experts"), values, strict=True))
    return {f"expert-{i + 1}": value for i, value in enumerate(values)}


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _check_model(value: Any, name: str) -> None:
    """Refuse what is neither a path nor a model in memory.

    Raises:
        InputError: names the argument.
    """
    if isinstance(value, str | Path) or _is_held(value):
        return
    hint = (
        "pass its state_dict()"
        if hasattr(value, "state_dict")
        else "give a path, a hub reference, a state dict or a module"
    )
    raise InputError(f"{name}: is a {type(value).__name__}; {hint}")


def _recipe_of(recipe: Any) -> "tuple[Recipe, str, Path | None]":
    """Return a recipe given as such, as plain values or by its file; what errors call it; where its paths start.

    Raises:
        InputError: it is none of these, or is wrong.
    """
    value, where, root = _values_of(recipe)
    return _parsed(value, where, recipe), where, root


def _parsed(value: Any, where: str, given: Any) -> "Recipe":
    """Return the recipe of what ``_values_of`` returned of what was ``given``: a pipe is read once."""
    from consilience.recipe.schema import Recipe
    from consilience.recipe.stages import parse_documents

    if isinstance(value, Recipe):
        return value
    found = parse_documents(cast(list[Any], value) if isinstance(value, list) else [value], where)
    return found.with_file(Path(given)) if isinstance(given, str | Path) else found


def _values_of(recipe: Any) -> "tuple[Any, str, Path | None]":
    """Return a recipe, or the plain values that it is given as; what errors call it; where its paths start.

    Raises:
        InputError: its file cannot be read.
    """
    from consilience.recipe.schema import Recipe
    from consilience.recipe.yaml_file import read_documents

    if isinstance(recipe, Recipe):
        return recipe, recipe.where, None if recipe.file is None else recipe.file.parent
    if isinstance(recipe, Mapping):
        return dict(cast(Mapping[str, Any], recipe)), "recipe", None
    if isinstance(recipe, list | tuple) and recipe:
        return list(cast(Sequence[Any], recipe)), "recipe", None
    path = path_of(recipe, "recipe")
    documents = read_documents(path)
    return documents[0] if len(documents) == 1 else documents, str(path), path.parent


def build_recipe(
    method: str,
    base: str | None,
    experts: Mapping[str, str],
    parameters: Mapping[str, Any],
    *,
    data: Mapping[str, Mapping[str, str]] | None = None,
    **extra: Any,
) -> "Recipe":
    """Return a recipe from plain arguments; a parameter given as a mapping holds one value per expert name.

    ``data`` maps expert names to their files (``{"calibration": ..., "statistics": ...}``).

    Raises:
        InputError: a parameter or expert name is unknown, or a value has the wrong form.
    """
    from consilience.recipe.schema import parse_recipe

    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {name: {} for name in experts}
    for key, value in parameters.items():
        key = key.rstrip("_")
        if isinstance(value, Mapping):
            for name, each in cast(Mapping[str, Any], value).items():
                if name not in own:
                    raise InputError(f"{key}: there is no expert {name!r}{nearest(name, list(own))}")
                own[name][key] = each
        else:
            shared[key] = list(cast(Sequence[Any], value)) if isinstance(value, tuple) else value
    given = {
        key: [name for name, files in (data or {}).items() if key in files] for key in ("calibration", "statistics")
    }
    for key, named in given.items():
        for name in (name for name in named if name not in own):
            raise InputError(f"{key}: there is no expert {name!r}{nearest(name, list(own))}")
    _check_read(method, {key: bool(named) for key, named in given.items()} | {"target": "target" in extra})
    models: list[dict[str, Any]] = [
        {"model": path, "name": name, "parameters": own[name]} for name, path in experts.items()
    ]
    for model in models:
        model |= {"data": dict(data[model["name"]])} if data and model["name"] in data else {}
    value = {"method": method, "models": models, "parameters": shared} | extra
    return parse_recipe(value | ({"base_model": base} if base is not None else {}), "arguments")


def override_recipe(
    recipe: "Recipe | Mapping[str, Any] | PathLike",
    parameters: Mapping[str, Any] | None = None,
    *,
    method: str | None = None,
    data: Mapping[str, Mapping[str, str]] | None = None,
    swept: bool = False,
    **keys: Any,
) -> "Recipe":
    """Return a recipe with values replaced; the merge's notes, lineage and resolved recipe say which.

        recipe = cs.override_recipe("recipe.yaml", {"density": 0.3, "math.weight": 0.5}, seed=1)
        cs.merge_recipe(recipe, "out")

    Args:
        recipe: a recipe, the same as plain values, or its file.
        parameters: the method's. ``density`` replaces the recipe's value and every model's own, ``math.density`` (or a
            mapping ``{"density": {"math": 0.3}}``) one model's.
        method: another method, with its own defaults; parameters that it does not have are left out.
        data: files by expert (``{"math": {"calibration": FILE}}``).
        swept: the values are a sweep's: one that changes nothing is taken instead of refused.
        keys: the recipe's other keys: ``out_dtype``, ``seed``, ``private``, ``config``, ``tokenizer``,
            ``chat_template``, ``coefficients``, ``target``.

    Raises:
        InputError: a key or expert is unknown (the nearest is named), or a value is wrong or changes nothing.
    """
    from consilience.recipe.overrides import override

    known = ("out_dtype", "seed", "private", "config", "tokenizer", "chat_template", "coefficients", "target")
    odd = next((key for key in keys if key not in known), None)
    if odd is not None:
        raise InputError(f"{odd}: is no key that can be replaced{nearest(odd, known)}; parameters go in a mapping")
    found, _, _ = _recipe_of(recipe)
    found = override(found, parameters or {}, method=method, data=data, keys=keys, swept=swept)
    given = {key: any(key in files for files in (data or {}).values()) for key in ("calibration", "statistics")}
    _check_read(found.merge_method, given | {"target": "target" in keys})
    return found


def _check_read(method: str, given: Mapping[str, bool]) -> None:
    """Refuse files that a method does not read.

    Raises:
        InputError: names the argument; or there is no such method.
    """
    from consilience.methods.registry import load

    if not any(given.values()):
        return
    known = load(method)
    read = {"calibration": known.reads_calibration, "target": known.reads_target}
    read["statistics"] = known.statistics is not None and known.collect is None
    for name in (name for name, there in given.items() if there and not read[name]):
        what = name if name == "statistics" else f"{name} rows"
        raise InputError(f"{option(name, 'FILE')}: method {method!r} reads no {what}; leave it out")


def merge(
    base: "Recipe | PathLike | StateDict | nn.Module | None",
    experts: "Mapping[str, Any] | Sequence[Any] | None" = None,
    out: PathLike | None = None,
    *,
    method: str | None = None,
    out_dtype: "str | Any | None" = None,
    as_adapter: "Kind | None" = None,
    rank: int | None = None,
    seed: int | None = None,
    private: Sequence[str] | str = (),
    force: bool = False,
    threads: int | None = None,
    shard_size: int | None = None,
    stochastic_rounding: bool = False,
    allow_nonfinite: bool = False,
    calibration: Mapping[str, PathLike] | None = None,
    statistics: Mapping[str, PathLike] | None = None,
    target: Mapping[str, PathLike] | None = None,
    coefficients: PathLike | None = None,
    device: str = "cpu",
    tensorboard: PathLike | None = None,
    trust_remote_code: bool = False,
    config: "str | Mapping[str, Any] | None" = None,
    tokenizer: "str | Mapping[str, Any] | None" = None,
    chat_template: str | None = None,
    strict: bool = False,
    check_load: bool = False,
    progress: "ProgressOption" = False,
    noted: "Callable[[str], None] | None" = None,
    **parameters: Any,
) -> "Summary | AdapterSummary | dict[str, Any] | Any":  # Any: a module, of the base's class
    """Merge experts into one model: paths to files, state dicts to a state dict, modules to a module.

        theta = theta_0 + method(tau_1 ... tau_K),   tau_k = theta_k - theta_0

        cs.merge("base", {"math": "experts/math", "code": "adapters/code"}, "merged", method="ties", density=0.2)
        merged = cs.merge(base.state_dict(), {"math": math.state_dict(), "code": code.state_dict()}, weight=0.5)
        model = cs.merge(base, [math, code], method="ties", out_dtype=torch.bfloat16)      # torch modules
        cs.merge("recipe.yaml", out="merged", density=0.3)                                 # replaces the recipe's
        cs.merge({"merge_method": "ties", "base_model": "base", "models": [{"model": "math"}]}, out="merged")

    A parameter is one value for all experts and tensors, ``{"math": 0.7, "code": 0.3}`` one per expert, a list of
    numbers a gradient over depth, and ``[{"filter": "mlp", "value": 0.4}, {"value": 0.6}]`` one by names of tensors;
    expert by expert these may be mixed: ``weight={"math": [0.2, 0.8], "code": 0.3}``.

    What is merged in memory is read as plain numbers and takes no part in autograd: the result requires no gradient and
    has no history. It shares no memory with the inputs, which stay as they are, and lies on the devices of the base's
    tensors; the arithmetic is the CPU's.

    Args:
        base: the model the experts were tuned from: a path or hub reference, a state dict (numpy arrays or torch
            tensors) or a torch module; None where the method needs none. Or, without ``experts``, a recipe: a
            ``Recipe``, its file, or the same as plain values, in which state dicts and modules may stand for models.
        experts: paths, hub references, adapters, state dicts or modules; a mapping names them.
        out: the folder (or file) to write; required for paths, not allowed in memory.
        method: a name ``consilience methods`` lists; by default task_arithmetic, or the recipe's.
        out_dtype: float32, float16, bfloat16 or float64, or torch's or numpy's; by default every tensor keeps the
            base's.
        as_adapter: write LoRA experts as one PEFT adapter: "cat" (exact) or "svd" (truncated to ``rank``).
        rank: of "svd".
        seed: of the random methods and of stochastic rounding; by default 0, or the recipe's.
        private: filters of tensors that are not merged.
        force: replace a non-empty ``out``.
        threads: number of workers (default: the cores this process may use); never changes the result.
        shard_size: greatest number of data bytes of an output file.
        stochastic_rounding: round to a random neighbour with the right expectation instead of to nearest.
        allow_nonfinite: let NaN, Inf and overflow through.
        calibration: for learned methods, each expert's JSONL file of (unlabelled) rows.
        statistics: for regmean, lot and fisher, each expert's folder of statistics (``collect_statistics``).
        target: for ``glue``, the labelled target rows: ``{"train": FILE, "validation": FILE}``.
        coefficients: a coefficients file to apply (method "coefficients").
        device: where a learned method runs the model.
        tensorboard: a folder that a learned method logs to.
        trust_remote_code: run ``.py`` files that come with the base.
        config: whose config.json, generation config and preprocessor the output has, "base" or an expert's name; or
            values that replace the base's.
        tokenizer: whose vocabulary, tokenizer files and special token ids it has: "base", an expert's name, or "union";
            or a mapping of ``source``, ``tokens`` and ``pad_to_multiple_of``, as in a recipe.
        chat_template: whose chat template, a format's name (auto, alpaca, chatml, exaone, llama3, mistral), or a
            template itself.
        strict: refuse experts that differ from the base in what the model computes, where ``config`` chooses nothing.
        check_load: open the output with its own library, even if nothing but values is new.
        progress: True for a bar (or lines) on standard error, a function called with (done, in all) of each part of the
            work, or a ``Progress``.
        noted: called with each note of a merge in memory; by default they are logged. A merge of files has them in its
            summary.
        parameters: the method's. Beside a recipe, they and the arguments above replace its values
            (``override_recipe``).

    Returns:
        A summary of the run for files; the merged state dict (of the base's library) for state dicts; a module like
        the base, with its own tensors, for modules.

    Raises:
        InputError: the input is wrong, or an argument has no effect; nothing is left behind.
        MachineError: the disk or another part of the machine failed; the same call continues where it stopped.
    """
    check_threads(threads)
    for name, value in {"calibration": calibration, "statistics": statistics, "target": target}.items():
        if value is not None and not isinstance(cast(Any, value), Mapping):
            raise InputError(f"{name}: is a {type(value).__name__}; give files by name, as a mapping")
    filters = list(private) if isinstance(cast(Any, private), Sequence) and not isinstance(private, str) else private
    keys: dict[str, Any] = {"seed": seed, "out_dtype": out_dtype, "private": filters or None, "config": config}
    keys |= {"tokenizer": tokenizer, "chat_template": chat_template}
    keys |= {"coefficients": None if coefficients is None else str(coefficients)}
    keys |= {"target": None if target is None else {key: str(path) for key, path in target.items()}}
    keys = {key: value for key, value in keys.items() if value is not None}
    data: dict[str, dict[str, str]] = {}
    for key, files in (("calibration", calibration), ("statistics", statistics)):
        for name, path in (files or {}).items():
            data.setdefault(name, {})[key] = str(path)
    found: Recipe
    if experts is None:
        found, held = _recipe_in_memory(base)
        if method is not None or parameters or data or keys:
            found = override_recipe(found, parameters, method=method, data=data, **keys)
    else:
        held, base_path, references = _models_in_memory(base, experts)
        method = method or ("coefficients" if coefficients is not None else "task_arithmetic")
        found = build_recipe(method, base_path, references, parameters, data=data, **keys)
    shared: dict[str, Any] = {"stochastic_rounding": stochastic_rounding, "allow_nonfinite": allow_nonfinite}
    files_only: dict[str, Any] = {
        "as_adapter": as_adapter, "rank": rank, "force": force, "shard_size": shard_size, "tensorboard": tensorboard,
        "trust_remote_code": trust_remote_code, "strict": strict, "check_load": check_load,
    }  # fmt: skip
    if held is not None:
        if out is not None:
            raise InputError("out: state dicts are merged in memory; save the result yourself, or pass paths")
        chosen = {"config": config, "tokenizer": tokenizer, "chat_template": chat_template}
        idle = [name for name, value in (files_only | chosen).items() if value not in (None, False)]
        idle += ["device"] if device != "cpu" else []
        if idle:
            raise InputError(f"{idle[0]}: has no effect on what is merged in memory; leave it out")
        return _merge_in_memory(found, held, threads=threads, progress=progress, noted=noted, **shared)
    if noted is not None:
        raise InputError("noted: has no effect on a merge of files, whose summary has the notes; leave it out")
    if out is None:
        raise InputError("out: name the folder to write")
    return merge_recipe(found, out, threads=threads, device=device, progress=progress, **shared, **files_only)


@dataclass(frozen=True)
class _Held:
    """Models in memory: the base, and the experts by their place in the recipe's ``models``."""

    base: Any
    experts: dict[int, Any]


def _is_held(value: Any) -> bool:
    """Whether a model is in memory: a state dict or a torch module."""
    return isinstance(value, Mapping) or (hasattr(value, "state_dict") and hasattr(value, "named_parameters"))


def _models_in_memory(base: Any, experts: Any) -> "tuple[_Held | None, str | None, dict[str, str]]":
    """Return the models that are in memory, if they are, and references for a recipe: the base's, the experts' by name.

    Raises:
        InputError: some are and some are not, or one is neither that nor a path.
    """
    named = _named(experts)
    values = {"base": base, **{f"expert {name!r}": value for name, value in named.items()}}
    for name, value in values.items():
        if value is not None or name != "base":
            _check_model(value, name)
    held = [_is_held(value) for name, value in values.items() if value is not None or name != "base"]
    if not any(held):
        return None, None if base is None else str(base), {name: str(value) for name, value in named.items()}
    if not all(held):
        raise InputError("experts: state dicts and paths cannot be mixed; load them all or pass paths")
    references = {name: f"expert {name}" for name in named}
    return _Held(base, dict(enumerate(named.values()))), None if base is None else "base", references


def _holds_model(value: Any) -> bool:
    """Whether a model in memory is named anywhere in a recipe's ``slices`` or ``modules``."""
    if isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value)
        return any((key == "model" and _is_held(each)) or _holds_model(each) for key, each in entries.items())
    return isinstance(value, list | tuple) and any(map(_holds_model, cast(Sequence[Any], value)))


def _recipe_in_memory(given: Any) -> "tuple[Recipe, _Held | None]":
    """Return a recipe that was given as such, and the models in memory that plain values of one may hold.

    Raises:
        InputError: it is no recipe.
    """
    if isinstance(given, list | tuple):
        raise InputError(
            "recipe: several documents are merged from files; give models by their paths, and use merge_recipe"
        )
    is_recipe = isinstance(given, Mapping) and bool({"models", "merge_method", "method"} & {*cast(Any, given)})
    is_file = isinstance(given, str | Path) and Path(given).suffix in (".yaml", ".yml")
    if not is_recipe and not is_file and type(given).__name__ != "Recipe":
        raise InputError("experts: is missing; give a list of experts or a mapping by name, or pass a recipe alone")
    listed: Any = cast(Any, given).get("models") if is_recipe else None
    entries: list[Any] = list(cast(list[Any], listed)) if isinstance(listed, list | tuple) else []
    models = [entry.get("model") if isinstance(entry, Mapping) else None for entry in entries]
    layered = next(
        (key for key in ("slices", "modules") if is_recipe and _holds_model(cast(Any, given).get(key))), None
    )
    if layered is not None:
        raise InputError(
            f"recipe: {layered} are merged from files, not in memory; save the models, and name their paths"
        )
    base: Any = cast(Any, given).get("base_model") if is_recipe else None
    if not any(map(_is_held, [base, *models])):
        return _recipe_of(given)[0], None
    if not all(map(_is_held, models)) or (base is not None and not _is_held(base)):
        raise InputError("recipe: state dicts and paths cannot be mixed; load them all or name paths")
    value = dict(cast(Mapping[str, Any], given))
    kept = [(number, entry) for number, entry in enumerate(entries) if entry["model"] is not base]  # mergekit lists it
    value["models"] = [
        dict(entry) | {"model": f"expert {number + 1}", "name": entry.get("name") or f"expert-{number + 1}"}
        for number, entry in kept
    ]
    value |= {"base_model": "base"} if base is not None else {}
    experts = {place: entry["model"] for place, (_, entry) in enumerate(kept)}
    return _recipe_of(value)[0], _Held(base, experts)


def _merge_in_memory(
    recipe: "Recipe",
    held: _Held,
    *,
    threads: int | None,
    progress: "ProgressOption",
    noted: "Callable[[str], None] | None",
    stochastic_rounding: bool,
    allow_nonfinite: bool,
) -> "dict[str, Any] | nn.Module":
    """Merge models in memory and return the result as the base, or else the first expert, is given."""
    from consilience.engine.memory import merge_in_memory
    from consilience.engine.plan import make_plan
    from consilience.experts.expert_set import expert_names
    from consilience.experts.state_dict import from_state_dict, into_module, state_of
    from consilience.methods.registry import load
    from consilience.progress import open_progress

    try:
        method = load(recipe.merge_method)
    except InputError as error:
        raise InputError(f"{recipe.where}: {error}") from None
    if method.learn is not None or method.collect is not None:
        raise InputError(f"method {method.name!r} runs the model, so it needs folders, not state dicts; pass paths")
    if method.statistics is not None:
        raise InputError(f"method {method.name!r} reads statistics of models in files, not of state dicts; pass paths")
    names = expert_names([(entry.model, entry.name) for entry in recipe.models], recipe.where)
    opened = [(from_state_dict(names[i], state_of(model)), i) for i, model in held.experts.items()]
    base = None if held.base is None else from_state_dict("base", state_of(held.base))
    plan = make_plan(
        recipe,
        where=recipe.where,
        stochastic=stochastic_rounding,
        allow_nonfinite=allow_nonfinite,
        models=(base, opened),
    )
    like = held.base if held.base is not None else next(iter(held.experts.values()))
    with open_progress(progress) as shown:
        merged = merge_in_memory(plan, state_of(like), threads, shown, noted)
    return merged if isinstance(like, Mapping) else into_module(like, merged)


def diagnose(
    recipe: "Recipe | Mapping[str, Any] | PathLike",
    *,
    exact: bool = False,
    threads: int | None = None,
    seed: int = 0,
    probe_rows: int | None = 100,
    methods: Sequence[str] = (),
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: "ProgressOption" = False,
) -> "Diagnosis":
    """Examine a recipe's experts before they are merged: their checkpoints, and losses on probe rows if there are any.

    Args:
        recipe: a recipe with a base, the same as plain values, or its file.
        exact: compute ranks and overlaps from whole matrices instead of sketches.
        threads: number of workers (default: the cores this process may use); changes no figure beyond rounding.
        seed: of the sketches.
        probe_rows: rows that are used of each expert's ``data.probe`` (0: all); None: probes are left out.
        methods: merge methods to try on the probe rows, as ``METHOD`` or ``METHOD:KEY=VALUE,KEY=VALUE``.
        device: where probes run the model.
        trust_remote_code: run ``.py`` files that come with the base.
        progress: True for a bar (or lines) on standard error, a function called with (done, in all) of each part of the
            work, or a ``Progress``.

    Raises:
        InputError: the recipe has no base, no expert fits it, a stored value is NaN or Inf, or probe rows are wrong.
    """
    from consilience.doctor.diagnose import diagnose
    from consilience.doctor.probing import ProbeSettings
    from consilience.doctor.trying import wanted
    from consilience.progress import open_progress

    check_threads(threads)
    recipe, where, root = _recipe_of(recipe)
    tried = tuple(wanted(text) for text in methods)
    if tried and probe_rows is None:
        raise InputError("methods: are tried on probe rows, and probes are left out; give probe_rows")
    probes = None if probe_rows is None else ProbeSettings(probe_rows, device, trust_remote_code, tried)
    with open_progress(progress) as shown:
        return diagnose(
            recipe,
            where=where,
            root=root,
            exact=exact,
            threads=threads,
            seed=seed,
            probes=probes,
            progress=shown,
        )


def align(
    base: "nn.Module | Mapping[str, Tensor] | PathLike",
    model: "nn.Module | Mapping[str, Tensor] | PathLike",
    out: PathLike | None = None,
    *,
    axes: "Axes | PathLike | None" = None,
    module: "nn.Module | None" = None,
    inputs: Any = None,
    labels: "Tensor | None" = None,
    loss: "Callable[[nn.Module], float] | None" = None,
    rows: "Sequence[Task | PathLike]" = (),
    seed: int = 0,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: "ProgressOption" = False,
) -> "AlignedModel | AlignmentReport":
    """Reorder a model's hidden units so that its weights lie closest to a base's; it computes what it did.

    Two networks trained apart have their units in unrelated orders, and an average of them is one of unrelated units.
    Sought are the permutations P of maximal <theta_base, P theta_model>, group by group (Ainsworth et al. 2023, Git
    Re-Basin, arXiv:2209.04836). The report says how much closer the two came and, where it can be measured, whether
    their midpoint is any good: often it is not.

    Args:
        base: whose order is kept: a torch module or state dict, or a path.
        model: whose units are reordered, of the same kind.
        out: where the aligned model goes; for paths. A transformers folder gives a folder, another file a
            ``.safetensors`` file.
        axes: the group of units that each axis of each tensor belongs to (see ``symmetry_of_axes``), or a YAML file
            that says so; None: found by tracing the module, or the folder's architecture.
        module: the network that state dicts are of.
        inputs: probe inputs of the module, a tensor [n, ...] (with ``axes`` also a sequence or mapping of arguments):
            for the trace, for the proof that outputs stay, and without labels for the divergence along the line.
        labels: of the inputs: the cross entropy along the line is measured instead.
        loss: what to measure along the line instead, ``loss(module) -> float``.
        rows: JSONL rows with responses to measure the loss per token along the line on; for paths.
        seed: of the order in which groups take turns.
        force: replace a non-empty ``out``.
        trust_remote_code: run ``.py`` files that come with the model.
        progress: True for a bar (or lines) on standard error, a function called with (done, in all), or a ``Progress``.

    Returns:
        For modules and state dicts the aligned state, the permutations and the report; for paths the report.

    Raises:
        InputError: the symmetry is not found or is none, the two do not meet, or an argument has no effect; nothing is
            left behind.
        MachineError: memory or disk ran out; OUT is absent.
    """
    on_disk = [isinstance(one, str | Path) for one in (base, model)]
    if on_disk[0] != on_disk[1]:
        raise InputError("model: base and model must be of one kind: both paths, or both modules or state dicts")
    memory = {"module": module, "inputs": inputs, "labels": labels, "loss": loss}
    disk = {"out": out, "rows": rows or None, "force": force or None, "trust_remote_code": trust_remote_code or None}
    idle = next((name for name, value in (memory if on_disk[0] else disk).items() if value is not None), None)
    if idle is not None:
        kind = "paths" if on_disk[0] else "modules and state dicts"
        raise InputError(f"{idle}: has no effect on {kind}; leave it out")
    if not on_disk[0]:
        from consilience.mixing.matching import align_networks

        stated = cast("Axes | None", axes)
        return align_networks(cast(Any, base), cast(Any, model), axes=stated, seed=seed, **cast(dict[str, Any], memory))
    if out is None:
        raise InputError("out: is missing; name the folder (or .safetensors file) to write the aligned model to")
    from consilience.mixing.align_files import align_files

    return align_files(
        cast(PathLike, base),
        cast(PathLike, model),
        out,
        axes=axes,
        rows=rows,
        seed=seed,
        force=force,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


@contextlib.contextmanager
def collection_paused() -> Generator[None]:
    """Make many objects without Python's search for cycles among them, which takes longer than making them."""
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


def plan_recipe(
    recipe: "Recipe | Mapping[str, Any] | Sequence[Mapping[str, Any]] | PathLike",
    out: PathLike | None = None,
    *,
    shard_size: int | None = None,
    stochastic_rounding: bool = False,
    allow_nonfinite: bool = False,
    coefficients: "Coefficients | None" = None,
    strict: bool = False,
) -> "Plan":
    """Check a recipe against its models' headers and return everything the merge would do; nothing is written.

    ``plan.differences`` says how experts differ from the base besides weights; ``strict`` refuses those that change
    what the model computes.

    Relative paths in a recipe file start from the current folder if they exist there, else from the file's folder. That
    of a mixture of experts (``experts:``, as mergekit-moe has it) is planned too: see docs/moe.md.
    Of a recipe of several documents the output's plan is returned, with those of its ``stages``.
    """
    from consilience.engine.differences import check_differences
    from consilience.engine.plan import SHARD_SIZE
    from consilience.engine.stages import plan_on_skeletons
    from consilience.moe.recipe import is_moe, parse_moe_recipe

    if shard_size is not None and not is_count(shard_size):
        raise InputError(f"shard_size: {shard_size!r} must be a number of bytes of at least 1")
    given = recipe
    value, where, root = _values_of(recipe)
    file = Path(given) if isinstance(given, str | Path) else getattr(recipe, "file", None)
    if file is not None and out is not None and path_of(out, "out").resolve() in file.resolve().parents:
        raise InputError(f"{file}: lies in {out}, which the merge replaces; move the recipe, or choose another OUT")
    if is_moe(value):
        from consilience.moe.build import plan_mixture

        plan = plan_mixture(
            parse_moe_recipe(value, where),
            where=where,
            root=root,
            shard_size=shard_size or SHARD_SIZE,
            stochastic=stochastic_rounding,
            allow_nonfinite=allow_nonfinite,
        )
        check_differences(plan.differences, where, strict=strict)
        return plan
    recipe = _parsed(value, where, given)
    single = path_of(out, "out").name if out is not None and str(out).endswith(".safetensors") else "model.safetensors"
    how = _How(where, root, shard_size, stochastic=stochastic_rounding, allow_nonfinite=allow_nonfinite, strict=strict)
    if not recipe.stages:
        return how.plan(recipe, {}, single=single, coefficients=coefficients)
    return plan_on_skeletons(
        recipe,
        lambda one, made: how.plan(
            one, made, single=single if one is recipe else "model.safetensors",
            coefficients=coefficients if one is recipe else None, values=False,
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class _How:
    """How the merges of one recipe are planned."""

    where: str
    root: Path | None
    shard_size: int | None
    stochastic: bool
    allow_nonfinite: bool
    strict: bool

    def plan(
        self,
        recipe: "Recipe",
        made: Mapping[str, Path],
        *,
        single: str,
        coefficients: "Coefficients | None" = None,
        values: bool = True,
    ) -> "Plan":
        """Plan one merge; without ``values`` what other merges made is looked at by headers alone."""
        from consilience.engine.differences import check_differences
        from consilience.engine.plan import SHARD_SIZE, make_plan

        where = recipe.where if recipe.name is not None and not recipe.stages else self.where
        with collection_paused():
            plan = make_plan(
                recipe,
                where=where,
                root=self.root,
                shard_size=self.shard_size or SHARD_SIZE,
                stochastic=self.stochastic,
                allow_nonfinite=self.allow_nonfinite,
                single=single,
                coefficients=coefficients,
                made=made,
            )
        if values or not made:
            check_differences(plan.differences, where, strict=self.strict)
        return _with_data(plan, where)


def _with_data(plan: "Plan", where: str) -> "Plan":
    """Return a plan whose data for learning, if it learns, are there and can be read."""
    if plan.unlearned:
        from consilience.tasks.load import require_transformers

        require_transformers(f"{where}: method {plan.method.name!r}")
        from consilience.learned.learn import check_data

        check_data(plan)
    return plan


def learn(
    recipe: "Recipe | Mapping[str, Any] | PathLike",
    out: PathLike | None = None,
    *,
    force: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    tensorboard: PathLike | None = None,
    trust_remote_code: bool = False,
    progress: "ProgressOption" = False,
) -> "Coefficients":
    """Learn a recipe's coefficients without merging: ``merge_recipe`` and ``save_coefficients`` take them.

    Args:
        recipe: one with a learned method, or the path of its YAML file.
        out: where a merge will go; the state is kept in OUT.partial, so that a later call continues. None keeps none.
        force: the merge will replace a non-empty ``out``.
        threads: workers of the passes over the task vectors.
        device: a torch device.
        tensorboard: a folder to log to.
        trust_remote_code: run ``.py`` files that come with the base.
        progress: True for a bar (or lines) on standard error, a function called with (done, in all) of each part of the
            work, or a ``Progress``.

    Raises:
        InputError: recipe, models or data are wrong, or the method is not a learned one.
        MachineError: memory or disk ran out; the same call continues.
    """
    from consilience.engine.merge import merge_workdir
    from consilience.engine.output import LEARNING
    from consilience.learned.learn import check_learning, learn_plan
    from consilience.progress import open_progress

    plan = plan_recipe(recipe, out)
    try:
        if plan.stages:
            raise InputError(f"{plan.where}: has stages, which are to be merged first; call merge_recipe")
        with open_progress(progress) as shown:
            settings = _Learning(threads, device, tensorboard, trust_remote_code, shown).arguments()
            check_learning(plan, settings["tensorboard"], device)
            if out is None:
                return learn_plan(plan, **settings)
            with merge_workdir(plan, Path(out), force=force, digest=work_digest(plan, None, None)) as work:
                return learn_plan(plan, work.path / LEARNING, **settings)
    finally:
        plan.close()


@dataclass(frozen=True)
class _Learning:
    """How a learned method runs."""

    threads: int | None
    device: str
    tensorboard: PathLike | None
    trust_remote_code: bool
    progress: "Progress"

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments of ``learn_plan``."""
        return vars(self) | {"tensorboard": None if self.tensorboard is None else Path(self.tensorboard)}


def work_digest(plan: "Plan", as_adapter: str | None, rank: int | None) -> str:
    """Identify the work of a command: the plan, the rows it is to learn from, and the form of the output."""
    from consilience.checkpoints.files import stamp
    from consilience.engine.plan import resolve_file
    from consilience.workdir import digest_of

    facts: list[Any] = [plan.digest, as_adapter, rank]
    if plan.unlearned:
        named = [entry.data for entry in plan.recipe.models if entry.data is not None]
        paths = [path for data in (*named, plan.recipe.target) if data for path in vars(data).values() if path]
        files = [resolve_file(str(path), plan.root) for path in paths]
        facts.append([stamp(file)[:3] for file in files if file.exists()])
    return digest_of(facts)


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)


def merge_recipe(
    recipe: "Recipe | Mapping[str, Any] | Sequence[Mapping[str, Any]] | PathLike",
    out: PathLike,
    *,
    as_adapter: "Kind | None" = None,
    rank: int | None = None,
    force: bool = False,
    threads: int | None = None,
    shard_size: int | None = None,
    stochastic_rounding: bool = False,
    allow_nonfinite: bool = False,
    device: str = "cpu",
    tensorboard: PathLike | None = None,
    trust_remote_code: bool = False,
    coefficients: "Coefficients | None" = None,
    strict: bool = False,
    check_load: bool = False,
    progress: "ProgressOption" = False,
    learned: "Callable[[Coefficients], None] | None" = None,
    warned: Callable[[str], None] = _warn,
) -> "Summary | AdapterSummary":
    """Carry out a recipe (a ``Recipe``, plain values or a YAML file) and write OUT; see ``merge`` and ``learn``.

    Plain values are a mapping, or a list of mappings for a recipe of several documents.

    The models are opened once. A learned method learns first, unless its ``coefficients`` are given, in the folder
    that the merge then works in, so that the same call continues wherever it was stopped.

    Args:
        recipe: what to merge.
        out: the folder (or file) to write.
        as_adapter: write a PEFT adapter instead of a model: "cat" (exact) or "svd" (of rank ``rank``).
        rank: of "svd".
        force: replace a non-empty ``out``; files in it that Consilience has not written are moved to OUT.kept.
        threads: number of workers (default: the cores this process may use); never changes the result.
        shard_size: greatest number of data bytes of an output file.
        stochastic_rounding: round to a random neighbour with the right expectation instead of to nearest.
        allow_nonfinite: let NaN, Inf and overflow through.
        device: where a learned method runs the model.
        tensorboard: a folder that a learned method logs to.
        trust_remote_code: run ``.py`` files that come with the base.
        coefficients: what a learned method found before.
        strict: refuse experts that differ from the base in what the model computes, where the recipe chooses nothing.
        check_load: open the output with its own library (transformers, PEFT) even where names, shapes and config are
            the base's own, and refuse where that cannot be done.
        progress: True for a bar on standard error (lines where it is no terminal), or what is told of progress.
        learned: called with the coefficients as soon as they are found.
        warned: called with each such difference before any work; by default it becomes a Python warning.

    Raises:
        InputError: the input is wrong; nothing is left behind.
        MachineError: the disk or another part of the machine failed; the same call continues where it stopped.
    """
    from consilience.engine.adapter_output import check_adapter
    from consilience.engine.load_check import LoadCheck
    from consilience.engine.merge import merge_workdir
    from consilience.progress import open_progress

    check_threads(threads)
    path_of(out, "out")
    plan = plan_recipe(
        recipe,
        out,
        shard_size=shard_size,
        stochastic_rounding=stochastic_rounding,
        allow_nonfinite=allow_nonfinite,
        coefficients=coefficients,
        strict=strict,
    )
    try:
        kind = check_adapter(plan, as_adapter, rank)
        if kind is not None:
            check_adapter_options(shard_size, stochastic=stochastic_rounding, allow_nonfinite=allow_nonfinite)
        plan = check_options(plan, device, tensorboard, trust_remote_code=trust_remote_code)
        digest, folder = work_digest(plan, kind, rank), True if kind is not None else None
        with (
            open_progress(progress) as shown,
            merge_workdir(plan, Path(out), force=force, digest=digest, folder=folder) as work,
        ):
            learning = _Learning(threads, device, tensorboard, trust_remote_code, shown)
            run = _Run(learning, LoadCheck(check_load, trust_remote_code), learned, warned, strict=strict)
            if plan.stages and work.delivered is None:
                plan = run.stages(plan, work)
            return run.deliver(plan, work, kind, rank)
    finally:
        plan.close()


@dataclass(frozen=True)
class _Run:
    """How merges are carried out."""

    learning: _Learning
    check: "LoadCheck"
    learned: "Callable[[Coefficients], None] | None"
    warned: Callable[[str], None]
    strict: bool

    def stages(self, plan: "Plan", work: "Workdir") -> "Plan":
        """Carry the stages of a plan out in the folder that is held, and return the plan on what they made.

        A stage that an earlier run of the same work has finished is there already.
        """
        from consilience.engine.merge import merge_workdir
        from consilience.engine.stages import STAGES, stage_place

        made: dict[str, Path] = {}
        for name, stage in plan.stages.items():
            place = stage_place(work.path / STAGES, name, stage)
            if not place.exists():
                ready = self._on(stage, made)
                try:
                    with merge_workdir(ready, place, force=False, digest=work_digest(ready, None, None)) as inner:
                        self.deliver(ready, inner, None, None)
                finally:
                    ready.close()
            made[name] = place
        ready = self._on(plan, made)
        plan.close()
        return ready

    def _on(self, plan: "Plan", made: Mapping[str, Path]) -> "Plan":
        """Return a plan again, on what other merges have made."""
        from consilience.engine.differences import check_differences
        from consilience.engine.plan import replanned

        plan = replanned(plan, made)
        check_differences(plan.differences, plan.where, strict=self.strict)
        return plan

    def deliver(
        self, plan: "Plan", work: "Workdir", kind: "Kind | None", rank: int | None
    ) -> "Summary | AdapterSummary":
        """Learn, if a plan does, then merge in the folder that is held."""
        from consilience.engine.adapter_output import adapter_in
        from consilience.engine.differences import by_level
        from consilience.engine.load_check import check_model
        from consilience.engine.merge import merge_in

        threads, shown, loader = self.learning.threads, self.learning.progress, ""
        if work.delivered is None:
            for text in by_level(plan.differences, "warning"):
                self.warned(text)
        if work.delivered is None and kind is None:
            loader = check_model(plan, self.check, shown)
        if work.delivered is None and plan.unlearned:
            plan = _learned(plan, work, self.learning)
            if self.learned is not None and plan.coefficients is not None:
                self.learned(plan.coefficients)
        if kind is not None:
            return adapter_in(plan, work, kind, rank or 0, threads=threads, progress=shown, check=self.check)
        return merge_in(plan, work, loader=loader, threads=threads, progress=shown)


def check_adapter_options(shard_size: int | None, *, stochastic: bool, allow_nonfinite: bool) -> None:
    """Refuse settings that mean nothing for an adapter.

    Raises:
        InputError: names the setting.
    """
    given = {"stochastic_rounding": stochastic, "allow_nonfinite": allow_nonfinite}
    named = [option(name) for name, there in given.items() if there]
    named += [option("shard_size", str(shard_size))] if shard_size is not None else []
    if named:
        raise InputError(f"{named[0]}: has no effect on an adapter, which is one small file; leave it out")


def check_options(plan: "Plan", device: str, tensorboard: PathLike | None, *, trust_remote_code: bool) -> "Plan":
    """Refuse what only a method that runs the model uses, where none is run; return the plan, with a note if need be.

    Raises:
        InputError: names the option.
    """
    if plan.unlearned and (tensorboard is None or plan.merges):
        if plan.method.collect is not None and tensorboard is not None:
            raise InputError(
                f"{option('tensorboard', str(tensorboard))}: has no effect, since method {plan.method.name!r} takes no "
                "steps; leave it out"
            )
        return plan
    for name, value in (("tensorboard", tensorboard), ("device", None if device == "cpu" else device)):
        if value is not None:
            raise InputError(
                f"{option(name, str(value))}: has no effect, since nothing is learned here (method "
                f"{plan.method.name!r}); leave it out"
            )
    folder = plan.alignment.donor.folder
    if not trust_remote_code or (folder is not None and any(folder.glob("*.py"))):
        return plan
    note = f"{option('trust_remote_code')}: has no effect, since no code comes with the base"
    return replace(plan, notes=(*plan.notes, note))


def _learned(plan: "Plan", work: "Workdir", learning: _Learning) -> "Plan":
    """Learn a plan's coefficients, or collect its statistics, in the folder that is held; return the plan with them."""
    from consilience.engine.output import LEARNING
    from consilience.engine.plan import with_coefficients, with_statistics

    folder = work.path / LEARNING
    if not plan.merges:
        from consilience.moe.build import learn_gates
        from consilience.moe.plan import MoePlan

        assert isinstance(plan, MoePlan)
        return learn_gates(
            plan,
            folder,
            device=learning.device,
            trust_remote_code=learning.trust_remote_code,
            progress=learning.progress,
        )
    from consilience.learned.learn import collect_plan, learn_plan

    if plan.method.collect is not None:
        return with_statistics(plan, collect_plan(plan, folder, **learning.arguments()))
    return with_coefficients(plan, learn_plan(plan, folder, **learning.arguments()), folder)
