"""Merges that other merges of the same recipe start from: planned in advance, and opened by their names.

A stage's output is known from its plan: names, shapes, types, config. So the whole recipe is checked before any work,
on *skeletons*: folders with all of a model but its values, for which there are holes in the files.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from consilience.engine import output
from consilience.engine.plan import Plan
from consilience.engine.skeletons import Skeletons
from consilience.recipe.schema import Recipe

#: In OUT.partial: the stages' outputs.
STAGES = "stages"
#: Plans one recipe, its stages' folders given by name, without looking at values of those that are not there yet.
PlanOne = Callable[[Recipe, Mapping[str, Path]], Plan]


def plan_on_skeletons(recipe: Recipe, plan_one: PlanOne) -> Plan:
    """Plan a recipe and all its stages, whose outputs are not there yet.

    Returns:
        The last plan, with those of the stages. It can be shown and checked, not carried out. Closing it takes the
        skeletons away.
    """
    skeletons = Skeletons()
    folder, plans, places = skeletons.path, dict[str, Plan](), dict[str, Path]()
    try:
        for name, stage in recipe.stages.items():
            plans[name] = replace(plan_one(stage, places), skeletons=skeletons)
            places[name] = stage_place(folder, name, plans[name])
            _write_skeleton(places[name], plans[name])
        plan = plan_one(recipe, places)
    except BaseException:
        for plan in plans.values():
            plan.close()
        skeletons.close()
        raise
    return replace(plan, skeletons=skeletons, stages=plans)


def stage_place(folder: Path, name: str, plan: Plan) -> Path:
    """Return where a stage's output goes: a folder, or a file where models are flat state dicts."""
    return folder / (name if plan.alignment.donor.folder is not None else f"{name}.safetensors")


def _write_skeleton(place: Path, plan: Plan) -> None:
    if plan.alignment.donor.folder is None:
        paths = [place]
    else:
        place.mkdir()
        output.copy_side_files(place, plan)
        paths = [place / file.name for file in plan.layout.files]
    for path, file in zip(paths, plan.layout.files, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as out:
            out.write(file.header)
            out.truncate(file.size)
