"""What a dry run says of learning, and what was learned in a few lines."""

from collections.abc import Mapping
from typing import Any

from consilience.engine.plan import Plan


def summary(found: Any) -> list[str]:
    """Return what was learned: coefficients, steps, and the loss's terms before the first and the last step."""
    lines = [
        f"learned {int(found.learned.sum())} coefficient(s) per expert"
        + (f" in {found.facts['steps']} steps" if "steps" in found.facts else "")
        + (f", {found.facts['seconds']:.0f} s" if "seconds" in found.facts else "")
    ]
    history = found.facts.get("history") or []
    if history:
        first, last = history[0], history[-1]
        terms = (f"{key} {first[key]:.4f} -> {last[key]:.4f}" for key in first if key not in ("step", "held_out"))
        lines.append("  " + ", ".join(terms))
    if "diagnosis" in found.facts:
        lines.append("  {verdict}: {advice}".format(**found.facts["diagnosis"]))
    lines += _compared(found.facts.get("compared", {"impossible": "the method measures nothing beside itself"}))
    if "sigma_max" in found.facts:
        told = "  sigma_max of the experts {sigma_max:.4g}, of the experts less their mean {sigma_max_centred:.4g}"
        lines.append(told.format(**found.facts))
    lines += [f"  note: {note}" for note in found.facts.get("notes", ())]
    for name, row in zip(found.experts, found.alpha, strict=True):
        lines.append(f"  {name}: mean {row.mean():.3f}, from {row.min():.3f} to {row.max():.3f}")
    return lines


_MEASURES = {"kl": "KL to the experts", "loss": "loss", "error": "share ranked wrongly"}


def _compared(facts: Mapping[str, Any]) -> list[str]:
    """Return how the merge stands beside the base and Task Arithmetic, and a warning where it is no better."""
    if "impossible" in facts:
        return [f"  not compared with the base and Task Arithmetic: {facts['impossible']}"]
    told = (
        "  {what} on {rows} {on}: base {base:.4f}, Task Arithmetic at its best ({strength:g}) {task_arithmetic:.4f}, "
        "learned {learned:.4f}"
    ).format(what=_MEASURES[facts["measure"]], **facts)
    if facts["better"]:
        return [told]
    worse = facts["learned"] >= facts["base"]
    return [
        told,
        "  warning: what was learned is no better than "
        + ("the base" if worse else "Task Arithmetic with one strength")
        + "; look at the rows and answers it was learned from (consilience inspect), give more rows or steps, or merge "
        "with task_arithmetic",
    ]


def learning_lines(plan: Plan) -> list[str]:
    """Return what a dry run says of learning: how many coefficients, from how many rows, at which cost."""
    from consilience.learned.run import Run, groups_of

    run, values = Run(plan, plan.root, where=plan.where), plan.learning
    count = values.get("samples", 0)
    own = values.get("own_prompts", 0) if values.get("responses") == "generate" else 0
    asked_of = [] if plan.method.reads_target else run.experts
    tasks = [run.asked(name, own_prompts=own, key=plan.method.rows_key, rows=count) for name in asked_of]
    given = run.target(count) if plan.method.reads_target else tasks
    rows = {task.name: len(task.rows) or own for task in given if task is not None}
    if plan.method.collect is not None:
        lines = ["statistics (collected before the merge, block by block)"]
        lines.append("  rows: " + ", ".join(f"{name} {count}" for name, count in rows.items()))
        return lines
    lines = ["learning (before the merge; the coefficients above are where it starts)"]
    if "grouping" in values:
        start = groups_of(run, values["grouping"], values["exclude"], values["alphabar"])
        excluded = len(start.facts["excluded"])
        lines.append(f"  {start.count} coefficients per expert; {excluded} tensors excluded")
    asked = values.get("responses") == "generate" and not plan.method.reads_target
    if asked:
        lines.append(f"  {values.get('answers', 1)} answer(s) of its expert to each prompt, generated first")
    lines.append(f"  {'prompts' if asked else 'rows'}: " + ", ".join(f"{name} {count}" for name, count in rows.items()))
    parameters = sum(t.numel for t in plan.tensors)
    width = 2 if values.get("precision") == "bfloat16" else 4
    lines.append(
        f"  memory: about {parameters * width / 1e9:.1f} GB of weights, up to as much of gradients, and activations"
    )
    if "steps" in values:
        lines.append(f"  at most {values['steps']} steps")
    return lines
