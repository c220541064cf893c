"""One learning run: the plan, the data, and what every learned method does with them before its own part begins."""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from consilience.coefficients import Coefficients, Trimmed, constant, make_groups
from consilience.engine.plan import Plan, resolve_file
from consilience.errors import InputError, option
from consilience.learned.answers import Answered, answered, as_given
from consilience.learned.data import Data
from consilience.learned.problem import Problem
from consilience.learned.settings import PATTERNS
from consilience.name_filter import any_filter
from consilience.objectives.objective import Objective
from consilience.progress import NullProgress, Progress
from consilience.student.bank import Bank, check_bank, mergeable
from consilience.student.calibration import Sample, batches, check_tokenizers, encode_task, held_out
from consilience.student.outputs import Reader
from consilience.student.student import Precision, Settings, Student, blocks_of, make_student
from consilience.student.teachers import Teachers
from consilience.tasks.rows import Task, overlap, read_rows


@dataclass(frozen=True)
class Machine:
    """Where a run computes: device, CPU threads of the bank (None: all), and whether a model's own code may run."""

    device: str = "cpu"
    threads: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Run:
    """What a learned method is given.

    ``root`` is the folder that a recipe's relative paths start from; ``folder`` keeps state and the experts' cached
    answers (None: nothing is kept), ``shared`` is the folder that stages have in common; ``tensorboard`` is a folder to
    log to.
    """

    plan: Plan
    root: Path | None = None
    folder: Path | None = None
    tensorboard: Path | None = None
    machine: Machine = field(default_factory=Machine)
    progress: Progress = field(default_factory=NullProgress)
    where: str = "recipe"
    shared: Path | None = None

    @property
    def answers(self) -> Path | None:
        """Return the folder of the experts' cached answers: one for all stages."""
        return None if self.folder is None else (self.shared or self.folder) / "teachers"

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        return self.plan.recipe.seed

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, in the plan's order."""
        return tuple(expert.name for expert in self.plan.experts)

    def inside(self, name: str) -> "Run":
        """Return the run of one stage, whose state is kept apart."""
        if self.folder is None:
            return self
        return replace(self, folder=self.folder / name, shared=self.shared or self.folder)

    def path_of(self, expert: str, key: str) -> Path | None:
        """Return the file that the recipe names as an expert's ``data.KEY``."""
        names = iter(self.experts)
        for entry in self.plan.recipe.models:
            if entry.model == self.plan.recipe.base_model and self.plan.method.base != "unused":
                continue
            if next(names) == expert:
                value = getattr(entry.data, key) if entry.data is not None else None
                return None if value is None else resolve_file(value, self.root)
        raise KeyError(expert)

    def task(self, expert: str, key: str = "calibration", rows: int = 0) -> Task:
        """Read an expert's rows: the first ``rows`` of them (0: all).

        Raises:
            InputError: the recipe names no file, it cannot be read, or its rows are also in the expert's validation
                file.
        """
        path = self.path_of(expert, key)
        if path is None:
            calibration = option("calibration", f"{expert}=FILE.jsonl")
            how = f" ({calibration})" if key == "calibration" else ""
            raise InputError(
                f"{self.where}: {expert}: method {self.plan.method.name!r} needs {key} rows; give the expert "
                f"data: {{{key}: FILE.jsonl}}{how}"
            )
        task = Task(expert, read_rows(path)[: rows or None], path)
        test = self.path_of(expert, "validation")
        if test is not None and key != "validation":
            shared = overlap(task, Task(expert, read_rows(test), test))
            if shared.n_shared:
                raise InputError(
                    f"{path}: {shared.n_shared} of {shared.n_a} rows are also in {test} (the first is line "
                    f"{shared.pairs[0][0] + 1}); what is measured must not be learned from: draw other rows"
                )
        return task

    def asked(self, expert: str, *, own_prompts: int, key: str = "calibration", rows: int = 0) -> Task:
        """Return ``task``'s rows, or with ``own_prompts`` none yet: the expert is to write them.

        Raises:
            InputError: see ``task``; or there is a file, and prompts of the expert's own are asked for.
        """
        if not own_prompts:
            return self.task(expert, key, rows)
        path = self.path_of(expert, key)
        if path is not None:
            raise InputError(
                f"{path}: own_prompts={own_prompts} has {expert} write its own prompts, and reads none; leave out one"
            )
        return Task(expert, ())

    def target(self, rows: int = 0) -> tuple[Task, Task | None]:
        """Read the recipe's target: labelled rows to learn from (the first ``rows``; 0: all), and to stop by, if named.

        Raises:
            InputError: the recipe names no file, it cannot be read, or the two share rows.
        """
        paths = self.plan.recipe.target
        if paths is None or paths.train is None:
            raise InputError(
                f"{self.where}: method {self.plan.method.name!r} needs labelled rows of the target; give it as target: "
                f"{{train: FILE.jsonl, validation: FILE.jsonl}} ({option('target', 'train=FILE.jsonl')})"
            )
        path = resolve_file(paths.train, self.root)
        train = Task("target", read_rows(path)[: rows or None], path)
        if paths.validation is None:
            return train, None
        other = resolve_file(paths.validation, self.root)
        validation = Task("target validation", read_rows(other), other)
        shared = overlap(train, validation)
        if shared.n_shared:
            raise InputError(
                f"{path}: {shared.n_shared} of {shared.n_a} rows are also in {other} (the first is line "
                f"{shared.pairs[0][0] + 1}); what is measured must not be learned from: draw other rows"
            )
        return train, validation

    @contextlib.contextmanager
    def scalars(self, stage: str) -> Generator[Any]:
        """Open a TensorBoard writer, if a folder was asked for."""
        if self.tensorboard is None:
            yield None
            return
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(self.tensorboard / stage))
        try:
            yield writer
        finally:
            writer.close()


