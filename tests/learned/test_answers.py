"""What the experts answer: drawn from their own distribution, kept, divided by prompt, and compared with."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_experts import recipe_of, sentences, write_adapter, write_recipe, write_rows

import consilience as cs
from consilience.api import learn, plan_recipe
from consilience.cli.learning import summary
from consilience.coefficients.listing import coefficient_facts, coefficient_lines
from consilience.errors import InputError
from consilience.learned import answers as asked
from consilience.learned import written as writing
from consilience.learned.compare import STRENGTHS
from consilience.learned.expert_merging import ExpertMerging
from consilience.learned.learn import check_data
from consilience.learned.learning import start_of
from consilience.learned.run import Run, Workshop, open_workshop
from consilience.learned.settings import Start
from consilience.learned.written import common_beginning, common_ending
from consilience.methods.signature import settings_of
from consilience.recipe.schema import parse_recipe
from consilience.student.calibration import batches
from consilience.tasks import Row, Task, encode, sample

QUICK: dict[str, Any] = {"preset": "default", "precision": "float32", "steps": 2, "response_tokens": 5, "answers": 2}
#: A seed whose first answer says something.
SPOKEN = 1


def recipe(zoo: Path, *names: str, seed: int = 0, **parameters: Any) -> Any:
    value = recipe_of(zoo, {name: zoo / name for name in names}, seed=seed, parameters=QUICK | parameters)
    return parse_recipe(value, "test")


def workshop(zoo: Path, *names: str, folder: Path | None = None, seed: int = 0, **parameters: Any) -> Workshop:
    plan = plan_recipe(recipe(zoo, *names, seed=seed, **parameters))
    run = Run(plan, folder=folder)
    rows = settings_of(ExpertMerging, plan.learning).rows
    return open_workshop(run, start_of(run, settings_of(Start, plan.learning)), rows, precision="float32")


def load(folder: Path) -> Any:
    """An expert's model: a full one, or the base with an adapter's products added."""
    from transformers import AutoModelForCausalLM

    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(load(folder.parent / "base"), folder).merge_and_unload()


def rows_of(shop: Workshop) -> list[Row]:
    shop.close()
    return [one.row for one in shop.samples]


def test_answers_are_drawn_from_the_experts_own_distribution(zoo: Path):
    model, text, times = load(zoo / "a"), "w1 w2 w3", 4000
    tokenizer = _tokenizer(zoo)
    (one,) = encode(Task("t", (Row(prompt=text),)), tokenizer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([one.inputs])).logits[0, -1].double()
    for temperature in (1.0, 2.0):
        drawn = Counter(sample(model, tokenizer, [text] * times, 1, batch_size=times, temperature=temperature))
        expected = torch.softmax(logits / temperature, 0)
        likely = [i for i in range(3, len(expected)) if expected[i] * times > 20]
        assert len(likely) > 5
        for i in likely:
            p = float(expected[i])
            assert abs(drawn[tokenizer.decode([i])] / times - p) < 5 * np.sqrt(p * (1 - p) / times)


def _tokenizer(zoo: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(zoo / "base")


def test_a_seed_gives_the_same_answers_and_another_seed_others(zoo: Path):
    model, tokenizer = load(zoo / "a"), _tokenizer(zoo)
    prompts = ["w1 w2", "w3", "w1 w2"]
    torch.manual_seed(7)
    first = sample(model, tokenizer, prompts, 6, temperature=1.0)
    following = torch.rand(1)
    torch.manual_seed(7)
    assert following == torch.rand(1), "the caller's generator moved"
    assert sample(model, tokenizer, prompts, 6, temperature=1.0) == first
    assert sample(model, tokenizer, prompts, 6, temperature=1.0, seed=1) != first
    assert first[0] != first[2]
    with pytest.raises(ValueError, match="negative"):
        sample(model, tokenizer, "w1", temperature=-1)


def test_every_expert_answers_its_own_prompts(zoo: Path):
    shop = workshop(zoo, "a", "lora", answers=1, answer_temperature=0.0)
    rows, prompts = rows_of(shop), {name: sentences(seed, 5) for name, seed in (("a", 0), ("lora", 2))}
    assert [row.prompt for row in rows] == [*prompts["a"], *prompts["lora"]]
    own = load(zoo / "a")
    assert [row.response or "" for row in rows[:5]] == sample(own, _tokenizer(zoo), prompts["a"], 5)
    assert [row.response or "" for row in rows[5:]] != sample(own, _tokenizer(zoo), prompts["lora"], 5)
    assert shop.learn == list(range(10))
    assert not shop.judge, "greedy answers are all alike"


def test_a_further_answer_is_kept_to_judge_by(zoo: Path):
    shop = workshop(zoo, "a", "b", answers=3)
    rows = rows_of(shop)
    assert len(rows) == 2 * 5 * 4
    assert shop.judge == list(range(3, 40, 4))
    assert sorted(shop.learn + shop.judge) == list(range(40))
    assert len({row.prompt for row in rows[:4]}) == 1
    lines = {one.where.rpartition("/")[2] for one in shop.samples[4:8]}
    assert lines == {"a.jsonl:2"}


def test_answers_to_one_prompt_are_held_out_together(zoo: Path):
    shop = workshop(zoo, "a", "b", answers=3, holdout=0.4)
    shop.close()
    hold = {shop.samples[i].where for i in shop.hold}
    assert len(hold) == 4
    assert len(shop.hold) == 12
    assert not hold & {shop.samples[i].where for i in shop.learn}
    assert shop.judge == shop.hold


def test_kept_answers_are_not_asked_for_again(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = rows_of(workshop(zoo, "a", "lora", folder=tmp_path))
    files = sorted((tmp_path / "teachers").glob("answers-*.json"))
    assert len(files) == 2
    kept: list[dict[str, Any]] = json.loads(files[0].read_text())
    assert [len(one["answers"]) for one in kept] == [3] * 5
    with monkeypatch.context() as patch:
        patch.setattr(asked, "_asked", lambda *a: pytest.fail("asked again"))
        assert rows_of(workshop(zoo, "a", "lora", folder=tmp_path)) == first
    files[0].write_text(files[0].read_text()[:-9])
    assert rows_of(workshop(zoo, "a", "lora", folder=tmp_path)) == first
    assert rows_of(workshop(zoo, "a", "lora", folder=tmp_path, seed=1)) != first


def with_template(zoo: Path, tmp_path: Path, end: str = "{% if m.role == 'assistant' %}<eos>{% endif %}") -> Path:
    """The zoo's models with a chat template; ``end`` follows a turn."""
    place = tmp_path / "chat"
    shutil.copytree(zoo, place)
    for folder in (place / "base",):
        path = folder / "tokenizer_config.json"
        template = "{% for m in messages %} {{ m.content }} " + end + "{% endfor %}"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return place


