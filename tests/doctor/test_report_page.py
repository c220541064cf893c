"""The doctor's page: whole, safe, and true to its values, whatever these are."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from doctor_models import Make, drawn, moved

from consilience.__main__ import run
from consilience.doctor.candidates import Candidate
from consilience.doctor.diagnosis import (
    BlockFacts,
    BoundFacts,
    Diagnosis,
    ExpertFacts,
    PairFacts,
    ProbedTask,
    ProbeFacts,
    SetFacts,
    TrainedExpert,
)
from consilience.doctor.findings.finding import Finding, Severity, ranked
from consilience.doctor.report import draw
from consilience.doctor.report.page import page
from consilience.doctor.trying import Tried
from consilience.errors import printable

VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = '<b onload="x()">&\'\u202e' + "n" * 90
FAR = {"href", "src", "action", "data", "poster", "srcset", "xlink:href"}
NUMBERS = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e308, -1e308, 5e-324]


class Page(HTMLParser):
    """What a browser would see, and whether every tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def said(self) -> str:
        """All text that is not style."""
        return "".join(text for where, text in self.texts if where != "style")

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        """Attributes of the tags of a name and class."""
        found = [own for name, own in self.tags if name == tag]
        return [own for own in found if kind is None or kind in (own.get("class") or "").split()]


def checked(found: Diagnosis) -> Page:
    """A page after what must be true of every page."""
    text = page(found)
    read = Page(text)
    assert text.startswith("<!doctype html>")
    assert not re.search(r"url\(|@import|https?:|javascript:", text)
    assert not any(tag in ("script", "iframe", "object", "foreignobject") for tag, _ in read.tags)
    for _, own in read.tags:
        assert not any(key.startswith("on") for key in own)
        assert {own[key] for key in FAR & own.keys()} <= {"data:,"}
        assert not re.search(r"\b(nan|inf|infinity|None)\b", " ".join(v or "" for v in own.values()))
    assert not re.search(r"\b(nan|inf|infinity|None)\b", read.said)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]|@@", text)
    for one in read.all("svg"):
        parts = own_class(one)
        assert parts & {"at", "sample"} or one.get("aria-label") or one.get("aria-hidden")
    assert "Figures describe these weights; none is a guarantee" in read.said
    for finding in found.findings:
        for words in (finding.what, finding.mend, finding.effect, finding.confidence, ", ".join(finding.places)):
            assert printable(words) in read.said
    return read


def own_class(own: dict[str, str | None]) -> set[str]:
    return set((own.get("class") or "").split())


def wave(*at: int) -> float:
    """A number between -1 and 1 for a place."""
    return math.sin(sum((i + 1) * 2.3 * (k + 1) for k, i in enumerate(at)) + 1)


def diagnosis(experts: int, blocks: int, *, probes: bool = True, prefix: str = "expert ", **more: Any) -> Diagnosis:
    """Made-up values of any size."""
    names = tuple(f"{prefix}{k}" for k in range(experts))
    facts = tuple(
        ExpertFacts(name, f"/somewhere/with/a/long/path/{name}", "adapter", 10 + 5 * wave(k), 0.01, 0.9999, 1 / experts,
                    8 + wave(k), 0.5, *((None, None) if k % 3 else (2.5, 0.3)))
        for k, name in enumerate(names)
    )  # fmt: skip
    pairs = tuple(
        PairFacts(names[j], names[k], 0.3 * wave(j, k), None if wave(j, k) > 0.9 else 0.5 - 0.1 * wave(j, k),
                  None if k == 1 else abs(wave(k, j)), None if k == 1 else 0.01)
        for j, k in combinations(range(experts), 2)
    )  # fmt: skip
    order = sorted(range(blocks), key=str)
    pair = (names[0], names[1]) if experts > 1 else None
    places = tuple(
        BlockFacts(f"model.layers.{i}", tuple(2 + wave(i, k) for k in range(experts)), abs(wave(i)) + i / blocks,
                   -0.2 * abs(wave(i)) if pair else None, pair, 0.4 + 0.1 * wave(i))
        for i in order
    )  # fmt: skip
    together = SetFacts(10**8, 5 * 10**7, 12.3 if experts > 1 else None, 15.0, 9.0, 8.0, 1 / experts, 0.4, 0.45)
    rest = BlockFacts("outside blocks", (1.0,) * experts, 0.3, None, None, 0.2)
    severities: tuple[Severity, ...] = ("note", "stop", "warning")
    found = [
        Finding(severity, "kind", names[:2], f"{severity}: <what> & why", "'this'", 'a "gain" > 0', "likely", ("a.b",))
        for severity in severities
    ]  # fmt: skip
    values: dict[str, Any] = {
        "recipe": "recipe.yaml", "base": "base", "weights": "uniform, 1 / K", "experts": facts,
        "refused": (("odd", "its shapes differ"),), "together": together, "pairs": pairs, "blocks": (*places, rest),
        "findings": ranked(found), "unknown": ("this & that",), "evidence": ("checkpoints",), "seconds": 1.25,
        "probes": probed(names) if probes else None, "training": tuple(map(trained, names)),
        "bound": BoundFacts({"length": 2.0, "noise": None}, {"optimisation": 0.5, "stability": None}, "optimisation"),
    }  # fmt: skip
    return Diagnosis(**{**values, **more})


