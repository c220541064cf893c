"""Calibration rows as model inputs: which tokens go in, and at which positions student and expert are compared.

    positions: all        every token of prompt and response that is not padding, those of an image included
    positions: response   where a token of the response (or its end) is predicted; unlabelled rows keep all

Prompts go through the base's chat template where it has one, as they do in evaluation. Rows may come without responses:
calibration needs none.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from consilience.errors import InputError
from consilience.tasks.encoding import Encoded, encode
from consilience.tasks.load import load_tokenizer
from consilience.tasks.rows import Row, Task

Positions = Literal["all", "response"]
#: Rows of several experts go together as long as none is shorter than this share of the longest.
SHORT = 0.6


@dataclass(frozen=True)
class Sample:
    """One row of one expert's calibration data.

    ``encoded`` are its token ids, compared positions and, for labelled rows, targets; ``extra`` holds further model
    inputs (pixel values of an image row), which are not padded, so that such a sample makes a batch of its own.
    """

    expert: int
    encoded: Encoded
    where: str
    row: Row
    extra: dict[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def digest(self) -> str:
        """Hash of all that a model is given and compared by: a row may stay as it is while its image changes."""
        one = self.encoded
        state = blake2b(repr((one.source, one.inputs, one.positions, one.targets)).encode(), digest_size=16)
        for key, value in sorted(self.extra.items()):
            state.update(f"{key} {value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        return state.hexdigest()


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together, of one expert unless they were mixed.

    ``indices`` number them among all samples.
    """

    expert: int
    samples: tuple[Sample, ...]
    indices: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of compared positions."""
        return sum(len(sample.encoded.positions) for sample in self.samples)

    def inputs(self, model: Any) -> tuple[dict[str, Any], tuple[Any, Any], Any]:
        """Return the model's keyword arguments, compared (sequence, position) pairs and their targets (-1: none)."""
        from consilience.tasks.readout import padded

        inputs, where, targets = padded([sample.encoded for sample in self.samples], model)
        taken = inspect.signature(model.forward).parameters
        extra = {key: placed(value, model) for key, value in self.samples[0].extra.items() if key in taken}
        return inputs | extra, where, targets


def placed(value: Any, model: Any) -> Any:
    """Return a tensor where the model is, pixels in the model's own precision."""
    return value.to(device=model.device, dtype=model.dtype if value.is_floating_point() else None)


def encode_task(
    task: Task,
    expert: int,
    tokenizer: Any,
    model_config: Any,
    *,
    positions: Positions = "all",
    decoder_start: int | None = None,
    processor: Any = None,
    answered: bool = False,
    vocabulary: int | None = None,
) -> list[Sample]:
    """Encode one expert's rows.

    ``answered``: a row without a response was answered by silence, so that what counts is the end after its prompt.
    ``vocabulary``: how many tokens the model has rows for.

    Raises:
        InputError: a row does not suit the model; the message names FILE:LINE.
    """
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    context = getattr(text, "max_position_embeddings", None)
    samples: list[Sample] = []
    for index, row in enumerate(task.rows):
        where = task.where(index)
        extra: dict[str, Any] = {}
        if row.image is not None:
            from consilience.student.images import encode_image

            if decoder_start is not None:
                raise InputError(f"{where}: rows with an image need a decoder-only model, not an encoder-decoder one")
            one, extra = encode_image(row, task.path, processor, where)
            if context is not None and len(one.inputs) > context:
                raise InputError(
                    f"{where}: image and text are {len(one.inputs)} tokens and the model takes {context}; scale the "
                    "image down, or shorten the prompt"
                )
        else:
            plain = replace(task, rows=(row.model_copy(update={"choices": None, "label": None}),))
            (one,) = encode(plain, tokenizer, decoder_start=decoder_start, context=context, vocabulary=vocabulary)
        if positions == "all":
            one = _everywhere(one)
        elif answered and not one.targets and not one.source:
            one = replace(one, positions=one.positions[-1:])
        samples.append(Sample(expert, replace(one, row=index), where, row, extra))
    return samples


def _everywhere(one: Encoded) -> Encoded:
    """Compare every position; labels stay where they are known."""
    known = dict(zip(one.positions, one.targets, strict=True)) if one.targets else {}
    every = tuple(range(len(one.inputs)))
    return replace(one, positions=every, targets=tuple(known.get(p, -1) for p in every) if known else ())


