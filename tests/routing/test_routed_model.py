"""A routed model as a whole: what it computes, and that it is used as any transformers model is."""

import copy
import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from routed_models import ByLetter, linears, make_expert, make_experts, merge_into, routed_llama, routed_t5
from tiny_models import make_llama, make_t5, make_tokenizer
from torch import Tensor

from consilience.errors import InputError
from consilience.kernels import routed
from consilience.routing.expert import Expert
from consilience.routing.install import install
from consilience.routing.layer import Experts, Factors, RoutedLinear
from consilience.routing.local.arrow import direction
from consilience.routing.model import Routing
from consilience.routing.router import Router, Similarity
from consilience.routing.settings import Settings

IDS = torch.tensor([[5, 9, 40, 77, 120, 33], [8, 8, 61, 200, 3, 17]])


def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def recorded(model: Any, run: Any) -> dict[str, Tensor]:
    """Every layer's weights in one pass."""
    found: dict[str, Tensor] = {}
    with model.routing.watched(lambda name, weights: found.__setitem__(name, weights)):
        run()
    return found


@pytest.mark.parametrize("local", ["phatgoose", "arrow", "average", "none"])
def test_experts_without_effect_leave_the_base(local: Any) -> None:
    model, plain = make_llama(), make_llama()
    experts = [
        Expert(e.name, {m: Factors(f.a, 0 * f.b) for m, f in e.factors.items()}, e.vectors) for e in make_experts(model)
    ]
    install(model, experts, Settings(local))
    assert torch.equal(logits(model), logits(plain))


def test_one_expert_is_its_merge() -> None:
    model, merged = make_llama(), make_llama()
    expert = make_expert(model, "only", 3)
    merge_into(merged, [expert], [1.0])
    install(model, [expert], Settings("phatgoose"))
    assert torch.allclose(logits(model), logits(merged), atol=1e-4, rtol=1e-4)


def test_fixed_weights_are_a_merge_of_products() -> None:
    model, merged = routed_llama(Settings("arrow")), make_llama()
    merge_into(merged, make_experts(make_llama()), [0.2, 0.5, 0.3])
    with model.routing.only([0.2, 0.5, 0.3]):
        assert torch.allclose(logits(model), logits(merged), atol=1e-4, rtol=1e-4)
    with model.routing.plain():
        assert torch.equal(logits(model), logits(make_llama()))


def test_each_sequence_may_have_weights_of_its_own() -> None:
    model = routed_llama(Settings("arrow"))
    with model.routing.only(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])):
        found = logits(model)
    for row, name in enumerate(("e1", "e0")):
        with model.routing.only(name):
            assert torch.allclose(found[row], logits(model)[row], atol=1e-5)


def test_without_instructions_similarities_do_not_count() -> None:
    model = routed_llama(Settings("phatgoose", scale=0.0))
    assert model.routing.asked.semantics.asked == []
    plain = make_llama()
    install(plain, make_experts(plain), Settings("phatgoose"))
    assert torch.equal(logits(model), logits(plain))
    assert model.routing.asked.semantics.asked == []