def trained(name: str) -> TrainedExpert:
    """What a log says of an expert, and one that it does not say."""
    return TrainedExpert(
        name, 100, 1e-4, "linear", 8, 800, None, name, "lora", 0.005, "logged", 0.7, None, 1e-5, (name,)
    )


def probed(names: tuple[str, ...]) -> ProbeFacts:
    """Made-up losses: every second way has a barrier."""
    tasks = tuple(
        ProbedTask(name, 4, 3 + wave(k), 1.0, 1.6, (1.1, 1.9 if k % 2 else 1.2, 1.5, 1.6), -0.004 * wave(k),
                   0.6 if k % 2 else 0.0, 1.2, None if k % 2 else 0.1)
        for k, name in enumerate(names)
    )  # fmt: skip
    uniform = (1 / len(names),) * len(names)
    merges = tuple(
        Candidate(f"average without {name}", "subset", uniform, (2.0,) * len(names), 1 + 0.05 * k, 0.7, name)
        for k, name in enumerate(names)
    )
    methods = (Tried("ties:density=0.3", (2.0,) * len(names), 0.4, names[0]),)
    given = Candidate("the weights given", "given", uniform, (2.0,) * len(names), 2.5, 0.9, names[0])
    curve = tuple(2 + 1 / k for k in range(1, len(names) + 1)) if len(names) > 1 else ()
    gain = 0.05 if len(names) > 2 else None
    return ProbeFacts((0.25, 0.5, 0.75, 1.0), tasks, (*merges, given), methods, curve, gain)


@pytest.mark.parametrize(
    ("experts", "blocks"),
    [(1, 1), (2, 2), (3, 120), *(pytest.param(*size, marks=pytest.mark.slow) for size in [(20, 30), (60, 120)])],
)
@pytest.mark.parametrize("probes", [True, False])
def test_a_page_of_any_size_is_whole(experts: int, blocks: int, probes: bool) -> None:
    found = diagnosis(experts, blocks, probes=probes)
    read = checked(found)
    pairs = experts * (experts - 1)
    assert len(read.all("rect", "over")) + len(read.all("rect", "under")) + len(read.all("rect", "unknown")) == (
        3 * pairs + experts * (blocks + 1)
    )
    assert len(read.all("rect", "self")) == (3 * experts if pairs else 0)
    assert all(one.name in read.said for one in found.experts)
    assert "odd: its shapes differ" in read.said
    assert "this & that" in read.said
    for title, shown in (
        ("Cosines", experts > 1), ("Sign conflicts", experts > 1), ("Overlap of inputs", experts > 1),
        ("Displacement by block", experts > 1), ("Cancellation by block", experts > 1),
        ("Length by block and expert", True), ("Loss of each task", probes), ("From each expert to the merge", probes),
        ("How they were trained", True),
        ("What the theory blames", True), ("Merges that could be made instead", probes),
        ("What one more expert brings", probes and experts > 1),
    ):  # fmt: skip
        assert (title in read.said) is shown
    if probes:
        assert len(read.all("line", "barrier")) == experts // 2


@pytest.mark.parametrize("prefix", [EVIL, "", "Ĝ專家‮ ", "\ud800"])
def test_names_of_strangers_are_text(prefix: str) -> None:
    found = diagnosis(3, 2, prefix=prefix, recipe=prefix, base=prefix, unknown=(prefix,), refused=((prefix, prefix),))
    blocks = tuple(dataclasses.replace(one, name=f"{prefix}.{i}") for i, one in enumerate(found.blocks))
    told = Finding("stop", "kind", (prefix,), prefix, prefix, prefix, "likely", (prefix,))
    read = checked(dataclasses.replace(found, blocks=blocks, findings=(told,)))
    assert not read.all("b")
    assert printable(f"{prefix}0") in read.said
    assert printable(f"{prefix}.1") in read.said


def broken(value: Any, number: Any) -> Any:
    """A value with every number of its own replaced that may be anything."""
    if isinstance(value, float):
        return number
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: broken(getattr(value, field.name), number) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **own)
    return tuple(broken(one, number) for one in value) if isinstance(value, tuple) else value  # pyright: ignore


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("experts", [1, 4])
def test_numbers_that_are_none_are_a_dash(experts: int, number: float) -> None:
    found = diagnosis(experts, 3)
    checked(broken(found, number))
    assert found.probes is not None
    mixed = [broken(one, number) if i == 1 else one for i, one in enumerate(found.probes.tasks)]
    some = dataclasses.replace(found.probes, tasks=tuple(mixed), candidates=broken(found.probes.candidates, number))
    checked(dataclasses.replace(found, probes=some))


