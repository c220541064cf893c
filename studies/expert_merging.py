"""Expert Merging on the four language experts: three draws of ten unlabelled prompts, against every baseline.

Two sets of experts: ``lora`` (the four committed adapters) and ``full`` (pronounce and sentiment fine-tuned in all
weights, translate and code as adapters: full weights and factors in one merge). A draw is ten of the thirty calibration
prompts of each domain, disjoint between draws. Measured on held-out rows: KL(expert || merge) per token of the prompts,
which is what Expert Merging minimises (on others), and the loss per response token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import consilience as cs
from consilience.api import build_recipe, plan_recipe
from consilience.coefficients import Coefficients, save_coefficients
from consilience.learned.expert_merging import ExpertMerging
from consilience.learned.learning import start_of
from consilience.learned.run import Machine, Run, open_workshop
from consilience.learned.settings import Start
from consilience.methods.signature import settings_of
from consilience.objectives.objective import Objective
from consilience.tasks import Task, evaluate, load_task
from studies.cells import Study
from studies.expert_merging_tables import tables
from studies.language import TOKENS, in_scratch, measure, scores
from suites.language import CACHE, DOMAINS, MORE_DOMAINS, adapter_path, calibration_path, heldout_path
from suites.language.base import base_path
from suites.language.train import further_path
from suites.language.train_full import full_path
from suites.language.train_mixture import LORA_PATH

DRAWS = (0, 1, 2)
SAMPLES = 10
#: Prompts per domain on which divergences are measured.
PROMPTS = 60
#: This study is of the published objective: rows as they are, every token, hidden states, an anchor.
PUBLISHED: dict[str, Any] = {"preset": "paper"}
#: What every learned method here shares: eight samples a step keep a step to seconds on two cores.
LEARNING: dict[str, Any] = {"steps": 40, "batch": 8, "learning_rate": 0.04}
#: What the defaults were chosen among, on validation rows and the first draw.
TRIED: dict[str, dict[str, Any]] = {
    "rate 0.02": {"learning_rate": 0.02},
    "rate 0.04": {},
    "rate 0.03, 80 steps": {"learning_rate": 0.03, "steps": 80},
    "rate 0.08": {"learning_rate": 0.08},
    "gamma 0": {"gamma": 0.0},
    "gamma 5": {"gamma": 5.0},
    "hidden weight 0.2": {"hidden_weight": 0.2},
    "alphabar 0.5": {"alphabar": 0.5},
}
#: label -> (method, parameters besides LEARNING)
LEARNED: dict[str, tuple[str, dict[str, Any]]] = {
    "expert_merging": ("expert_merging", {}),
    "expert_merging without logits": ("expert_merging", {"logit_weight": 0.0}),
    "expert_merging without hidden states": ("expert_merging", {"hidden_weight": 0.0}),
    "expert_merging_pp": ("expert_merging_pp", {}),
    "expert_merging_pp, uniform chunks": ("expert_merging_pp", {"kappa": 0.0}),
    "adamerging": ("adamerging", {"granularity": "layer", "batch": 2}),
    "least_squares": ("least_squares", {}),
}
#: Strengths of Task Arithmetic that are tried on the calibration prompts.
STRENGTHS = tuple(round(0.1 * i, 1) for i in range(1, 11))
#: Data-free merges at the strength that language_merge chose on validation rows.
FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "ties": ("ties", {"density": 0.2, "lambda": 1.0}),
    "dare_linear": ("dare_linear", {"density": 0.5, "lambda": 0.5}),
}


def experts(kind: str) -> dict[str, str]:
    """Return expert name -> model of a set: adapters ("lora"), full fine-tunes, or the further domains' adapters."""
    own = {domain: str(adapter_path(domain)) for domain in DOMAINS}
    if kind == "further":
        return {domain: str(further_path(domain)) for domain in MORE_DOMAINS}
    if kind == "full":
        own |= {domain: str(full_path(domain)) for domain in ("pronounce", "sentiment")}
    return own


def loadable(kind: str, domain: str) -> str:
    """Return an expert as ``evaluate`` takes it."""
    path = experts(kind)[domain]
    return path if (Path(path) / "config.json").is_file() else f"{base_path()}+{path}"