def test_a_large_scale_sends_every_token_to_the_most_similar() -> None:
    model = routed_llama(Settings("phatgoose", scale=1e6, top_k=1))
    with model.routing.queries(["cccab", "bb a"]):
        weights = recorded(model, lambda: logits(model))
    assert len(weights) == len(linears(make_llama(), ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")))
    for one in weights.values():
        assert (one[0].argmax(-1) == 2).all()
        assert (one[1].argmax(-1) == 1).all()
        assert torch.allclose(one.amax(-1), torch.ones(2, 6), atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_at_most_k_experts_a_token(k: int) -> None:
    model = routed_llama(Settings("phatgoose", top_k=k))
    for one in recorded(model, lambda: logits(model)).values():
        assert ((one > 0).sum(-1) == k).all()
        assert torch.allclose(one.sum(-1), torch.ones(2, 6), atol=1e-4)


def test_the_order_of_the_experts_does_not_matter() -> None:
    one, other = make_llama(), make_llama()
    experts = make_experts(one)
    install(one, experts, Settings("phatgoose"))
    install(other, experts[::-1], Settings("phatgoose"))
    assert torch.allclose(logits(one), logits(other), atol=1e-5)


def test_a_new_expert_that_is_left_out_changes_nothing() -> None:
    model = routed_llama(Settings("phatgoose"))
    before, kept = logits(model), model.routing.experts
    model.routing.replace([*kept, make_expert(make_llama(), "new", 99)], ByLetter(4))
    with model.routing.without("new"):
        assert torch.allclose(logits(model), before, atol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    model.routing.replace(kept, ByLetter(3))
    assert torch.equal(logits(model), before)


def test_few_and_many_experts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed_llama(Settings("phatgoose"))
    layers = [module.experts for module in model.modules() if isinstance(module, RoutedLinear)]
    assert any(one.dense for one in layers)
    dense = logits(model)
    monkeypatch.setattr("consilience.routing.layer.DENSE_SHARE", -1.0)
    assert not any(one.dense for one in layers)
    assert torch.allclose(dense, logits(model), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_read_only_their_experts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    experts = [make_expert(model, f"e{k}", k) for k in range(9)]
    router = install(model.to(dtype), experts, Settings("phatgoose"))
    for ids in (IDS[:1, :1], IDS[:, :1]):
        gathered: list[int] = []
        original = Experts._gathered  # pyright: ignore[reportPrivateUsage]

        def spied(self: Any, *args: Any, into: list[int] = gathered, of: Any = original) -> None:
            into.append(1)
            of(self, *args)

        monkeypatch.setattr(Experts, "_gathered", spied)
        compiled = routed.add_own
        monkeypatch.setattr(routed, "add_own", partial(spied, into=gathered, of=compiled))
        few = logits(model, ids)
        assert gathered
        monkeypatch.setattr(Experts, "_gathered", original)
        monkeypatch.setattr(routed, "add_own", compiled)
        with monkeypatch.context() as patch:
            patch.setattr("consilience.routing.layer.FEW", 1000)
            patch.setattr("consilience.routing.bfloat16.OWN", 0)
            router.settings = replace(router.settings)
            tolerance = 1e-4 if dtype == torch.float32 else 0.1
            assert torch.allclose(few, logits(model, ids), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_token_in_half_precision_is_rounded_at_the_end(dtype: torch.dtype) -> None:
    """And its products with prototypes in bfloat16, as those of many tokens are: a token is routed one way."""
    generator = torch.Generator().manual_seed(7)
    draw = partial(torch.randn, generator=generator)
    factors, prototypes = [Factors(draw(2, 64), draw(48, 2)) for _ in range(9)], draw(9, 64)
    router = Router(tuple("abcdefghi"), Settings("arrow", temperature=8.0))
    experts = Experts("one", factors, prototypes, torch.zeros(1, dtype=dtype), router)
    u, y, seen = draw(1, 1, 64).to(dtype), draw(1, 1, 48).to(dtype), list[Tensor]()
    with router.watched(lambda _, weights: seen.append(weights)):
        found = experts.add(u, y.clone())
    z = prototypes.to(dtype).double() @ u[0, 0].double()
    z = (z.to(dtype).double() if dtype == torch.bfloat16 else z).abs() / 8
    kept = z.topk(2)
    weights = torch.zeros_like(z).scatter(0, kept.indices, kept.values.softmax(0))
    pairs = [(one.a.to(dtype).double(), one.b.to(dtype).double()) for one in factors]
    exact = y[0, 0].double() + sum(w * (b @ (a @ u[0, 0].double())) for w, (a, b) in zip(weights, pairs, strict=True))
    assert torch.allclose(seen[0][0, 0].double(), weights, atol=1e-5)
    assert torch.allclose(found[0, 0].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_one_token_under_autocast_is_near() -> None:
    model = make_llama()
    install(model, [make_expert(model, f"e{k}", k) for k in range(9)], Settings("phatgoose"))
    expected = logits(model, IDS[:1, :1])
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, IDS[:1, :1]).float()
    assert (found - expected).norm() / expected.norm() < 0.05


def test_a_layer_goes_back_when_nobody_adapts_it() -> None:
    model = routed_llama(Settings("phatgoose"))
    model.routing.replace([make_expert(make_llama(), "q", 5, targets=("q_proj",))], ByLetter(1))
    names = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, RoutedLinear)}
    assert names == {"q_proj"}
    assert set(make_llama().state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("beams", [1, 3])
def test_batches_mix_tasks(beams: int) -> None:
    model, tokenizer = routed_llama(Settings("phatgoose", scale=60.0)), make_tokenizer()
    texts = ["aaaa", "bbbbbb bb", "the cat sat on the mat cccc"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    together = model.generate(**batch, **settings)[:, -5:]
    assert model.routing.asked.semantics.asked == texts
    for row, text in enumerate(texts):
        alone = model.generate(**tokenizer([text], return_tensors="pt"), **settings)[:, -5:]
        assert torch.equal(together[row : row + 1, : alone.shape[1]], alone)
    assert model.routing.router.bias is None


class Recognising(ByLetter):
    """Recognises a query by its share of a, b and c."""

    def __call__(self, queries: Any, settings: Settings) -> Similarity:
        found = super().__call__(queries, settings)
        return Similarity(found.cosines, settings.most_scale * found.cosines.sum(-1))


def test_a_query_that_is_no_experts_is_answered_by_their_mean() -> None:
    model, tokenizer = routed_llama(Settings("phatgoose")), make_tokenizer()
    model.routing.asked.semantics = Recognising(3)
    model.routing.set(scale="adaptive", most_scale=30.0)
    routed = logits(model, tokenizer(["aabb"], return_tensors="pt").input_ids)
    model.routing.set(fallback="mean")
    assert torch.allclose(logits(model, tokenizer(["aabb"], return_tensors="pt").input_ids), routed, atol=1e-5)
    ids = tokenizer(["the hill"], return_tensors="pt").input_ids
    found = logits(model, ids)
    with model.routing.only([1 / 3] * 3):
        assert torch.allclose(logits(model, ids), found, atol=1e-5)
    with model.routing.queries(["aabb"]):
        assert not torch.allclose(logits(model, ids), found, atol=1e-3)
    with model.routing.without("e1"):
        without = logits(model, ids)
    with model.routing.only([0.5, 0.0, 0.5]):
        assert torch.allclose(logits(model, ids), without, atol=1e-5)
    model.routing.set(scale=0.0, fallback="local")
    assert model.routing.router.known is None


def test_the_cache_changes_nothing() -> None:
    model, ids = routed_llama(Settings("phatgoose", scale=30.0)), IDS[:1]
    runs = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*runs)


def test_a_step_with_a_cache_keeps_the_query() -> None:
    model = routed_llama(Settings("phatgoose", scale=50.0))
    ids = make_tokenizer()(["aabc"], return_tensors="pt").input_ids
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        first = model(input_ids=ids[:, :-1], use_cache=True)
        asked = list(model.routing.asked.semantics.asked)
        last = model(input_ids=ids[:, -1:], use_cache=True, **{name: first[name]})
    assert model.routing.asked.semantics.asked == asked
    with model.routing.queries(asked):
        assert torch.allclose(last.logits[:, -1], logits(model, ids)[:, -1], atol=1e-5)
    with model.routing.queries(["c"]):
        assert not torch.allclose(last.logits[:, -1], logits(model, ids)[:, -1], atol=1e-3)


def test_a_pass_without_generate_reads_its_query() -> None:
    model, tokenizer = routed_llama(Settings("phatgoose", scale=50.0)), make_tokenizer()
    batch = tokenizer(["aab", "ccccccc"], return_tensors="pt", padding=True)
    found = logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    assert model.routing.asked.semantics.asked == ["aab", "ccccccc"]
    with model.routing.queries(["aab", "ccccccc"]):
        assert torch.equal(found, logits(model, batch["input_ids"], attention_mask=batch["attention_mask"]))


def test_answers_do_not_route_themselves() -> None:
    model, tokenizer = routed_llama(Settings("phatgoose", scale=50.0)), make_tokenizer()
    ids = tokenizer(["aabcc"], return_tensors="pt").input_ids
    size = len(tokenizer("aab").input_ids)
    labels = ids.clone()
    labels[:, :size] = -100
    logits(model, ids, labels=labels)
    assert model.routing.asked.semantics.asked[-1].startswith("aab")
    assert "c" not in model.routing.asked.semantics.asked[-1]
    with model.routing.expecting({tuple(ids[0].tolist()): "given"}):
        logits(model, ids)
    assert model.routing.asked.semantics.asked[-1] == "given"


def test_the_chat_template_is_not_the_query() -> None:
    model, tokenizer = routed_llama(Settings("phatgoose", scale=50.0)), make_tokenizer()
    turns = [{"role": "user", "content": "a b\nc"}]
    batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert model.routing.asked.semantics.asked == ["a b\nc"]


def test_an_encoder_s_inputs_are_the_query() -> None:
    model, tokenizer = routed_t5(Settings("phatgoose", scale=50.0)), make_tokenizer()
    batch = tokenizer(["aaaa", "bb"], return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert model.routing.asked.semantics.asked == ["aaaa", "bb"]
    alone = model.generate(**tokenizer(["bb"], return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert torch.equal(together[1, : alone.shape[1]], alone[0])
    logits(model, batch["input_ids"], attention_mask=batch["attention_mask"], labels=IDS)
    assert model.routing.asked.semantics.asked[-2:] == ["aaaa", "bb"]


def test_t5_with_one_expert_is_its_merge() -> None:
    model, merged = make_t5(), make_t5()
    expert = make_expert(model, "only", 3, targets=("q", "v", "o", "wi", "wo"))
    merge_into(merged, [expert], [1.0])
    install(model, [expert], Settings("phatgoose"))
    found = [logits(one, IDS, decoder_input_ids=IDS[:, :3]) for one in (model, merged)]
    assert torch.allclose(*found, atol=1e-4, rtol=1e-4)


def test_copies_are_models_of_their_own() -> None:
    model = routed_llama(Settings("phatgoose", scale=5.0))
    other = copy.deepcopy(model)
    other.routing.set(scale=0.0)
    assert model.routing.settings.scale == 5.0
    assert other.routing.model is other
    assert torch.equal(model.generate(IDS, max_new_tokens=3), copy.deepcopy(model).generate(IDS, max_new_tokens=3))


def test_pipelines_work() -> None:
    from transformers import pipeline

    model = routed_llama(Settings("phatgoose", scale=5.0))
    made = pipeline("text-generation", model=model, tokenizer=make_tokenizer())
    answers = made(["aa", "bb b"], max_new_tokens=3, do_sample=False, batch_size=2)
    assert [len(answer) for answer in answers] == [1, 1]


def test_bfloat16_is_near() -> None:
    model = routed_llama(Settings("phatgoose"))
    found = logits(copy.deepcopy(model).to(torch.bfloat16)).float()
    expected = logits(model)
    assert (found - expected).norm() / expected.norm() < 0.05


def test_settings_change_the_local_router() -> None:
    model, other = routed_llama(Settings("phatgoose")), routed_llama(Settings("arrow"))
    model.routing.set(local="arrow")
    assert torch.equal(logits(model), logits(other))


def test_arrow_is_the_largest_direction() -> None:
    expert = make_expert(make_llama(), "x", 4)
    for factors in expert.factors.values():
        _, _, rows = torch.linalg.svd((factors.b @ factors.a).double())
        assert abs(float(direction(factors).double() @ rows[0])) == pytest.approx(1, abs=1e-6)
    assert not direction(Factors(torch.ones(2, 4), torch.zeros(3, 2))).any()


def bad(change: Any) -> Any:
    model = make_llama()
    expert = make_expert(model, "x", 1)
    return model, change(expert)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: Expert("x", {"model.layers.7.self_attn.q_proj": Factors(torch.ones(1, 32), torch.ones(32, 1))}, {}),
         "which the base does not have"),
        (lambda e: Expert("x", {"model.layers.0.self_attn.q_proj": Factors(torch.ones(1, 8), torch.ones(32, 1))}, {}),
         "8 inputs"),
        (lambda e: Expert("x", {"model.norm": Factors(torch.ones(1, 8), torch.ones(32, 1))}, {}), "LlamaRMSNorm"),
        (lambda e: Expert("x", e.factors, {}), "has no phatgoose vectors"),
        (lambda e: Expert("x", {}, {}), "adapts nothing"),
        (lambda e: Expert("x", e.factors, {"phatgoose": {m: v / 0 for m, v in e.vectors["phatgoose"].items()}}),
         "its phatgoose vector holds NaN or Inf"),
    ],
)  # fmt: skip
def test_misfits_are_named_and_nothing_changes(change: Any, said: str) -> None:
    model, expert = bad(change)
    with pytest.raises(InputError, match=said):
        install(model, [expert], Settings("phatgoose"))
    assert not any(isinstance(module, RoutedLinear) for module in model.modules())


def test_a_vector_that_is_no_number_in_the_last_layer_changes_nothing_either() -> None:
    model = routed_llama(Settings("phatgoose"))
    before = logits(model)
    bad = make_experts(make_llama())
    arrow = dict(bad[2].vectors["arrow"])
    arrow[list(arrow)[-1]] = torch.full_like(list(arrow.values())[-1], torch.nan)
    experts = [*bad[:2], Expert("e2", bad[2].factors, {**bad[2].vectors, "arrow": arrow})]
    model.routing.replace(experts, None)
    with pytest.raises(InputError, match="arrow vector holds NaN or Inf"):
        model.routing.set(local="arrow")
    assert model.routing.settings.local == "phatgoose"
    assert torch.equal(logits(model), before)


def flat(layer: Any, tokens: Tensor, *passes: int) -> Tensor:
    """A layer's result for tokens [n, d], in a pass of inputs with so many tokens in all."""
    layer.experts.router.tokens = frozenset(passes)
    return layer(tokens)


def test_tokens_that_a_model_gathers_itself_are_of_one_query() -> None:
    """A model that sends tokens to its own experts gives these [tokens, d], and which are whose is lost."""
    model = routed_llama(Settings("none", scale=9.0, top_k=1))
    layer, tokens = model.model.layers[0].mlp.down_proj, torch.randn(6, 48)
    with torch.no_grad():
        with model.routing.queries(["aaa", "bbb"]):
            whole = flat(layer, tokens, 6)
            for row, query in enumerate(("aaa", "bbb")):
                with model.routing.queries([query]):
                    assert torch.allclose(whole[3 * row :][:3], flat(layer, tokens[3 * row :][:3], 3), atol=1e-5)
            with pytest.raises(
                InputError, match=r"mlp\.down_proj: is given 4 tokens of 2 queries, .* one sequence at a"
            ):
                flat(layer, tokens[:4], 6)
        with model.routing.queries(["bbb"]):
            assert torch.allclose(flat(layer, tokens[3:5], 6), whole[3:5], atol=1e-5)


def test_a_pass_says_how_many_tokens_it_has() -> None:
    model, encoding = routed_llama(Settings()), routed_t5(Settings())
    logits(model)
    assert model.routing.router.tokens == {12}
    logits(encoding, decoder_input_ids=torch.zeros(2, 5, dtype=torch.long))
    assert encoding.routing.router.tokens == {12, 10}
    logits(encoding, labels=torch.ones(2, 4, dtype=torch.long))
    assert encoding.routing.router.tokens == {12, 8}


def test_a_model_without_instructions_says_so() -> None:
    model = make_llama()
    with pytest.raises(InputError, match="built without"):
        Routing(model, make_experts(model), Settings("arrow", scale=1.0), make_tokenizer())
    assert not any(isinstance(module, RoutedLinear) for module in model.modules())
