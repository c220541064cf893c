import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import make_llama, make_t5, make_tokenizer

from consilience.errors import InputError
from consilience.tasks import Evaluation, Row, Task, TaskResult, evaluate, load_model, loss_per_token, render, sample
from consilience.tasks import evaluation as evaluation_module
from consilience.tasks.cache import cache_folder

ROWS = (
    '{"prompt": "is it good?", "response": "yes"}',
    '{"prompt": "the cat", "response": "sat on the mat"}',
    '{"prompt": "bad?", "choices": ["yes", "no it is not"], "label": 1}',
)


@pytest.fixture
def rows(rows_file: Callable[..., Path]) -> Path:
    return rows_file(*ROWS, name="code/test.jsonl")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the models that were loaded, in order."""
    seen: list[str] = []

    def counted(folder: Path, **settings: Any) -> Any:
        seen.append(folder.name)
        return load_model(folder, **settings)

    monkeypatch.setattr(evaluation_module, "load_model", counted)
    return seen


def run(model: Any, tasks: Any, **settings: Any) -> Evaluation:
    return evaluate(model, tasks, progress=False, **settings)


def save(model: Any, tokenizer: Any, place: Path) -> Path:
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def make_adapter(place: Path, folder: Path, rank: int = 2) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    with warnings.catch_warnings():  # peft 0.21 still uses a name that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        adapted: Any = get_peft_model(load_model(folder), config)
        adapted.save_pretrained(str(place))
    return place


def test_a_model_on_disk_measures_as_in_memory(folder: Path, rows: Path, llama: Any, tokenizer: Any):
    result = run(folder, rows).results[0]
    task = Task("code", tuple(Row.model_validate_json(line) for line in ROWS))
    assert result.task == "code"
    assert result.loss is not None
    assert result.loss.nats == pytest.approx(loss_per_token(llama, tokenizer, task).nats, rel=1e-6)
    assert result.accuracy is not None
    assert result.divergence is None
    in_memory = run(llama, task, tokenizer=tokenizer)
    assert in_memory.results[0].loss == result.loss
    assert in_memory.model == "LlamaForCausalLM"


def test_a_hit_loads_no_model(folder: Path, rows: Path, loads: list[str]):
    first = run(folder, rows)
    again = run(str(folder), f"other={rows}", batch_size=3)
    assert loads == ["model"]
    assert not first.results[0].cached
    assert again.results[0].cached
    assert again.results[0].task == "other"
    assert again.results[0].loss == first.results[0].loss
    assert run(folder, rows, cache=False).results[0].loss == first.results[0].loss
    assert loads == ["model", "model"]
    run(folder, rows, dtype="bfloat16", batch_size=2)
    assert run(folder, rows, dtype="bfloat16", batch_size=2).results[0].cached
    assert not run(folder, rows, dtype="bfloat16", batch_size=3).results[0].cached


def test_a_hit_needs_no_torch(folder: Path, rows: Path):
    run(folder, rows)
    code = (
        "import sys; from consilience.tasks import evaluate;"
        f"assert evaluate({str(folder)!r}, {str(rows)!r}).results[0].cached;"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("change", ["weights", "config", "rows", "max_tokens", "dtype", "seed", "reference", "damage"])
def test_whatever_matters_misses(
    change: str, folder: Path, rows: Path, other_llama: Any, loads: list[str], rows_file: Callable[..., Path]
):
    settings: dict[str, Any] = {}
    first = run(folder, rows)
    if change == "weights":
        other_llama.save_pretrained(folder)
    elif change == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    elif change == "rows":
        rows_file(ROWS[0], ROWS[1].replace("sat", "sits"), name="code/test.jsonl")
    elif change == "reference":
        settings = {"reference": folder}
    elif change == "damage":
        for file in (cache_folder() / "results").rglob("*.json"):
            file.write_text('{"task": "code"}')
    else:
        settings = {change: {"max_tokens": 2, "dtype": "bfloat16", "seed": 1}[change]}
    second = run(folder, rows, **settings)
    assert not second.results[0].cached
    assert len(loads) >= 2
    if change not in ("damage", "reference", "seed"):
        assert second.results[0].loss != first.results[0].loss
    assert run(folder, rows, **settings).results[0].cached


def test_only_missing_tasks_are_run(folder: Path, rows: Path, rows_file: Callable[..., Path], loads: list[str]):
    run(folder, rows)
    other = rows_file('{"text": "the cat sat"}', name="cats.jsonl")
    both = run(folder, [other, rows])
    assert [(r.task, r.cached) for r in both.results] == [("cats", False), ("code", True)]


def test_references_for_all_tasks_or_one_each(
    folder: Path,
    rows: Path,
    rows_file: Callable[..., Path],
    other_llama: Any,
    tokenizer: Any,
    loads: list[str],
    tmp_path: Path,
):
    other = save(other_llama, tokenizer, tmp_path / "other")
    cats, dogs = (rows_file('{"text": "the cat sat"}', name=f"{name}.jsonl") for name in ("cats", "dogs"))
    found = run(folder, [rows, cats, dogs], reference={"code": other, "dogs": folder})
    code, none, same = found.results
    assert code.divergence is not None
    assert code.divergence.kl > 0.01
    assert code.reference == str(other)
    assert none.divergence is None
    assert same.divergence is not None
    assert same.divergence.kl == pytest.approx(0, abs=1e-7)
    assert sorted(loads) == ["model", "model", "other"]
    assert run(folder, [rows, cats], reference=other).results[0].divergence == code.divergence
    with pytest.raises(InputError, match=r"reference for 'dogs': no such task; the tasks are code, cats"):
        run(folder, [rows, cats], reference={"dogs": other})


def test_a_reference_with_another_tokenizer_is_refused(folder: Path, rows: Path, llama: Any, tmp_path: Path):
    other = make_tokenizer()
    other.add_tokens(["dog"])
    save(llama, other, tmp_path / "other")
    with pytest.raises(InputError, match="tokenizer differs"):
        run(folder, rows, reference=tmp_path / "other")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_part_of_the_model(folder: Path, rows: Path, tmp_path: Path, loads: list[str]):
    from peft import PeftModel

    adapter = make_adapter(tmp_path / "adapter", folder)
    base = run(folder, rows)
    joined = run(f"{folder}+{adapter}", rows)
    apart = run(folder, rows, adapter=adapter)
    assert joined.model == apart.model == f"{folder}+{adapter}"
    assert apart.results[0].cached
    assert joined.results[0].loss is not None
    assert base.results[0].loss is not None
    assert joined.results[0].loss.value != pytest.approx(base.results[0].loss.value, rel=1e-3)
    unmerged: Any = PeftModel.from_pretrained(load_model(folder), str(adapter)).eval()
    live = run(unmerged, rows, tokenizer=make_tokenizer())
    assert live.results[0].loss is not None
    assert live.results[0].loss.value == pytest.approx(joined.results[0].loss.value, rel=1e-5)
    make_adapter(tmp_path / "adapter", folder, rank=3)
    assert not run(folder, rows, adapter=adapter).results[0].cached
    with pytest.raises(InputError, match="give one"):
        run(f"{folder}+{adapter}", rows, adapter=adapter)
    with pytest.raises(InputError, match="model given by its path"):
        run(unmerged, rows, adapter=adapter)


def test_an_adapter_of_another_model_is_refused(folder: Path, rows: Path, tmp_path: Path, tokenizer: Any):
    adapter = make_adapter(tmp_path / "adapter", folder)
    deeper = save(make_llama(num_hidden_layers=3), tokenizer, tmp_path / "deeper")
    wider = save(make_llama(intermediate_size=64), tokenizer, tmp_path / "wider")
    for model in (deeper, wider):
        with pytest.raises(InputError, match="adapter: does not fit"):
            run(model, rows, adapter=adapter)


def test_encoder_decoder_on_disk(rows: Path, tmp_path: Path, plain_tokenizer: Any):
    model = save(make_t5(), plain_tokenizer, tmp_path / "t5")
    result = run(model, rows).results[0]
    assert result.loss is not None
    assert result.loss.n_examples == 3


def test_wrong_models_are_one_line(folder: Path, rows: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "empty").mkdir()
    adapter = make_adapter(tmp_path / "adapter", folder)
    headless = tmp_path / "headless"
    save(make_llama(), make_tokenizer(), headless)
    tensors = load_file(headless / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, headless / "model.safetensors", {"format": "pt"})
    torn = tmp_path / "torn"
    save(make_llama(), make_tokenizer(), torn)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    weightless = tmp_path / "weightless"
    save(make_llama(), make_tokenizer(), weightless)
    (weightless / "model.safetensors").unlink()
    for model, said in (
        (tmp_path / "absent", "absent: no such file or folder"),
        (tmp_path / "empty", "empty: holds no config.json"),
        (adapter, r"adapter: holds an adapter, not a model; write BASE\+"),
        (rows, "no such model folder"),
        (headless, r"headless: tensor model\.layers\.1\.mlp\.up_proj\.weight missing or misshapen"),
        (torn, "torn: does not load as a language model"),
        (weightless, "weightless: does not load as a language model"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            run(model, rows)
        assert "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer(folder: Path, rows: Path, llama: Any):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="its tokenizer does not load"):
        run(folder, rows)
    with pytest.raises(InputError, match="a model in memory needs its tokenizer"):
        run(llama, rows)
    assert run(folder, rows, tokenizer=make_tokenizer()).results[0].loss is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 0}, "batch_size 0 must be a whole number, and must be at least 1"),
        ({"max_examples": 0}, "max_examples 0"),
        ({"max_tokens": -1}, "max_tokens -1"),
        ({"threads": 0}, "threads 0"),
        ({"dtype": "float16"}, "dtype 'float16' must be float32 or bfloat16"),
    ],
)
def test_wrong_settings(folder: Path, rows: Path, settings: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        run(folder, rows, **settings)


def test_tasks_need_names_of_their_own(folder: Path, rows: Path):
    with pytest.raises(InputError, match="two tasks are named 'code'; give one as NAME=PATH"):
        run(folder, [rows, rows])
    with pytest.raises(InputError, match="no task given"):
        run(folder, [])


def test_threads_are_set_for_the_call_only(folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    monkeypatch.setattr(
        evaluation_module, "load_model", lambda *a, **k: (seen.append(torch.get_num_threads()), load_model(*a, **k))[1]
    )  # pyright: ignore
    before = torch.get_num_threads()
    run(folder, rows, threads=before + 1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_progress_goes_to_standard_error(folder: Path, rows: Path, capsys: pytest.CaptureFixture[str]):
    evaluate(folder, rows, progress=True)
    assert capsys.readouterr().out == ""


def test_json_round_trip(folder: Path, rows: Path):
    found = run(folder, rows, reference=folder)
    value = json.loads(found.to_json())
    assert TaskResult.from_dict(value["results"][0]) == found.results[0]
    short = json.loads(found.to_json(examples=False))
    assert short["results"][0]["loss"]["value"] == value["results"][0]["loss"]["value"]
    assert "nats" not in short["results"][0]["loss"]


def test_tables(
    folder: Path, rows: Path, rows_file: Callable[..., Path], other_llama: Any, tokenizer: Any, tmp_path: Path
):
    cats = rows_file('{"text": "the cat sat"}', name="cats[1].jsonl")
    other = save(other_llama, tokenizer, tmp_path / "other")
    one = run(folder, [rows, cats], name="base[0]", reference={"code": other}, max_tokens=2)
    two = run(other, rows, name="other", reference=other)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(render([one, two]))
    said = console.export_text()
    assert "base[0]" in said  # names are not markup
    assert "cats[1]" in said
    assert "KL(reference || model)" in said
    assert "0.0000 [0.0000, 0.0000]" in said
    assert "accuracy by rank classification" in said
    assert one.results[0].loss is not None
    assert f"{one.results[0].loss.value:.3f} [" in said
    assert f"base[0], code: {one.results[0].n_cut} of 3 rows cut" in said


@pytest.fixture
def cats() -> Any:
    """A Llama trained for a moment to answer two prompts."""
    model, tokenizer = make_llama(4), make_tokenizer()
    texts = ["cat", "a much longer prompt about a cat"]
    answers = ["yes", "no it is not good"]
    from consilience.tasks import encode

    pairs = encode(Task("t", tuple(Row(prompt=p, response=r) for p, r in zip(texts, answers, strict=True))), tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = torch.zeros(())
        for one in pairs:
            logits = model(input_ids=torch.tensor([one.inputs])).logits[0, list(one.positions)]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(one.targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer, texts, answers


def test_sampling_answers_prompts_through_the_template(cats: Any):
    model, tokenizer, texts, answers = cats
    assert sample(model, tokenizer, texts) == answers
    assert sample(model, tokenizer, texts[::-1], batch_size=1) == answers[::-1]
    assert sample(model, tokenizer, texts[0]) == answers[0]
    short = sample(model, tokenizer, texts[1], max_new_tokens=2)
    assert answers[1].startswith(short)
    assert len(tokenizer(short).input_ids) <= 2
    with pytest.raises(ValueError, match="at least 1"):
        sample(model, tokenizer, "x", 0)


def test_sampling_together_is_sampling_one_by_one(llama: Any, tokenizer: Any):
    prompts = ["cat", "is the cat good or bad?", "x" * 40]  # a random model would notice padding
    assert sample(llama, tokenizer, prompts, 8) == [sample(llama, tokenizer, prompt, 8) for prompt in prompts]


def test_sampling_ignores_the_model_s_own_sampling_settings(cats: Any):
    model, tokenizer, texts, answers = cats
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.generation_config.max_length = 3
    assert sample(model, tokenizer, texts) == answers


def test_sampling_from_an_encoder_decoder(plain_tokenizer: Any):
    answers = sample(make_t5(), plain_tokenizer, ["cat", "the cat sat"], 5)
    assert len(answers) == 2


def test_importing_tasks_is_light():
    code = "import sys, consilience.tasks; assert not {'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
