"""Explanations: what is recorded, what it adds up to, and what a page, a text and an object say of it."""

import base64
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_models import make_experts, routed_llama, routed_t5, write_adapter
from tiny_models import make_llama, make_tokenizer

from consilience.__main__ import run
from consilience.errors import InputError
from consilience.routing import build_routed, load_routed
from consilience.routing.explaining import explain_page
from consilience.routing.explaining.explain import explain
from consilience.routing.explaining.explain_text import columns
from consilience.routing.explaining.explain_tokens import Role, Token, pieces, prompt_tokens
from consilience.routing.explaining.explanation import Explanation, Layer, Part
from consilience.routing.settings import Settings
from consilience.tasks.generate import sample

TOKENIZER = make_tokenizer()
PROMPT = "is the cat good or bad?"


def hooked(model: Any, ids: list[int]) -> dict[str, np.ndarray[Any, Any]]:
    """Weights of every routed layer, by a hook on the layer that works them out again from its input."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    handles: list[Any] = []
    for name, module in model.named_modules():
        if hasattr(module, "experts"):
            stack = module.experts

            def hook(_: Any, args: Any, output: Any, name: str = name, stack: Any = stack) -> None:
                u = args[0][0].double()
                v = stack.into[stack.edges[-1] :].double()
                z = (u @ v.T).abs().numpy()
                w = np.exp(z - z.max(-1, keepdims=True))
                w[w < np.sort(w, -1)[:, [-2]]] = 0
                found[name] = w / w.sum(-1, keepdims=True)

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module")
def llama() -> Any:
    return routed_llama(Settings("arrow"))


@pytest.fixture(scope="module")
def told(llama: Any) -> Explanation:
    return explain(llama, PROMPT, max_new_tokens=6)


def test_weights_and_shares_are_those_of_a_hook_on_every_layer(llama: Any, told: Explanation) -> None:
    (part,) = told.parts
    tokenizer = llama.routing.asked.texts.tokenizer
    asked = llama.routing.asked.texts.encode(PROMPT)
    out = llama.generate(torch.tensor([asked]), do_sample=False, max_new_tokens=6, pad_token_id=0)[0].tolist()
    expected = hooked(llama, out)
    assert {layer.name for layer in part.layers} == set(expected)
    weights = np.stack([expected[layer.name] for layer in part.layers])
    assert part.weights.dtype == np.float32
    assert np.allclose(part.weights, weights, atol=1e-4)
    assert np.allclose(told.shares, weights.mean((0, 1)), atol=1e-4)
    for block in ("0", "1"):
        own = weights[[f".{block}." in layer.name for layer in part.layers]]
        assert np.allclose(told.by_block[f"block {block}"], own.mean((0, 1)), atol=1e-4)
    own = weights[[layer.name.endswith("o_proj") for layer in part.layers]]
    assert np.allclose(told.by_kind["o_proj"], own.mean((0, 1)), atol=1e-4)
    assert np.allclose(told.by_role["answer"], weights[:, len(asked) :].mean((0, 1)), atol=1e-4)
    entropy = -np.where(weights > 0, weights * np.log(np.where(weights > 0, weights, 1)), 0).sum(-1).mean()
    assert told.entropy == pytest.approx(entropy, abs=1e-4)
    assert "".join(token.text for token in part.tokens) == tokenizer.decode(out)


def test_weights_of_a_token_at_a_layer_sum_to_one(told: Explanation) -> None:
    (part,) = told.parts
    assert part.weights.shape == (len(part.layers), len(part.tokens), 3)
    assert (part.weights >= 0).all()
    assert np.allclose(part.weights.sum(-1), 1, atol=2e-6)
    for shares in (told.shares, *told.by_block.values(), *told.by_kind.values(), *told.by_role.values()):
        assert shares.sum() == pytest.approx(1, abs=1e-5)


def test_the_answer_is_what_the_model_generates(llama: Any, told: Explanation) -> None:
    assert told.answer == sample(llama, llama.routing.asked.texts.tokenizer, PROMPT, 6)
    assert not llama.routing.router.watchers


def test_layers_have_blocks_and_kinds(told: Explanation) -> None:
    assert list(told.by_block) == ["block 0", "block 1"]
    assert sorted(told.by_kind) == ["down_proj", "gate_proj", "o_proj", "q_proj", "v_proj"]


def test_roles_tell_the_template_the_prompt_and_the_answer_apart(told: Explanation) -> None:
    (part,) = told.parts
    runs = re.sub(r"(.)\1+", r"\1", "".join(token.role[0] for token in part.tokens))
    assert runs == "tpta"
    assert "".join(token.text for token in part.tokens if token.role == "prompt").strip() == PROMPT
    assert {token.text for token in part.tokens if token.special} <= {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}


def test_a_given_answer_is_explained_instead(llama: Any) -> None:
    found = explain(llama, PROMPT, answer="good or bad 🙂")
    (part,) = found.parts
    assert found.answer == "good or bad 🙂"
    assert "".join(token.text for token in part.tokens if token.role == "answer") == "good or bad 🙂"


@pytest.mark.parametrize("scale", [2.0, "adaptive"])
def test_instructions_are_the_prompts_and_move_the_weights(scale: Any) -> None:
    model = routed_llama(Settings("none", scale=scale, most_scale=5.0, top_k=0))
    found = explain(model, "aab abba", max_new_tokens=3)
    assert found.query == "aab abba"
    assert found.scale == (5.0 if scale == "adaptive" else 2.0)
    assert found.cosines is not None
    assert np.allclose(found.cosines, [4 / 8, 3 / 8, 0])
    expected = np.exp(np.float64(found.scale or 0) * found.cosines)
    assert np.allclose(found.parts[0].weights, expected / expected.sum(), atol=1e-5)


def test_what_is_left_to_the_mean_is_said() -> None:
    settings = Settings("none", scale="adaptive", most_scale=5.0, fallback="mean")
    found = explain(routed_llama(settings), "aab abba", max_new_tokens=3)
    text = found.to_text().replace("\n", " ")
    assert "top 2, and all by their mean" in text
    assert "recognised to 100%, the rest is the experts' mean" in text
    assert explain_page.data(found)["used"] == 3
    assert explain_page.data(replace(found, settings=Settings("none", scale=1.0)))["used"] == 2


def test_a_fitted_threshold_is_told() -> None:
    from consilience.routing.instructions.adaptive import Adaptive

    model = routed_llama(Settings("none", scale="adaptive", most_scale=5.0, fallback="mean"))
    assert explain(model, "aab abba", max_new_tokens=3).threshold is None
    model.routing.asked.semantics.adaptive = Adaptive(0.25, 0.1, 0.0, 0.0, 8)
    found = explain(model, "aab abba", max_new_tokens=3)
    assert found.to_dict()["instructions"]["threshold"] == 0.25
    text = found.to_text().replace("\n", " ")
    assert "its cosine is 0.50, and queries at 0.25 are half recognised." in text


def test_without_instructions_there_are_no_cosines(told: Explanation) -> None:
    assert told.cosines is None
    assert told.scale is None
    assert told.to_dict()["instructions"] is None


@pytest.mark.parametrize("answer", [None, "good", "the cat sat on the mat"])
def test_an_encoder_and_a_decoder_see_a_sequence_each(answer: str | None) -> None:
    model = routed_t5(Settings("arrow"))
    found = explain(model, PROMPT, max_new_tokens=5, answer=answer)
    encoder, decoder = found.parts
    assert (encoder.name, decoder.name) == ("encoder", "decoder")
    assert decoder.tokens[0].role == "template"
    cross = {layer.name for layer in encoder.layers if layer.name.startswith("decoder")}
    assert cross == {f"decoder.block.{b}.layer.1.EncDecAttention.v" for b in (0, 1)}
    assert all(layer.name.startswith("decoder") for layer in decoder.layers)
    assert list(found.by_block) == ["encoder block 0", "encoder block 1", "decoder block 0", "decoder block 1"]
    for part in found.parts:
        assert part.weights.shape == (len(part.layers), len(part.tokens), 3)
        assert np.allclose(part.weights.sum(-1), 1, atol=2e-6)


def test_a_decoder_as_long_as_the_encoder_is_not_mistaken_for_it() -> None:
    model = routed_t5(Settings("arrow"))
    texts = model.routing.asked.texts
    start = model.config.decoder_start_token_id
    prompt, answer = "good bad yes", "good bad yes"
    texts.tokenizer.chat_template = None
    ids = texts.encode(prompt)
    # The start token makes the decoder one longer than the same text: the answer has to lose one.
    shorter = next(answer[:n] for n in range(len(answer), 0, -1) if len(texts.encode(answer[:n])) == len(ids) - 1)
    found = explain(model, prompt, answer=shorter)
    encoder, decoder = found.parts
    assert len(encoder.tokens) == len(decoder.tokens) == len(ids)
    recorded: dict[str, Any] = {}
    with torch.no_grad(), model.routing.watched(lambda name, weights: recorded.__setitem__(name, weights[0].numpy())):
        model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, *texts.encode(shorter)]]))
    for part in found.parts:
        for layer, weights in zip(part.layers, part.weights, strict=True):
            assert np.allclose(weights, recorded[layer.name], atol=1e-5)
    assert len(recorded) == len(encoder.layers) + len(decoder.layers)


def test_layers_that_see_other_tokens_are_left_out_and_shared_ones_counted(llama: Any) -> None:
    router, before = llama.routing.router, explain(llama, PROMPT, answer="good")
    first = before.parts[0].layers[0].name

    def more(_: Any, args: Any, output: Any) -> None:
        router.watch("model.layers.0.some", torch.full((1, 3, 3), 1 / 3))
        router.watch(first, torch.full((1, args[0].shape[1], 3), 1 / 3))

    handle = llama.lm_head.register_forward_hook(more)
    found = explain(llama, PROMPT, answer="good")
    handle.remove()
    assert found.left_out == ("model.layers.0.some",)
    assert "1 layer left out" in found.to_text()
    assert [layer.name for layer in found.parts[0].layers] == [x.name for x in before.parts[0].layers] + [
        f"{first} (2)"
    ]
    assert np.array_equal(found.parts[0].weights[:-1], before.parts[0].weights)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_pieces_join_to_the_text(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    found = pieces(TOKENIZER, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text


def test_a_character_of_many_tokens_is_the_last_ones() -> None:
    ids = TOKENIZER("a🙂b").input_ids
    assert pieces(TOKENIZER, ids) == ["a", "", "", "", "🙂", "b"]
    assert pieces(TOKENIZER, ids[:3]) == ["a", "", TOKENIZER.decode(ids[1:3])]


def test_a_prompt_that_the_tokenizer_rewrote_is_all_that_is_not_special() -> None:
    ids = TOKENIZER("<|im_start|>the cat<|im_end|>").input_ids
    found = prompt_tokens(TOKENIZER, ids, "THE CAT")
    assert [token.role for token in found] == ["template", *["prompt"] * (len(ids) - 2), "template"]


NASTY = (
    "</script><script>alert(1)</script>",
    '" onmouseover="x',
    "<!--",
    "@@data@@",
    "&amp;",
    "\N{RIGHT-TO-LEFT OVERRIDE}lived",
    "שלום",
    "🙂",
    "\n",
    "\x1b[31m",
    "\x00",
    "\u2028",
    "",
    "日本",
)
Texts = st.lists(st.sampled_from(NASTY) | st.text(max_size=8), min_size=1, max_size=6)


@st.composite
def explanations(draw: st.DrawFn) -> Explanation:
    """An explanation of random weights, whose texts are a stranger's."""
    texts = draw(Texts)
    experts = draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    roles: tuple[Role, ...] = ("template", "prompt", "answer")
    tokens = tuple(Token(text, draw(st.sampled_from(roles)), draw(st.booleans())) for text in texts)
    layers = tuple(Layer(f"layers.{i // 2}.{'ab'[i % 2]}", f"block {i // 2}", "ab"[i % 2]) for i in range(3))
    weights = rng.dirichlet(np.full(experts, 0.5), (len(layers), len(tokens))).astype(np.float32)
    names = tuple(f"{k} {draw(st.sampled_from(NASTY))}" for k in range(experts))
    told = draw(st.booleans())
    cosines, scale = (rng.uniform(-1, 1, experts), 3.0) if told else (None, None)
    parts = (Part("text", tokens, layers, weights),)
    return Explanation("".join(texts), "q", "".join(texts), names, Settings("arrow"), parts, cosines, scale)


