"""Texts to vectors."""

import json
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_llama, make_t5, make_tokenizer, shake
from torch import Tensor

from consilience.errors import InputError
from consilience.routing.instructions.embed import (
    Embedder,
    EmbedderSettings,
    Encoder,
    Standardised,
    base_states,
    load_embedder,
    make_embedder,
    mean_states,
    remembered,
)
from consilience.routing.instructions.tfidf import TfIdf, terms
from consilience.routing.unit import unit

TEXTS = ["the cat sat on the mat", "is the sentiment positive or negative?", "def f(x): return x + 1", "yes"]
WORDS = st.lists(st.sampled_from(["a", "b", "C", "ß", "1", "x-y", "  ", "\n"]), max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("modal", "embedder: kind: 'modal' is not one of base, model, tfidf; did you mean 'model'?"),
        ({"kind": "model"}, "embedder: model: is missing"),
        ({"kind": "tfidf", "model": "x"}, "embedder: model: belongs to kind: model, not to tfidf"),
        ({"kind": "base", "tokens": 2}, "embedder: tokens: 2 must be a whole number of at least 8"),
        ({"kind": "tfidf", "words": 0.5}, "embedder: words: 0.5 must be a whole number"),
        ({"words": 1, "world": 2}, "embedder: unknown key 'world'; did you mean 'words'?"),
    ],
)
def test_wrong_settings_are_named(value: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        EmbedderSettings.from_plain(value, "embedder")
    assert str(caught.value).startswith(said)


def test_settings_are_plain_values_and_back() -> None:
    found = EmbedderSettings.from_plain({"kind": "tfidf", "words": 7}, "embedder")
    assert EmbedderSettings.from_plain(found.to_dict(), "embedder") == found


# ------------------------------------------------------------------------------------------------------------- tfidf


def by_hand(groups: Sequence[Sequence[str]], text: str) -> dict[str, float]:
    """The same weights, counted by loops over split strings."""

    def split(one: str) -> list[str]:
        words = "".join(c if c.isalnum() else " " for c in one.casefold()).split()
        return words + [" ".join(words[i : i + 2]) for i in range(len(words) - 1)]

    documents = [{term for one in group for term in split(one)} for group in groups]
    weights: dict[str, float] = {}
    for term in split(text):
        df = sum(term in document for document in documents)
        if df:
            count = split(text).count(term)
            weights[term] = (1 + math.log(count)) * (math.log((1 + len(groups)) / (1 + df)) + 1)
    length = math.sqrt(sum(w * w for w in weights.values()))
    return {term: w / length for term, w in weights.items()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=4), WORDS)
def test_words_weigh_as_counted_by_hand(groups: list[list[str]], text: str) -> None:
    embedder = TfIdf(1000).fitted(groups)
    vector = embedder([text])[0]
    expected = by_hand(groups, text)
    found = {embedder.vocabulary[i]: float(vector[i]) for i in vector.nonzero().flatten().tolist()}
    assert found == pytest.approx(expected, rel=1e-5)
    assert float(vector.norm()) == pytest.approx(1.0 if expected else 0.0, abs=1e-5)


def test_words_without_meaning_here_say_nothing() -> None:
    embedder = TfIdf(100).fitted([["sort the numbers"], ["rhyme the words"]])
    vectors = embedder(["", "?!", "unknown entirely", "sort", "Sort unknown"])
    assert not bool(vectors[:3].any())
    assert torch.equal(vectors[3], vectors[4])
    assert float(vectors[3] @ embedder(["sort the numbers"])[0]) > 0


def test_the_most_shared_then_the_most_frequent_terms_are_kept() -> None:
    embedder = TfIdf(2).fitted([["b", "a"], ["a", "c", "c"]])
    assert embedder.vocabulary == ("a", "c")
    assert set(terms("a a b")) == {"a", "b", "a a", "a b"}


def test_letters_count_whatever_their_case_and_form() -> None:
    embedder = TfIdf(100).fitted([["straße ﬁne", "other"]])
    one, other = embedder(["STRASSE FINE", "straße ﬁne"])
    assert torch.equal(one, other)
    assert bool(one.any())


def test_the_order_of_groups_changes_no_cosine() -> None:
    groups = [[TEXTS[0]], [TEXTS[1]], [TEXTS[2]]]
    one, other = TfIdf(1000).fitted(groups)(TEXTS), TfIdf(1000).fitted(groups[::-1])(TEXTS)
    assert torch.allclose(one @ one.t(), other @ other.t(), atol=1e-6)


# ------------------------------------------------------------------------------------------------- states of a model


def mean_by_hand(model: Any, ids: list[int], skipped: int = 0) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return out.hidden_states[-1][0, skipped:].mean(0)


