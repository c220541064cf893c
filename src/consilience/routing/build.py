"""Build a routed model's folder from a recipe, and load it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilience.checkpoints.adapter import is_adapter
from consilience.checkpoints.reference import resolve
from consilience.engine.output import partial_path
from consilience.engine.plan import expert_names, resolve_file
from consilience.errors import InputError
from consilience.routing import store
from consilience.routing.arrow import directions
from consilience.routing.expert import Expert, read_factors
from consilience.routing.install import check_fit
from consilience.routing.model import Routing
from consilience.routing.recipe import RoutedEntry, RouteRecipe
from consilience.tasks.load import check_folder, load_model, load_tokenizer, require_transformers
from consilience.training.place import check_out, claimed, delivery


@dataclass(frozen=True)
class Source:
    """One expert as the recipe names it: where its adapter is, and the folder that relative paths start from."""

    name: str
    adapter: Path
    entry: RoutedEntry
    root: Path | None

    def file(self, key: str) -> Path | None:
        """Return the file that the recipe names as ``data.KEY``."""
        value = None if self.entry.data is None else getattr(self.entry.data, key)
        return None if value is None else resolve_file(value, self.root)


def sources_of(recipe: RouteRecipe, root: Path | None, where: str) -> list[Source]:
    """Return a recipe's experts.

    Raises:
        InputError: an expert is no adapter, or two have one name.
    """
    names = expert_names([(entry.model, entry.name) for entry in recipe.models], where)
    found: list[Source] = []
    for name, entry in zip(names, recipe.models, strict=True):
        if not store.is_name(name):
            raise InputError(f"{where}: expert {name!r} cannot name a folder; give it a name: without / \\ or .")
        place = resolve(entry.model, root)
        folder = place.adapter or place.model
        if not folder.is_dir() or not is_adapter(folder):
            raise InputError(f"{where}: expert {name!r}: {entry.model} is no PEFT adapter (no adapter_config.json)")
        found.append(Source(name, folder, entry, root))
    return found


def build(
    recipe: RouteRecipe,
    out: Path | str,
    *,
    root: Path | None = None,
    where: str = "recipe",
    force: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> store.Description:
    """Build a routed model from a base and its adapters.

    Everything is made in OUT.partial, and OUT appears whole; an interrupted build goes on where it stopped.

    Args:
        recipe: the base, the experts and how they are routed.
        out: the folder to make.
        root: the folder that the recipe's relative paths start from.
        where: what errors call the recipe.
        force: replace what stands at ``out``.
        device: where the base runs, if gates, mean activations or instructions need it.
        trust_remote_code: run ``.py`` files that come with the base.

    Raises:
        InputError: the recipe, an adapter or a row is wrong; nothing is left behind.
        MachineError: memory or disk ran out; the same call continues.
    """
    require_transformers("routing")
    settings, out = recipe.settings(where), Path(out)
    base = resolve(recipe.base_model, root).model
    check_folder(base)
    sources = sources_of(recipe, root, where)
    check_out(out, [base, *(source.adapter for source in sources)], force)
    described = store.Base.of(base, recipe.base_model)
    plan = json.loads(json.dumps({"base": asdict(described), "recipe": recipe.model_dump()}))
    with claimed(partial_path(out.absolute()), plan):
        experts = [Expert(source.name, read_factors(source.adapter)) for source in sources]
        vectors = _vectors(experts)
        model = load_model(base, device=device, trust_remote_code=trust_remote_code, dtype="auto")
        for expert in experts:
            check_fit(model, expert)
        description = store.Description(described, settings, store.names_of(experts))
        with delivery(partial_path(out.absolute()), out) as result:
            for source, own in zip(sources, vectors, strict=True):
                store.write_expert(result, source.name, source.adapter, own)
            store.write_description(result, description)
    return description


def _vectors(experts: Sequence[Expert]) -> list[Mapping[str, Mapping[str, Tensor]]]:
    return [{"arrow": directions(expert.factors)} for expert in experts]


def load_routed(
    folder: Path | str,
    *,
    base: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """Load a routed model: a ``transformers`` model with ``routing`` (``consilience.routing.model.Routing``) on top.

    ``generate``, batches of mixed tasks, caches and pipelines work as with the base. ``model.tokenizer`` is the base's.

    Args:
        folder: what ``consilience route build`` made.
        base: where the base is, if it has moved.
        device: a torch device.
        dtype: of the weights, such as "float32"; "auto": as the base's are stored.
        trust_remote_code: run ``.py`` files that come with the base.

    Raises:
        InputError: the folder is malformed, or its base is not there or another model.
        MachineError: not enough memory.
    """
    require_transformers("routing")
    folder = Path(folder)
    description = store.read_description(folder)
    place = store.find_base(description.base, folder, base)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype {dtype!r}: use auto, float32, bfloat16 or float16")
    tokenizer = load_tokenizer(place, trust_remote_code=trust_remote_code)
    model = load_model(place, device=device, trust_remote_code=trust_remote_code, dtype=dtype).requires_grad_(False)
    experts = [store.read_expert(folder, name) for name in description.experts]
    Routing(model, experts, description.settings, tokenizer)
    model.tokenizer = tokenizer
    return model
