"""``consilience align``: a model on disk brought into the order of another one's units.

Only elements change places: every tensor keeps its name, shape, dtype and bits. A transformers folder is loaded to find
which units may be reordered (``symmetry_of_module``) and to show that the written model computes the same; for other
files the axes are stated (``symmetry_of_axes``).
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from consilience.checkpoints.checkpoint import Checkpoint
from consilience.checkpoints.files import copy_file, path_of
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.open import SAFETENSORS_INDEX, open_checkpoint
from consilience.checkpoints.packed import packing
from consilience.checkpoints.reference import resolve
from consilience.checkpoints.torch_file import as_tensor
from consilience.engine.lineage import checkpoint_fingerprints, model_fingerprint, versions
from consilience.engine.output import check_side_files, check_space, side_files
from consilience.errors import InputError, MachineError
from consilience.experts.state_dict import from_state_dict
from consilience.experts.vocabulary import has_tokenizer
from consilience.mixing.alignment import align
from consilience.mixing.matching import (
    AlignedModel,
    AlignmentReport,
    Line,
    Scratch,
    along_line,
    check_same,
    report,
)
from consilience.mixing.normalisation import fold, normalised_alike, read_normalisation
from consilience.mixing.symmetry import Axes, Group, Symmetry, symmetry_of_axes
from consilience.mixing.symmetry_trace import symmetry_of_module
from consilience.progress import Progress, ProgressOption, open_progress
from consilience.student.names import match_names
from consilience.tasks.evaluation import evaluate
from consilience.tasks.load import explained, load_model, load_tokenizer, loader_of, quiet
from consilience.tasks.rows import Task, load_tasks
from consilience.workdir import LINEAGE, OURS, Workdir, digest_of, workdir, write_json

_PREPROCESSOR = "preprocessor_config.json"
_State = dict[str, Tensor]


@dataclass(frozen=True)
class _Side:
    """One of the two models: what the user called it, where it is, and its stored tensors."""

    name: str
    path: Path
    checkpoint: Checkpoint
    state: _State

    @property
    def folder(self) -> Path | None:
        """The folder of a transformers model; None of a lone file of tensors."""
        return self.checkpoint.folder if self.checkpoint.config is not None else None


def align_files(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    axes: Axes | str | Path | None = None,
    rows: Sequence[Task | Path | str] = (),
    seed: int = 0,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressOption = False,
) -> AlignmentReport:
    """Match a model on disk to a base and write it; see ``consilience.align``.

    Raises:
        InputError: a model, the axes or rows are wrong, the two do not meet, or OUT is not free; nothing is left.
        MachineError: memory or disk ran out, or what was written does not read back; OUT is absent.
    """
    out = path_of(out, "out")
    stated = _read_axes(axes)
    tasks = load_tasks(rows) if rows else []
    with _opened(base, "base") as one, _opened(model, "model") as other:
        folder = _check(one, other, out, stated, tasks)
        inputs = [one.path, other.path, *(task.path for task in tasks if task.path is not None)]
        inputs += [Path(axes)] if isinstance(axes, str | Path) else []
        stamps = [[entry[:3] for entry in side.checkpoint.storage.stamps()] for side in (one, other)]
        axes_text = None if stated is None else {name: list(value) for name, value in stated.items()}
        digest = digest_of(
            {"align": 1, "models": stamps, "axes": axes_text, "rows": [t.digest for t in tasks], "seed": seed}
        )
        with (
            workdir(out, digest, folder=folder, force=force, inputs=inputs) as work,
            open_progress(progress) as shown,
        ):
            if work.delivered is not None:
                return AlignmentReport.from_dict(work.delivered)
            found = _aligned(one, other, stated, tasks, seed, trust_remote_code, shown)
            _write(work, one, other, found, {"axes": axes_text, "seed": seed}, shown)
            work.deliver(found.report.to_dict())
    return found.report


def _read_axes(axes: Axes | str | Path | None) -> Axes | None:
    """Return axes as they are stated, read from YAML where a path is given.

    Raises:
        InputError: an entry is no list of groups.
    """
    if axes is None:
        return None
    where = str(axes) if isinstance(axes, str | Path) else "axes"
    if isinstance(axes, str | Path):
        from consilience.recipe.yaml_file import read_yaml

        axes = cast(Axes, read_yaml(Path(axes)))
    if not isinstance(cast(Any, axes), dict) or not axes:
        raise InputError(f"{where}: is no mapping; write one line a tensor, such as up.weight: [hidden, stream]")
    for name, groups in cast(dict[Any, Any], axes).items():
        entries = _listed(groups)
        parts = [part for entry in entries for part in (_listed(entry) or [entry or "fixed"])]
        good = all(isinstance(part, str) or (type(part) is int and part > 0) for part in parts)
        if not isinstance(name, str) or not (entries and good) or any(type(entry) is int for entry in entries):
            raise InputError(
                f"{where}: {name}: {groups!r} is no list of axes; give each a group's name, null, or a list of names "
                "and numbers of fixed positions"
            )
    return axes


def _listed(value: Any) -> list[Any]:
    return list(cast(Sequence[Any], value)) if isinstance(value, list | tuple) else []


@contextmanager
def _opened(reference: str | Path, name: str) -> Generator[_Side]:
    place = resolve(str(path_of(reference, name)))
    if place.adapter is not None:
        raise InputError(f"{reference}: names an adapter, and whole models are aligned; merge the two first")
    checkpoint = open_checkpoint(place.model)
    try:
        packed = next(iter(packing(checkpoint).weights.values()), None)
        if packed is not None:
            raise InputError(
                f"{reference}: weight {packed.name!r} is stored as {packed.format}, whose blocks cannot be reordered; "
                "align the unquantised model"
            )
        tensors = checkpoint.tensors.items()
        state = {tensor: as_tensor(checkpoint.read(tensor), info, str(reference)) for tensor, info in tensors}
        yield _Side(str(reference), place.model, checkpoint, state)
    finally:
        checkpoint.storage.close()


def _check(one: _Side, other: _Side, out: Path, axes: Axes | None, tasks: Sequence[Task]) -> bool:
    """Refuse what cannot work before anything takes time; return whether OUT is a folder."""
    folder = other.folder is not None
    if not folder and out.suffix != ".safetensors":
        raise InputError(f"{out}: {other.name} is one file, so one is written; name it with the ending .safetensors")
    if not folder and axes is None:
        raise InputError(
            f"{other.name}: is a file of tensors without an architecture to look at; state which axes may be reordered "
            "(--axes FILE, axes=), or call consilience.align with the module"
        )
    if tasks and (other.folder is None or one.folder is None):
        raise InputError(f"rows: {other.name} is no transformers folder, so no loss can be measured; leave them out")
    if other.folder is None or one.folder is None:
        return folder
    check_side_files(other.folder)
    if has_tokenizer(one.folder) and has_tokenizer(other.folder):
        vocabularies = [load_tokenizer(side).get_vocab() for side in (one.folder, other.folder)]
        if vocabularies[0] != vocabularies[1]:
            raise InputError(
                f"{other.name}: its tokenizer is not {one.name}'s, so one row of the embeddings is another token; "
                "models over other tokens cannot be averaged: distil them"
            )
    return folder


def _aligned(
    one: _Side,
    other: _Side,
    axes: Axes | None,
    tasks: Sequence[Task],
    seed: int,
    trust_remote_code: bool,
    progress: Progress,
) -> AlignedModel:
    progress.phase("aligning", 3 + 4 * bool(tasks), "steps")
    network = None if other.folder is None else _load(other.folder, trust_remote_code)
    names = {} if network is None else _names(other, network)
    state, folded = _folded(one, other, network, names)
    if axes is not None:
        symmetry = symmetry_of_axes(axes, state)
    else:
        assert network is not None
        symmetry = _stored(symmetry_of_module(network, _example(network, other.name)), names)
    progress.advance(1, "matching")
    found = align(one.state, state, symmetry, seed=seed)
    progress.advance(1, "checking")
    changed = line = None
    if network is not None:
        scratch = _Renamed(network, names)
        changed = check_same(scratch, state, found.state, _example(network, other.name))
        progress.advance()
        if tasks:
            line = _line(scratch, one, other, state, found.state, tasks, progress)
    made = report(one.state, state, symmetry, found, changed, line, folded=folded)
    return AlignedModel(found.state, found.permutations, made)


class _Renamed(Scratch):
    """A transformers model that takes states under their stored names."""

    def __init__(self, network: Any, names: dict[str, str]) -> None:
        super().__init__(network, copied=False)
        self.names = names

    def load(self, state: Any) -> Any:
        """Return the network with a state's tensors."""
        own = self.network.state_dict()
        with torch.no_grad():
            for stored, held in self.names.items():
                own[held].copy_(state[stored])
        return self.network


