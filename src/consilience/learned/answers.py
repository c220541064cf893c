"""What the experts answer to their own prompts: generated, kept beside the run's state, and read back.

Every prompt is answered ``answers`` times by the expert it belongs to (greedily, or sampled at a temperature), and each
answer makes a row of its own: (prompt, answer). Coefficients are then learned where answers are predicted, on the
states that the merge will be in when it is used. One more answer a prompt can be asked for, which nothing is learned
from: what is found is measured on it (``judged``).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from consilience.errors import InputError
from consilience.learned.written import SHOTS
from consilience.tasks.rows import Message, Row, Task
from consilience.workdir import write_file

if TYPE_CHECKING:
    from consilience.learned.data import Data
    from consilience.learned.run import Run
    from consilience.student.calibration import Sample
    from consilience.student.student import Student
    from consilience.tasks.generate import Prompt

#: What a row says of its own answer, which a generated one takes the place of.
BARE: dict[str, None] = {"choices": None, "label": None, "response": None}


@dataclass(frozen=True)
class Answered:
    """One expert's rows to learn from and to judge by.

    ``origin`` says of every row of ``task`` which row of ``asked`` it answers (-1: a prompt that the model wrote);
    ``further`` are the rows that nothing is learned from, ``generated`` says whether the answers are the expert's, and
    ``note`` is what whoever runs this should know.
    """

    task: Task
    asked: Task
    origin: tuple[int, ...]
    further: frozenset[int] = frozenset()
    generated: bool = False
    note: str = ""

    def where(self, index: int) -> str:
        """Name the file and line that a row comes from."""
        origin = self.origin[index]
        return self.asked.where(origin) if origin >= 0 else f"{self.asked.path}: written prompt {index}"


def as_given(task: Task) -> Answered:
    """Return rows that stand for themselves."""
    return Answered(task, task, tuple(range(len(task.rows))))


def answered(run: "Run", student: "Student", expert: int, task: Task, data: "Data") -> Answered:
    """Return an expert's rows with the responses that were asked for: their own, none, or the expert's answers.

    Raises:
        InputError: answers are to be generated, and a row is no prompt.
    """
    if data.responses == "given":
        return as_given(task)
    if data.responses == "none":
        return as_given(replace(task, rows=tuple(row.model_copy(update=BARE) for row in task.rows)))
    bare = replace(task, rows=_own(run, student, expert, task, data)) if data.own_prompts else questions(task)
    texts = _answers(run, student, expert, bare, data, _times(data))
    rows = [(row, text, i) for i, (row, own) in enumerate(zip(bare.rows, texts, strict=True)) for text in own]
    further = frozenset(range(_times(data) - 1, len(rows), _times(data)) if data.further else ())
    note = ""
    if data.written_prompts:
        more, note = _written(run, student, expert, bare, [own[0] for own in texts], data)
        rows += [
            (row, own[0], -1) for row, own in zip(more.rows, _answers(run, student, expert, more, data, 1), strict=True)
        ]
    filled = replace(task, rows=tuple(_with_answer(row, text) for row, text, _ in rows))
    return Answered(filled, task, tuple(origin for *_, origin in rows), further, generated=True, note=note)


def _own(run: "Run", student: "Student", expert: int, task: Task, data: "Data") -> tuple[Row, ...]:
    """Return prompts that an expert writes itself (kept or new).

    Raises:
        InputError: it writes none, or the base has no chat template.
    """
    path = _path(run, expert, task, data, [data.own_prompts], "own-prompts")
    title = f"prompts of {task.name}'s own"
    try:
        found = _prompts(run, path, title, data.own_prompts, (), (), data, lambda: student.become(expert), student)
    except InputError as error:
        raise InputError(f"own_prompts: {task.name}: {error}") from None
    if not found:
        raise InputError(f"own_prompts: {task.name}: wrote no prompt to its end; give the expert a file of prompts")
    return tuple(Row(prompt=text) for text in found)


def _written(
    run: "Run", student: "Student", expert: int, task: Task, answers: Sequence[str], data: "Data"
) -> tuple[Task, str]:
    """Return further prompts that the base writes in the manner of an expert's (kept or new), or none and why."""
    plain = [i for i, row in enumerate(task.rows) if row.prompt is not None and row.image is None]
    given, told = [task.rows[i].prompt or "" for i in plain], [answers[i] for i in plain]
    path = _path(run, expert, task, data, [data.written_prompts, told], "prompts")
    title = f"prompts in the manner of {task.name}'s"
    try:
        if len(given) < 2:
            raise InputError("there are not two text prompts to go by (written_prompts=0 asks for none)")
        found = _prompts(run, path, title, data.written_prompts, given, told, data, student.become_base, student)
    except InputError as error:
        return Task(task.name, ()), f"{task.name}: no further prompts were written: {error}"
    return Task(task.name, tuple(Row(prompt=text) for text in found)), ""


