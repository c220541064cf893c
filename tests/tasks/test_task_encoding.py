from typing import Any

import pytest
from tiny_models import CHAT, make_tokenizer

from consilience.errors import InputError
from consilience.tasks import Encoded, Message, Row, Task, encode


def one(tokenizer: Any, row: Row, **limits: Any) -> Encoded:
    (encoded,) = encode(Task("t", (row,)), tokenizer, **limits)
    return encoded


def scored(tokenizer: Any, encoded: Encoded) -> str:
    return str(tokenizer.decode(list(encoded.targets)))


def sequence(encoded: Encoded) -> list[int]:
    return [*encoded.inputs, encoded.targets[-1]]


def check(encoded: Encoded) -> None:
    """Each target is the token after its position, and no input is wasted."""
    ids = sequence(encoded)
    assert all(ids[p + 1] == t for p, t in zip(encoded.positions, encoded.targets, strict=True))
    assert encoded.positions[-1] == len(encoded.inputs) - 1


def test_a_response_is_scored_with_the_token_that_ends_the_turn(tokenizer: Any):
    encoded = one(tokenizer, Row(prompt="is it good?", response="yes it is"))
    check(encoded)
    prompt: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": "is it good?"}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    assert sequence(encoded)[: len(ids)] == ids  # what a model is given to generate from
    assert tokenizer.decode(sequence(encoded)) == prompt + "yes it is<|im_end|>"
    assert scored(tokenizer, encoded) == "yes it is<|im_end|>"
    assert encoded.positions[0] == len(ids) - 1


def test_text_scores_all_but_the_first_token(tokenizer: Any, plain_tokenizer: Any):
    bare = one(tokenizer, Row(text="the cat sat"))
    assert sequence(bare) == tokenizer("the cat sat").input_ids
    assert bare.positions == tuple(range(len(bare.inputs)))
    with_bos = one(plain_tokenizer, Row(text="the cat sat"))
    assert scored(plain_tokenizer, with_bos) == "the cat sat"
    assert with_bos.inputs[0] == 3


def test_without_a_template_prompt_and_response_are_joined_as_they_are(plain_tokenizer: Any):
    encoded = one(plain_tokenizer, Row(prompt="the cat ", response="sat"))
    check(encoded)
    assert plain_tokenizer.decode(sequence(encoded)) == "<s>the cat sat"
    assert scored(plain_tokenizer, encoded) == "sat"


def test_a_token_across_the_boundary_is_split_as_generation_would(plain_tokenizer: Any):
    joint: list[int] = plain_tokenizer("the cat", add_special_tokens=False).input_ids
    pieces = [plain_tokenizer(part, add_special_tokens=False).input_ids for part in ("the c", "at")]
    assert joint != pieces[0] + pieces[1]  # "at" and " cat" are tokens of this vocabulary
    encoded = one(plain_tokenizer, Row(prompt="the c", response="at"))
    assert sequence(encoded) == [3, *pieces[0], *pieces[1]]
    assert encoded.targets == tuple(pieces[1])


def test_every_assistant_turn_of_messages_is_scored(tokenizer: Any):
    turns = (("user", "hi"), ("assistant", "hello cat"), ("user", "good?"), ("assistant", "no bad"))
    encoded = one(tokenizer, Row(messages=tuple(Message(role=r, content=c) for r, c in turns)))  # pyright: ignore[reportArgumentType]
    check(encoded)
    assert scored(tokenizer, encoded) == "hello cat<|im_end|>no bad<|im_end|>"


def test_messages_of_one_exchange_are_prompt_and_response(tokenizer: Any):
    row = Row(messages=(Message(role="user", content="hi"), Message(role="assistant", content="yes")))
    assert one(tokenizer, row) == one(tokenizer, Row(prompt="hi", response="yes"))


def test_an_assistant_who_begins_is_scored_without_its_header(tokenizer: Any):
    row = Row(messages=(Message(role="assistant", content="hello"), Message(role="user", content="hi")))
    assert scored(tokenizer, one(tokenizer, row)) == "hello<|im_end|>"


def test_choices_are_encoded_as_responses_are(tokenizer: Any):
    row = Row(prompt="is it?", choices=("yes", "no no"), label=1)
    both = encode(Task("t", (row,)), tokenizer, max_tokens=1)  # choices are never cut: they could not be ranked
    for candidate, (encoded, choice) in enumerate(zip(both, ("yes", "no no"), strict=True)):
        expected = one(tokenizer, Row(prompt="is it?", response=choice))
        assert encoded.inputs == expected.inputs
        assert encoded.targets == expected.targets
        assert (encoded.row, encoded.candidate, encoded.dropped) == (0, candidate, 0)
    asked = Row(messages=(Message(role="user", content="is it?"),), choices=("yes", "no no"), label=1)
    assert encode(Task("t", (asked,)), tokenizer) == both


