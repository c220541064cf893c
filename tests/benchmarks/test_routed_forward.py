"""The routing benchmark: its sides are what they are called, its passes repeat, and its page says what was found."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from benchmarks import records, routed_forward, routed_sides
from benchmarks.measure import Measurement
from benchmarks.records import Results
from benchmarks.routed_forward import DTYPES, Row
from benchmarks.routed_sides import (
    ARROW,
    INSTRUCTED,
    NETS,
    SIDES,
    Agreement,
    Case,
    Found,
    Load,
    Pass,
    Spec,
    compare,
    make_adapters,
)

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return make_adapters("tiny", 3, tmp_path_factory.mktemp("adapters"))


def spec_of(adapters: tuple[Path, ...], dtype: str = "float32") -> Spec:
    return Spec("tiny", dtype, 1, "cpu", 1, adapters, SIDES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ours_is_the_loop_over_tokens(adapters: tuple[Path, ...], dtype: str) -> None:
    spec = spec_of(adapters, dtype)
    found = routed_sides.work(spec)
    assert set(found.agreement) == {"ours", "ours, arrow"}
    row = Row("tiny", 3, dtype, 1, found)
    assert row.agrees
    if dtype == "float32":
        assert max(max(one.logits, one.module) for one in found.agreement.values()) < 1e-5
    for load in NETS["tiny"].loads:
        assert set(found.seconds[load.title]) == set(SIDES)
        assert all(len(values) == 1 and values[0] > 0 for values in found.seconds[load.title].values())
    # Two layers: q and o are 32 x 32, k and v 32 x 16, gate, up and down 32 x 48; rank 4, three experts, a gate each.
    each = 4 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 48)) + 6 * 32 + 48
    assert found.experts_mb == pytest.approx(2 * 3 * each * (4 if dtype == "float32" else 2) / 1e6)


def test_another_router_is_not_the_loop(adapters: tuple[Path, ...]) -> None:
    case = Case(spec_of(adapters))
    ours = routed_sides.MAKERS["ours"](case)
    found = {"ours": compare(case, ours, ARROW)}
    assert min(found["ours"].module, found["ours"].logits) > 1e-3
    assert not Row("tiny", 3, "float32", 1, Found(agreement=found)).agrees
    case.cosines = case.cosines.flip(1)
    assert compare(case, ours, INSTRUCTED).logits < 1e-5
    ours.routing.set(scale=1.0)
    assert compare(case, ours, INSTRUCTED).module > 1e-4


def test_sides_share_the_base_and_leave_it_alone(adapters: tuple[Path, ...]) -> None:
    case = Case(spec_of(adapters))
    ids = case.ids[:2]
    before = case.base(input_ids=ids).logits
    models = {side: make(case) for side, make in routed_sides.MAKERS.items()}
    own = {value.data_ptr() for value in case.base.parameters()}
    for side, model in models.items():
        assert own <= {value.data_ptr() for value in model.parameters()}
        assert bool(torch.equal(model(input_ids=ids).logits, before)) == (side == "base")
    assert torch.equal(case.base(input_ids=ids).logits, before)


def test_one_adapter_is_the_first_expert(adapters: tuple[Path, ...]) -> None:
    case = Case(spec_of(adapters))
    ours, peft = routed_sides.MAKERS["ours"](case), routed_sides.MAKERS["one adapter"](case)
    ids = case.ids[:2]
    with ours.routing.only(ours.routing.names[0]):
        assert torch.allclose(ours(input_ids=ids).logits, peft(input_ids=ids).logits, atol=1e-6)


def test_a_step_finds_the_cache_as_it_was(adapters: tuple[Path, ...]) -> None:
    case = Case(spec_of(adapters))
    load = Load(3, 1, 5)
    step = Pass(routed_sides.MAKERS["ours"](case), load, case)
    keys = step.cache.layers[0].keys.clone()
    assert keys.shape[0] == 3
    for _ in range(2):
        assert step() > 0
        assert torch.equal(step.cache.layers[0].keys, keys)
    assert keys.shape[2] == 5


def test_a_run_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Spec] = []

    def here(spec: Spec, folder: Path, more: Mapping[str, str]) -> tuple[Found, Measurement]:
        asked.append(spec)
        given, out = folder / "spec.json", folder / "found.json"
        given.write_bytes(TypeAdapter(Spec).dump_json(spec))
        routed_sides.main([str(given), str(out)])
        found = TypeAdapter(Found).validate_json(out.read_bytes())
        return found, Measurement(1.0, 1.0, found.imports_mb + 10.0 * len(more), 0.0, 0, False, "")

    monkeypatch.setattr(routed_forward, "run_process", here)
    arguments = ["--net", "tiny", "--k", "2", "--dtype", "float32", "--repeat", "1", "--cache", str(tmp_path)]
    assert routed_forward.main(arguments) == 0
    assert [spec.sides for spec in asked] == [SIDES, *((side,) for side in SIDES)]
    assert [spec.repeat for spec in asked] == [1, 0, 0, 0, 0, 0]
    found = records.load(Results[Row], tmp_path / "results" / "routed_forward.json")
    (row,) = found.rows
    assert (row.net, row.k, row.dtype, row.threads, row.failure) == ("tiny", 2, "float32", 1, "")
    assert row.memory_mb == pytest.approx(dict.fromkeys(SIDES, 20.0))
    assert "| tiny, K = 2, float32, 1 thread | prefill 2 x 6 |" in (tmp_path / "results/routed_forward.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_without_its_base_a_net_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(routed_forward, "base_folder", lambda: tmp_path / "none")
    assert routed_forward.main(["--net", "smollm2-135m", "--cache", str(tmp_path)]) == 0
    text = (tmp_path / "results" / "routed_forward.md").read_text()
    assert "Skipped: smollm2-135m, K = 8, float32, 1 thread (its base is not there; make it with" in text
    assert "its base is not there" in capsys.readouterr().out


def row_of(net: str, k: int, ours: float, adapter: float, memory: float, difference: float = 1e-6) -> Row:
    """A row whose base took 0.1 s and 100 MB, and whose adapters and gates take 20 MB."""
    seconds: dict[str, dict[str, list[float]]] = {
        "prefill 1 x 512": {"base": [0.1, 0.2], "ours": [0.1 * ours, 0.2 * ours], "ours, arrow": [0.1, 0.2],
                            "one adapter": [0.1 * adapter, 0.2 * adapter]},
    }  # fmt: skip
    found = Found(50.0, 20.0, 0.0, seconds, {"ours": Agreement(2e-7, difference), "ours, arrow": Agreement(1e-7, 1e-7)})
    return Row(net, k, "float32", 1, found, {"base": 100.0, "ours": memory, "ours, arrow": 120.0}, 0.1)


def results(*rows: Row) -> Results[Row]:
    return Results("2026-01-02T03:04:05+00:00", {"cores": "2"}, {"python": "3.11"}, {"device": "cpu"}, rows)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (row_of("llama-2048", 8, 1.19, 1.1, 126.0), "ours / base | 1.19 | <= 1.2 | met |"),
        (row_of("llama-2048", 8, 1.21, 1.1, 126.0), "ours / base | 1.21 | <= 1.2 | missed |"),
        (row_of("llama-2048", 64, 1.9, 1.1, 126.0), "ours / base | 1.90 | <= 2.0 | met |"),
        (row_of("smollm2-135m", 8, 1.8, 1.25, 126.0), "ours / one adapter | 1.44 | <= 1.5 | met |"),
        (row_of("smollm2-135m", 8, 1.8, 1.1, 126.0), "ours / one adapter | 1.64 | <= 1.5 | missed |"),
    ],
)
def test_times_are_judged(row: Row, said: str) -> None:
    text = routed_forward.page(results(row), "x.json")
    assert f"| {row.title} | prefill 1 x 512, {said}" in text


def test_memory_and_differences_are_judged(tmp_path: Path) -> None:
    rows = (
        row_of("llama-2048", 8, 1.0, 1.0, 126.0),
        row_of("llama-2048", 64, 1.0, 1.0, 127.0, difference=3e-4),
        Row("llama-2048", 8, "bfloat16", 2, failure="time limit"),
    )
    made = results(*rows)
    path = routed_forward.save(made, tmp_path)
    assert path.name == "routed_forward.json"
    assert records.load(Results[Row], path) == made
    text = path.with_suffix(".md").read_text()
    few, many = rows[0].title, rows[1].title
    assert f"| {few} | memory, ours / (base + adapters + gates) | 1.05 | <= 1.05 | met |" in text
    assert f"| {many} | memory, ours / (base + adapters + gates) | 1.06 | <= 1.05 | missed |" in text
    assert f"| {few} | ours | 1.0e-06 | 2.0e-07 | yes |" in text
    assert f"| {many} | ours | 3.0e-04 | 2.0e-07 | no |" in text
    assert f"| {few} | prefill 1 x 512 | 150.0 | 150.0 | 1.00 | 1.00 | - | 1.00 |" in text
    assert "Failed: llama-2048, K = 8, bfloat16, 2 threads (time limit)." in text
    path.with_suffix(".md").unlink()
    assert routed_forward.main(["--page", str(path)]) == 0
    assert path.with_suffix(".md").read_text() == text


def test_logits_count_in_float32_alone() -> None:
    found = Found(agreement={"ours": Agreement(logits=0.1, module=1e-6)})
    assert not Row("tiny", 2, "float32", 1, found).agrees
    assert Row("tiny", 2, "bfloat16", 1, found).agrees
    found = Found(agreement={"ours": Agreement(logits=0.1, module=0.06)})
    assert not Row("tiny", 2, "bfloat16", 1, found).agrees


def test_no_comparison_is_no_agreement() -> None:
    assert not Row("tiny", 2, "float32", 1).agrees
    assert Row("tiny", 2, "float32", 1).ratio("prefill 1 x 512", "ours", "base") is None


def options_of(*arguments: str) -> Any:
    return routed_forward.options_of(routed_forward.parser().parse_args(arguments))


def test_a_complete_run_is_kept() -> None:
    usual = options_of()
    assert usual.cases == (("llama-2048", 8), ("llama-2048", 64), ("smollm2-135m", 8))
    assert (usual.dtypes, usual.threads, usual.device) == (DTYPES, (1,), "cpu")
    assert usual.folder.parts[-3:] == ("docs", "results", "bench")
    for part in (("--net", "llama-2048"), ("--k", "4"), ("--dtype", "bfloat16"), ("--net", "tiny")):
        assert options_of(*part).folder.parts[-2:] == ("bench", "results")
    assert options_of("--net", "llama-2048").cases == (("llama-2048", 8), ("llama-2048", 64))
    assert options_of("--k", "4").cases == (("llama-2048", 4), ("smollm2-135m", 4))
    cuda = dataclasses.replace(results(), settings={"device": "cuda"})
    assert routed_forward.name_of(cuda) == "routed_forward_cuda.json"


@pytest.mark.parametrize(
    "arguments", [["--net", "gpt"], ["--k", "0"], ["--threads", "x"], ["--threads", "9999"], ["--dtype", "int8"]]
)
def test_what_cannot_be_run_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        routed_forward.main(arguments)
