"""From a mixture's recipe to a plan: which tensor of the output is whose, decided from headers alone.

Attention, norms and embeddings are the base's; a layer's MLP is every expert's own, side by side. Routers come last:
until they are known their place is held, and the plan cannot be carried out.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from consilience.checkpoints.checkpoint import MemoryStorage, TensorInfo
from consilience.checkpoints.dtypes import DTYPES, DType
from consilience.checkpoints.packed import packing
from consilience.engine.differences import Difference, differences
from consilience.engine.layout import plan_layout
from consilience.engine.plan import SHARD_SIZE, Plan, TensorPlan
from consilience.errors import InputError
from consilience.experts.align import Alignment, align
from consilience.experts.expert_set import comparable, expert_names
from consilience.experts.model import Model, Source, open_model
from consilience.methods.program import Elementwise, Program
from consilience.methods.signature import Method, MethodFunction
from consilience.methods.weighted_sum import weighted
from consilience.moe.architecture import Architecture, choose
from consilience.moe.gates import Gates
from consilience.moe.recipe import MoeRecipe, plain_recipe
from consilience.recipe.schema import parse_recipe
from consilience.workdir import digest_of

_MLP = re.compile(r"^(?P<layer>(?:.*\.)?layers\.(?P<number>\d+)\.)mlp\.(?P<part>gate|up|down)_proj\.weight$")
_IN_MLP = re.compile(r"\.layers\.\d+\.mlp\.|^layers\.\d+\.mlp\.")
#: In messages and in the lineage: whose value a router is.
ROUTERS = "the prompts"
SOURCE = "mergekit-moe (Goddard et al. 2024, arXiv:2403.13257); Komatsuzaki et al. 2023, arXiv:2212.05055"


def _no_tensor(*_: Any, **__: Any) -> Program:
    """Put the MLPs of several dense models side by side, behind a router."""
    raise AssertionError("a mixture's tensors are planned by plan_moe")


METHOD = Method(
    "moe", cast(MethodFunction, _no_tensor), {}, "required", 1, None, "prompts of every expert", SOURCE,
    counts_base=False,
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One dense layer: the beginning of its tensors' names, its number, and its MLP's matrices."""

    prefix: str
    number: int
    parts: dict[str, TensorInfo]


@dataclass(frozen=True, kw_only=True)
class MoePlan(Plan):
    """A mixture, ready to be written once it has ``gates``.

    ``mixture`` is its recipe, ``routed`` how many of the experts are routed (the others are shared), ``layers`` are the
    base's, ``left_behind`` says what of adapters is.
    """

    mixture: MoeRecipe
    architecture: Architecture
    routed: int
    layers: tuple[Layer, ...]
    left_behind: tuple[str, ...]
    gates: Gates | None = None

    @property
    def unlearned(self) -> bool:
        """Whether the routers are still to be made."""
        return self.gates is None

    @property
    def merges(self) -> bool:
        """Nothing is merged."""
        return False

    @property
    def own_recipe(self) -> dict[str, Any] | None:
        """The mixture's recipe, with what stands for what it leaves out."""
        return plain_recipe(self.mixture, [expert.name for expert in self.experts])

    @property
    def facts(self) -> dict[str, Any]:
        """What the lineage says of the mixture and of its routers."""
        facts: dict[str, Any] = {
            "architecture": self.architecture.model_type,
            "experts": [expert.name for expert in self.experts[: self.routed]],
            "shared_experts": [expert.name for expert in self.experts[self.routed :]],
            "experts_per_token": self.mixture.experts_per_token,
            "gate_mode": self.mixture.gate_mode,
        }
        return {"mixture": facts | ({} if self.gates is None else self.gates.facts())}

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """How the experts differ from the base in what makes them usable, and routers that do not know their own."""
        recipe = self.recipe.model_copy(update={"config": None})
        dense = Plan(
            recipe=recipe, method=self.method, base=self.base, experts=self.experts, alignment=self.alignment,
            tensors=(), layout=self.layout, stochastic=self.stochastic, allow_nonfinite=self.allow_nonfinite,
            where=self.where,
        )  # fmt: skip
        # A mixture's recipe has none of the keys that choose among models' files.
        facts = [
            one if one.kind in ("other-base", "base-name") else replace(one, mend="") for one in differences(dense)
        ]
        own = () if self.gates is None else self.gates.warnings()
        found = [Difference("routing", "warning", (name,), what, mend) for name, what, mend in (*own, *self._same())]
        return tuple(sorted((*found, *facts), key=lambda one: ("error", "warning", "note").index(one.level)))

    def _same(self) -> Iterable[tuple[str, str, str]]:
        """Say that all experts are one model: then routing changes nothing."""
        references = {expert.reference for expert in self.experts[: self.routed]}
        if self.routed > 1 and len(references) == 1:
            what = f"all {self.routed} experts are {references.pop()}, so the mixture computes what one of them does"
            yield self.experts[0].name, what, "of use only if it is trained further"