def test_a_conversation_is_answered_up_to_its_last_question(zoo: Path, tmp_path: Path):
    place = with_template(zoo, tmp_path)
    turns = [{"role": r, "content": c} for r, c in (("user", "w1"), ("assistant", "w2"), ("user", "w3 w4"))]
    old = {"role": "assistant", "content": "w5"}
    write_rows(place / "rows" / "a.jsonl", [{"messages": turns}, {"messages": [*turns, old]}])
    shop = workshop(place, "a", answers=1, answer_temperature=0.0)
    rows = rows_of(shop)
    given = [[(m.role, m.content) for m in row.messages or ()] for row in rows]
    assert given[0] == given[1]
    assert given[0][:3] == [(t["role"], t["content"]) for t in turns]
    answer = sample(load(place / "a"), _tokenizer(place), [turns], 5)[0]
    assert given[0][3:] == ([("assistant", answer)] if answer else [])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "w1 w2"}, "text is no prompt"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, "no turn but the model's own"),
    ],
)
def test_a_row_without_a_question_is_named_before_any_model_runs(
    zoo: Path, tmp_path: Path, row: Mapping[str, Any], said: str
):
    path = write_rows(tmp_path / "rows.jsonl", ["w1", row])
    value = recipe_of(zoo, {"a": zoo / "a"}, parameters=QUICK)
    value["models"][0]["data"]["calibration"] = str(path)
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: .*{said}"):
        plan_recipe(parse_recipe(value, "test"))


def merged_divergence(zoo: Path, names: Sequence[str], shop: Workshop, chosen: Sequence[int], alpha: Any) -> float:
    """Mean over experts of KL(expert || merge) per token, from state dicts and transformers alone."""
    base = load(zoo / "base").state_dict()
    taus = [{k: v - base[k] for k, v in load(zoo / name).state_dict().items()} for name in names]
    model = load(zoo / "base")
    model.load_state_dict({k: v + sum(a * tau[k] for a, tau in zip(alpha, taus, strict=True)) for k, v in base.items()})
    sums: dict[int, list[float]] = {k: [] for k in range(len(names))}
    for i in chosen:
        one = shop.samples[i]
        ids, at = torch.tensor([one.encoded.inputs]), list(one.encoded.positions)
        with torch.no_grad():
            q, p = (
                m(input_ids=ids).logits[0, at].double().log_softmax(-1) for m in (model, load(zoo / names[one.expert]))
            )
        sums[one.expert] += (p.exp() * (p - q)).sum(-1).tolist()
    return float(np.mean([np.mean(values) for values in sums.values()]))