def _load(folder: Path, trust_remote_code: bool) -> Any:
    """Load a folder's own class of model in float32, without a cache of keys and values in its outputs."""
    import transformers
    from transformers import AutoConfig

    with quiet(), explained(str(folder), "does not load"):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    own: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if own is None or _is_language(config, own):
        network = load_model(folder, trust_remote_code=trust_remote_code)
    else:
        with quiet(), explained(str(folder), "does not load"):
            network = own.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    if hasattr(network.config, "use_cache"):
        network.config.use_cache = False
    return network


def _is_language(config: Any, own: Any) -> bool:
    try:
        mapping: Any = loader_of(config)._model_mapping
        return own in mapping.values()
    except (AttributeError, KeyError, ValueError):
        return False


def _names(side: _Side, network: Any) -> dict[str, str]:
    """Return stored name -> the loaded model's name."""
    held = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    return match_names({name: tuple(value.shape) for name, value in side.state.items()}, held)


def _stored(symmetry: Symmetry, names: dict[str, str]) -> Symmetry:
    """Return a loaded model's symmetry under its stored names, without groups that hold a tensor stored otherwise."""
    by_held = {held: stored for stored, held in names.items()}
    groups = [
        Group(
            group.name,
            {(by_held[name], axis): places for (name, axis), places in group.places.items() if name in by_held},
        )
        for group in symmetry.groups
        if _is_stored(group, by_held)
    ]
    return Symmetry(tuple(groups), frozenset(by_held[name] for name in symmetry.uncompared if name in by_held))