def _prompts(
    run: "Run", path: Path | None, title: str, count: int, given: Sequence[str], told: Sequence[str], data: "Data",
    become: Callable[[], None], student: "Student",
) -> list[str]:  # fmt: skip
    """Return prompts that were kept, or have the student, which ``become`` makes the writer, write them."""
    from consilience.learned.run import base_folder
    from consilience.learned.written import write_prompts
    from consilience.tasks.load import load_tokenizer

    kept = _read(path)
    if isinstance(kept, list) and all(isinstance(one, str) for one in kept):
        return cast(list[str], kept)
    run.progress.phase(title, count, "prompts")
    become()
    tokenizer = load_tokenizer(base_folder(run.plan), trust_remote_code=run.machine.trust_remote_code)
    with student.generating():
        found = write_prompts(
            student.model, tokenizer, given, told, count,
            batch_size=_together(given, data, SHOTS + 1), seed=run.seed, advance=run.progress.advance,
        )  # fmt: skip
    _write(path, found)
    return found


def questions(task: Task) -> Task:
    """Return a task's rows without their answers.

    Raises:
        InputError: a row has nothing that could be answered.
    """
    return replace(task, rows=tuple(_question(row, task.where(i)) for i, row in enumerate(task.rows)))


def _question(row: Row, where: str) -> Row:
    """Return a row without its answer: its prompt, or its conversation up to the last turn that is not the model's."""
    if row.text is not None:
        raise InputError(
            f"{where}: text is no prompt, so the expert has nothing to answer; write it as prompt, or use "
            "responses=given to compare every token of it"
        )
    bare = row.model_copy(update=BARE)
    if bare.messages is None:
        return bare
    turns = list(bare.messages)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns:
        raise InputError(f"{where}: the conversation has no turn but the model's own; begin it with the user's")
    return bare.model_copy(update={"messages": tuple(turns)})


def _with_answer(row: Row, text: str) -> Row:
    """Return a row with an answer; an expert that says nothing gives an unlabelled row."""
    if not text:
        return row
    if row.messages is None:
        return row.model_copy(update={"response": text})
    return row.model_copy(update={"messages": (*row.messages, Message(role="assistant", content=text))})


def _prompt(row: Row) -> "Prompt":
    if row.messages is None:
        return row.prompt or ""
    return [{"role": turn.role, "content": turn.content} for turn in row.messages]


def _times(data: "Data") -> int:
    return data.answers + data.further


def shown(samples: Sequence["Sample"], prompts: int = 3) -> list[dict[str, str | None]]:
    """Return an expert's first answer to its first prompts, for whoever reads the report: a wrong chat template shows.

    Args:
        samples: the expert's.
        prompts: how many.
    """
    first = {sample.where: sample.row for sample in reversed(samples)}
    return [_shown(row) for row in list(first.values())[::-1][:prompts]]


def _shown(row: Row) -> dict[str, str | None]:
    if row.messages is None:
        return {"prompt": row.prompt, "answer": row.response}
    *asked, last = row.messages
    said = last.content if last.role == "assistant" else None
    return {"prompt": (asked[-1] if said is not None else last).content, "answer": said}


def _answers(run: "Run", student: "Student", expert: int, task: Task, data: "Data", times: int) -> list[list[str]]:
    """Return ``times`` answers to every prompt: kept ones, or asked for now."""
    path = _path(run, expert, task, data, [times], "answers")
    kept = _kept(path, len(task.rows), times)
    if kept is not None:
        return kept
    run.progress.phase(f"answers of {task.name}", len(task.rows) * times, "answers")
    student.become(expert)
    with student.generating():
        found = _asked(run, student, task, data, times)
    _write(path, [{"prompt": _prompt(row), "answers": own} for row, own in zip(task.rows, found, strict=True)])
    return found


