"""The global router: from experts and queries to cosines."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples_of
from hypothesis import strategies as st
from routed_models import make_experts
from tiny_models import make_llama, make_tokenizer
from torch import Tensor

from consilience.errors import InputError
from consilience.progress import NullProgress
from consilience.routing.instructions.adaptive import Adaptive, fit_adaptive
from consilience.routing.instructions.describe import DescriberSettings
from consilience.routing.instructions.semantics import Instructions, InstructionSettings, Source
from consilience.routing.model import Routing
from consilience.routing.settings import Settings
from consilience.tasks.rows import read_rows
from suites.language import DOMAINS, adapter_path, calibration_path, heldout_path

ADAPTIVE = Settings(scale="adaptive", most_scale=50.0)
WORDS = {
    "sort": ("sort these numbers 3 1 2", "sort the numbers 9 8", "put the numbers 7 5 in order", "sort 4 and 2"),
    "rhyme": ("what rhymes with cat", "find a rhyme for house", "which word rhymes with tree", "rhyme the word blue"),
    "spell": ("spell the word necessary", "how do you spell rhythm", "spell it backwards", "spell necessary aloud"),
}
SOURCES = [Source(name, examples=texts) for name, texts in WORDS.items()]
TEXTS = [Source(name, f"{name} what you are given") for name in WORDS]
TFIDF = InstructionSettings.from_plain({"embedder": "tfidf"}, "x")
TOLD = InstructionSettings.from_plain({"describer": "template", "embedder": "tfidf"}, "x")


def prompts(path: Path) -> list[str]:
    return [row.prompt for row in read_rows(path) if row.prompt]


@pytest.fixture(scope="module")
def real() -> Instructions:
    """The suite's experts, by their calibration prompts."""
    sources = [Source(name, examples=tuple(prompts(calibration_path(name)))) for name in DOMAINS]
    return Instructions.build(TFIDF, sources)


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"descriptor": "none"}, "instructions: unknown key 'descriptor'; did you mean 'describer'?"),
        ({"describer": "nobody"}, "instructions: describer: kind: 'nobody' is not one of"),
        ({"embedder": {"kind": "tfidf", "size": 3}}, "instructions: embedder: unknown key 'size'"),
        ({"held_in": -1}, "instructions: held_in: -1 must be"),
        ({"cache": 0}, "instructions: cache: 0 must be"),
        ([], "instructions: must be a mapping"),
    ],
)
def test_wrong_settings_are_named(value: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        InstructionSettings.from_plain(value, "instructions")
    assert str(caught.value).startswith(said)


def test_settings_are_plain_values_and_back() -> None:
    value = {"describer": {"kind": "model", "model": "a"}, "embedder": {"kind": "model", "model": "/b"}, "held_in": 3}
    found = InstructionSettings.from_plain(value, "x")
    assert InstructionSettings.from_plain(json.loads(json.dumps(found.to_dict())), "x") == found
    located = found.located(Path("/root"))
    assert (located.describer.model, located.embedder.model) == ("/root/a", "/b")
    assert TFIDF.located(Path("/root")) == TFIDF


# -------------------------------------------------------------------------------------------------------- similarities


def test_the_same_description_has_cosine_one_and_rank_one() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    for kind in ("tfidf", "base"):
        settings = InstructionSettings.from_plain({"describer": "template", "embedder": kind}, "x")
        found = Instructions.build(settings, TEXTS, model, tokenizer)
        cosines = found([one.text for one in found.instructions], Settings()).cosines
        assert torch.allclose(cosines.diagonal(), torch.ones(3), atol=1e-5)
        assert torch.equal(cosines.argmax(-1), torch.arange(3))
        assert float(cosines.abs().max()) <= 1


@examples_of(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_cosines_are_cosines_whatever_is_asked(real: Instructions, queries: list[str]) -> None:
    found = real(queries, ADAPTIVE)
    assert found.cosines.shape == (len(queries), 4)
    assert bool((found.cosines.abs() <= 1).all())
    assert bool(((found.scale >= 0) & (found.scale <= 50)).all())


def test_without_words_an_expert_is_the_mean_of_its_examples() -> None:
    built = Instructions.build(TFIDF, SOURCES)
    for source, instruction in zip(SOURCES, built.instructions, strict=True):
        mean = torch.stack([one.embedding for one in built.asked(source.examples)]).mean(0)
        assert torch.allclose(instruction.embedding, mean / mean.norm(), atol=1e-6)
        assert instruction.text == ""
    assert built.names == tuple(WORDS)


def test_words_that_are_not_known_favour_nobody() -> None:
    assert not bool(Instructions.build(TFIDF, SOURCES)(["zebra"], Settings()).cosines.any())


def test_held_out_prompts_find_their_expert(real: Instructions) -> None:
    for number, name in enumerate(DOMAINS):
        cosines = real(prompts(heldout_path(name, "validation")), Settings()).cosines
        assert float((cosines.argmax(-1) == number).float().mean()) > 0.98


# ------------------------------------------------------------------------------------------------------ adaptive scale


def test_held_in_prompts_get_the_most_and_far_ones_little(real: Instructions) -> None:
    far = [
        "Plan a trip to Rome for two days.",
        "Who won the football match in 1998?",
        "My car does not start. What should I do?",
        "Which planet is nearest to the sun?",
        "Zxqv wpoi!",
    ]
    assert float(real(far, ADAPTIVE).scale.max()) < 0.2 * 50
    held_in = [query for name in DOMAINS for query in prompts(heldout_path(name, "validation"))]
    assert float((real(held_in, ADAPTIVE).scale > 0.8 * 50).float().mean()) > 0.95
    assert real.adaptive is not None
    assert real.adaptive.wrong_inside < 0.1
    assert real.adaptive.wrong_outside < 0.1


def test_experts_are_left_out_as_if_they_had_never_been_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cosines that the scale is fitted on, found by building without an expert, or without an example."""
    fitted: list[tuple[Tensor, Tensor]] = []

    def recording(inside: Tensor, outside: Tensor) -> Adaptive:
        fitted.append((inside, outside))
        return fit_adaptive(inside, outside)

    monkeypatch.setattr("consilience.routing.instructions.held_in.fit_adaptive", recording)
    whole = Instructions.build(replace(TFIDF, held_in=3), SOURCES)
    [(inside, outside)] = fitted
    expected: list[Tensor] = []
    missing: list[Tensor] = []
    for k, source in enumerate(SOURCES):
        rest = Instructions.build(TFIDF, SOURCES[:k] + SOURCES[k + 1 :])
        missing.append(rest(source.examples[:3], Settings()).cosines.amax(-1))
        vectors = torch.stack([one.embedding for one in whole.asked(source.examples)])
        for i in range(3):
            mean = torch.cat([vectors[:i], vectors[i + 1 :]]).mean(0)
            expected.append(vectors[i] @ mean / mean.norm())
    assert torch.allclose(inside, torch.stack(expected), atol=1e-5)
    assert torch.allclose(outside, torch.cat(missing), atol=1e-5)


def test_a_number_is_the_scale_of_all_queries() -> None:
    assert Instructions.build(TFIDF, SOURCES)(["a", "b"], Settings(scale=7.0)).scale.tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    ("settings", "sources"),
    [(TFIDF, SOURCES[:1]), (replace(TFIDF, held_in=0), SOURCES), (TOLD, TEXTS)],
    ids=["one expert", "no held-in examples", "no examples"],
)
def test_adaptive_needs_experts_with_examples(settings: InstructionSettings, sources: list[Source]) -> None:
    built = Instructions.build(settings, sources)
    assert built.adaptive is None
    with pytest.raises(InputError, match="scale: adaptive was not fitted"):
        built(["sort"], ADAPTIVE)


# --------------------------------------------------------------------------------------------------- cache and latency


def test_a_query_is_embedded_once() -> None:
    built = Instructions.build(TFIDF, SOURCES)
    first = built.asked(["sort 1", "rhyme cat", "sort 1"])
    again = built.asked(["rhyme cat", "sort 1"])
    assert again[0].embedding is first[1].embedding
    assert again[1].embedding is first[0].embedding is first[2].embedding
    assert (built.latency.count, built.latency.cached) == (5, 3)
    assert built.latency.embedding > 0
    assert built.latency.seconds == (built.latency.describing + built.latency.embedding) / 2


def test_the_least_recently_asked_is_forgotten() -> None:
    built = Instructions.build(replace(TFIDF, cache=2), SOURCES)
    one = built.asked(["1"])[0]
    built.asked(["2"])
    assert built.asked(["1"])[0] is one
    built.asked(["3"])
    assert built.asked(["1"])[0] is one
    assert built.latency.cached == 2
    built.asked(["2"])
    assert built.latency.cached == 2
    assert len(built.asked([str(n) for n in range(9)])) == 9


# --------------------------------------------------------------------------------------------- experts that come and go


@pytest.mark.parametrize("kind", ["tfidf", "base"])
def test_others_stay_the_same_bits_when_experts_come_and_go(kind: str) -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    built = Instructions.build(InstructionSettings.from_plain({"embedder": kind}, "x"), SOURCES[:2], model, tokenizer)
    before = [one.embedding.clone() for one in built.instructions]
    query = built(["sort the words"], Settings()).cosines
    built.add(replace(SOURCES[2], examples=("sort the words that you spell",)))
    assert built.names == tuple(WORDS)
    assert all(torch.equal(a, b.embedding) for a, b in zip(before, built.instructions, strict=False))
    after = built(["sort the words", "sort the words that you spell"], Settings()).cosines
    assert torch.equal(after[:1, :2], query)
    assert float(after[1, 2]) == pytest.approx(1.0, abs=1e-5)
    built.remove("sort")
    assert built.names == ("rhyme", "spell")
    assert torch.equal(built.instructions[0].embedding, before[1])
    assert torch.equal(built(["sort the words"], Settings()).cosines, after[:1, 1:])


def test_a_card_that_comes_later_gives_what_no_other_has(tmp_path: Path) -> None:
    sources = [Source(name, card=adapter_path(name) / "README.md") for name in DOMAINS]
    built = Instructions.build(TOLD, sources[:3])
    stored = Instructions.load(built.to_dict(), built.tensors())
    stored.add(sources[3])
    assert stored.instructions[3].text.startswith("It answers one kind of instruction: positive or negative")


def test_wrong_comings_and_goings_are_refused() -> None:
    built = Instructions.build(TFIDF, SOURCES[:2])
    with pytest.raises(InputError, match="expert 'sort': there is one of that name already"):
        built.add(SOURCES[0])
    with pytest.raises(InputError, match="expert 'new': the embedder knows nothing of what is said of it"):
        built.add(Source("new", examples=("zebra",)))
    with pytest.raises(InputError, match="expert 'sirt': there is none; did you mean 'sort'"):
        built.remove("sirt")
    built.remove("sort")
    with pytest.raises(InputError, match="expert 'rhyme': is the only one"):
        built.remove("rhyme")
    assert built.names == ("rhyme",)


def test_wrong_sources_are_refused() -> None:
    with pytest.raises(InputError, match="there are no experts"):
        Instructions.build(TFIDF, [])
    with pytest.raises(InputError, match="'sort' is named twice"):
        Instructions.build(TFIDF, [SOURCES[0], SOURCES[0]])
    with pytest.raises(InputError, match="expert 'e': has no examples, which describer none embeds"):
        Instructions.build(TFIDF, [Source("e")])
    with pytest.raises(InputError, match="expert 'e': the embedder knows nothing"):
        Instructions.build(TFIDF, [SOURCES[0], Source("e", examples=("?!",))])


# -------------------------------------------------------------------------------------------- stored, looked up, routed


@pytest.mark.parametrize("kind", ["tfidf", "base"])
def test_instructions_are_stored(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    model, tokenizer = make_llama(), make_tokenizer()
    built = Instructions.build(InstructionSettings.from_plain({"embedder": kind}, "x"), SOURCES, model, tokenizer)
    save_file(built.tensors(), tmp_path / "t.safetensors")
    value = json.loads(json.dumps(built.to_dict(), allow_nan=False))
    again = Instructions.load(value, load_file(tmp_path / "t.safetensors"), model, tokenizer)
    assert (again.settings, again.names, again.adaptive) == (built.settings, built.names, built.adaptive)
    queries = ["sort the words", "something else"]
    one, other = built(queries, ADAPTIVE), again(queries, ADAPTIVE)
    assert torch.equal(one.cosines, other.cosines)
    assert torch.equal(one.scale, other.scale)


def damaged(value: dict[str, Any], key: str, change: Any) -> dict[str, Any]:
    return {name: one for name, one in {**value, key: change}.items() if one is not ...}


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("adaptive", ..., "must have settings"),
        ("experts", {}, "experts is not what it should be"),
        ("experts", ["sort"], "experts are not each a name and a text"),
        ("experts", [{"name": "sort", "text": ""}] * 3, "experts are not each a name and a text"),
        ("experts", [{"name": "sort", "text": ""}], "vectors are missing or too many or few"),
        ("adaptive", {"width": 1}, "adaptive must have"),
        ("settings", {"kind": 1}, "settings: unknown key 'kind'"),
        ("common", [1], "experts are not each a name and a text"),
    ],
)
def test_what_is_damaged_is_refused(key: str, change: Any, said: str) -> None:
    built = Instructions.build(TFIDF, SOURCES)
    with pytest.raises(InputError, match=said):
        Instructions.load(damaged(built.to_dict(), key, change), built.tensors())


def test_a_stored_endpoint_gets_no_query_unless_allowed() -> None:
    describer = DescriberSettings("endpoint", model="m", url="http://127.0.0.1:9/v1", retries=0)
    built = Instructions.build(TOLD, TEXTS)
    value = built.to_dict() | {"settings": replace(TOLD, describer=describer).to_dict()}
    loaded = Instructions.load(value, built.tensors())
    with pytest.raises(InputError, match=r"queries would be sent to http://127\.0\.0\.1:9/v1; allow that"):
        loaded(["sort"], Settings())
    assert Instructions.load(value, built.tensors(), allow_endpoint=True).settings.describer == describer


def test_what_a_writer_says_is_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def local_writer(*_: Any) -> Any:
        def write(texts: Sequence[str]) -> list[str]:
            asked.extend(texts)
            return [next(f"{name} it." for name in WORDS if any(one in text for one in WORDS[name])) for text in texts]

        return write

    monkeypatch.setattr("consilience.routing.instructions.describe.local_writer", local_writer)
    settings = InstructionSettings.from_plain({"describer": {"kind": "model", "examples": 2}, "embedder": "tfidf"}, "x")
    built = Instructions.build(settings, SOURCES, object(), object())
    assert [one.text for one in built.instructions] == ["sort it.", "rhyme it.", "spell it."]
    # Three for the experts, of two examples each, then the two that were not shown, one by one.
    assert len(asked) == 3 + 3 * 2
    assert not any(WORDS["sort"][0] in text for text in asked[3:])
    cosines = built([WORDS["rhyme"][3]], Settings()).cosines[0]
    assert built.asked([WORDS["rhyme"][3]])[0].text == "rhyme it."
    assert cosines[1] == pytest.approx(1.0)
    assert len(asked) == 10


def test_a_lookup_knows_which_task_a_query_is_of() -> None:
    built = Instructions.build(TFIDF, SOURCES)
    found = built.lookup({"t1": "sort the numbers", "t2": "find a rhyme"})
    similarity = found(["t2", "t1", "t2"], Settings(scale=3.0))
    expected = built(["find a rhyme", "sort the numbers", "find a rhyme"], Settings(scale=3.0))
    assert torch.equal(similarity.cosines, expected.cosines)
    assert torch.equal(similarity.scale, expected.scale)
    with pytest.raises(InputError, match="task 't3': has no instruction; add one"):
        found(["t1", "t3"], Settings())


def test_progress_is_told() -> None:
    told: list[tuple[Any, ...]] = []

    class Told(NullProgress):
        def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
            told.append((title, total))

        def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
            told.append((count, text))

    Instructions.build(TFIDF, SOURCES, progress=Told())
    assert told[0] == ("instructions", 6)
    assert [count for count, _ in told[1:]] == [1] * 6
    assert told[1] == (1, "described sort")


def test_a_large_scale_routes_all_tokens_to_the_expert_that_is_described() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    settings = Settings("phatgoose", scale=1e4, top_k=1)
    Routing(model, make_experts(model), settings, tokenizer, Instructions.build(TFIDF, SOURCES))
    ids = tokenizer("which word rhymes with house", return_tensors="pt").input_ids
    seen: list[Tensor] = []
    with model.routing.watched(lambda _, weights: seen.append(weights)), torch.no_grad():
        model(input_ids=ids)
    assert seen
    assert all(bool((weights.argmax(-1) == 1).all()) for weights in seen)