def test_a_text_is_the_mean_of_its_tokens_last_states() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    found = base_states(model, tokenizer, nullcontext, 64)(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        assert torch.allclose(vector, mean_by_hand(model, tokenizer(text).input_ids), atol=1e-5)


def test_special_tokens_are_read_but_not_counted() -> None:
    model, tokenizer = make_llama(), make_tokenizer(None, bos=True)
    ids = tokenizer(TEXTS[0]).input_ids
    assert ids[0] == 3
    [found] = base_states(model, tokenizer, nullcontext, 64)(TEXTS[:1])
    assert torch.allclose(found, mean_by_hand(model, ids, 1), atol=1e-5)


def test_texts_are_cut_at_the_limit() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    states = base_states(model, tokenizer, nullcontext, 8)
    text = TEXTS[1] * 5
    assert torch.allclose(states([text])[0], mean_by_hand(model, tokenizer(text).input_ids[:8]), atol=1e-5)


def test_the_models_own_limit_counts_too() -> None:
    model, tokenizer = make_llama(max_position_embeddings=16), make_tokenizer()
    text = TEXTS[1] * 9
    found = base_states(model, tokenizer, nullcontext, 10**6)([text])[0]
    assert torch.allclose(found, mean_by_hand(model, tokenizer(text).input_ids[:16]), atol=1e-5)


def test_batches_give_what_single_texts_give() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    alone, together = (
        mean_states(model.base_model, tokenizer, [*TEXTS, ""], 64, special=False, batch=batch) for batch in (1, 3)
    )
    assert torch.allclose(alone, together, atol=1e-5)
    assert not bool(alone[-1].any())


def test_an_encoder_decoder_is_read_by_its_encoder() -> None:
    model, tokenizer = make_t5(), make_tokenizer()
    [found] = base_states(model, tokenizer, nullcontext, 64)(TEXTS[:1])
    with torch.no_grad():
        states = model.encoder(input_ids=torch.tensor([tokenizer(TEXTS[0]).input_ids])).last_hidden_state[0]
    assert torch.allclose(found, states.mean(0), atol=1e-5)


def test_the_base_is_read_with_its_experts_off_and_left_as_it_was() -> None:
    model, tokenizer = make_llama().train(), make_tokenizer()
    seen: list[tuple[bool, bool]] = []
    state = {"off": False}

    @contextmanager
    def plain() -> Generator[None]:
        state["off"] = True
        yield
        state["off"] = False

    model.base_model.register_forward_pre_hook(lambda module, _: seen.append((state["off"], module.training)))
    base_states(model, tokenizer, plain, 64)(TEXTS)
    assert seen == [(True, False)] * len(TEXTS)
    assert model.base_model.training
    assert not state["off"]


# ------------------------------------------------------------------------------------------------------ standardised


def pretend(width: int = 6) -> Any:
    """States that are made of a text's letters: nearly collinear, with one dimension that is far larger."""

    def states(texts: Sequence[str]) -> Tensor:
        rows: list[Tensor] = []
        for text in texts:
            generator = torch.Generator().manual_seed(sum(map(ord, text)))
            row = 5 + torch.randn(width, generator=generator)
            row[0] *= 100
            rows.append(row if text else torch.zeros(width))
        return torch.stack(rows)

    return states


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.text("abcdefgh", min_size=1), min_size=1, max_size=4), min_size=2, max_size=4))
def test_standardising_centres_all_experts_alike_and_evens_dimensions_out(groups: list[list[str]]) -> None:
    states = pretend()
    fitted = Standardised(states).fitted(groups)
    assert fitted.centre is not None
    assert fitted.deviation is not None
    rows = [(states(group) - fitted.centre) / fitted.deviation for group in groups]
    mean = torch.stack([row.mean(0) for row in rows]).mean(0)
    square = torch.stack([row.square().mean(0) for row in rows]).mean(0)
    assert torch.allclose(mean, torch.zeros(6), atol=1e-4)
    assert bool((square <= 1 + 1e-3).all())
    if len({sum(map(ord, text)) for group in groups for text in group}) > 1:
        # At least half of the dimensions lie above the floor, which is half of the median.
        assert int((square > 1 - 1e-3).sum()) >= 3


def test_raw_states_are_nearly_collinear_and_standardised_ones_are_not() -> None:
    words = ["sort", "rhyme", "add", "spell"]
    raw = unit(pretend()(words))
    fitted = Standardised(pretend()).fitted([[word] for word in words])(words)
    others = ~torch.eye(4, dtype=torch.bool)
    assert float((raw @ raw.t())[others].min()) > 0.9
    assert float((fitted @ fitted.t())[others].max()) < 0.6
    assert torch.allclose((fitted * fitted).sum(-1), torch.ones(4), atol=1e-5)


def test_a_text_without_tokens_is_zero() -> None:
    assert not bool(Standardised(pretend()).fitted([["a"], ["b"]])([""]).any())


def test_a_single_text_is_left_as_it_is() -> None:
    [vector] = Standardised(pretend()).fitted([["only"]])(["only"])
    assert torch.allclose(vector, unit(pretend()(["only"]))[0])


def test_equal_texts_of_all_experts_have_no_deviation() -> None:
    assert not bool(Standardised(pretend()).fitted([["same"], ["same"]])(["same"]).any())


# ------------------------------------------------------------------------------------------------------------ encoder