def plan_moe(
    recipe: MoeRecipe,
    *,
    where: str = "recipe",
    root: Path | None = None,
    shard_size: int = SHARD_SIZE,
    stochastic: bool = False,
    allow_nonfinite: bool = False,
) -> MoePlan:
    """Plan a mixture, but for its routers, from headers.

    Args:
        recipe: what to put together.
        where: how errors name the recipe.
        root: folder that relative paths start from.
        shard_size: greatest number of data bytes of an output file.
        stochastic: round stochastically instead of to nearest, where the dtype changes.
        allow_nonfinite: let NaN, Inf and overflow through.

    Raises:
        InputError: anything in the recipe or the models does not fit; nothing has been written.
    """
    entries = [*recipe.experts, *recipe.shared_experts]
    names = expert_names([(entry.source_model, entry.name) for entry in entries], where)
    base = open_model("base", recipe.base_model, root, base=True)
    opened = [open_model(name, entry.source_model, root) for name, entry in zip(names, entries, strict=True)]
    config = base.checkpoint.config if base.checkpoint is not None else None
    architecture = choose(recipe.architecture, config, recipe.base_model, where)
    _check_alike(config or {}, opened, base)
    _check_shared(recipe, architecture, where)
    on, numbered = comparable(base, [(model, number) for number, model in enumerate(opened)])
    assert on is not None
    experts = [model for model, _ in numbered]
    alignment = align(on, [])
    _check_plain(on, alignment)
    layers = _layers(alignment, config or {}, recipe.base_model)
    left_behind = _check_mlps(on, experts, layers)
    merge = _merge_recipe(
        recipe, names, architecture.config(config or {}, len(recipe.experts), recipe.experts_per_token)
    )
    draft = _Draft(recipe, architecture, on, experts, alignment, layers, None, merge.output_dtype, where)
    tensors = draft.tensors()
    layout = plan_layout(
        [(t.name, t.out_dtype, t.shape, t.nbytes) for t in tensors], shard_size, {"format": "pt"}
    )  # fmt: skip
    placed = [replace(t, file=layout.places[t.name][0], offset=layout.places[t.name][1]) for t in tensors]
    owned = replace(alignment, owners=draft.owners)
    return MoePlan(
        recipe=merge, method=METHOD, base=on, experts=tuple(experts), alignment=owned, tensors=tuple(placed),
        layout=layout, stochastic=stochastic, allow_nonfinite=allow_nonfinite, where=where, root=root,
        numbers=tuple(range(len(experts))), shard_size=shard_size, mixture=recipe, architecture=architecture,
        routed=len(recipe.experts), layers=tuple(layers), left_behind=tuple(left_behind), notes=tuple(left_behind),
    )  # fmt: skip


def with_gates(plan: MoePlan, gates: Gates) -> MoePlan:
    """Return a plan with its routers; the models stay open."""
    assert plan.base is not None
    draft = _Draft(
        plan.mixture, plan.architecture, plan.base, list(plan.experts), plan.alignment, list(plan.layers), gates,
        plan.recipe.output_dtype, plan.where,
    )  # fmt: skip
    planned = {tensor.name: tensor for tensor in draft.tensors()}
    tensors = tuple(replace(planned[t.name], file=t.file, offset=t.offset, index=t.index) for t in plan.tensors)
    return replace(plan, tensors=tensors, gates=gates, notes=(*plan.left_behind, *gates.lines()))


def _merge_recipe(recipe: MoeRecipe, names: Sequence[str], config: dict[str, Any]) -> Any:
    """Return what of a mixture's recipe a merge's says too: models, dtype, seed, and how its config differs."""
    entries = [*recipe.experts, *recipe.shared_experts]
    models = [{"model": one.source_model, "name": name} for one, name in zip(entries, names, strict=True)]
    value: dict[str, Any] = {"method": METHOD.name, "base_model": recipe.base_model, "models": models}
    value |= {"seed": recipe.seed, "config": config} | ({"out_dtype": recipe.dtype} if recipe.dtype else {})
    return parse_recipe(value, "recipe")