def test_a_run_compares_itself_with_the_base_and_the_best_strength(zoo: Path, tmp_path: Path):
    names = ("a", "b")
    found = learn(recipe(zoo, *names, learning_rate=0.0))
    facts = found.facts["compared"]
    shop = workshop(zoo, *names)
    shop.close()
    assert facts["rows"] == len(shop.judge) == 10
    by_strength = {s: merged_divergence(zoo, names, shop, shop.judge, [s] * 2) for s in (0.0, 0.3, *STRENGTHS)}
    best = min(STRENGTHS, key=lambda s: by_strength[s])
    assert facts["strength"] == best
    for key, strength in (("base", 0.0), ("learned", 0.3), ("task_arithmetic", best)):
        assert facts[key] == pytest.approx(by_strength[strength], rel=1e-4), key
    assert not facts["better"], "nothing was learned, and 0.3 is among the strengths"
    assert any("warning" in line for line in summary(found))


def test_learning_beats_the_best_strength_and_says_so(zoo: Path):
    found = learn(recipe(zoo, "a", "b", answers=12, batch=0, steps=40, learning_rate=0.05))
    assert found.facts["compared"]["better"]
    assert not any("warning" in line for line in summary(found))


def test_the_experts_answers_are_shown(zoo: Path, tmp_path: Path):
    path = write_recipe(
        tmp_path / "r.yaml", recipe(zoo, "a", "lora", seed=SPOKEN).model_dump(mode="json", exclude_defaults=True)
    )
    cs.merge_recipe(path, tmp_path / "out")
    found = cs.load_coefficients(tmp_path / "out")
    told = found.facts["calibration"]["a"]
    assert (told["rows"], told["answers"], told["responses"]) == (5, 2, "generate")
    assert [one["prompt"] for one in told["shown"]] == sentences(0, 3)
    lines = "\n".join(coefficient_lines(coefficient_facts("here", found)))
    assert json.dumps(sentences(0, 1)[0]) in lines
    assert json.dumps(told["shown"][0]["answer"]) in lines


def test_held_weights_of_factored_layers_are_what_autocast_makes_of_them(zoo: Path, monkeypatch: pytest.MonkeyPatch):
    from consilience.student import student as module

    def states() -> tuple[Any, set[torch.dtype]]:
        plan = plan_recipe(recipe(zoo, "lora", responses="given"))
        run = Run(plan)
        settings = settings_of(ExpertMerging, plan.learning)
        start = start_of(run, settings_of(Start, plan.learning))
        monkeypatch.setattr("consilience.student.factored.TOKENS", 1 << 20)  # these layers are too narrow to pay
        shop = open_workshop(run, start, settings.rows, precision="mixed")
        try:
            assert shop.student.factored
            held = {shop.student.parameters[name].dtype for name in shop.student.factored}
            shop.student.set(start.alpha)
            return shop.reader.run(batches(shop.samples, shop.learn, 4096)[0])[0].states.detach(), held
        finally:
            shop.close()

    now, held = states()
    monkeypatch.setattr(module, "_narrow", lambda student: None)
    before, wide = states()
    assert (held, wide) == ({torch.bfloat16}, {torch.float32})
    assert torch.equal(now, before)


def test_further_prompts_begin_as_the_given_ones_do(zoo: Path, tmp_path: Path):
    place = with_template(zoo, tmp_path, end="<eos>")
    write_rows(place / "rows" / "a.jsonl", ["w1 w2 w3 w4 w5", "w1 w2 w3 w4 w6", "w1 w2 w3 w4 w7 w8"])
    shop = workshop(place, "a", "b", answers=2, written_prompts=80, response_tokens=3, folder=tmp_path / "state")
    rows = rows_of(shop)
    own = [one.row.prompt or "" for one in shop.samples if one.expert == 0 and "written" in one.where]
    assert len(own) > 5
    assert len(set(own)) == len(own)
    assert all(prompt.startswith("w1 w2 w3 w4 ") for prompt in own)
    assert not any("<" in prompt for prompt in own)
    assert not {row.prompt for row in rows[:9]} & set(own)
    further = {shop.samples[i].where for i in shop.judge}
    assert not any("written" in where for where in further)
    again = workshop(place, "a", "b", answers=2, written_prompts=80, response_tokens=3)
    assert rows_of(again) == rows


def test_further_prompts_end_as_the_given_ones_do(zoo: Path, tmp_path: Path):
    """The base writes as it likes after the first word of the ending; what has no such word is no prompt."""
    place = with_template(zoo, tmp_path, end="<eos>")
    given = [f"{word} w1 w2 w3 w4" for word in ("w5", "w6", "w7 w8")]
    tokenizer = _tokenizer(place)

    def continued(*_args: Any, **_settings: Any) -> list[list[int]]:
        return [
            list(tokenizer(text, add_special_tokens=False).input_ids)
            for text in ("w9 w1 w2 w50 w51", "w10 w11", "w5 w1 w2 w3 w4 <eos>")
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "continued", continued)
        found = writing.write_prompts(None, tokenizer, given, ["w1", "w2", "w3"], 2)
    assert found == ["w9 w1 w2 w3 w4"]