def test_what_is_not_there_is_left_out() -> None:
    nothing = ProbeFacts((), (), (), (), (), None)
    together = dataclasses.replace(diagnosis(2, 1).together, displacement=None)
    empty = diagnosis(2, 1, findings=(), unknown=(), refused=(), pairs=(), training=(), bound=None, together=together)
    read = checked(dataclasses.replace(empty, blocks=(), probes=nothing))
    assert "Nothing is wrong with these 2 experts" in read.said
    assert "the weights do not sum to 1" in read.said
    assert not re.search("What is not known|How they were trained|How they agree|Where in the model", read.said)
    probes = probed(("a", "b"))
    short = dataclasses.replace(probes, tasks=(dataclasses.replace(probes.tasks[0], scan=(1.1,)),))
    assert "0.25" in checked(dataclasses.replace(empty, probes=short)).said


@pytest.mark.parametrize(
    ("severities", "verdict"),
    [(("stop", "note"), "Do not merge"), (("warning", "note"), "will likely suffer"), (("note",), "Nothing stands")],
)
def test_the_verdict_follows_the_worst_finding(severities: tuple[Severity, ...], verdict: str) -> None:
    told = [Finding(one, "kind", (), f"a {one}", "do") for one in severities]
    text = page(diagnosis(2, 2, findings=ranked(told)))
    read = Page(text)
    assert verdict in read.said
    assert [own_class(own) - {"badge"} for own in read.all("span", "badge")] == [{one} for one in severities] * 2
    assert [f"1 {one}" in read.said for one in severities] == [True] * len(severities)


def test_findings_stand_in_their_order() -> None:
    read = Page(page(diagnosis(2, 2)))
    assert [own["class"] for own in read.all("li") if "class" in own] == ["stop", "warning", "note"]


def test_blocks_stand_in_the_order_of_the_model() -> None:
    titles = [text for where, text in Page(page(diagnosis(2, 12))).texts if where == "title" and "share" not in text]
    found = [re.search(r"layers\.(\d+): .*agree least: expert 0 and expert 1, cosine −", one) for one in titles]
    assert [int(one[1]) for one in found if one] == [*range(12), *range(12)]


def test_bars_and_marks_stand_where_their_values_are() -> None:
    found = diagnosis(2, 2)
    task = ProbedTask("a", 1, 10.0, 0.0, 5.0, (5.0,), 1.0, 0.0, 1.0, None)
    merges = [
        Candidate(name, "subset", (1.0, 0.0), (1.0, 1.0), mean, 0.0, "a")
        for name, mean in (("one", 4.0), ("two", -2.0))
    ]
    probes = ProbeFacts((1.0,), (task,), tuple(merges), (), (3.0, 2.0), None)
    read = Page(page(dataclasses.replace(found, probes=probes)))
    marks = [own["x"] for own in read.all("svg", "at") if own.get("y") == "15.0"]
    assert marks == ["100.00%", "0.00%", "50.00%"]
    bars = [(own["x"], own["width"]) for own in read.all("rect", "mark") if own.get("y") == "6"]
    scale = draw.scale_of([5.0, 4.0, -2.0], zero=True)
    low, zero, high = (100 * scale.at(value) for value in (-2, 0, 4))
    assert bars == [(f"{zero:.2f}%", f"{high - zero:.2f}%"), (f"{low:.2f}%", f"{zero - low:.2f}%")]


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.0, 10.0], 0, 10),
        ([-1.0, 1.0], -1, 1),
        ([3.0], 2.6, 3.4),
        ([0.0], -1, 1),
        ([], -1, 1),
        ([2.63, 2.94], 2.6, 3.0),
    ],
)
def test_an_axis_holds_its_values_with_few_round_numbers(values: list[float], low: float, high: float) -> None:
    scale = draw.scale_of(values)
    assert (scale.low, scale.high) == (pytest.approx(low), pytest.approx(high))
    assert 2 <= len(scale.ticks()) <= 8
    assert scale.ticks()[0] == pytest.approx(scale.low)
    assert scale.ticks()[-1] == pytest.approx(scale.high)


def test_numbers_in_words() -> None:
    assert [draw.number(one) for one in (None, math.nan, math.inf, -0.0, -1.5)] == ["–", "–", "–", "0", "−1.5"]
    assert [draw.number(one, "+.2f") for one in (0.001, -0.001, 0.5)] == ["0.00", "0.00", "+0.50"]
    assert draw.percent(0.125) == "12.5\N{NO-BREAK SPACE}%"
    assert draw.clipped("專家專家", 5) == "專…"


def test_the_command_writes_the_page(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, recipe, out = drawn(0), tmp_path / "recipe.yaml", tmp_path / "report.html"
    recipe.write_text(json.dumps(make(base, a=moved(base, drawn(1), 0.05), b=moved(base, drawn(2), 0.05))))
    out.write_text("something older")
    assert run(["doctor", str(recipe), "--html", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["experts"][0]["name"] == "a"
    assert "report.html: open it in a browser" in printed.err
    read = Page(out.read_text(encoding="utf-8"))
    assert "Nothing is wrong with these 2 experts as far as their weights tell." in read.said
    assert [one.name for one in tmp_path.glob(".report*")] == []


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, says in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.html", "there is no folder")):
        assert run(["doctor", "no-recipe.yaml", "--html", str(target)]) == 2
        assert says in capsys.readouterr().err
