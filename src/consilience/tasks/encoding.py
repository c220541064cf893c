"""Rows to token ids, and which positions of a sequence are scored.

========================  ==========================================================================================
row                       scored tokens
========================  ==========================================================================================
``text``                  all but the first (with a tokenizer that adds a BOS token: all of the text)
``prompt`` + ``response``  the response and, under a chat template, the token that ends the turn
``messages``              every assistant turn, each with the token that ends it
``choices``               one sequence per choice, each scored as a response would be
no response at all        none: *every* position is compared by a divergence, the last one included
========================  ==========================================================================================

With a chat template the prompt is a user's turn; without one, prompt and response are joined as they are (put the
space between them into the row). The ids of the prompt are always an exact prefix of the sequence's, as they are when
a model generates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from consilience.errors import InputError
from consilience.tasks.rows import Row, Task


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence to run a model on.

    ``inputs`` [T] are the (decoder's) input ids and ``source`` [S] the encoder's, empty for a decoder-only model. The
    distribution at position ``positions[j]`` is scored against token ``targets[j]``; ``targets`` is empty when the row
    is unlabelled. ``row`` indexes the task's rows, ``candidate`` the row's choices (None without choices), and
    ``dropped`` counts scored tokens that a limit cut off.
    """

    row: int
    candidate: int | None
    source: tuple[int, ...]
    inputs: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]
    dropped: int = 0


#: A piece of a sequence: its text, and whether its tokens are scored.
_Piece = tuple[str, bool]


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """A tokenizer, the special ids it puts before and after a text (BOS, EOS; maybe none), and its special tokens."""

    own: Any
    before: tuple[int, ...]
    after: tuple[int, ...]
    special: tuple[str, ...]

    def ids(self, text: str) -> list[int]:
        """Ids of a text without special ones around it; ``verbose`` off: length limits are handled in this module."""
        return list(self.own(text, add_special_tokens=False, verbose=False).input_ids) if text else []


def _study(tokenizer: Any) -> _Tokenizer:
    plain = _Tokenizer(tokenizer, (), (), (*tokenizer.all_special_tokens, *map(str, tokenizer.get_added_vocab())))
    bare, full = plain.ids("a"), list(tokenizer("a").input_ids)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return replace(plain, before=tuple(full[:start]), after=tuple(full[start + len(bare) :]))
    return plain


