"""Gram matrices of what layers are given behind blocks that are merged already: RegMean++'s statistics.

The model goes from block to block. In block b every expert's rows, as the merged blocks before it left them, go through
the block with that expert's own weights, which gives its layers' Gram matrices; then the block is merged by them, and
all rows go through it. Kept are the rows' states between two blocks, [tokens, n] of every expert, and at most 2 GiB of
one expert's Gram matrices of one block; all of them are files, which a run that was stopped goes on from. What comes
before the blocks is merged first.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consilience.checkpoints.open import open_checkpoint
from consilience.checkpoints.values import decode
from consilience.engine.memory import MemorySink
from consilience.engine.plan import TensorPlan
from consilience.engine.stream import Streamer
from consilience.errors import InputError
from consilience.experts.statistics import Facts, Statistics, Writer, mark_of
from consilience.learned.answers import as_given
from consilience.learned.data import Data
from consilience.learned.gram import pass_tokens
from consilience.learned.inputs import InputSums, leaders, passes, watched
from consilience.learned.run import Run, base_folder, encode_rows, groups_of
from consilience.methods.program import Matrix
from consilience.methods.signature import TensorSpec
from consilience.student.bank import Bank
from consilience.student.calibration import Batch, Sample, batches, check_tokenizers
from consilience.student.factored import layers_of
from consilience.student.stepping import Stepper
from consilience.student.student import Settings, Student, make_student
from consilience.workdir import digest_of, write_file

#: Bytes of Gram matrices of one pass.
BYTES = 2 << 30
#: The file that says which work the folders beside it are of, and how far it is.
KEY = "statistics.json"


def collect_in_sequence(run: Run, folder: Path) -> list[Path]:
    """Return every expert's folder of statistics behind merged blocks, made in ``folder`` unless it is there.

    Raises:
        InputError: a row or an expert does not suit the model, or the model does not run block by block.
    """
    values = run.plan.learning
    root = base_folder(run.plan)
    tasks = [run.task(name, rows=values["samples"]) for name in run.experts]
    run.progress.phase("loading the model")
    start = groups_of(run, "tensor", (), [1.0] * len(run.experts))
    bank = Bank(run.plan, start.groups, threads=run.machine.threads)
    try:
        settings = Settings(values["precision"], run.machine.device, False, run.machine.trust_remote_code)
        student = make_student(run.plan, bank, settings, factored=False)
        student.model.requires_grad_(False)
        if getattr(student.model.config, "is_encoder_decoder", False):
            raise InputError(
                f"{root}: is an encoder-decoder model, and method {run.plan.method.name!r} runs one stack of blocks; "
                "use regmean"
            )
        samples = encode_rows(run, student, list(map(as_given, tasks)), root, Data(samples=values["samples"]))
        folders = [expert.folder for expert in run.plan.experts]
        check_tokenizers(samples, folders, root, trust_remote_code=run.machine.trust_remote_code)
        key = digest_of({"sequential": [run.plan.digest, [sample.digest for sample in samples]]})
        return _Sequence(run, student, samples, folder, key).collect()
    finally:
        bank.close()


@dataclass
class _Rows:
    """One expert's batches, and their states between two blocks."""

    batches: list[Batch]
    states: list[Any]