def _is_stored(group: Group, by_held: dict[str, str]) -> bool:
    """Whether every tensor of a group is stored, under one name at least of those that are one tensor."""
    stored = [places for (name, _), places in group.places.items() if name in by_held]
    return all(
        name in by_held or any(places is other for other in stored) for (name, _), places in group.places.items()
    )


def _example(network: Any, where: str) -> Tensor:
    """Return two rows of a model's main input, the same every time."""
    random = torch.Generator().manual_seed(0)
    config = network.config.get_text_config() if hasattr(network.config, "get_text_config") else network.config
    if network.main_input_name == "input_ids":
        return torch.randint(1, config.vocab_size, (2, 8), generator=random)
    size = getattr(config, "image_size", None)
    if network.main_input_name == "pixel_values" and size is not None:
        sides = [size, size] if isinstance(size, int) else list(size)
        return torch.randn(2, getattr(config, "num_channels", 3), *sides, generator=random)
    raise InputError(
        f"{where}: a model of {network.main_input_name} is not traced here; state which axes may be reordered (--axes "
        "FILE, axes=)"
    )


def _folded(one: _Side, other: _Side, network: Any, names: dict[str, str]) -> tuple[_State, bool]:
    """Return the model's state for the base's input normalisation, and whether that is another one."""
    if one.folder is None or other.folder is None or network is None:
        return other.state, False
    files = [side / _PREPROCESSOR for side in (one.folder, other.folder)]
    if not all(file.is_file() for file in files):
        return other.state, False
    metadata = [read_object(file) for file in files]
    if not all("image_mean" in each for each in metadata):
        return other.state, False
    common, own = (read_normalisation(each, str(file)) for each, file in zip(metadata, files, strict=True))
    if normalised_alike([common, own]):
        return other.state, False
    held = {names[name]: value for name, value in other.state.items() if name in names}
    changed = fold(network, held, own, common).state
    return {name: changed[names[name]] if name in names else value for name, value in other.state.items()}, True