class Page(HTMLParser):
    """What a browser would see: tags with attributes, the text inside elements, what scripts hold."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))


def embedded(page: Page) -> Any:
    """The data that the page's script reads."""
    assert [tag for tag, attributes in page.tags if attributes.get("id") == "data"] == ["script"]
    return json.loads(next(text for tag, text in page.texts if tag == "script" and text.startswith("{")))


def unpacked(text: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(shape) / 255


@settings(max_examples=40, deadline=None)
@given(explanations())
def test_a_page_holds_the_weights_and_no_foreign_markup(found: Explanation) -> None:
    html = found.to_html()
    page = Page(html)
    (part,), (data,) = found.parts, embedded(page)["parts"]
    assert np.abs(unpacked(data["weights"], part.weights.shape) - part.weights).max() <= 0.5 / 255 + 1e-6
    assert embedded(page)["experts"] == list(found.experts)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not any("onmouseover" in own for _, own in page.tags)
    assert len([tag for tag, own in page.tags if "data-t" in own]) == len(part.tokens)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", html)


def test_a_page_asks_for_nothing_from_outside(told: Explanation) -> None:
    page = Page(told.to_html())
    links = [
        value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "srcset")
    ]
    assert links == ["data:,"]
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttp|import\(", told.to_html())
    policy = next(own["content"] for _, own in page.tags if own.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_a_page_says_every_experts_share(told: Explanation) -> None:
    said = "".join(text for _, text in Page(told.to_html()).texts)
    for name, share in zip(told.experts, told.shares, strict=True):
        assert re.search(rf"{name}\s*{100 * share:.1f}\s%", said)
    spelt = re.sub(r"\d+", "", said)  # each token has a number under it
    assert "".join(token.text for token in told.parts[0].tokens if token.role == "prompt") in spelt


@settings(max_examples=40, deadline=None)
@given(explanations())
def test_a_text_fits_a_terminal_and_names_the_experts_that_lead(found: Explanation) -> None:
    text = found.to_text()
    lines = text.splitlines()
    assert max(columns(line) for line in lines) <= 100
    assert all(line.isprintable() for line in lines)
    bars = lines[next(i for i, line in enumerate(lines) if line.startswith("Experts")) + 1 :]
    for place, k in enumerate(found.ranking[:6]):
        assert re.match(rf" *{place + 1} {k} ", bars[place])
        assert f"{100 * found.shares[k]:.1f} %" in bars[place]


def test_a_text_tells_the_top_expert_of_each_token() -> None:
    tokens = tuple(Token(text, "answer") for text in ("red", " green", " blue"))
    weights = np.array([[[0.1, 0.9], [0.2, 0.8], [1.0, 0.0]]], np.float32)
    part = Part("text", tokens, (Layer("a.0.b", "block 0", "b"),), weights)
    found = Explanation("p", "p", "a", ("one", "two"), Settings("arrow"), (part,))
    assert found.to_text().splitlines()[-1] == "  answer    [1]red green [2] blue"
    assert [token["expert"] for token in found.to_dict()["parts"][0]["tokens"]] == ["two", "two", "one"]


@settings(max_examples=40, deadline=None)
@given(explanations())
def test_an_object_survives_json_and_holds_the_weights(found: Explanation) -> None:
    value = found.to_dict()
    assert json.loads(json.dumps(value)) == value
    assert value["format"] == 1
    (part,) = value["parts"]
    assert np.abs(np.array(part["weights"]) - found.parts[0].weights).max() <= 5.1e-5
    assert list(value["shares"]["all"]) == list(found.experts)
    assert [token["text"] for token in part["tokens"]] == [token.text for token in found.parts[0].tokens]


def test_docs_name_every_key_of_the_object(told: Explanation) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "routing-explained.md").read_text()
    value = told.to_dict()
    keys = {*value, *value["shares"], *value["parts"][0], *value["parts"][0]["tokens"][0]}
    assert {key for key in keys if f"`{key}`" not in page} == set()


@pytest.mark.parametrize(
    ("prompt", "more", "says"),
    [
        (" ", {}, "PROMPT: is empty"),
        ("\udcff", {}, "no UTF-8"),
        ("a", {"answer": ""}, "answer: is empty"),
        ("a", {"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_input_that_cannot_be_explained(llama: Any, prompt: str, more: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        explain(llama, prompt, **more)


def test_a_model_that_does_not_route_cannot_be_explained(llama: Any) -> None:
    with pytest.raises(InputError, match="load_routed"):
        explain(make_llama(), "a")
    with llama.routing.only("e1"), pytest.raises(InputError, match="fixed by hand"):
        explain(llama, "a")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed model on disk."""
    place = tmp_path_factory.mktemp("routed")
    model = make_llama()
    model.save_pretrained(place / "base")
    TOKENIZER.save_pretrained(place / "base")
    models = [{"model": str(write_adapter(expert, place / expert.name))} for expert in make_experts(model)]
    recipe = {"base_model": str(place / "base"), "models": models, "routing": {"local": "arrow"}}
    build_routed(recipe, place / "out")
    return place / "out"


def test_the_command_prints_text_or_json_and_writes_a_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["route", "explain", str(folder), PROMPT, "--answer", "good", "--html", str(tmp_path / "a.html")]
    assert run(command) == 0
    said = capsys.readouterr()
    found = explain(load_routed(folder), PROMPT, answer="good")
    assert said.out == found.to_text()
    assert (tmp_path / "a.html").read_text() == found.to_html()
    assert "a.html" in said.err
    assert run([*command[:6], "--json", "--set", "top_k=1"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["settings"]["top_k"] == 1
    assert {weight for layer in value["parts"][0]["weights"] for cell in layer for weight in cell} == {0.0, 1.0}


def test_the_command_says_where_a_page_cannot_go(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, says in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.html", "there is no folder")):
        assert run(["route", "explain", str(folder), PROMPT, "--html", str(target)]) == 2
        assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