def _render(tokenizer: _Tokenizer, turns: list[dict[str, str]], where: str, *, generation: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.own.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise InputError(f"{where}: the chat template refuses turns {roles} ({error}); change the messages") from None


def _chat_pieces(tokenizer: _Tokenizer, turns: list[dict[str, str]], where: str) -> list[_Piece]:
    """Cut a rendered conversation into scored (assistant) and unscored pieces."""
    if all(turn["role"] != "assistant" for turn in turns):
        return [(_render(tokenizer, turns, where, generation=True), False)]
    full = _render(tokenizer, turns, where)
    pieces: list[_Piece] = []
    done = 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        end = _render(tokenizer, turns[: index + 1], where)
        if end.rstrip().endswith(tokenizer.special):
            end = end.rstrip()  # white space after the token that ends a turn is the template's, not the model's
        before = _render(tokenizer, turns[:index], where, generation=True) if index else None
        if before is None or not full.startswith(before):
            # Some templates open a generation with more than they write for a finished turn (an empty thought, say).
            before = _render(tokenizer, turns[:index], where) if index else ""
            at = full.find(turn["content"].strip(), len(before)) if full.startswith(before) else -1
            before = full[:at] if at >= 0 else before
        if not (full.startswith(end) and full.startswith(before) and done <= len(before) < len(end)):
            raise InputError(
                f"{where}: the chat template rewrites earlier turns, so turn {index + 1} cannot be scored in place;"
                " give one row per answer"
            )
        pieces += [(full[done : len(before)], False), (full[len(before) : len(end)], True)]
        done = len(end)
    return pieces


def _tokenise(tokenizer: _Tokenizer, pieces: Sequence[_Piece]) -> tuple[list[int], list[int]]:
    """Ids of the pieces in a row, and the indices of the scored ones."""
    ids = tokenizer.ids("".join(text for text, _ in pieces))
    cuts = [0]
    for end in range(1, len(pieces)):
        before = tokenizer.ids("".join(text for text, _ in pieces[:end]))
        cuts.append(len(before) if ids[: len(before)] == before else -1)
    if -1 in cuts:
        # A token would straddle a boundary: a model that generates never sees it, so tokenise piece by piece.
        parts = [tokenizer.ids(text) for text, _ in pieces]
        ids = [token for part in parts for token in part]
        cuts = [sum(map(len, parts[:k])) for k in range(len(parts))]
    ends = [*cuts[1:], len(ids)]
    scored = [i for (_, on), a, b in zip(pieces, cuts, ends, strict=True) if on for i in range(a, b)]
    return ids, scored


def _turns(row: Row, answer: str | None) -> list[dict[str, str]]:
    if row.messages is None:
        turns = [{"role": "user", "content": row.prompt or ""}]
    else:
        turns = [{"role": message.role, "content": message.content} for message in row.messages]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def _decoder_only(row: Row, answer: str | None, tokenizer: _Tokenizer, where: str) -> tuple[list[int], list[int]]:
    """Ids of a row and the indices of the scored ones."""
    if row.text is not None:
        ids = [*tokenizer.before, *tokenizer.ids(row.text), *tokenizer.after]
        return ids, list(range(1, len(ids)))
    if getattr(tokenizer.own, "chat_template", None):
        # The template writes its own special tokens.
        return _tokenise(tokenizer, _chat_pieces(tokenizer, _turns(row, answer), where))
    if row.messages is not None:
        raise InputError(f"{where}: messages need a chat template and this tokenizer has none; use prompt and response")
    pieces = [(row.prompt or "", False)] + ([(answer, True)] if answer is not None else [])
    ids, scored = _tokenise(tokenizer, pieces)
    return [*tokenizer.before, *ids], [i + len(tokenizer.before) for i in scored]


def _encoder_decoder(row: Row, answer: str | None, tokenizer: _Tokenizer, where: str) -> tuple[list[int], list[int]]:
    """Ids for the encoder, and the ids the decoder is to write (none for an unlabelled row)."""
    if row.prompt is None:
        kind = "text" if row.text is not None else "messages"
        raise InputError(f"{where}: an encoder-decoder model needs prompt (+ response), not {kind}; rewrite the row")
    source, target = (
        [*tokenizer.before, *tokenizer.ids(text), *tokenizer.after] for text in (row.prompt, answer or "")
    )
    return source, [] if answer is None else target


def encode(
    task: Task,
    tokenizer: Any,
    *,
    decoder_start: int | None = None,
    max_tokens: int | None = None,
    max_examples: int | None = None,
    context: int | None = None,
    vocabulary: int | None = None,
) -> tuple[Encoded, ...]:
    """Encode a task's rows, in order; a row with C choices gives C sequences.

    Args:
        task: the rows.
        tokenizer: a transformers tokenizer.
        decoder_start: the id a decoder starts with; given for encoder-decoder models only (None: decoder-only).
        max_tokens: score at most the first ``max_tokens`` tokens of a row; what lies past them is cut off and counted
            in ``dropped``. Rows with choices are exempt: choices cut short cannot be ranked.
        max_examples: use the first ``max_examples`` rows.
        context: the most input tokens the model takes; a longer sequence is cut at its end and counted as above.
        vocabulary: how many tokens the model has rows for (``vocabulary_of``).

    Raises:
        InputError: a row has an image, nothing to score, a token that the model has no row for, does not fit the
            tokenizer's chat template, or its prompt (or one of its choices) does not fit into the context.
    """
    study = _study(tokenizer)
    out: list[Encoded] = []
    for index, row in enumerate(task.rows[:max_examples]):
        where = task.where(index)
        if row.image is not None:
            raise InputError(f"{where}: a language model cannot be measured on an image; drop the key or the row")
        answers: Sequence[tuple[int | None, str | None]] = [(None, row.response)]
        limit = max_tokens
        if row.choices is not None:
            answers, limit = tuple(enumerate(row.choices)), None
        for candidate, answer in answers:
            if decoder_start is None:
                ids, scored = _decoder_only(row, answer, study, where)
                one = _causal(index, candidate, ids, scored, limit, context)
            else:
                source, target = _encoder_decoder(row, answer, study, where)
                if context is not None and len(source) > context:
                    raise InputError(
                        f"{where}: the prompt's {len(source)} tokens exceed the model's {context}; shorten it"
                    )
                one = _seq2seq(index, candidate, source, target, decoder_start, limit, context)
            check_ids((*one.source, *one.inputs, *one.targets), tokenizer, vocabulary, where)
            if not one.positions or (row.labelled and not one.targets):
                room = f" within the model's context of {context} tokens" if one.dropped else ""
                raise InputError(f"{where}: nothing to score{room}; change the row or drop it")
            if candidate is not None and one.dropped:
                raise InputError(
                    f"{where}: choice {candidate} exceeds the model's context of {context} tokens; shorten it"
                )
            out.append(one)
    return tuple(out)


def vocabulary_of(model: Any) -> int | None:
    """Return how many tokens a model has rows for, in its embeddings or its head; None: it shows neither."""
    named = ("get_input_embeddings", "get_output_embeddings")
    layers = [getattr(model, name)() for name in named if hasattr(model, name)]
    return max((layer.weight.shape[0] for layer in layers if hasattr(layer, "weight")), default=None)


def check_ids(ids: Iterable[int], tokenizer: Any, vocabulary: int | None, where: str) -> None:
    """Refuse ids that a model has no row for, as its tokenizer gives them where tokens were added to it alone.

    Raises:
        InputError: names the token.
    """
    highest = max(ids, default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise InputError(
            f"{where}: token {tokenizer.convert_ids_to_tokens(highest)!r} has id {highest} in the tokenizer, and the "
            f"model has rows for {vocabulary} tokens alone; give the model resized to its tokenizer, or with the "
            "tokenizer it was trained with"
        )


def _causal(
    row: int, candidate: int | None, ids: list[int], scored: list[int], limit: int | None, context: int | None
) -> Encoded:
    if not scored:  # unlabelled: every position counts, also the last, which predicts the answer's first token
        kept = ids[:context][:limit]
        return Encoded(row, candidate, (), tuple(kept), tuple(range(len(kept))), (), len(ids) - len(kept))
    wanted = [i for i in scored if i > 0]  # the token at index i is predicted at i - 1; nothing predicts the first
    chosen = [i for i in wanted if context is None or i <= context][:limit]
    inputs = tuple(ids[: chosen[-1]]) if chosen else ()
    positions, targets = tuple(i - 1 for i in chosen), tuple(ids[i] for i in chosen)
    return Encoded(row, candidate, (), inputs, positions, targets, len(wanted) - len(chosen))


def _seq2seq(
    row: int,
    candidate: int | None,
    source: list[int],
    target: list[int],
    start: int,
    limit: int | None,
    context: int | None,
) -> Encoded:
    kept = tuple(target[:context][:limit])
    inputs = (start, *kept[:-1])
    positions = tuple(range(len(inputs)))
    return Encoded(row, candidate, tuple(source), inputs, positions, kept, len(target) - len(kept))