def _check_alike(config: dict[str, Any], experts: Sequence[Model], base: Model) -> None:
    """Refuse experts of another architecture, or whose layers compute with another function."""
    for expert in experts:
        own = expert.checkpoint.config if expert.checkpoint is not None else None
        if own is None:
            continue
        for key in ("model_type", "hidden_act", "num_hidden_layers", "hidden_size", "intermediate_size"):
            if key in own and key in config and own[key] != config[key]:
                raise InputError(
                    f"{expert.reference}: config.json: its {key} is {own[key]!r}, and {config[key]!r} in "
                    f"{base.reference}; experts must share the base's architecture and sizes"
                )


def _check_shared(recipe: MoeRecipe, architecture: Architecture, where: str) -> None:
    if not architecture.shared:
        if recipe.shared_experts:
            raise InputError(f"{where}: shared_experts: {architecture.name} has none; make them experts")
        return
    if len(recipe.shared_experts) != 1:
        raise InputError(
            f"{where}: shared_experts: {architecture.name} has exactly one, of which sigmoid(gate) is added to what is "
            f"routed, and the recipe names {len(recipe.shared_experts)}; with residual_scale: 0 it adds nothing"
        )
    silent = recipe.gate_mode not in ("random", "uniform_random") and not recipe.shared_experts[0].positive_prompts
    if silent and recipe.shared_experts[0].residual_scale != 0:
        raise InputError(
            f"{where}: shared_experts.0: positive_prompts are missing, of which its gate is made; add some"
        )


def _check_plain(base: Model, alignment: Alignment) -> None:
    if base.checkpoint is not None and packing(base.checkpoint).weights:
        weight = next(iter(packing(base.checkpoint).weights.values()))
        raise InputError(
            f"{base.reference}: weight {weight.name!r} is stored as {weight.format}; pass the unquantised model"
        )
    strange = [name for name in alignment.tensors if _IN_MLP.search(name) and _MLP.match(name) is None]
    strange += [name for name, info in alignment.tensors.items() if _MLP.match(name) and len(info.shape) != 2]
    if strange:
        raise InputError(
            f"{base.reference}: tensor {strange[0]!r} is in an MLP, of which gate_proj, up_proj and down_proj are known"
        )


def _layers(alignment: Alignment, config: dict[str, Any], reference: str) -> list[Layer]:
    """Return the layers of the base, in their order.

    Raises:
        InputError: one lacks a matrix, or there are others than the config says.
    """
    found: dict[str, Layer] = {}
    for name, info in alignment.tensors.items():
        match = _MLP.match(name)
        if match is not None:
            layer = found.setdefault(match["layer"], Layer(match["layer"], int(match["number"]), {}))
            layer.parts[match["part"]] = info
    layers = sorted(found.values(), key=lambda layer: layer.number)
    count = config.get("num_hidden_layers", len(layers))
    for layer in layers:
        missing = sorted({"gate", "up", "down"} - layer.parts.keys())
        if missing:
            raise InputError(f"{reference}: tensor '{layer.prefix}mlp.{missing[0]}_proj.weight' is missing")
    if not layers or [layer.number for layer in layers] != list(range(count)):
        raise InputError(
            f"{reference}: {len(layers)} layers have an MLP of gate_proj, up_proj and down_proj, and config.json says "
            f"num_hidden_layers: {count}"
        )
    return layers


def _check_mlps(base: Model, experts: Sequence[Model], layers: Sequence[Layer]) -> list[str]:
    """Check the experts' MLPs against the base's, and say what else of adapters is left behind."""
    mlps = {info.name for layer in layers for info in layer.parts.values()}
    align(_restricted(base, mlps), [_restricted(expert, mlps) for expert in experts])
    notes: list[str] = []
    for expert in experts:
        adapter = expert.adapter
        targets = set[str]() if adapter is None else adapter.pairs.keys() | adapter.whole.keys() | adapter.tokens.keys()
        outside = sorted(targets - mlps)
        if outside:
            notes.append(
                f"{expert.name}: its updates of {len(outside)} of {len(targets)} tensors are left behind, as "
                f"{outside[0]!r}: of an expert a mixture has the MLPs alone"
            )
        if adapter is not None and not targets & mlps:
            raise InputError(f"{expert.reference}: adapts no MLP, and of an expert a mixture has the MLPs alone")
    return notes


def _restricted(model: Model, names: set[str]) -> Model:
    """Return a model with some of its tensors."""
    checkpoint, adapter = model.checkpoint, model.adapter
    if checkpoint is not None:
        tensors = {name: info for name, info in checkpoint.tensors.items() if name in names}
        checkpoint = replace(checkpoint, tensors=tensors, modules=())
    if adapter is not None:
        pairs = {name: pair for name, pair in adapter.pairs.items() if name in names}
        whole = {name: info for name, info in adapter.whole.items() if name in names}
        adapter = replace(adapter, pairs=pairs, whole=whole, tokens={})
    return replace(model, checkpoint=checkpoint, adapter=adapter, assembled={})