def draw(number: int, folder: Path) -> dict[str, str]:
    """Write the calibration files of one draw and return them by expert."""
    out: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        lines = calibration_path(domain).read_text(encoding="utf-8").splitlines()
        chosen = lines[number * SAMPLES : (number + 1) * SAMPLES]
        (folder / f"{domain}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
        out[domain] = str(folder / f"{domain}.jsonl")
    return out


def prompts(split: str) -> list[Task]:
    """Return every domain's held-out prompts without their responses."""
    tasks: list[Task] = []
    for domain in DOMAINS:
        task = load_task(f"{domain}={heldout_path(domain, 'test' if split == 'test' else 'validation')}")
        bare = {"response": None, "choices": None, "label": None}
        tasks.append(replace(task, rows=tuple(row.model_copy(update=bare) for row in task.rows[:PROMPTS])))
    return tasks


def divergences(model: str, kind: str, split: str) -> dict[str, Any]:
    """Measure KL(expert || model) per prompt token, every expert on its own domain."""
    found = evaluate(
        model,
        prompts(split),
        reference={domain: loadable(kind, domain) for domain in DOMAINS},
        dtype="bfloat16",
        max_tokens=TOKENS,
        batch_size=16,
        progress=False,
    )
    out: dict[str, dict[str, Any]] = {}
    for result in found.results:
        held = result.divergence
        assert held is not None
        sums = [round(value, 4) for value in held.kl_sums]
        out[result.task] = {"kl": held.kl, "low": held.interval.low, "high": held.interval.high,
                            "sums": sums, "tokens": list(held.tokens)}  # fmt: skip
    return out


def losses(model: str, split: str, domains: Sequence[str] = DOMAINS) -> dict[str, Any]:
    """Measure the loss per response token on every domain; per row too, for paired comparisons."""
    found = measure(model, split, domains=domains)
    out = scores(found)
    for result in found.results:
        assert result.loss is not None
        out[result.task] |= {"sums": [round(v, 3) for v in result.loss.nats], "row_tokens": list(result.loss.tokens)}
    return out


def measured(model: str, kind: str, split: str = "test") -> dict[str, Any]:
    """Measure a merge: losses and divergences."""
    return {split: {"losses": losses(model, split), "divergences": divergences(model, kind, split)}}


def _cells() -> tuple[tuple[str, dict[str, Any]], ...]:
    cells: list[tuple[str, dict[str, Any]]] = [("base", {"kind": "model", "model": "base", "seed": 0})]
    cells.append(("mixture", {"kind": "model", "model": "mixture", "seed": 0}))
    for label, parameters in TRIED.items():
        setting = {"kind": "learned", "experts": "lora", "label": label, "method": "expert_merging", "draw": 0}
        identity = "tried-" + label.replace(" ", "-").replace(",", "")
        cells.append((identity, setting | {"parameters": LEARNING | parameters, "split": "validation", "seed": 0}))
    for kind in ("lora", "full"):
        for domain in DOMAINS:
            if kind == "lora" or domain in ("pronounce", "sentiment"):
                cells.append(
                    (f"{kind}-expert-{domain}", {"kind": "expert", "experts": kind, "domain": domain, "seed": 0})
                )
        for label, (method, parameters) in FIXED.items():
            setting = {"kind": "fixed", "experts": kind, "label": label, "method": method, "parameters": parameters}
            cells.append((f"{kind}-{label}", setting | {"seed": 0}))
        for number in DRAWS:
            setting = {"kind": "strength", "experts": kind, "label": "task_arithmetic", "draw": number, "seed": 0}
            cells.append((f"{kind}-task_arithmetic-{number}", setting))
            for label, (method, parameters) in LEARNED.items():
                once = kind == "full" and label in ("expert_merging_pp", "adamerging")
                if (kind == "full" and ("without" in label or "uniform" in label)) or (once and number):
                    continue
                shared = {} if method == "least_squares" else LEARNING
                setting = {"kind": "learned", "experts": kind, "label": label, "method": method, "draw": number}
                identity = "".join(c if c.isalnum() or c == "_" else "-" for c in label).replace("--", "-")
                cells.append((f"{kind}-{identity}-{number}", setting | {"parameters": shared | parameters, "seed": 0}))
    return tuple(cells)


def best_strength(kind: str, files: Mapping[str, str]) -> tuple[float, dict[str, float]]:
    """Choose Task Arithmetic's lambda by KL(expert || merge) on the calibration prompts; also return every trial."""
    recipe = build_recipe(
        "expert_merging", str(base_path()), experts(kind), PUBLISHED | {"grouping": "global", "hidden_weight": 0.0},
        data={name: {"calibration": path} for name, path in files.items()},
    )  # fmt: skip
    plan = plan_recipe(recipe)
    run = Run(plan, machine=Machine())
    start = start_of(run, settings_of(Start, plan.learning))
    shop = open_workshop(run, start, settings_of(ExpertMerging, plan.learning).rows)
    problem = shop.problem(Objective())
    trials: dict[str, float] = {}
    for strength in STRENGTHS:
        terms, _ = problem.evaluate(start.alpha * 0 + strength, shop.learn, gradient=False)
        trials[str(strength)] = sum(terms.values()) / len(DOMAINS)
    shop.close()
    plan.close()
    return float(min(trials, key=lambda key: trials[key])), trials


def learned(setting: Mapping[str, Any], files: Mapping[str, str]) -> Coefficients:
    """Learn coefficients; a draw's runs share a folder, so that the second stage of ++ finds its first stage done."""
    from consilience.learned.learn import learn_state

    kept = CACHE / "expert-merging" / f"{setting['experts']}-{setting['draw']}"
    published = PUBLISHED if setting["method"].startswith("expert_merging") else {}
    recipe = build_recipe(
        setting["method"], str(base_path()), experts(setting["experts"]), published | setting["parameters"],
        data={name: {"calibration": path} for name, path in files.items()},
    )  # fmt: skip
    plan = plan_recipe(recipe)
    try:
        own: dict[str, Path] = {
            "expert_merging": kept / "stage-1",
            "rate 0.04": kept / "stage-1",
            "expert_merging_pp": kept,
        }
        label = str(setting["label"])
        folder = own[label] if label in own else kept / label.replace(" ", "-").replace(",", "")
        return learn_state(plan, folder)
    finally:
        plan.close()


def facts(found: Coefficients) -> dict[str, Any]:
    """Return what a cell keeps of learned coefficients: the loss's course, their spread, importance and chunks."""
    keys = ("steps", "seconds", "importance", "chunks")
    history = found.facts.get("history", [])
    kept = {key: found.facts[key] for key in keys if key in found.facts}
    spread = {
        name: {"mean": float(row.mean()), "sd": float(row.std()), "low": float(row.min()), "high": float(row.max())}
        for name, row in zip(found.experts, found.alpha, strict=True)
    }
    return kept | {"alpha": spread, "coefficients": found.count, "history": [round(one["loss"], 5) for one in history]}


def run(setting: dict[str, Any]) -> dict[str, Any]:
    """Make one model and measure it."""
    return in_scratch(_run, setting)


def _run(setting: dict[str, Any], out: Path) -> dict[str, Any]:
    if setting["kind"] == "model":
        model = str(base_path()) if setting["model"] == "base" else f"{base_path()}+{LORA_PATH}"
        return {kind: measured(model, kind) for kind in ("lora", "full")}
    kind = setting["experts"]
    if setting["kind"] == "expert":
        model = loadable(kind, setting["domain"])
        return {"test": {"losses": losses(model, "test")}}
    if setting["kind"] == "fixed":
        cs.merge(str(base_path()), experts(kind), out, method=setting["method"], **setting["parameters"])
        return measured(str(out), kind)
    files = draw(setting["draw"], out.parent / "calibration")
    if setting["kind"] == "strength":
        strength, trials = best_strength(kind, files)
        cs.merge(str(base_path()), experts(kind), out, method="task_arithmetic", lambda_=strength)
        return measured(str(out), kind) | {"strength": strength, "trials": trials}
    found = learned(setting, files)
    save_coefficients(out.parent / "found", found)
    cs.merge(str(base_path()), experts(kind), out, method="coefficients", coefficients=out.parent / "found")
    return measured(str(out), kind, setting.get("split", "test")) | {"learned": facts(found)}


STUDY = Study("expert_merging", _cells(), run, tables)