def require_tensorboard() -> None:
    """Check that TensorBoard's package is there.

    Raises:
        InputError: names the extra to install.
    """
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        raise InputError(
            f"{option('tensorboard', 'FOLDER')}: needs the tensorboard package; install it with: pip install "
            "'consilience[tensorboard]'"
        )


def base_folder(plan: Plan) -> Path:
    """Return the base's Hugging Face folder.

    Raises:
        InputError: the base is a lone file.
    """
    base = plan.base
    folder = base.checkpoint.folder if base is not None and base.checkpoint is not None else None
    if folder is None or not (folder / "config.json").is_file():
        raise InputError(
            f"{base.reference if base else 'base_model'}: learning runs the model, so the base must be a Hugging Face "
            "folder (config.json, weights, tokenizer)"
        )
    return folder


def groups_of(run: Run, grouping: str, exclude: Sequence[str], alphabar: Sequence[float]) -> Coefficients:
    """Return the coefficients at the anchor for every tensor that some expert changes and nothing excludes.

    Raises:
        InputError: nothing is left to learn.
    """
    excluded = any_filter([pattern for name in exclude for pattern in PATTERNS.get(name, (name,))], "exclude")
    tensors = mergeable(run.plan, excluded)
    out = sorted(t.name for t in run.plan.tensors if t.program is not None and excluded(t.name))
    found = constant(run.experts, make_groups(tensors, grouping), alphabar, alphabar=list(alphabar), excluded=out)
    check_bank(found)
    return found


@dataclass
class Workshop:
    """The student, its samples and the experts' answers, ready for any objective; ``close`` it when done."""

    run: Run
    bank: Bank
    student: Student
    reader: Reader
    samples: list[Sample]
    learn: list[int]
    hold: list[int]
    further: list[int]
    tokens: int
    teachers: Teachers | None
    notes: list[str] = field(default_factory=list[str])

    @property
    def judge(self) -> list[int]:
        """Return samples that nothing is learned from: those held out, or further answers to the same prompts."""
        return self.hold or self.further

    def problem(self, objective: Objective) -> Problem:
        """Return an objective as a function of the coefficients."""
        return Problem(self.student, self.reader, self.teachers, self.samples, objective, tokens=self.tokens)

    def close(self) -> None:
        """Stop the workers."""
        self.bank.close()


