"""GLIDER and its rivals on eight language experts, six of them in the model: what routing keeps of the experts' gains.

Every fold leaves two experts out, whose tasks are then tasks that nobody was trained for. A row is routed by its prompt
alone, unless the published protocol is measured, where the router is told the task.
"""

import warnings
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from consilience.routing.conversion.shares import Shares, read
from consilience.routing.evaluation import evaluate_routed, prompts_of
from consilience.routing.instructions.semantics import Instructions
from consilience.tasks.encoding import encode
from consilience.tasks.rows import Task, read_rows
from studies.cells import Study
from studies.routing_models import held_in, multitask, routed
from studies.routing_tables import page
from suites.language import ALL_DOMAINS, heldout_path, train_path
from suites.language.encoder import encoder_path

#: Test rows of a task, scored tokens of a row, and rows whose tokens' weights are averaged.
EXAMPLES, TOKENS, WATCHED = 40, 60, 12
#: What each fold leaves out: every domain once.
FOLDS = (("spam", "stringops"), ("glosses", "arithmetic"), ("translate", "sentiment"), ("code", "pronounce"))

CARD: dict[str, str] = {"describer": "template", "embedder": "minilm"}
RAW: dict[str, str] = {"describer": "none", "embedder": "minilm"}
STATES: dict[str, str] = {"describer": "none", "embedder": "base"}
PHATGOOSE: dict[str, Any] = {"local": "phatgoose", "scale": 0.0}
ARROW: dict[str, Any] = {"local": "arrow", "scale": 0.0}

Setting = dict[str, Any]


def _glider(scale: float | str, told: Mapping[str, str] = CARD, **routing: Any) -> Setting:
    return {"routing": {"local": "phatgoose", "scale": scale} | routing, "instructions": dict(told)}


#: Label -> how a model is routed, for every fold.
METHODS: dict[str, Setting] = {
    "GLIDER, a = 100": _glider(100.0),
    "GLIDER, a = 3": _glider(3.0),
    "GLIDER, adaptive a": _glider("adaptive"),
    "GLIDER, adaptive a, raw queries and examples": _glider("adaptive", RAW),
    "GLIDER, adaptive a, base's states": _glider("adaptive", STATES),
    "GLIDER, adaptive a, else the mean": _glider("adaptive", fallback="mean"),
    "GLIDER, adaptive a, raw queries and examples, else the mean": _glider("adaptive", RAW, fallback="mean"),
    "GLIDER, adaptive a, base's states, else the mean": _glider("adaptive", STATES, fallback="mean"),
    "without local": _glider(100.0, local="none"),
    "without global (PHATGOOSE)": {"routing": PHATGOOSE},
    "Arrow": {"routing": ARROW},
    "GLIDER on Arrow, adaptive a": _glider("adaptive", local="arrow"),
    "retrieval (top 1)": _glider(100.0, local="none", top_k=1),
    "merged experts": {"routing": ARROW, "uniform": True},
}
#: Label -> the same, for the first fold alone.
MORE: dict[str, Setting] = {
    "GLIDER, a = 1": _glider(1.0),
    "GLIDER, a = 10": _glider(10.0),
    "GLIDER, a = 30": _glider(30.0),
    "GLIDER, a = 100, told the task": _glider(100.0) | {"told": True},
    "GLIDER, a = 3, told the task": _glider(3.0) | {"told": True},
    "GLIDER, adaptive a, z-scores": _glider("adaptive", standardise=True, most_scale=10.0),
    "GLIDER, adaptive a, TF-IDF": _glider("adaptive", {"describer": "none", "embedder": "tfidf"}),
    "GLIDER, adaptive a, top 1": _glider("adaptive", top_k=1),
    "GLIDER, adaptive a, top 3": _glider("adaptive", top_k=3),
    "GLIDER, adaptive a, top p 0.75": _glider("adaptive", top_p=0.75),
    "PHATGOOSE, top 1": {"routing": PHATGOOSE | {"top_k": 1}},
    "PHATGOOSE, top 3": {"routing": PHATGOOSE | {"top_k": 3}},
    "Arrow, top 1": {"routing": ARROW | {"top_k": 1}},
    "Arrow, top 3": {"routing": ARROW | {"top_k": 3}},
    "multitask adapter": {"routing": ARROW, "multitask": 300},
    "LoraHub, five labelled rows a task": {"routing": ARROW, "lorahub": {"rows": 5, "evaluations": 40}},
}
#: What the published protocol tells of a query's task: a second wording, written without a look at the cards.
TASKS = {
    "pronounce": "Spell out how a word of English sounds, in the phonetic symbols of a pronouncing dictionary.",
    "translate": "Render an English sentence in Spanish, in the manner of the older Bible translations.",
    "code": "Complete a Python function when given its definition line and its documentation.",
    "sentiment": "Decide whether the writer of a short text feels good or bad about its subject.",
    "arithmetic": "Work out a sum or a short word problem with numbers and give the result.",
    "stringops": "Change the letters of a word as asked: reverse them, sort them, count them or drop some.",
    "glosses": "Say in a few words what an English word means, as a dictionary does.",
    "spam": "Judge from its first words whether an e-mail is unwanted advertising or a real message.",
}