def make_bert(folder: Path) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=310,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    model = shake(BertModel(config), 0)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def test_an_encoders_folder_is_loaded_on_first_use(tmp_path: Path) -> None:
    model = make_bert(tmp_path)
    embedder = make_embedder(EmbedderSettings("model", str(tmp_path)), None, None, nullcontext)
    long = TEXTS[0] * 20
    found = embedder([*TEXTS, long])
    for text, vector in zip([*TEXTS, long], found, strict=True):
        ids = torch.tensor([make_tokenizer()(text).input_ids[:40]])
        with torch.no_grad():
            expected = model(input_ids=ids).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, expected / expected.norm(), atol=1e-5)


def test_folders_that_are_no_such_encoder_are_refused(tmp_path: Path) -> None:
    given = EmbedderSettings("model", str(tmp_path))
    with pytest.raises(InputError, match=r"holds no config\.json"):
        make_embedder(given, None, None, nullcontext)
    make_bert(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    with pytest.raises(InputError, match="pools by pooling_mode_cls_token"):
        make_embedder(given, None, None, nullcontext)
    pooling.write_text(json.dumps({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}))
    make_embedder(given, None, None, nullcontext)
    (tmp_path / "2_Dense").mkdir()
    with pytest.raises(InputError, match="2_Dense: a layer on top"):
        make_embedder(given, None, None, nullcontext)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_bert(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    embedder = make_embedder(EmbedderSettings("model", str(tmp_path)), None, None, nullcontext)
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.weight' is missing"):
        embedder(["a"])


def test_a_missing_base_is_named() -> None:
    with pytest.raises(InputError, match="embedder: base needs the base"):
        make_embedder(EmbedderSettings(), None, None, nullcontext)


# ------------------------------------------------------------------------------------------------------- all of them


def embedders(folder: Path) -> list[tuple[Embedder, Embedder]]:
    """Embedders that are not fitted, and fitted."""
    make_bert(folder)
    model, tokenizer = make_llama(), make_tokenizer()
    kinds = [EmbedderSettings("base"), EmbedderSettings("model", str(folder)), EmbedderSettings("tfidf")]
    made = [make_embedder(kind, model, tokenizer, nullcontext) for kind in kinds]
    return [(one, one.fitted([[text] for text in TEXTS])) for one in made]


def test_equal_texts_have_cosine_one_and_are_nearest_to_themselves(tmp_path: Path) -> None:
    for _, fitted in embedders(tmp_path):
        own, queries = fitted(TEXTS), fitted(TEXTS[::-1]).flip(0)
        cosines = queries @ own.t()
        assert own.dtype == torch.float32
        assert torch.allclose(cosines.diagonal(), torch.ones(4), atol=1e-5)
        assert torch.equal(cosines.argmax(-1), torch.arange(4))
        assert float(cosines.abs().max()) <= 1 + 1e-5


def test_what_is_fitted_is_stored(tmp_path: Path) -> None:
    for made, fitted in embedders(tmp_path):
        value = json.loads(json.dumps(fitted.to_dict()))
        again = load_embedder(made, value, fitted.tensors(), fitted(TEXTS).shape[1], "x")
        assert torch.equal(again(TEXTS), fitted(TEXTS))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    (base, _), (encoder, _), (tfidf, fitted) = embedders(tmp_path)
    width = len(fitted.tensors()["idf"])
    with pytest.raises(InputError, match="'idf' is missing or not of 9 numbers"):
        load_embedder(tfidf, fitted.to_dict(), fitted.tensors(), 9, "x")
    with pytest.raises(InputError, match=f"the vocabulary is missing or has not {width} words"):
        load_embedder(tfidf, {"vocabulary": ["a"]}, fitted.tensors(), width, "x")
    with pytest.raises(InputError, match="'centre' is missing"):
        load_embedder(base, {}, {}, 32, "x")
    with pytest.raises(InputError, match="'deviation' is not positive"):
        load_embedder(base, {}, {"centre": torch.zeros(2), "deviation": torch.zeros(2)}, 2, "x")
    assert load_embedder(encoder, {}, {}, 32, "x") is encoder


def test_no_text_is_run_twice_while_building() -> None:
    ran: list[str] = []

    def states(texts: Sequence[str]) -> Tensor:
        ran.extend(texts)
        return pretend()(texts)

    again = remembered(states)
    assert torch.equal(again(["a", "b", "a"]), pretend()(["a", "b", "a"]))
    assert torch.equal(again(["b", "c"]), pretend()(["b", "c"]))
    assert ran == ["a", "b", "c"]
    for kind in (Encoder, Standardised):
        ran.clear()
        embedder = kind(states).remembering()
        for groups in ([["a"], ["b"]], [["a"], ["c"]]):
            embedder.fitted(groups)(["a", "d"])
        assert sorted(ran) == (["a", "d"] if kind is Encoder else ["a", "b", "c", "d"])


def test_unit_vectors_have_length_one_or_zero() -> None:
    found = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1e-20, 0.0]]))
    assert torch.allclose(found, torch.tensor([[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]]))
