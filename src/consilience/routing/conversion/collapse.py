"""A routed model distilled to one checkpoint: what routing does on average, done always.

    theta[module] = theta_0[module] + sum_k alpha_k[module] s_k B_k A_k,    alpha_k[module] = mean weight of expert k

Where routing gives all tokens of a module the same weights, this is the routed model itself; elsewhere it is what is
left when tokens can no longer differ. The means are a Coefficients value, applied by the streaming merge.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from consilience.coefficients import Coefficients, make_groups
from consilience.coefficients.coefficients import WEIGHTS
from consilience.engine.adapter_output import called
from consilience.engine.differences import check_differences
from consilience.engine.load_check import LoadCheck, check_model
from consilience.engine.merge import stream_in
from consilience.engine.output import check_side_files
from consilience.engine.plan import Plan, make_plan
from consilience.errors import InputError
from consilience.experts.expert_set import open_experts
from consilience.progress import Progress, ProgressOption, open_progress
from consilience.recipe.schema import parse_recipe
from consilience.routing.conversion.shares import Shares, read
from consilience.routing.evaluation import evaluate_routed, prompts_of
from consilience.routing.folder import store
from consilience.routing.folder.load import load_routed
from consilience.tasks.encoding import Encoded, encode, vocabulary_of
from consilience.tasks.evaluation import evaluate
from consilience.tasks.load import require_transformers
from consilience.tasks.readout import decoder_start
from consilience.tasks.results import Evaluation
from consilience.tasks.rows import Task, load_tasks, row_hashes
from consilience.workdir import OURS, check_out, digest_of, workdir, write_json

RECORD = "collapse.json"


@dataclass(frozen=True, eq=False)
class Collapsed:
    """What became of a routed model.

    ``shares`` has, by task and expert, the mean weight over tokens and modules. ``evaluations`` are the routed model's
    (none if no row has a response) and the checkpoint's, whose divergence is from the routed model.
    """

    out: str
    coefficients: Coefficients
    shares: dict[str, dict[str, float]]
    evaluations: tuple[Evaluation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without rows."""
        measured = [json.loads(one.to_json(examples=False)) for one in self.evaluations]
        facts = {key: self.coefficients.facts[key] for key in ("routing", "tokens")}
        return {"format": 1, **facts, "shares": self.shares, "evaluations": measured}


def collapse(
    folder: Path | str,
    tasks: Sequence[Task | Path | str],
    out: Path | str,
    *,
    model: Any | None = None,
    held_out: Sequence[Task | Path | str] = (),
    base: str | None = None,
    batch_size: int = 16,
    max_examples: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: ProgressOption = False,
    trust_remote_code: bool = False,
) -> Collapsed:
    """Distil a routed model to one checkpoint by its mean weights on prompts, and measure the two side by side.

    The checkpoint is an ordinary merge, verified and with lineage; the figures are in ``consilience/collapse.json``.

    Args:
        folder: what ``consilience route build`` made.
        tasks: rows to take the means on, as ``consilience.evaluate`` takes them; responses are read, but no query.
        out: the folder to write.
        model: the routed model, if it is loaded, with the settings and weights it has now.
        held_out: rows to measure on; by default those of ``tasks``.
        base: where the base is, if it has moved.
        batch_size: sequences of a forward pass.
        max_examples: use the first rows of each task only.
        device: a torch device.
        force: replace what stands at ``out``.
        progress: True for a bar (or lines) on standard error, a function called with (done, in all) of each part of the
            work, or a ``Progress``.
        trust_remote_code: run ``.py`` files that come with the base.

    Raises:
        InputError: the folder or a row is wrong, the model is another one, or a module sees no token of the rows;
            nothing is left behind.
        MachineError: memory or disk ran out; the same call continues.
    """
    require_transformers("routing")
    folder, out, named = Path(folder), Path(out), load_tasks(tasks)
    measured = load_tasks(held_out) if held_out else named
    description = store.read_description(folder)
    place = store.find_base(description.base, folder, base)
    inputs = [folder, place, *(one.path for one in (*named, *measured) if one.path is not None)]
    check_out(out, force=force, inputs=inputs)
    check_side_files(place)
    routed: Any = model
    if model is None:
        routed = load_routed(folder, base=base, device=device, dtype="float32", trust_remote_code=trust_remote_code)
    if routed.routing.names != description.experts:
        raise InputError(f"model: its experts are not those of {folder}; load that folder, or save the model first")
    experts = {name: str(store.expert_folder(folder, name)) for name in description.experts}
    with open_progress(progress) as shown:
        total, shares = _watched(routed, named, batch_size, max_examples, shown)
        plan = _planned(str(place), experts, total, _facts(routed, named, total, max_examples))
        try:
            assert plan.coefficients is not None
            with workdir(out, digest_of({"collapse": plan.digest}), force=force, inputs=inputs) as work:
                if work.delivered is not None:
                    known = tuple(map(Evaluation.from_dict, work.delivered["evaluations"]))
                    return Collapsed(str(out), plan.coefficients, shares, known)
                loader = check_model(plan, LoadCheck(trust_remote_code=trust_remote_code), shown)
                stream_in(plan, work, loader=loader, progress=shown)
                compared = _compared(routed, work.result, measured, batch_size, max_examples, shown)
                found = Collapsed(str(out), plan.coefficients, shares, compared)
                write_json(work.result / OURS / RECORD, found.to_dict())
                work.deliver({"evaluations": [one.to_dict() for one in compared]})
            return found
        finally:
            plan.close()