def _asked(run: "Run", student: "Student", task: Task, data: "Data", times: int) -> list[list[str]]:
    """Ask for every row's answers: prompts of text together, rows with an image one by one."""
    from consilience.learned.run import base_folder
    from consilience.tasks.generate import sample
    from consilience.tasks.load import load_tokenizer

    folder, trusted = base_folder(run.plan), run.machine.trust_remote_code
    plain = [i for i, row in enumerate(task.rows) if row.image is None]
    prompts = [_prompt(task.rows[i]) for i in plain for _ in range(times)]
    flat = sample(
        student.model, load_tokenizer(folder, trust_remote_code=trusted), prompts, data.response_tokens,
        batch_size=_together(prompts, data), temperature=data.answer_temperature, seed=run.seed,
        advance=run.progress.advance,
    )  # fmt: skip
    found = {i: flat[at * times : (at + 1) * times] for at, i in enumerate(plain)}
    if len(plain) < len(task.rows):
        from consilience.student.images import load_processor

        processor = load_processor(folder, trust_remote_code=trusted)
        for index in range(len(task.rows)):
            if index not in found:
                found[index] = _seen(run, student, processor, task, index, data, times)
    return [found[i] for i in range(len(task.rows))]


def _together(prompts: "Sequence[Prompt]", data: "Data", shown: int = 1) -> int:
    """Return how many prompts are answered together: as many as four forward passes may have tokens, by a rough count.

    A token's pass over them holds little, and costs much the same for one as for many.

    ``shown``: prompts that one sequence holds.
    """
    longest = shown * max((len(str(prompt)) for prompt in prompts), default=0) // 3 + data.response_tokens
    return max(1, min(128, 4 * data.tokens // max(1, longest)))


def _seen(
    run: "Run", student: "Student", processor: Any, task: Task, index: int, data: "Data", times: int
) -> list[str]:
    """Answer a row with an image, alone: pixels of several images do not go into one batch."""
    import torch

    from consilience.student.calibration import placed
    from consilience.student.images import encode_image
    from consilience.tasks.decode import draws
    from consilience.tasks.generate import generation_config

    model = student.model
    encoded, extra = encode_image(task.rows[index], task.path, processor, task.where(index))
    ids = torch.tensor([encoded.inputs], device=model.device)
    settings = generation_config(model, processor.tokenizer, data.response_tokens)
    draw = draws(data.answer_temperature, data.response_tokens, times, [run.seed, index])
    if draw is not None:  # a greedy search returns one answer; what is sampled from has a single token left
        settings.do_sample, settings.num_return_sequences = True, times
    # Sampling from a single token still takes a number from torch's generator.
    with torch.no_grad(), torch.random.fork_rng([]):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings,
            logits_processor=[] if draw is None else [draw],
            **{key: placed(value, model) for key, value in extra.items()},
        )  # fmt: skip
    texts = processor.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    run.progress.advance(times)
    return [text.strip() for text in texts] * (times // len(texts))


def _path(run: "Run", expert: int, task: Task, data: "Data", more: Any, kind: str) -> Path | None:
    """Return the file of an expert's answers, named after all that they depend on; None: nothing is kept."""
    if run.answers is None:
        return None
    own, base = run.plan.experts[expert].identity(), run.plan.base
    facts = [
        own, run.plan.scales(expert), base.identity() if base is not None else None, data.response_tokens,
        data.answer_temperature, run.seed, more,
        [(_prompt(row), _image_digest(row, task)) for row in task.rows],
    ]  # fmt: skip
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()
    return run.answers / f"{kind}-{expert}-{digest}.json"


def _image_digest(row: Row, task: Task) -> str | None:
    """Hash an image's file: a row may stay as it is while its image changes. None: there is none to read."""
    path = None if row.image is None else Path(row.image if task.path is None else task.path.parent / row.image)
    return hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest() if path and path.is_file() else None


def _write(path: Path | None, value: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(value, ensure_ascii=False, indent=1).encode())


def _read(path: Path | None) -> Any:
    """Read a kept file back; None if it is not there, or not whole: then it is made again."""
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        return None


def _kept(path: Path | None, prompts: int, answers: int) -> list[list[str]] | None:
    try:
        kept = [one["answers"] for one in cast(list[dict[str, list[str]]], _read(path) or ())]
    except (KeyError, TypeError):
        return None
    whole = len(kept) == prompts and all(len(own) == answers for own in kept)
    return kept if whole else None
