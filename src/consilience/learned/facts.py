"""What is written beside learned coefficients: parameters, machine, and which rows they were learned from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consilience.learned.answers import shown
from consilience.learned.data import Data
from consilience.learned.run import Run, Workshop
from consilience.student.calibration import Sample


def facts_of(run: Run, shop: Workshop, parameters: Mapping[str, Any], data: Data, seconds: float) -> dict[str, Any]:
    """Return what every learned method writes beside its coefficients."""
    return {
        "method": run.plan.method.name,
        "parameters": {key: list(v) if isinstance(v, tuple) else v for key, v in parameters.items()},
        "seed": run.seed,
        "seconds": round(seconds, 2),
        "device": run.machine.device,
        "calibration": provenance(run, shop.samples, data),
    } | ({"notes": shop.notes} if shop.notes else {})


def provenance(run: Run, samples: Sequence[Sample], data: Data) -> dict[str, Any]:
    """Return what is written of the calibration data: per expert its file's name, number of rows, and row hashes.

    The hashes let ``consilience evaluate`` say when a model is measured on rows that its coefficients were learned on.
    """
    from consilience.tasks.rows import row_hashes

    out: dict[str, Any] = {}
    target = run.plan.recipe.target if run.plan.method.reads_target else None
    for expert, name in enumerate(run.experts if target is None else ["target"]):
        own = [sample for sample in samples if sample.expert == expert]
        path = run.path_of(name, data.key) if target is None else Path(target.train or "")
        hashes = sorted({value for sample in own for value in row_hashes(sample.row)})
        out[name] = {"file": path.name if path else None, "rows": len({s.where for s in own}),
                     "responses": data.responses, "hashes": hashes}  # fmt: skip
        if target is None and data.responses == "generate":
            asked = {"answers": data.answers, "temperature": data.answer_temperature}
            out[name] |= asked | {"tokens": sum(len(s.encoded.positions) for s in own), "shown": shown(own)}
    return out
