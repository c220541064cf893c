"""The state of an unfinished training on disk: one safetensors file, replaced whole.

It holds the trained tensors and the two moments of AdamW in float32, and in its metadata the number of steps done, the
seconds they took and every step's losses. Orders are functions of the step, and nothing else is random.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consilience.errors import MachineError

#: The saved state of a run, in OUT.partial.
STATE = "state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class TrainingState:
    """How far a run is: steps done, the seconds they took, and the losses of each step by task index."""

    step: int = 0
    seconds: float = 0.0
    losses: list[dict[int, float]] = field(default_factory=lambda: [])


def save_state(path: Path, parameters: dict[str, Any], optimizer: Any, state: TrainingState) -> None:
    """Write the state; a crash leaves the previous file or this one, never a part.

    Raises:
        MachineError: it cannot be written.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    for name, parameter in parameters.items():
        tensors[f"value/{name}"] = parameter.detach()
        if parameter in optimizer.state:  # else the loss does not depend on it
            tensors |= {f"{moment}/{name}": optimizer.state[parameter][moment] for moment in _MOMENTS}
    notes = {"step": state.step, "seconds": state.seconds, "losses": state.losses}
    temporary = path.with_name(path.name + ".new")
    try:
        save_file(tensors, temporary, {"progress": json.dumps(notes)})
        _flush(temporary)
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        raise MachineError(f"{path}: cannot be written ({error}); free some disk, then run this again") from error


def load_state(path: Path, parameters: dict[str, Any], optimizer: Any) -> TrainingState:
    """Put a saved state into the model's parameters and the optimizer; without a file nothing is changed.

    Raises:
        MachineError: the file is damaged.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            notes: Any = json.loads(file.metadata()["progress"])
            saved = set(file.keys())
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"value/{name}"))
                if f"{_MOMENTS[0]}/{name}" in saved:
                    moments = {m: file.get_tensor(f"{m}/{name}").to(parameter.device) for m in _MOMENTS}
                    done = torch.tensor(float(notes["step"]), device=parameter.device)
                    optimizer.state[parameter] = {"step": done, **moments}
    except FileNotFoundError:
        return TrainingState()
    except (OSError, SafetensorError) as error:
        raise MachineError(f"{path}: cannot be read ({error}); remove its folder, then run this again") from error
    losses = [{int(task): loss for task, loss in step.items()} for step in notes["losses"]]
    return TrainingState(notes["step"], notes["seconds"], losses)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
