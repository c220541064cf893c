"""Expert Merging aligned on what the experts answer, against joint training and the controls that critics ask for.

Ten unlabelled prompts of each domain (three disjoint draws), answered by their expert; nothing else is known of the
tasks. Every cell is one whole command, generation included, on two cores, and is measured on the same test rows as the
other studies of the language suite.
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import consilience as cs
from consilience.api import build_recipe
from consilience.coefficients import Coefficients, load_coefficients
from consilience.tasks import Row, Task
from consilience.training import fine_tune
from studies.answers_tables import FRESH, FRESH_GIVEN, RANDOM, SWEPT, mean_loss, tables
from studies.cells import Study
from studies.expert_merging import experts, facts, loadable, losses
from studies.language import in_scratch
from suites.language import DOMAINS, MORE_DOMAINS, adapter_path, calibration_path
from suites.language.base import base_path
from suites.language.train_mixture import LORA_PATH

DRAWS = (0, 1, 2)
PROMPTS = 10
#: Prompts of a draw -> a file holds thirty, so that draws overlap above ten.
_HELD = 30
#: label -> (method, parameters): the command's own defaults unless they are named.
LEARNED: dict[str, tuple[str, dict[str, Any]]] = {
    "merge + distil": ("expert_merging_distil", {}),
    "merge + distil, prompts of the experts' own": ("expert_merging_distil", {"own_prompts": 10}),
    "expert_merging": ("expert_merging", {}),
    "expert_merging, written prompts too": ("expert_merging", {"written_prompts": 64}),
    "expert_merging, one greedy answer": ("expert_merging", {"answers": 1, "answer_temperature": 0.0}),
    "expert_merging, as published": ("expert_merging", {"preset": "paper"}),
    "expert_merging_pp, uniform chunks": ("expert_merging_pp", {"kappa": 0.0, "budget": 4.0}),
    "expert_merging_pp": ("expert_merging_pp", {"budget": 4.0}),
    "expert_merging, hidden states too": ("expert_merging", {"hidden_weight": 1.0}),
    "GLUE's mixture by the same loss": (
        "expert_merging", {"optimizer": "spsa", "coefficients": "softmax", "grouping": "global", "alphabar": 0.25},
    ),
    "LoraHub's search by the same loss": ("expert_merging", {"optimizer": "cma", "grouping": "global", "steps": 10}),
    "AdaMerging's coefficients by the same loss": ("expert_merging", {"coefficients": "box"}),
}  # fmt: skip
#: Cells in the order in which they run: (label, experts, draws, prompts).
PLAN: tuple[tuple[str, str, tuple[int, ...], int], ...] = (
    ("merge + distil", "lora", DRAWS, PROMPTS),
    ("expert_merging", "lora", DRAWS, PROMPTS),
    ("expert_merging, as published", "lora", (0,), PROMPTS),
    ("expert_merging, one greedy answer", "lora", (0,), PROMPTS),
    ("expert_merging, written prompts too", "lora", (0,), PROMPTS),
    ("merge + distil", "lora", (0,), 5),
    ("merge + distil", "lora", (0,), 2),
    ("merge + distil", "lora", (0,), 30),
    ("merge + distil, prompts of the experts' own", "lora", (0,), 0),
    ("expert_merging, hidden states too", "lora", (0,), PROMPTS),
    ("expert_merging_pp, uniform chunks", "lora", (0,), PROMPTS),
    ("expert_merging_pp", "lora", (0,), PROMPTS),
    ("AdaMerging's coefficients by the same loss", "lora", (0,), PROMPTS),
    ("GLUE's mixture by the same loss", "lora", (0,), PROMPTS),
    ("LoraHub's search by the same loss", "lora", (0,), PROMPTS),
    ("merge + distil", "full", (0,), PROMPTS),
    ("expert_merging", "random", (0,), PROMPTS),
    ("expert_merging", "further", (0,), PROMPTS),
    ("merge + distil", "further", (0,), PROMPTS),
)
#: Strengths of Task Arithmetic, of which validation rows choose one.
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
#: One fresh LoRA on the rows that the merge generated: rank, alpha, step size of the suite's own adapters, batch of 8.
FRESH_LORA: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 16, "learning_rate": 1e-3, "batch_size": 8}
FRESH_STEPS = 150


def domains_of(setting: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the domains that a cell is about: the core four, or the further ones."""
    return MORE_DOMAINS if setting.get("experts") == "further" else DOMAINS