def test_further_prompts_that_cannot_be_written_are_noted(zoo: Path, tmp_path: Path):
    for place, why in ((zoo, "no chat template"), (with_template(zoo, tmp_path, end=""), "does not mark where")):
        shop = workshop(place, "a", "b", written_prompts=4)
        assert len(rows_of(shop)) == 2 * 5 * 3
        assert [why in note for note in shop.notes] == [True, True]
    found = learn(recipe(zoo, "a", written_prompts=4))
    assert sum("no further prompts" in line for line in summary(found)) == 1


def test_experts_write_their_own_prompts_where_no_file_is_given(zoo: Path, tmp_path: Path):
    """As the first turn of a conversation; the base then writes more in their manner, and all is kept."""
    place = with_template(zoo, tmp_path, end="<eos>")
    settings: dict[str, Any] = {"own_prompts": 40, "written_prompts": 4, "answers": 1, "response_tokens": 3}
    given = recipe(place, "a", "b", **settings)
    bare = [entry.model_copy(update={"data": None}) for entry in given.models]
    plan = plan_recipe(given.model_copy(update={"models": bare}))
    check_data(plan)
    run, learning = Run(plan, folder=tmp_path / "state"), settings_of(ExpertMerging, plan.learning)
    start = start_of(run, settings_of(Start, plan.learning))
    shops = [open_workshop(run, start, learning.rows, precision="float32") for _ in range(2)]
    for k in range(2):
        own = {one.row.prompt for one in shops[0].samples if one.expert == k and "written" not in one.where}
        assert 0 < len(own) <= 40
        assert all(prompt and "<" not in prompt for prompt in own)
    assert rows_of(shops[0]) == rows_of(shops[1])
    assert len(list((tmp_path / "state").rglob("own-prompts-*.json"))) == 2


def test_prompts_of_its_own_and_a_file_are_one_too_many(zoo: Path, tmp_path: Path):
    place = with_template(zoo, tmp_path, end="<eos>")
    with pytest.raises(InputError, match=r"a\.jsonl: own_prompts=3 has a write its own prompts"):
        workshop(place, "a", own_prompts=3)


def test_common_beginnings_end_with_a_word():
    assert common_beginning(["w1 w2", "w1 w3"]) == ""
    assert (
        common_beginning(["Write a function.\n\ndef get", "Write a function.\n\ndef gone"])
        == "Write a function.\n\ndef"
    )
    assert common_beginning(["Translate this: a", "Translate this: b"]) == "Translate this:"
    assert common_beginning(["Translate this"]) == "Translate this"
    assert common_ending(["a is pronounced how?", "b is pronounced how? "]) == "is pronounced how?"
    assert common_ending(["pronounced how?", "unpronounced how?"]) == ""


def test_silence_is_compared_where_it_begins(zoo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(asked, "_asked", lambda run, student, task, data, times: [[""] * times for _ in task.rows])
    shop = workshop(zoo, "a", "b")
    shop.close()
    assert all(one.encoded.positions == (len(one.encoded.inputs) - 1,) for one in shop.samples)


def test_rows_of_several_experts_in_one_pass_give_the_same_loss_and_gradient(zoo: Path, tmp_path: Path):
    place = tmp_path / "two"
    shutil.copytree(zoo, place)
    write_adapter(place / "other", place / "base", 5)
    write_rows(place / "rows" / "other.jsonl", sentences(4, 5))
    plan = plan_recipe(recipe(place, "lora", "other"))
    run = Run(plan)
    settings = settings_of(ExpertMerging, plan.learning)
    start = start_of(run, settings_of(Start, plan.learning))
    shop = open_workshop(run, start, settings.rows, precision="float64")
    try:
        problem = shop.problem(settings.objective)
        assert problem.mixed
        together = problem.evaluate(start.alpha, shop.learn, gradient=True)
        problem.mixed = False
        apart = problem.evaluate(start.alpha, shop.learn, gradient=True)
        passes = [len(batches(shop.samples, shop.learn, 4096, mixed=mixed)) for mixed in (True, False)]
    finally:
        shop.close()
    assert passes[0] <= passes[1]
    assert together[0]["logit"] == pytest.approx(apart[0]["logit"], rel=1e-10)
    assert together[1] is not None
    assert apart[1] is not None
    assert np.allclose(together[1], apart[1], rtol=1e-8, atol=1e-12)


def test_experts_with_heads_of_their_own_are_read_apart(zoo: Path):
    shop = workshop(zoo, "a", "b")
    try:
        assert not shop.problem(settings_of(ExpertMerging, shop.run.plan.learning).objective).mixed
    finally:
        shop.close()