class _Sequence:
    """One pass from the first block to the last."""

    def __init__(self, run: Run, student: Student, samples: Sequence[Sample], folder: Path, key: str) -> None:
        self.run, self.plan, self.student, self.samples = run, run.plan, student, samples
        self.folder, self.key = folder / "statistics", key
        self.stepper = Stepper(student.model, str(base_folder(run.plan)))
        changed = [t for t in self.plan.tensors if t.rows and t.name == t.stream]
        self.held = {t.name: t for t in changed if t.name in student.parameters}
        for tensor in changed:
            for expert in range(len(run.experts)) if tensor.name not in self.held else ():
                student.check_unheld(tensor, expert)
        self.place = _places(student, self.stepper, self.held)
        self.rows: list[_Rows] = []
        if not any(self._layers(index) for index in range(len(self.stepper.blocks))):
            raise InputError(
                f"{self.stepper.where}: no expert changes a linear layer of its blocks, so method "
                f"{self.plan.method.name!r} has nothing to fit; use one that needs no rows, such as actmat"
            )

    def collect(self) -> list[Path]:
        """Return every expert's folder."""
        places = [self.folder / f"{number}" for number in range(len(self.run.experts))]
        done = self._done()
        if done.finished:
            return places
        if not done.blocks:
            shutil.rmtree(self.folder, ignore_errors=True)
        writers = list(map(Writer, places))
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        self._take({name: self._merged_by((), tensor) for name, tensor in self.held.items() if self.place[name] < 0})
        self._begin()
        count = len(self.stepper.blocks)
        self.run.progress.phase("block by block", count * len(self.samples), "rows")
        for index in range(count):
            if index == len(done.blocks):
                done.blocks.append([self._expert(index, expert, writers[expert]) for expert in range(len(self.rows))])
                self._save(done)
            else:
                self.run.progress.advance(len(self.samples))
            for writer, part in zip(writers, done.blocks[index], strict=True):
                writer.names = [*writer.names, *(name for name in part.files if name not in writer.names)]
            parts = [self._opened(place, part) for place, part in zip(places, done.blocks[index], strict=True)]
            names = [name for name in self.held if self.place[name] == index]
            self._take({name: self._merged_by(parts, self.held[name]) for name in names})
            for part in parts:
                part.close()
            for rows in self.rows if index + 1 < count else ():
                rows.states = [
                    self._through(index, batch, x) for batch, x in zip(rows.batches, rows.states, strict=True)
                ]
        for expert, writer in enumerate(writers):
            alias = {key: lead for block in done.blocks for key, lead in block[expert].alias.items()}
            writer.finish(self._facts(expert, alias))
        self._save(replace(done, finished=True))
        return places

    def _done(self) -> "_Done":
        """Return what an earlier run of this work has left; nothing, if there is none or it cannot be read."""
        try:
            said = json.loads((self.folder / KEY).read_text(encoding="utf-8"))
            blocks = [[_Part(**part) for part in block] for block in said["blocks"]]
            return _Done(blocks, said["finished"]) if said["key"] == self.key else _Done([])
        except (OSError, ValueError, KeyError, TypeError):
            return _Done([])

    def _save(self, done: "_Done") -> None:
        write_file(self.folder / KEY, json.dumps({"key": self.key, **asdict(done)}).encode())

    def _opened(self, folder: Path, part: "_Part") -> Statistics:
        """Return one expert's statistics of one block."""
        facts = Facts("", "", ("gram",), 0, 0, (), alias=part.alias)
        return Statistics(folder, facts, tuple(open_checkpoint(folder / name) for name in part.files))

    def _facts(self, expert: int, alias: dict[str, str]) -> Facts:
        model, own = self.plan.experts[expert], [s for s in self.samples if s.expert == expert]
        digest = blake2b(repr([sample.digest for sample in own]).encode(), digest_size=16).hexdigest()
        tokens = sum(len(sample.encoded.inputs) for sample in own)
        rows, seed = len({sample.encoded.row for sample in own}), self.run.seed
        return Facts(model.reference, mark_of(model), ("gram",), rows, tokens, (digest,), seed=seed, alias=alias)

    # ------------------------------------------------------------------------------------------------------- the model

    def _begin(self) -> None:
        """Take every expert's rows to the first block."""
        tokens = pass_tokens(self.samples, self.plan.learning["batch_tokens"])
        for expert in range(len(self.run.experts)):
            chosen = [i for i, sample in enumerate(self.samples) if sample.expert == expert]
            self.rows.append(_Rows(batches(self.samples, chosen, tokens), []))
        with self.student.compute():
            self.stepper.probe(self._inputs(self.rows[0].batches[0]))
            for rows in self.rows:
                rows.states = [self.stepper.first(self._inputs(batch)) for batch in rows.batches]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return batch.inputs(self.student.model)[0]

    def _through(self, index: int, batch: Batch, states: Any) -> Any:
        with self.student.compute():
            return self.stepper.through(index, self._inputs(batch), states)

    def _take(self, values: Mapping[str, "_Merged"]) -> None:
        """Give the model merged tensors: the bytes of the output's, as it stores them."""
        if not values:
            return
        tensors = tuple(replace(one.tensor, index=i, program=one.program) for i, one in enumerate(values.values()))
        small = replace(self.plan, tensors=tensors)
        sink = MemorySink(small)
        Streamer(small, sink, threads=self.run.machine.threads).run()
        for tensor in tensors:
            real = np.float64 if tensor.out_dtype.bits > 32 else np.float32
            flat = np.empty(tensor.numel, real)
            decode(sink.arrays[tensor.name], tensor.out_dtype, flat)
            parameter = self.student.parameters[tensor.name]
            parameter.data.copy_(torch.from_numpy(flat).view(parameter.shape))

    def _merged_by(self, parts: Sequence[Statistics], tensor: TensorPlan) -> "_Merged":
        if not isinstance(tensor.program, Matrix):
            return _Merged(tensor, tensor.program)
        spec = TensorSpec(tensor.name, tensor.shape, tensor.numel, tensor.row_names, tuple(parts))
        if not parts:  # in no block, without Gram matrices: as tensors that are no matrices are
            spec = replace(spec, shape=(tensor.numel,))
        return _Merged(tensor, self.plan.method.plan(spec, **self.plan.learning))

    # ------------------------------------------------------------------------------------------------------ statistics

    def _expert(self, index: int, expert: int, writer: Writer) -> "_Part":
        """Write one expert's Gram matrices of one block."""
        for name, tensor in self.held.items():
            if self.place[name] == index:
                flat = self.student.parameters[name].data.view(-1)
                self.student.bank.write(name, None if tensor.rows[expert].untouched else expert, flat)
        layers = self._layers(index)
        rows, before = self.rows[expert], len(writer.names)
        leader = leaders(layers, lambda: self._through(index, rows.batches[0], rows.states[0]))
        sizes = {name: 4 * layers[name].in_features ** 2 for name in leader.values()}
        for number, wanted in enumerate(passes(sizes, BYTES)):
            sums = InputSums(["gram"])
            with watched(layers, wanted, sums.take):
                for batch, states in zip(rows.batches, rows.states, strict=True):
                    sums.mask = _mask(self._inputs(batch), batch)
                    self._through(index, batch, states)
                    self.run.progress.advance(0 if number else len(batch.samples))
            writer.add(dict(self._grams(sums, expert)))
        if not layers:
            self.run.progress.advance(sum(len(batch.samples) for batch in rows.batches))
        alias = {f"gram/{name}": f"gram/{lead}" for name, lead in leader.items() if name != lead}
        return _Part(writer.names[before:], alias)

    def _layers(self, index: int) -> dict[str, Any]:
        """Return the linear layers of a block that some expert changes, by their matrices' names."""
        matrices = [n for n, place in self.place.items() if place == index and len(self.held[n].shape) == 2]
        return layers_of(self.student.model, self.student.parameters, matrices)

    def _grams(self, sums: InputSums, expert: int) -> Iterator[tuple[str, Any]]:
        for key, total in sums.sums.items():
            gram = total / sums.counts[key.partition("/")[2]]
            if not bool(gram.isfinite().all()):
                raise InputError(
                    f"{self.run.experts[expert]}: activations at {key.partition('/')[2]!r} are not finite; use "
                    "precision=float32"
                )
            yield key, gram.cpu().numpy()


@dataclass(frozen=True)
class _Merged:
    """A tensor and the program that merges it."""

    tensor: TensorPlan
    program: Any


@dataclass(frozen=True)
class _Part:
    """One expert's Gram matrices of one block: names of files, and which layers share them."""

    files: list[str]
    alias: dict[str, str]


@dataclass(frozen=True)
class _Done:
    """What is collected: every expert's part of the first blocks; ``finished``: of all, with facts."""

    blocks: list[list[_Part]]
    finished: bool = False


def _places(student: Student, stepper: Stepper, held: Mapping[str, TensorPlan]) -> dict[str, int]:
    """Return the number of the block that a tensor is in; -1: it is in none."""
    numbers = {id(p): index for index, block in enumerate(stepper.blocks) for p in block.parameters()}
    return {name: numbers.get(id(student.parameters[name]), -1) for name in held}


def _mask(inputs: Mapping[str, Any], batch: Batch) -> Any:
    mask = inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.ndim == 2 and len(batch.samples) > 1 else None