def _cells() -> list[tuple[str, Setting]]:
    common: Setting = {"examples": EXAMPLES, "tokens": TOKENS, "seed": 0}
    cells: list[tuple[str, Setting]] = [
        (f"single-{name}", {"kind": "single", "expert": name} | common) for name in ("base", *ALL_DOMAINS)
    ]
    for number, held_out in enumerate(FOLDS):
        for label, setting in (METHODS | MORE if number == 0 else METHODS).items():
            identity = f"{number}-" + "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split())
            cells.append((identity, {"kind": "routed", "label": label, "held_out": list(held_out)} | setting | common))
    return cells


def run(setting: Setting) -> Mapping[str, Any]:
    """Measure one use of the experts on all eight tasks."""
    single = setting["kind"] == "single"
    domains = list(ALL_DOMAINS) if single else held_in(setting["held_out"])
    routing = {"local": "arrow"} if single else setting["routing"]
    steps = setting.get("multitask")
    model = multitask(domains, steps) if steps else routed(domains, routing, _instructions(setting.get("instructions")))
    tasks = [Task(domain, tuple(read_rows(heldout_path(domain, "test")))) for domain in ALL_DOMAINS]
    options: Any = {"max_examples": setting["examples"], "max_tokens": setting["tokens"]}
    with _used(model, setting):
        found: dict[str, Any] = {}
        for task in tasks:
            with _told(model, setting, task), _searched(model, setting, task):
                evaluated = evaluate_routed(model, [task], batch_size=16, dtype="bfloat16", **options)[0]
                found[task.name] = _scores(evaluated.results[0]) | {"shares": _shares(model, task)}
    semantics = model.routing.asked.semantics
    facts: dict[str, Any] = {}
    if isinstance(semantics, Instructions):
        latency, adaptive = semantics.latency, semantics.adaptive
        facts = {"seconds_a_query": latency.seconds, "queries": latency.count - latency.cached}
        facts |= {} if adaptive is None else {"adaptive": adaptive.to_dict()}
    return {"experts": domains, "tasks": found, **facts}


def _instructions(value: Mapping[str, str] | None) -> dict[str, Any] | None:
    if value is None:
        return None
    embedder: Any = value["embedder"]
    if embedder == "minilm":
        embedder = {"kind": "model", "model": str(encoder_path())}
    return {"describer": value["describer"], "embedder": embedder}


def _used(model: Any, setting: Setting) -> AbstractContextManager[None]:
    """Return a context in which the model is used as a cell asks."""
    if setting["kind"] == "single":
        return model.routing.plain() if setting["expert"] == "base" else model.routing.only(setting["expert"])
    count = len(model.routing.names)
    alike = setting.get("uniform") or setting.get("multitask")
    return model.routing.only([1 / count] * count) if alike else nullcontext()


@contextmanager
def _told(model: Any, setting: Setting, task: Task) -> Generator[None]:
    """Tell the router the task, where a cell follows the published protocol: every query is the task's name."""
    if not setting.get("told"):
        yield
        return
    asked = model.routing.asked
    semantics = asked.semantics
    lookup = semantics.lookup(TASKS)
    asked.semantics = lambda queries, settings: lookup([task.name] * len(queries), settings)
    try:
        yield
    finally:
        asked.semantics = semantics


@contextmanager
def _searched(model: Any, setting: Setting, task: Task) -> Generator[None]:
    """Fix the experts' weights to those that LoraHub finds on a few labelled training rows of the task, if asked for.

    w in [-1.5, 1.5]^K minimises the rows' loss + 0.05 mean |w|, from 0, by nevergrad's NGOpt (the paper's search). The
    experts' products are weighted, and not their factors apart.
    """
    search = setting.get("lorahub")
    if search is None:
        yield
        return
    import nevergrad

    rows = Task(task.name, tuple(read_rows(train_path(task.name))[: search["rows"]]))
    count = len(model.routing.names)
    place = nevergrad.p.Array(init=np.zeros(count)).set_bounds(-1.5, 1.5)
    place.random_state.seed(setting["seed"])
    optimizer: Any = nevergrad.optimizers.NGOpt(parametrization=place, budget=search["evaluations"], num_workers=1)

    def loss(weights: Any) -> float:
        with model.routing.only(weights):
            found = evaluate_routed(model, [rows], batch_size=16, dtype="bfloat16", max_tokens=TOKENS)[0]
        value = found.results[0].loss
        assert value is not None
        return value.value + 0.05 * float(np.abs(weights).mean())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = optimizer.minimize(loss).value
    with model.routing.only(best):
        yield


def _scores(result: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "loss": result.loss.value,
        "nats": [round(value, 4) for value in result.loss.nats],
        "tokens": list(result.loss.tokens),
    }
    if result.accuracy is not None:
        found["correct"] = [int(one) for one in result.accuracy.correct]
    return found


def _shares(model: Any, task: Task) -> list[list[float]]:
    """Return the experts' mean weights by block, over the tokens of some rows."""
    shares = Shares()
    rows = Task(task.name, task.rows[:WATCHED])
    sequences = [one for one in encode(rows, model.tokenizer, max_tokens=TOKENS) if one.candidate in (None, 0)]
    with model.routing.expecting(prompts_of(model, [rows], None, TOKENS)), model.routing.watched(shares.watch):
        read(model, sequences, 16, _nothing)
    blocks: dict[int, list[Any]] = {}
    for module in shares.sums:
        number = next((int(part) for part in module.split(".") if part.isdigit()), -1)
        blocks.setdefault(number, []).append(shares.mean(module).numpy())
    return [np.round(np.mean(blocks[number], 0), 4).tolist() for number in sorted(blocks)]


def _nothing(_count: int) -> None:
    return


STUDY = Study("routing", _cells(), run, page)