def identity(label: str) -> str:
    """Return a label as part of a file's name."""
    plain = "".join(c if c.isalnum() or c == "_" else "-" for c in label.replace(" + ", "-"))
    return "-".join(part for part in plain.split("-") if part)


def _cells() -> list[tuple[str, dict[str, Any]]]:
    cells: list[tuple[str, dict[str, Any]]] = [
        (name, {"kind": "model", "model": name, "seed": 0}) for name in ("base", "mixture")
    ]
    for domain in DOMAINS:
        cells.append((f"expert-{domain}", {"kind": "expert", "domain": domain, "seed": 0}))
    for domain in MORE_DOMAINS:
        cells.append(
            (f"further-expert-{domain}", {"kind": "expert", "domain": domain, "experts": "further", "seed": 0})
        )
    cells.append(("further-base", {"kind": "model", "model": "base", "experts": "further", "seed": 0}))
    swept: dict[str, Any] = {"kind": "swept", "label": SWEPT, "strengths": list(STRENGTHS), "seed": 0}
    cells += [("task_arithmetic", swept), ("further-task_arithmetic", swept | {"experts": "further"})]
    for label, kind, draws, prompts in PLAN:
        method, parameters = LEARNED[label]
        for number in draws:
            name = f"{kind}-{identity(label)}-{prompts}-{number}"
            named = RANDOM if kind == "random" else label
            setting = {"kind": "learned", "experts": kind, "label": named, "method": method, "parameters": parameters}
            cells.append((name, setting | {"draw": number, "prompts": prompts, "seed": 0}))
            if label == "merge + distil" and prompts == PROMPTS and kind == "lora":
                setting = {"kind": "fresh", "draw": number, "prompts": prompts, "seed": 0, "steps": FRESH_STEPS}
                cells.append((f"fresh-lora-written-{number}", setting | {"label": FRESH, "method": method}))
                if number == 0:
                    setting |= {"label": FRESH_GIVEN, "method": "expert_merging"}
                    cells.append((f"fresh-lora-{number}", setting))
    return cells


