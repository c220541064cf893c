"""The routed models of the routing study: six of eight language experts on one base, and their gates.

``python -m studies.routing_models`` trains the gates that are missing, about four minutes an expert on one core.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from consilience.errors import MachineError
from consilience.progress import LossProgressOption
from consilience.routing import build_routed, load_routed
from consilience.routing.expert import read_factors
from consilience.routing.folder.build import Base
from consilience.routing.local.gate_settings import GateSettings
from consilience.routing.local.gate_training import train_gates
from consilience.tasks.rows import Task, read_rows
from consilience.training import fine_tune
from suites.language import ALL_DOMAINS, CACHE, adapter_path, train_path
from suites.language.base import base_path
from suites.language.data import train_rows
from suites.language.train import ALPHA, RANK
from suites.packages import locked

#: PHATGOOSE's steps, rate and warm-up; batches of 8 rows instead of 1,024.
GATES = GateSettings()


def held_in(held_out: Sequence[str]) -> list[str]:
    """Return the domains whose experts the model holds."""
    return [domain for domain in ALL_DOMAINS if domain not in held_out]


def recipe(domains: Sequence[str], instructions: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the recipe of a routed model that needs no gates."""
    entries = [
        {"model": str(adapter_path(domain)), "name": domain, "data": {"train": str(train_path(domain))}}
        for domain in domains
    ]
    made = _recipe(entries)
    return made if instructions is None else made | {"instructions": dict(instructions)}


def _recipe(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"base_model": str(base_path()), "models": entries, "routing": {"local": "arrow"}}


def routed(domains: Sequence[str], routing: Mapping[str, Any], instructions: Mapping[str, Any] | None = None) -> Any:
    """Return a routed model with the gates of its experts, built in a folder that is thrown away."""
    for domain in domains:
        _ready(domain)
    model = _built(recipe(domains, instructions))
    if routing.get("local") == "phatgoose":
        experts = [replace(one, vectors={**one.vectors, "phatgoose": gates(one.name)}) for one in model.routing.experts]
        model.routing.replace(experts, model.routing.asked.semantics)
    model.routing.set(**routing)
    return model


def _built(made: dict[str, Any]) -> Any:
    CACHE.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="routed-", dir=CACHE))
    try:
        build_routed(made, work / "model")
        return load_routed(work / "model")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def multitask(domains: Sequence[str], steps: int) -> Any:
    """Return a model whose one expert was trained on the rows of all these domains, once, as each of theirs was."""
    place = CACHE / "language" / "multitask" / f"{'-'.join(sorted(domains))}-{steps}"
    with locked(place.with_suffix(".lock")):
        if not place.is_dir():
            for domain in domains:
                train_rows(domain)
            fine_tune(
                base_path(), [f"{domain}={train_path(domain)}" for domain in domains], place, learning_rate=1e-3,
                steps=steps, lora_rank=RANK, lora_alpha=ALPHA, seed=0, threads=1, progress=True,
            )  # fmt: skip
    return _built(_recipe([{"model": str(place), "name": "multitask"}]))


def _ready(domain: str) -> None:
    """Make an expert's rows, if they are not there.

    Raises:
        MachineError: its adapter is not there, which takes longer.
    """
    train_rows(domain)
    if not adapter_path(domain).is_dir():
        raise MachineError(f"{adapter_path(domain)}: is not there; train it: python -m suites.language.train {domain}")


def gates(domain: str, progress: LossProgressOption = False) -> dict[str, Tensor]:
    """Return the gates of an expert, trained on its own rows, once."""
    folder = CACHE / "language" / "gates"
    place = folder / f"{domain}.safetensors"
    with locked(folder / f".{domain}.lock"):
        if not place.is_file():
            base = Base(base_path(), "cpu", False)
            _ready(domain)
            examples = base.examples(Task(domain, read_rows(train_path(domain)), train_path(domain)))
            factors = read_factors(adapter_path(domain))
            found, record = train_gates(base()[0], domain, factors, [examples], GATES, folder / "state", progress)
            place.with_suffix(".json").write_text(json.dumps(record.to_dict(), indent=1) + "\n", encoding="utf-8")
            save_file(found, place.with_suffix(".partial"))
            place.with_suffix(".partial").rename(place)
    return load_file(place)


def main() -> int:
    """Train the gates that are missing."""
    for domain in sys.argv[1:] or ALL_DOMAINS:
        gates(domain, progress=True)
        print(f"gates of {domain}: trained", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