def _sequences(model: Any, task: Task, max_examples: int | None) -> list[Encoded]:
    """Return a task's rows as the model reads them; of choices, the right one."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    encoded = encode(
        task,
        model.tokenizer,
        decoder_start=decoder_start(model) if getattr(config, "is_encoder_decoder", False) else None,
        max_examples=max_examples,
        context=getattr(text, "max_position_embeddings", None),
        vocabulary=vocabulary_of(model),
    )
    return [one for one in encoded if one.candidate in (None, task.rows[one.row].gold)]


def _watched(
    model: Any, tasks: Sequence[Task], batch_size: int, max_examples: int | None, progress: Progress
) -> tuple[Shares, dict[str, dict[str, float]]]:
    """Return the weights summed over all tasks, and every task's mean weights."""
    sequences = [_sequences(model, task, max_examples) for task in tasks]
    total = Shares()
    progress.phase("reading the experts' weights", sum(map(len, sequences)), "sequences")
    means: dict[str, dict[str, float]] = {}
    with (
        model.routing.expecting(prompts_of(model, tasks, max_examples)),
        model.routing.watched(total.watch),
    ):
        for task, own in zip(tasks, sequences, strict=True):
            seen = Shares()
            with model.routing.watched(seen.watch):
                read(model, own, batch_size, progress.advance)
            means[task.name] = dict(zip(model.routing.names, seen.overall().tolist(), strict=True))
    return total, means


def _facts(model: Any, tasks: Sequence[Task], total: Shares, max_examples: int | None) -> dict[str, Any]:
    rows = {task.name: task.rows[:max_examples] for task in tasks}
    files = {task.name: task.path.name if task.path else None for task in tasks}
    return {
        "method": "collapse",
        "routing": model.routing.settings.to_dict(),
        "tokens": max(total.tokens.values(), default=0),
        "calibration": {
            name: {
                "file": files[name],
                "rows": len(own),
                "hashes": sorted({value for row in own for value in row_hashes(row)}),
            }
            for name, own in rows.items()
        },
    }


def _planned(base: str, experts: Mapping[str, str], total: Shares, facts: dict[str, Any]) -> Plan:
    """Plan the merge of the experts with their mean weights as coefficients."""
    opened = open_experts(base, experts)
    try:
        adapted = [stack for stack in opened.stacks if any(row.pair is not None for row in stack.rows)]
        modules = [called(opened, stack.name).removesuffix(".weight") for stack in adapted]
    finally:
        opened.close()
    unseen = [module for module in modules if module not in total.sums]
    if unseen:
        raise InputError(f"{unseen[0]}: no token of the given rows reached this module; give rows that do")
    groups = make_groups([(stack.name, stack.numel) for stack in adapted], "tensor")
    alpha = np.stack([total.mean(module).numpy() for module in modules], 1)
    found = Coefficients(tuple(experts), groups, alpha, facts=facts)
    models = [{"model": path, "name": name} for name, path in experts.items()]
    recipe = parse_recipe({"method": "coefficients", "base_model": base, "models": models}, "arguments")
    plan = make_plan(recipe, where="arguments", coefficients=found)
    check_differences(plan.differences, "arguments", strict=False)
    # The recipe is kept beside the coefficients, and relative paths start there.
    return replace(plan, recipe=plan.recipe.model_copy(update={"coefficients": WEIGHTS}))


def _compared(
    model: Any, merged: Path, tasks: Sequence[Task], batch_size: int, max_examples: int | None, progress: Progress
) -> tuple[Evaluation, ...]:
    """Measure the routed model where rows have responses, and the checkpoint beside it."""
    settings: dict[str, Any] = {"batch_size": batch_size, "max_examples": max_examples, "progress": progress}
    labelled = [task for task in tasks if any(row.labelled for row in task.rows[:max_examples])]
    routed = evaluate_routed(model, labelled, **settings) if labelled else []
    with model.routing.expecting(prompts_of(model, tasks, max_examples)):
        single = evaluate(
            str(merged),
            tasks,
            reference=model,
            tokenizer=model.tokenizer,
            name="collapsed",
            device=str(model.device),
            **settings,
        )
    return (*routed, single)