@dataclass
class _Draft:
    """What the tensors of a mixture are planned from; ``owners`` fills as they are."""

    recipe: MoeRecipe
    architecture: Architecture
    base: Model
    experts: list[Model]
    alignment: Alignment
    layers: list[Layer]
    gates: Gates | None
    out_dtype: str | None
    where: str
    owners: dict[str, str] = field(default_factory=dict[str, str])

    def tensors(self) -> list[TensorPlan]:
        """Return the plans of all tensors in the base's order, a layer's experts and router in its MLP's place."""
        found: list[TensorPlan] = []
        layers = {layer.prefix: layer for layer in self.layers}
        for name in self.alignment.tensors:
            match = _MLP.match(name)
            if match is None:
                found.append(self._copied(name))
            elif match["layer"] in layers:
                found += self._layer(layers.pop(match["layer"]))
        return [replace(tensor, index=index) for index, tensor in enumerate(found)]

    def _dtype(self, info: TensorInfo) -> DType:
        return DTYPES[self.out_dtype] if self.out_dtype and info.dtype.mergeable else info.dtype

    def _tensor(self, name: str, info: TensorInfo, base: Source, **more: Any) -> TensorPlan:
        out, program = self._dtype(info), more.get("program")
        stored = [source.dense.dtype.bits for source in (base, *more.get("rows", ())) if source.dense is not None]
        wide = out.bits > (32 if program is None else 16) or any(bits > 32 for bits in stored)
        values: dict[str, Any] = {"rows": (), "row_names": (), "program": None, "parameters": {}, "stream": name} | more
        return TensorPlan(
            index=-1, name=name, shape=info.shape, numel=info.numel, out_dtype=out, file=-1, offset=-1, wide=wide,
            base=base, **values,
        )  # fmt: skip

    def _copied(self, name: str) -> TensorPlan:
        target = self.alignment.ties.get(name, name)
        source = self.alignment.source(self.alignment.donor, target)
        return self._tensor(name, self.alignment.tensors[name], source, stream=target)

    def _layer(self, layer: Layer) -> list[TensorPlan]:
        kind, routed = self.architecture, len(self.recipe.experts)
        found = [self._router(layer, kind.router, routed, shared=False)]
        for number, expert in enumerate(self.experts):
            spelled = kind.expert if number < routed else kind.shared
            for part, info in layer.parts.items():
                found.append(self._expert(f"{layer.prefix}{spelled[part].format(e=number)}", info, number, expert))
        if len(self.experts) > routed:
            found.append(self._router(layer, kind.shared_gate, len(self.experts) - routed, shared=True))
        return found

    def _expert(self, name: str, info: TensorInfo, number: int, expert: Model) -> TensorPlan:
        """Return the plan of one expert's matrix: a copy, or the base's with an adapter's update, times a scale."""
        entry = [*self.recipe.experts, *self.recipe.shared_experts][number]
        scale = entry.residual_scale if entry.residual_scale is not None and ".down_proj." in info.name else 1.0
        source = expert.source(info.name)
        if source.dense is not None and source.pair is None and scale == 1.0:
            self.owners[name] = expert.name
            return self._tensor(name, info, source)
        program = Elementwise("weights", weighted((scale,)))
        row = {"rows": (source,), "row_names": (expert.name,), "program": program}
        return self._tensor(name, info, self.base.source(info.name), parameters={"scale": (scale,)}, **row)

    def _router(self, layer: Layer, ending: str, count: int, *, shared: bool) -> TensorPlan:
        """Return the plan of a router [count, hidden], of zeros until it is made."""
        name, like = layer.prefix + ending, layer.parts["gate"]
        self.owners[name] = ROUTERS
        values = np.zeros((count, like.shape[1]), np.float32)
        facts: dict[str, Any] = {"gates": digest_of([self.recipe.model_dump(mode="json")])}
        if self.gates is not None:
            values = self.gates.weight(layer.number, shared=shared)
            facts["values"] = digest_of([values.tobytes().hex()])
        if values.shape != (count, like.shape[1]):
            raise InputError(f"{self.where}: {name} has shape {list(values.shape)}, not {[count, like.shape[1]]}")
        info = TensorInfo(name, DTYPES["F32"], values.shape)
        storage = MemoryStorage({name: np.ascontiguousarray(values).reshape(-1).view(np.uint8)})
        plan = self._tensor(name, info, Source(storage, info), parameters=facts)
        return replace(plan, out_dtype=self._dtype(replace(like, name=name)))
