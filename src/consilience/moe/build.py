"""From a plan without routers to one with them: the base is run on the prompts, once, and kept no longer.

What was made is kept in OUT.partial until the mixture is installed, so that an interrupted run goes on with the same.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.reference import resolve
from consilience.errors import InputError, MachineError
from consilience.moe.gates import Gates, Routed, random_gates
from consilience.moe.plan import MoePlan, plan_moe, with_gates
from consilience.moe.recipe import RANDOM, MoeExpert, MoeRecipe
from consilience.progress import NullProgress, Progress
from consilience.workdir import digest_of, json_text, write_file

_VALUES, _FACTS = "gates.safetensors", "gates.json"


def plan_mixture(recipe: MoeRecipe, **settings: Any) -> MoePlan:
    """Plan a mixture from headers, and make sure that its routers can be made; see ``plan_moe``.

    Raises:
        InputError: anything in the recipe or the models does not fit.
    """
    plan = plan_moe(recipe, **settings)
    check_gates(plan)
    return plan


def check_gates(plan: MoePlan, device: str = "cpu") -> None:
    """Refuse what would stop routers from being made, before any work.

    Raises:
        InputError: transformers is missing, the base is no folder, has no tokenizer, or there is no such device.
    """
    if not _prompted(plan):
        return
    from consilience.experts.vocabulary import has_tokenizer
    from consilience.tasks.load import check_device, require_transformers

    require_transformers(f"{plan.where}: gate_mode {plan.mixture.gate_mode!r} of prompts")
    folder = plan.alignment.donor.folder
    adapter = plan.base.adapter.folder if plan.base is not None and plan.base.adapter is not None else None
    if folder is None or not any(has_tokenizer(one) for one in (folder, adapter) if one is not None):
        raise InputError(f"{plan.mixture.base_model}: has no tokenizer, and prompts are to be read; add its files")
    check_device(device)


def _prompted(plan: MoePlan) -> list[tuple[int, MoeExpert]]:
    """Return the experts, by number, that have prompts."""
    entries = [*plan.mixture.experts, *plan.mixture.shared_experts]
    return [(number, entry) for number, entry in enumerate(entries) if entry.positive_prompts]


def learn_gates(
    plan: MoePlan,
    folder: Path | None = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MoePlan:
    """Return a plan with its routers, made of the prompts, or those that an earlier run left in ``folder``.

    Raises:
        InputError: the base cannot be run, or a prompt has no state of its own.
        MachineError: not enough memory.
    """
    check_gates(plan, device)
    assert plan.base is not None
    facts = [plan.mixture.model_dump(mode="json"), [expert.name for expert in plan.experts], plan.base.identity()]
    digest = digest_of(facts)
    gates = None if folder is None else _kept(folder, digest, plan)
    if gates is None:
        try:
            gates = _made(plan, device, trust_remote_code, progress or NullProgress())
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise MachineError(f"{plan.mixture.base_model}: not enough memory to run it on the prompts") from error
        if folder is not None:
            _keep(folder, digest, gates)
    return with_gates(plan, gates)


def _made(plan: MoePlan, device: str, trust_remote_code: bool, progress: Progress) -> Gates:
    mode, seed, layers, count = plan.mixture.gate_mode, plan.mixture.seed, len(plan.layers), plan.routed
    hidden = next(t.shape[1] for t in plan.tensors if t.name.endswith(plan.architecture.router))
    values = np.concatenate(
        [
            random_gates(mode, layers, count, hidden, seed),
            random_gates(mode, layers, len(plan.experts) - count, hidden, seed, part="shared"),
        ],
        axis=1,
    )
    prompted = _prompted(plan)
    routing: list[Routed] = []
    if prompted:
        from consilience.moe.states import gate, routing_of

        dense = _dense(plan, device, trust_remote_code)
        progress.phase("routers", 2 * len(prompted), "experts")
        places = {number: f"{plan.where}: {plan.experts[number].name}" for number, _ in prompted}
        positive = {n: dense.encode(entry.positive_prompts or [], places[n]) for n, entry in prompted}
        for number, entry in prompted if mode not in RANDOM else ():
            negative = dense.encode(entry.negative_prompts or [], places[number]) if entry.negative_prompts else []
            values[:, number] = gate(dense, positive[number], negative, mode, places[number])
            progress.advance()
        if mode not in RANDOM:
            silent = [n for n in range(count, len(plan.experts)) if n not in positive]
            values[:, silent] = 0.0
        for number in (n for n in positive if n < count):
            name, per_token = plan.experts[number].name, plan.mixture.experts_per_token
            routing.append(routing_of(dense, name, number, positive[number], values[:, :count], per_token))
            progress.advance()
    return Gates(mode, plan.mixture.experts_per_token, values[:, :count], values[:, count:], tuple(routing))


def _dense(plan: MoePlan, device: str, trust_remote_code: bool) -> Any:
    from consilience.moe.states import Dense
    from consilience.student.student import blocks_of
    from consilience.tasks.load import load_model, load_own_tokenizer

    place = resolve(plan.mixture.base_model, plan.root)
    tokenizer = load_own_tokenizer(place.model, place.adapter, trust_remote_code=trust_remote_code)
    model = load_model(place.model, adapter=place.adapter, device=device, trust_remote_code=trust_remote_code)
    return Dense(model, blocks_of(model), tokenizer)


def _kept(folder: Path, digest: str, plan: MoePlan) -> Gates | None:
    """Return the routers that an earlier run of the same work left; None: it left none."""
    try:
        facts = read_object(folder / _FACTS)
        if facts.get("digest") != digest:
            return None
        values = load_file(folder / _VALUES)
    except (InputError, OSError, SafetensorError):
        return None
    routing = tuple(Routed.from_dict(one) for one in facts["routing"])
    mixture = plan.mixture
    return Gates(mixture.gate_mode, mixture.experts_per_token, values["routed"], values["shared"], routing)


def _keep(folder: Path, digest: str, gates: Gates) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FACTS).unlink(missing_ok=True)  # written last: it says that the values are whole
    values = {"routed": gates.routed, "shared": gates.shared}
    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, folder / _VALUES)
    write_file(folder / _FACTS, json_text({"digest": digest, "routing": [asdict(one) for one in gates.routing]}))