def batches(
    samples: Sequence[Sample], chosen: Sequence[int], tokens: int, *, mixed: bool = False, packed: bool = False
) -> list[Batch]:
    """Return the chosen samples in batches of at most ``tokens`` padded tokens, in a fixed order.

    Args:
        samples: all of them.
        chosen: indices of those wanted.
        tokens: most padded tokens of a batch.
        mixed: put samples of several experts together, longest first; a batch's ``expert`` is then its first sample's.
        packed: rows are packed, so that a short one costs no padding.
    """
    out: list[Batch] = []
    order = sorted(chosen, key=lambda i: (0 if mixed else samples[i].expert, -_width(samples[i]), samples[i].expert, i))
    held: list[int] = []

    def close() -> None:
        if held:
            out.append(Batch(samples[held[0]].expert, tuple(samples[i] for i in held), tuple(held)))
            held.clear()

    for i in order:
        wide = max((_width(samples[j]) for j in held), default=_width(samples[i]))
        alone = bool(samples[i].extra) or any(samples[j].extra for j in held)
        if not held:
            other = False
        elif mixed:  # padding a short row to a long one's width costs more than a pass of its own
            other = not packed and _width(samples[i]) < SHORT * wide
        else:
            other = samples[held[0]].expert != samples[i].expert
        if held and (other or alone or wide * (len(held) + 1) > tokens):
            close()
        held.append(i)
    close()
    return out


def _width(sample: Sample) -> int:
    return len(sample.encoded.inputs) + len(sample.encoded.source)


def check_tokenizers(
    samples: Sequence[Sample], folders: Sequence[Path | None], base: Path, *, trust_remote_code: bool = False
) -> None:
    """Refuse experts that would read other tokens than the student for the same row.

    Every expert's own tokenizer and chat template, where its folder brings one, must give the ids that the base's
    gives: hidden states and logits are compared position by position.

    Raises:
        InputError: names the expert's folder and the first row that differs.
    """
    for expert, folder in enumerate(folders):
        if folder is None or folder == base or not (folder / "tokenizer_config.json").is_file():
            continue
        own = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        theirs = load_tokenizer(base, trust_remote_code=trust_remote_code)
        if not getattr(own, "chat_template", None):
            own.chat_template = getattr(theirs, "chat_template", None)
        for sample in samples:
            if sample.expert == expert and not _reads_alike(sample, own, theirs):
                raise InputError(
                    f"{folder}: its tokenizer gives other token ids than {base}'s for {sample.where}; alignment "
                    "compares token by token: give the expert the base's tokenizer and chat template, or retrain it"
                )


def _reads_alike(sample: Sample, own: Any, theirs: Any) -> bool:
    """Whether a tokenizer gives a sample's ids; of an image row the text is compared."""
    row = sample.row.model_copy(update={"choices": None, "label": None, "image": None})
    task = Task("calibration", (row,))
    expected = encode(task, theirs)[0] if sample.extra else sample.encoded
    (again,) = encode(task, own, decoder_start=_start(expected))
    same = again.inputs[: len(expected.inputs) if expected.dropped else None]
    return same == expected.inputs and again.source == expected.source


def _start(one: Encoded) -> int | None:
    return one.inputs[0] if one.source else None


def held_out(samples: Sequence[Sample], known: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Return (indices to learn from, indices to stop early by): the last ``share`` of an expert's rows is held out.

    Args:
        samples: all of them.
        known: indices of those that are divided.
        share: of an expert's rows; several answers to one row are on the same side.
    """
    learn: list[int] = []
    hold: list[int] = []
    for expert in sorted({samples[i].expert for i in known}):
        own = [i for i in known if samples[i].expert == expert]
        rows = list(dict.fromkeys(samples[i].where for i in own))
        count = min(len(rows) - 1, round(share * len(rows))) if share > 0 else 0
        last = set(rows[len(rows) - count :])
        learn += [i for i in own if samples[i].where not in last]
        hold += [i for i in own if samples[i].where in last]
    return learn, hold


def each_expert(samples: Sequence[Sample]) -> Iterator[tuple[int, list[int]]]:
    """Yield (expert, indices of its samples)."""
    for expert in sorted({sample.expert for sample in samples}):
        yield expert, [i for i, sample in enumerate(samples) if sample.expert == expert]