def _line(
    scratch: _Renamed,
    one: _Side,
    other: _Side,
    state: _State,
    aligned: _State,
    tasks: Sequence[Task],
    progress: Progress,
) -> Line | None:
    """Measure the mean loss per token on rows, a mean over tasks; None where the two are of unlike shapes."""
    assert other.folder is not None
    if any(name not in one.state or one.state[name].shape != state[name].shape for name in scratch.names):
        return None
    tokenizer = load_tokenizer(other.folder)

    def loss(network: Any) -> float:
        found = evaluate(network, tasks, tokenizer=tokenizer, cache=False, progress=False)
        losses = [result.loss.value for result in found.results if result.loss is not None]
        if len(losses) < len(tasks):
            raise InputError("rows: they have no responses to measure a loss on; give rows with responses")
        progress.advance(1, "measuring")
        return sum(losses) / len(losses)

    return along_line(scratch, "loss per token", loss, one.state, state, aligned)


def _write(
    work: Workdir, one: _Side, other: _Side, found: AlignedModel, settings: dict[str, Any], progress: Progress
) -> None:
    """Write the aligned model beside the files that come along, and read it back."""
    check_space(work.out, other.checkpoint.nbytes)
    result = work.new_result() if work.folder else work.result
    if not work.folder:
        work.remove_result()
    files = _weight_files(other)
    progress.phase("writing", len(files), "files")
    for name, tensors in files.items():
        target = result / name if work.folder else result
        target.parent.mkdir(parents=True, exist_ok=True)
        _save({tensor: found.state[tensor] for tensor in tensors}, target)
        progress.advance()
    _, expected = checkpoint_prints(from_state_dict("aligned", found.state).checkpoint)
    if work.folder:
        _write_side_files(result, one, other, files, folded=found.report.folded)
    written = open_checkpoint(result)
    try:
        whole, tensors = checkpoint_prints(written)
    finally:
        written.storage.close()
    if tensors != expected:
        name = next(name for name in expected if tensors.get(name) != expected[name])
        raise MachineError(f"{work.out}: tensor {name!r} does not read back as it was written; check the disk")
    if work.folder:
        models = [{"name": role, "reference": side.name} for role, side in (("base", one), ("model", other))]
        document = {"format": 1, "method": "align", "versions": versions(), "models": models, **settings}
        document |= {"report": found.report.to_dict(), "output": {"fingerprint": whole, "tensors": tensors}}
        (result / OURS).mkdir(exist_ok=True)
        write_json(result / OURS / LINEAGE, document)


def checkpoint_prints(checkpoint: Checkpoint | None) -> tuple[str, dict[str, str]]:
    """Return a checkpoint's fingerprint, and its tensors'."""
    assert checkpoint is not None
    tensors = checkpoint_fingerprints(checkpoint)
    return model_fingerprint(tensors), tensors


def _weight_files(side: _Side) -> dict[str, list[str]]:
    """Return the output's weight files, those of a safetensors model, and their tensors; "": OUT is the one."""
    if side.folder is None:
        return {"": list(side.checkpoint.tensors)}
    stored: list[Path] = getattr(side.checkpoint.storage, "files", [])
    names = [file.relative_to(side.folder).as_posix() for file in stored]
    found: dict[str, list[str]] = {}
    for tensor, info in side.checkpoint.tensors.items():
        found.setdefault(names[info.file] if names else "model.safetensors", []).append(tensor)
    return found


def _save(tensors: _State, target: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in tensors.items()}, target, {"format": "pt"})


def _write_side_files(result: Path, one: _Side, other: _Side, files: dict[str, list[str]], *, folded: bool) -> None:
    assert other.folder is not None
    assert one.folder is not None or not folded
    for source in side_files(other.folder):
        name = source.relative_to(other.folder)
        donor = one.folder if folded and str(name) == _PREPROCESSOR else other.folder
        assert donor is not None
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(donor / name, result / name, donor)
    if len(files) > 1:
        total = sum(info.nbytes for info in other.checkpoint.tensors.values())
        weights = {tensor: name for name, tensors in files.items() for tensor in tensors}
        write_json(result / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weights})