def test_unlabelled_rows_compare_every_position(tokenizer: Any):
    encoded = one(tokenizer, Row(prompt="is it?"))
    text = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nis it?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(list(encoded.inputs)) == text
    assert encoded.positions == tuple(range(len(encoded.inputs)))
    assert encoded.targets == ()
    assert one(tokenizer, Row(prompt="is it?"), max_tokens=5).positions == (0, 1, 2, 3, 4)
    assert one(tokenizer, Row(messages=(Message(role="user", content="is it?"),))) == encoded


def test_limits_cut_the_end_and_count_what_they_cut(tokenizer: Any):
    row = Row(prompt="p", response="x" * 50)
    whole = one(tokenizer, row)
    assert whole.dropped == 0
    cut = one(tokenizer, row, max_tokens=7)
    assert cut.targets == whole.targets[:7]
    assert cut.inputs == whole.inputs[: whole.positions[6] + 1]
    assert cut.dropped == len(whole.targets) - 7
    short = one(tokenizer, row, context=len(whole.inputs) - 3)
    assert len(short.inputs) == len(whole.inputs) - 3
    assert short.dropped == 3
    with pytest.raises(InputError, match=r"task t, row 1: nothing to score within the model's context of 4 tokens"):
        one(tokenizer, row, context=4)
    with pytest.raises(InputError, match="choice 0 exceeds the model's context"):
        encode(Task("t", (Row(prompt="p", choices=("x" * 90, "y"), label=0),)), tokenizer, context=60)


def test_max_examples_takes_the_first_rows(tokenizer: Any):
    task = Task("t", tuple(Row(prompt=str(i), response="a") for i in range(5)))
    assert encode(task, tokenizer, max_examples=2) == encode(task, tokenizer)[:2]


def test_a_template_that_opens_generation_with_more_than_a_finished_turn_holds():
    thinking = make_tokenizer(CHAT.replace("assistant\n'", "assistant\n<think>\n'"))
    encoded = one(thinking, Row(prompt="hi", response="yes"))
    assert scored(thinking, encoded) == "yes<|im_end|>"


def test_templates_that_trim_or_write_no_end_token():
    trimming = make_tokenizer(CHAT.replace("m['content']", "m['content'] | trim"))
    assert scored(trimming, one(trimming, Row(prompt="hi", response=" yes "))) == "yes<|im_end|>"
    bare = make_tokenizer(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert scored(bare, one(bare, Row(prompt="hi", response="yes"))) == "yes\n"


def test_what_a_template_cannot_do_is_an_error_that_names_the_row(plain_tokenizer: Any):
    rewriting = make_tokenizer("{{ messages | length }}" + CHAT)
    refusing = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    two = Row(messages=(Message(role="user", content="a"), Message(role="assistant", content="b")) * 2)
    for tokenizer, row, said in (
        (rewriting, two, "rewrites earlier turns"),
        (refusing, two, r"refuses turns user, assistant.*roles must alternate"),
        (plain_tokenizer, two, "this tokenizer has none"),
        (plain_tokenizer, Row(prompt="a", image="x.png"), "image"),
    ):
        with pytest.raises(InputError, match=rf"task t, row 1: .*{said}"):
            one(tokenizer, row)


def test_a_text_of_one_token_has_nothing_to_score(tokenizer: Any):
    with pytest.raises(InputError, match="nothing to score; change"):
        one(tokenizer, Row(text="a"))


def test_encoder_decoder(plain_tokenizer: Any):
    encoded = one(plain_tokenizer, Row(prompt="the cat", response="yes"), decoder_start=7)
    assert encoded.source == tuple(plain_tokenizer("the cat").input_ids)
    assert encoded.targets == tuple(plain_tokenizer("yes").input_ids)
    assert encoded.inputs == (7, *encoded.targets[:-1])
    assert encoded.positions == tuple(range(len(encoded.targets)))
    unlabelled = one(plain_tokenizer, Row(prompt="the cat"), decoder_start=7)
    assert (unlabelled.inputs, unlabelled.positions, unlabelled.targets) == ((7,), (0,), ())
    with pytest.raises(InputError, match="needs prompt"):
        one(plain_tokenizer, Row(text="the cat"), decoder_start=7)
    with pytest.raises(InputError, match=r"tokens exceed the model's 2"):
        one(plain_tokenizer, Row(prompt="the cat", response="yes"), decoder_start=7, context=2)