def open_workshop(
    run: Run,
    coefficients: Coefficients,
    data: Data,
    *,
    layers: Sequence[int] | str = (),
    teachers: bool = True,
    precision: Precision = "mixed",
    checkpoint: bool = False,
    trimmed: Trimmed | None = None,
) -> Workshop:
    """Load the base, read the calibration rows, and let every expert answer its own.

    Args:
        run: the run.
        coefficients: whose groups are to be learned.
        data: how rows are read.
        layers: numbers of the blocks whose outputs are wanted; "middle" is the middle one.
        teachers: whether the experts' answers are needed.
        precision: see ``student.Settings``.
        checkpoint: recompute activations in the backward pass.
        trimmed: what is done to task vectors before they are multiplied.

    Raises:
        InputError: anything of the base, the rows or the experts does not fit.
    """
    folder = base_folder(run.plan)
    target = run.target(data.samples) if run.plan.method.reads_target else None
    own = data.own_prompts if data.responses == "generate" else 0
    asked = [run.asked(name, own_prompts=own, key=data.key, rows=data.samples) for name in run.experts if not target]
    run.progress.phase("loading the model")
    bank = Bank(run.plan, coefficients.groups, trimmed=trimmed, threads=run.machine.threads)
    with contextlib.ExitStack() as undo:
        undo.callback(bank.close)
        settings = Settings(precision, run.machine.device, checkpoint, run.machine.trust_remote_code)
        student = make_student(run.plan, bank, settings)
        chosen = middle(student, layers)
        rows = [answered(run, student, k, task, data) for k, task in enumerate(asked)]
        samples = encode_rows(run, student, rows, folder, data) if target is None else []
        for task in target or ():
            samples += encode_rows(run, student, [as_given(task)], folder, data) if task is not None else []
        folders = [expert.folder for expert in run.plan.experts]
        check_tokenizers(samples, folders, folder, trust_remote_code=run.machine.trust_remote_code)
        known, further = _further(samples, rows)
        learn, hold = held_out(samples, known, data.holdout)
        if target is not None and target[1] is not None:
            every = range(len(samples))
            learn, hold = list(every[: len(target[0].rows)]), list(every[len(target[0].rows) :])
        reader = Reader(student, batches(samples, range(len(samples)), data.tokens)[0], chosen)
        held = Teachers(student, reader, samples, run.answers)
        if teachers:
            run.progress.phase("answers of the experts", len(samples), "samples")
            held.prepare(data.tokens, run.progress.advance)
        undo.pop_all()
    notes = [one.note for one in rows if one.note]
    return Workshop(
        run, bank, student, reader, samples, learn, hold, further, data.tokens, held if teachers else None, notes
    )


def _further(samples: Sequence[Sample], rows: Sequence[Answered]) -> tuple[list[int], list[int]]:
    """Return the samples to learn from, and every prompt's last answer where it is a further one."""
    last = {i for i, s in enumerate(samples) if s.expert < len(rows) and s.encoded.row in rows[s.expert].further}
    return [i for i in range(len(samples)) if i not in last], sorted(last)


def middle(student: Student, layers: Sequence[int] | str) -> tuple[int, ...]:
    """Return block numbers, counted from 1: as given, or the middle one.

    Raises:
        InputError: there is no such block.
    """
    if not layers:
        return ()
    count = len(blocks_of(student.model))
    chosen = ((count + 1) // 2,) if isinstance(layers, str) else tuple(layers)
    for layer in chosen:
        if not 1 <= layer <= count:
            raise InputError(f"hidden_layers: there is no block {layer}; the model has blocks 1 to {count}")
    return chosen


def encode_rows(run: Run, student: Student, tasks: Sequence[Answered], folder: Path, data: Data) -> list[Sample]:
    """Return the rows of tasks, one an expert, as a model reads them.

    Raises:
        InputError: a row does not suit the model; the message names FILE:LINE.
    """
    from consilience.tasks.encoding import vocabulary_of
    from consilience.tasks.load import load_tokenizer
    from consilience.tasks.readout import decoder_start

    tokenizer = load_tokenizer(folder, trust_remote_code=run.machine.trust_remote_code)
    config = student.model.config
    start = decoder_start(student.model) if getattr(config, "is_encoder_decoder", False) else None
    processor = None
    if any(row.image is not None for one in tasks for row in one.task.rows):
        from consilience.student.images import load_processor

        processor = load_processor(folder, trust_remote_code=run.machine.trust_remote_code)
    return [
        replace(sample, where=one.where(sample.encoded.row))
        for expert, one in enumerate(tasks)
        for sample in encode_task(
            one.task,
            expert,
            tokenizer,
            config,
            positions=data.positions,
            decoder_start=start,
            processor=processor,
            answered=one.generated,
            vocabulary=vocabulary_of(student.model),
        )
    ]
