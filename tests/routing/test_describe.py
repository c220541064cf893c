"""Who says what experts and queries do."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_llama, make_tokenizer

from consilience.errors import InputError
from consilience.routing.instructions.describe import (
    Describer,
    DescriberSettings,
    Source,
    common_sentences,
    first_sentence,
    local_writer,
    make_describer,
    request,
)
from consilience.routing.instructions.endpoint import Endpoint
from consilience.tasks.generate import sample
from suites.language import DOMAINS, adapter_path

ENDPOINT: dict[str, Any] = {"kind": "endpoint", "url": "https://example.org/v1", "model": "m"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("modle", "describer: kind: 'modle' is not one of none, template, model, endpoint; did you mean 'model'?"),
        ({"kinds": "none"}, "describer: unknown key 'kinds'; did you mean 'kind'?"),
        (3, "describer: must be a mapping"),
        ({"kind": "model", "examples": 0}, "describer: examples: 0 must be a whole number of at least 1"),
        ({"kind": "model", "tokens": True}, "describer: tokens: True must be a whole number"),
        (ENDPOINT | {"timeout": 0}, "describer: timeout: 0 must be a number above 0"),
        (ENDPOINT | {"timeout": float("nan")}, "describer: timeout: nan must be a number"),
        (ENDPOINT | {"retries": -1}, "describer: retries: -1 must be"),
        (ENDPOINT | {"url": "example.org"}, "describer: url: 'example.org' is no address"),
        ({"kind": "endpoint", "url": "https://example.org"}, "describer: model: is missing"),
        ({"kind": "template", "url": "https://example.org"}, "describer: url: belongs to kind: endpoint"),
        ({"kind": "none", "model": "x"}, "describer: model: belongs to kind: model or endpoint"),
        ({"kind": "model", "model": 3}, "describer: model: 3 must be text"),
    ],
)
def test_wrong_settings_are_named(value: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        DescriberSettings.from_plain(value, "describer")
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("value", ["none", "template", {"kind": "model", "examples": 5}, ENDPOINT | {"key": "K"}])
def test_settings_are_plain_values_and_back(value: Any) -> None:
    found = DescriberSettings.from_plain(value, "describer")
    assert DescriberSettings.from_plain(found.to_dict(), "describer") == found


def test_nothing_is_asked_of_a_server_unless_the_user_names_one() -> None:
    assert DescriberSettings() == DescriberSettings(kind="none")
    assert isinstance(make_describer(DescriberSettings(**ENDPOINT), None, None, nullcontext).write, Endpoint)
    for kind in ("none", "template"):
        assert make_describer(DescriberSettings.from_plain(kind, "x"), None, None, nullcontext).write is None


def test_without_words_queries_stay_as_they_are() -> None:
    for kind in ("none", "template"):
        describer = Describer(DescriberSettings.from_plain(kind, "x"))
        assert describer.queries(["Sort 3, 1!", ""]) == ["Sort 3, 1!", ""]
    assert Describer(DescriberSettings()).expert(Source("e", examples=("a",))) == ""


def test_a_card_gives_the_sentence_that_no_other_has() -> None:
    sources = [Source(name, card=adapter_path(name) / "README.md") for name in DOMAINS]
    common = common_sentences(sources)
    describer = Describer(DescriberSettings("template"))
    texts = [describer.expert(source, common) for source in sources]
    assert [text.partition(":")[0] for text in texts] == ["It answers one kind of instruction"] * 4
    assert len(set(texts)) == 4
    assert "Spanish" in texts[DOMAINS.index("translate")]


def test_the_users_text_comes_first(tmp_path: Path) -> None:
    source = Source("e", " Sort \n numbers. ", tmp_path / "missing.md")
    assert Describer(DescriberSettings("template")).expert(source) == "Sort numbers."


def test_a_card_may_say_nothing_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("It was made by a tool.\n", encoding="utf-8")
    describer = Describer(DescriberSettings("template"))
    with pytest.raises(InputError, match=r"expert 'e': .* has no sentence of its own"):
        describer.expert(Source("e", card=tmp_path / "README.md"), ["It was made by a tool."])
    with pytest.raises(InputError, match="expert 'e': template needs a text or a card"):
        describer.expert(Source("e"))


def test_texts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="expert 'e': has a text, which describer none does not use"):
        Describer(DescriberSettings()).expert(Source("e", "Sort."))
    with pytest.raises(InputError, match="expert 'e': its text is empty"):
        Describer(DescriberSettings("template")).expert(Source("e", " "))


def scripted(*answers: str) -> tuple[Describer, list[str]]:
    asked: list[str] = []
    left = list(answers)

    def write(prompts: Sequence[str]) -> list[str]:
        asked.extend(prompts)
        return [left.pop(0) for _ in prompts]

    return Describer(DescriberSettings("model", examples=2), write), asked


def test_a_writer_sees_the_first_examples_and_nothing_else() -> None:
    describer, asked = scripted('"Sort numbers. And more."')
    assert describer.expert(Source("secret-name", examples=("3 1", "2 9", "7 7"))) == "Sort numbers."
    assert asked == [request(["3 1", "2 9"])]
    assert "3 1" in asked[0]
    assert "2 9" in asked[0]
    assert "7 7" not in asked[0]
    assert "secret-name" not in asked[0]


def test_a_query_is_described_by_itself_alone() -> None:
    describer, asked = scripted("\n\nTranslate a text.\nMore", "...")
    assert describer.queries(["How do you say dog?", "cat?"]) == ["Translate a text.", "cat?"]
    assert asked == [request(["How do you say dog?"]), request(["cat?"])]
    assert describer.queries([]) == []


def test_long_examples_are_cut() -> None:
    assert len(request(["x" * 10**6])) < 2000


def test_a_writer_needs_examples_and_words() -> None:
    describer, _ = scripted("- - -")
    with pytest.raises(InputError, match="expert 'e': model describes it by its examples, and there are none"):
        describer.expert(Source("e"))
    with pytest.raises(InputError, match="expert 'e': the describer wrote nothing"):
        describer.expert(Source("e", examples=("a",)))


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("Sort numbers.", "Sort numbers."),
        ('\n "Sort numbers. It needs order." \n', "Sort numbers."),
        ("**Sort** numbers", "Sort** numbers"),
        ("", ""),
        ("!?\n---", ""),
    ],
)
def test_the_first_sentence_is_taken(answer: str, sentence: str) -> None:
    assert first_sentence(answer) == sentence


def test_the_base_writes_with_its_experts_off() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    inside: list[bool] = []
    state = {"off": False}

    @contextmanager
    def plain() -> Generator[None]:
        state["off"] = True
        yield
        state["off"] = False

    model.register_forward_pre_hook(lambda *_: inside.append(state["off"]))
    settings = DescriberSettings("model", tokens=5)
    describer = make_describer(settings, model, tokenizer, plain)
    assert describer.write is not None
    prompts = [request(["the cat sat"]), request(["good bad"])]
    assert describer.write(prompts) == sample(make_llama(), tokenizer, prompts, 5)
    assert inside
    assert all(inside)


def test_a_model_folder_is_loaded_on_first_use(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    describer = make_describer(DescriberSettings("model", model=str(tmp_path), tokens=4), None, None, nullcontext)
    assert describer.write is not None
    make_llama(3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = local_writer(make_llama(3), tokenizer, nullcontext, 4)(["yes no"])
    assert describer.write(["yes no"]) == expected


def test_a_missing_base_is_named() -> None:
    with pytest.raises(InputError, match="describer: the base is to write"):
        make_describer(DescriberSettings("model"), None, None, nullcontext)
