"""The model to train: loaded whole or with fresh LoRA factors, and written as transformers and PEFT write theirs."""

import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience.checkpoints.files import copy_file
from consilience.checkpoints.json_files import read_object
from consilience.engine.output import side_files
from consilience.errors import InputError
from consilience.tasks.load import load_model
from consilience.training.settings import Settings
from consilience.workdir import OURS, write_json

#: Up to this many tokens a CPU computes plain attention faster than the fused one, whose backward pass is slow there.
_SHORT = 256


@dataclass(frozen=True, slots=True)
class Trainee:
    """A causal language model, the PEFT wrapper around it (None: all weights are trained), and what is trained."""

    model: Any
    adapted: Any | None
    parameters: dict[str, Any]

    @property
    def modules(self) -> tuple[str, ...] | None:
        """Names of the modules that have factors; None where all weights are trained."""
        return None if self.adapted is None else tuple(sorted(self.adapted.peft_config["default"].target_modules))


def load_trainee(base: Path, name: str, settings: Settings, device: str, longest: int) -> Trainee:
    """Load ``base`` and make its weights, or fresh LoRA factors (A random by the seed, B zero), trainable in float32.

    Args:
        base: a Hugging Face folder.
        name: what an adapter calls its base.
        settings: of the run.
        device: a torch device.
        longest: tokens of the longest row.

    Raises:
        InputError: the model does not load, is not a decoder-only language model, or lacks a target module.
    """
    model = load_model(base, device=device)
    if getattr(model.config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise InputError(f"{base}: is not a decoder-only language model, the only kind fine_tune trains")
    if device == "cpu" and longest <= _SHORT:
        model.set_attn_implementation("eager")
    adapted = None if settings.lora_rank is None else _with_factors(model, settings, name)
    trained = {n: p for n, p in (adapted or model).named_parameters() if p.requires_grad}
    return Trainee(model, adapted, trained)


def _with_factors(model: Any, settings: Settings, base: str) -> Any:
    import torch

    try:
        import peft
    except ImportError:
        raise InputError("lora_rank: an adapter needs peft; install it with: pip install 'consilience[hf]'") from None
    if settings.precision == "mixed":
        # Frozen weights need no cast at every step then. Buffers stay: rotary frequencies must not be rounded.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    targets = settings.target_modules
    values: dict[str, Any] = {  # PEFT's types allow whole alphas only, its arithmetic any
        "r": settings.lora_rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": "all-linear" if targets is None else list(targets),
        "task_type": "CAUSAL_LM",
    }
    config = peft.LoraConfig(**values)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, about how it asks transformers things
        torch.manual_seed(settings.seed)
        try:
            adapted: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
        except ValueError as error:
            raise InputError(f"target_modules: {base}: {error}") from error
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted.eval()


def write_trained(trainee: Trainee, settings: Settings, base: Path, out: Path) -> None:
    """Write the finished model or adapter to the empty folder ``out``; what is trained is rounded in place.

    Mixed precision writes bfloat16, the other float32. A model gets its base's tokenizer and other files.
    """
    import torch

    dtype = torch.bfloat16 if settings.precision == "mixed" else torch.float32
    if trainee.adapted is None:
        with _no_bars():
            trainee.model.to(dtype).save_pretrained(out)
        _write_side_files(base, out, str(dtype).removeprefix("torch."))
        return
    for parameter in trainee.parameters.values():
        parameter.data = parameter.data.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "auto" would ask the hub for the base's vocabulary size, hence the False
        trainee.adapted.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)  # a form with nothing filled in
    path = out / "adapter_config.json"
    config = read_object(path)
    # PEFT keeps a set, whose order changes from run to run.
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _no_bars() -> Generator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write_side_files(base: Path, out: Path, dtype: str) -> None:
    for source in side_files(base):
        place = source.relative_to(base)
        if place.parts[0] == OURS:
            continue
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, out / place, base)
    config = read_object(base / "config.json")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    write_json(out / "config.json", {**config, "dtype": dtype})