def draw(number: int, prompts: int, folder: Path, domains: Sequence[str] = DOMAINS) -> dict[str, str]:
    """Write the prompts of one draw and return the files by expert; draws of ten or fewer are disjoint."""
    out: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        lines = calibration_path(domain).read_text(encoding="utf-8").splitlines()
        chosen = [lines[(number * PROMPTS + i) % _HELD] for i in range(prompts)]
        (folder / f"{domain}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
        out[domain] = str(folder / f"{domain}.jsonl")
    return out


def random_experts(folder: Path) -> dict[str, str]:
    """Write adapters of Gaussian factors, each update as large as the trained one's in its place; return them by name.

    B' A' is scaled to ||B A||, which is the root of tr(B^T B A A^T).
    """
    import torch
    from safetensors.torch import load_file, save_file

    out: dict[str, str] = {}
    for number, domain in enumerate(DOMAINS):
        own, made = adapter_path(domain), folder / domain
        made.mkdir(parents=True)
        shutil.copy(own / "adapter_config.json", made)
        trained = {name: value.double() for name, value in load_file(own / "adapter_model.safetensors").items()}
        random = torch.Generator().manual_seed(number)
        drawn = {name: torch.randn(value.shape, generator=random).double() for name, value in trained.items()}
        for name in [name for name in trained if ".lora_A." in name]:
            other = name.replace(".lora_A.", ".lora_B.")
            drawn[other] *= _size(trained[other], trained[name]) / _size(drawn[other], drawn[name])
        save_file(
            {name: value.float().contiguous() for name, value in drawn.items()}, made / "adapter_model.safetensors"
        )
        out[domain] = str(made)
    return out


def _size(b: Any, a: Any) -> float:
    return float(((b.T @ b) * (a @ a.T)).sum().sqrt())


def run(setting: dict[str, Any]) -> dict[str, Any]:
    """Make one model and measure it."""
    return in_scratch(_run, setting)


def _run(setting: dict[str, Any], out: Path) -> dict[str, Any]:
    domains, kind = domains_of(setting), setting.get("experts", "lora")
    if setting["kind"] == "model":
        model = str(base_path()) if setting["model"] == "base" else f"{base_path()}+{LORA_PATH}"
        return {"losses": losses(model, "test", domains)}
    if setting["kind"] == "expert":
        return {"losses": losses(loadable(kind, setting["domain"]), "test", domains)}
    if setting["kind"] == "swept":
        return _swept(kind, setting["strengths"], out, domains)
    prompts = setting.get("prompts", PROMPTS)
    files = draw(setting["draw"], prompts, out.parent / "prompts", domains) if prompts else {}
    if setting["kind"] == "fresh":
        return _fresh(setting, files, out)
    models = random_experts(out.parent / "random") if kind == "random" else experts(kind)
    recipe = build_recipe(
        setting["method"], str(base_path()), models, setting["parameters"],
        data={name: {"calibration": path} for name, path in files.items()},
    )  # fmt: skip
    begun = _clock()
    cs.merge_recipe(recipe, out)
    took = _since(begun)
    found = load_coefficients(out)
    result = {"losses": losses(str(out), "test", domains), "learned": facts(found)} | took
    result |= {"compared": found.facts.get("compared"), "tokens": _tokens(found)}
    return result


def _swept(kind: str, strengths: list[float], out: Path, domains: Sequence[str]) -> dict[str, Any]:
    """Measure Task Arithmetic of the adapters at the strength with the least mean loss on validation rows."""
    means: dict[float, float] = {}

    def merge_at(strength: float) -> None:
        chosen: dict[str, Any] = {"lambda": strength}
        cs.merge(base_path(), experts(kind), out, method="task_arithmetic", force=True, **chosen)

    for strength in strengths:
        merge_at(strength)
        means[strength] = mean_loss(losses(str(out), "validation", domains))
    best = min(means, key=means.__getitem__)
    merge_at(best)
    return {
        "losses": losses(str(out), "test", domains),
        "strength": best,
        "validation": {str(k): v for k, v in means.items()},
    }


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(begun: tuple[float, float]) -> dict[str, Any]:
    """Return what a command took, of the clock and of processors: on a shared machine its seconds mean little."""
    import torch

    now = _clock()
    seconds, busy = (round(b - a, 1) for a, b in zip(begun, now, strict=True))
    return {"seconds": seconds, "busy": busy, "threads": torch.get_num_threads(), "load": round(os.getloadavg()[1], 1)}


def _tokens(found: Coefficients) -> dict[str, Any]:
    """Return how many compared tokens every expert's rows have."""
    return {name: told.get("tokens") for name, told in found.facts["calibration"].items()}


def _answers(method: str, files: Mapping[str, str], folder: Path) -> list[Task]:
    """Return the rows that a draw's merge learned from, written prompts included: seeds make the same answers."""
    from consilience.api import plan_recipe
    from consilience.learned.expert_merging import ExpertMerging
    from consilience.learned.learning import start_of
    from consilience.learned.run import Run, open_workshop
    from consilience.learned.settings import Start
    from consilience.methods.signature import settings_of

    recipe = build_recipe(
        method, str(base_path()), experts("lora"), {},
        data={name: {"calibration": path} for name, path in files.items()},
    )  # fmt: skip
    plan = plan_recipe(recipe)
    learning, start = settings_of(ExpertMerging, plan.learning), settings_of(Start, plan.learning)
    shop = open_workshop(Run(plan, folder=folder), start_of(Run(plan), start), learning.rows, teachers=False)
    shop.close()
    plan.close()
    rows: dict[int, list[Row]] = {}
    for i in shop.learn:
        if shop.samples[i].row.response is not None:
            rows.setdefault(shop.samples[i].expert, []).append(shop.samples[i].row)
    return [Task(domain, tuple(rows[k])) for k, domain in enumerate(DOMAINS)]


def _fresh(setting: Mapping[str, Any], files: Mapping[str, str], out: Path) -> dict[str, Any]:
    begun = _clock()
    tasks = _answers(setting["method"], files, out.parent / "state")
    fine_tune(base_path(), tasks, out, steps=setting["steps"], **FRESH_LORA)
    took = _since(begun)
    return {"losses": losses(f"{base_path()}+{out}", "test")} | took


STUDY = Study("answers", _cells(), run, tables)
