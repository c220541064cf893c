"""The language suite's committed rows and adapters, and the readers of its sources, without any network."""

import io
import json
import re
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from suites.language import ALL_DOMAINS, DOMAINS, Split, adapter_path, calibration_path, heldout_path, train_path
from suites.language import data as language

SHAPES = {
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}
"""(inputs, outputs) of every linear layer of a block."""

CLASSES = {"choices", "label"}

each_domain = pytest.mark.parametrize("domain", DOMAINS)
any_domain = pytest.mark.parametrize("domain", ALL_DOMAINS)


# ------------------------------------------------------------------------------------------------------ committed rows


@any_domain
def test_rows_are_well_formed(domain: str) -> None:
    sizes: dict[Split, int] = {"validation": language.N_VALIDATION, "test": language.N_TEST}
    for split, count in sizes.items():
        rows = language.read_jsonl(heldout_path(domain, split))
        assert len(rows) == count
        for row in rows:
            assert row["prompt"] == row["prompt"].strip() != ""
            assert row["response"] == row["response"].strip() != ""
            assert len(row["prompt"]) + len(row["response"]) < (520 if domain in DOMAINS else 400)
            assert set(row) == {"prompt", "response"} | (CLASSES if domain in ("sentiment", "spam") else set[str]())


@any_domain
def test_calibration_rows_hold_prompts_only(domain: str) -> None:
    rows = language.read_jsonl(calibration_path(domain))
    assert len(rows) == language.N_CALIBRATION
    assert all(set(row) == {"prompt"} and row["prompt"] for row in rows)


@each_domain
def test_splits_share_no_prompt(domain: str) -> None:
    files = [heldout_path(domain, "validation"), heldout_path(domain, "test"), calibration_path(domain)]
    prompts = [row["prompt"] for path in files for row in language.read_jsonl(path)]
    assert len(prompts) == len(set(prompts))
    if train_path(domain).is_file():
        train = {row["prompt"] for row in language.read_jsonl(train_path(domain))}
        assert not train & set(prompts[: language.N_VALIDATION + language.N_TEST])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_sentiment_labels_name_the_response_and_are_balanced(split: Split) -> None:
    rows = language.read_jsonl(heldout_path("sentiment", split))
    for row in rows:
        assert row["choices"] == ["negative", "positive"]
        assert row["choices"][row["label"]] == row["response"]
    assert sum(row["label"] for row in rows) * 2 == len(rows)


def test_sentiment_texts_name_nobody_and_link_nowhere() -> None:
    paths = [heldout_path("sentiment", "validation"), heldout_path("sentiment", "test"), calibration_path("sentiment")]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"(?<!\w)@\w+", text)) <= {"@user"}
        assert "http" not in text


def test_code_bodies_compile_and_repeat_nowhere() -> None:
    bodies: list[str] = []
    for split in ("validation", "test"):
        bodies += [row["response"] for row in language.read_jsonl(heldout_path("code", split))]
    for body in bodies:
        language.body_key(body)
    assert len({language.body_key(body) for body in bodies}) == len(bodies)


def test_paths_refuse_other_names() -> None:
    with pytest.raises(ValueError, match="pronounce, translate, code, sentiment"):
        adapter_path("poetry")
    with pytest.raises(ValueError, match="validation or test"):
        heldout_path("code", "train")  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------------ splitting


def _rows(n: int, label: bool = False) -> list[language.Row]:
    return [
        language.Row(f"k{i}", f"prompt {i}", "r", ("a", "b") if label else None, i % 3 % 2 if label else None)
        for i in range(n)
    ]


def test_split_is_disjoint_and_drops_repeats() -> None:
    rows = _rows(3000)
    again = language.Row("k5", "another prompt", "r")
    echo = language.Row("another key", "prompt 7", "r")
    splits = language.split("code", [*rows, again, echo])
    parts = [splits.train, splits.validation, splits.test]
    kept = [row.prompt for part in parts for row in part]
    assert len(kept) == len(set(kept))
    assert again not in splits.train + splits.validation + splits.test
    assert "another key" not in {row.key for part in parts for row in part}
    assert (len(splits.test), len(splits.validation)) == (language.N_TEST, language.N_VALIDATION)


def test_new_rows_never_move_an_old_row_between_splits() -> None:
    def where(n: int) -> dict[str, str]:
        splits = language.split("code", _rows(n))
        return {row.key: name for name in ("train", "validation", "test") for row in getattr(splits, name)}

    few, many = where(900), where(2000)
    assert all(many[key] == name for key, name in few.items() if key in many)


def test_split_does_not_depend_on_the_order_of_rows() -> None:
    assert language.split("code", _rows(500)) == language.split("code", _rows(500)[::-1])


def test_classification_splits_are_balanced() -> None:
    splits = language.split("sentiment", _rows(4000, label=True))
    for part in (splits.train, splits.validation, splits.test):
        assert [row.label for row in part[:4]] == [0, 1, 0, 1]
        assert sum(row.label or 0 for row in part) * 2 == len(part)


# -------------------------------------------------------------------------------------------------------------- sources

HEADING = '<div canonical="true" osisID="{0}" sID="gen1" type="book"/> <title type="main">The Book</title>'
END = '<chapter eID="{0}.{1}"/><div canonical="true" eID="gen1" osisID="{0}" type="book"/> A glossary.'


def _write_ztext(folder: Path, books: list[list[str]]) -> None:
    """A SWORD zText module: a block of its own for the headings of the module, then one for each book."""
    folder.mkdir()
    blocks, entries = [b"import note"], [(0, 0, 0), (0, 0, 11)]
    for number, book in enumerate(books, start=1):
        block = b""
        for text in book:
            raw = text.encode("utf-8")
            entries.append((number, len(block), len(raw)))
            block += raw
        blocks.append(block)
    packed, index = b"", b""
    for block in blocks:
        squeezed = zlib.compress(block)
        index += struct.pack("<III", len(packed), len(squeezed), len(block))
        packed += squeezed
    (folder / "nt.bzz").write_bytes(packed)
    (folder / "nt.bzs").write_bytes(index)
    (folder / "nt.bzv").write_bytes(b"".join(struct.pack("<IIH", *entry) for entry in entries))


def _chapter(book: str, number: int, verses: list[str]) -> list[str]:
    return [f'<div type="x-p"/><chapter n="{number}" osisID="{book}.{number}" sID="{book}.{number}"/>', *verses]


def test_ztext_reads_back_every_verse_by_chapter(tmp_path: Path) -> None:
    matt = [HEADING.format("Matt"), *_chapter("Matt", 1, ["En el <w>principio</w>", "", "tercero"])]
    matt += _chapter("Matt", 2, ["uno", "dos. " + END.format("Matt", 2)])
    mark = [HEADING.format("Mark"), *_chapter("Mark", 1, ["último " + END.format("Mark", 1)])]
    _write_ztext(tmp_path / "module", [matt, mark])
    entries = language.read_ztext(tmp_path / "module", "nt")
    assert entries[:2] == ["", "import note"]
    assert entries[2:] == matt + mark
    assert language.chapters(entries) == {
        "Matt.1": ["En el principio", "", "tercero"],
        "Matt.2": ["uno", "dos."],
        "Mark.1": ["último"],
    }


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ('<w lemma="strong:G1">In</w> <w>the beginning</w>, was.', "In the beginning, was."),
        ('wise men<note placement="foot"><reference>2:1 </reference>Or: sages</note> came', "wise men came"),
        ('<title type="psalm">A song.</title>Praise &amp; joy', "Praise & joy"),
        ('he said:<lb/><l level="1">“Go</l><l level="1">now.”</l>', "he said: “Go now.”"),
        ('<w>Iscariote</w>, <transChange type="added">hijo</transChange><w>de</w> Simón', "Iscariote, hijo de Simón"),
        ("<q who='J'>“Come.”</q>Then he went <chapter eID='x'/> notes", "“Come.” Then he went"),
        ("<div type='x-milestone'/>plain  text\n here", "plain text here"),
    ],
)
def test_osis_markup_is_stripped(markup: str, text: str) -> None:
    assert language.strip_osis(markup) == text


def test_alignment_leaves_out_what_two_versifications_cut_differently() -> None:
    english = {"A.1": ["one", "two"], "A.2": ["three"], "A.3": ["five", ""], "B.1": ["only here"]}
    spanish = {"A.1": ["uno", "dos"], "A.2": ["tres", "cuatro"], "A.3": ["cinco", "seis"]}
    assert list(language.align(english, spanish)) == [
        ("A.1.1", "one", "uno"),
        ("A.1.2", "two", "dos"),
        ("A.3.1", "five", "cinco"),
    ]


def test_cmudict_keeps_plain_words_and_drops_comments() -> None:
    text = "'bout B AW1 T\naalborg AO1 L B # place, danish\nread R EH1 D\nread(2) R IY1 D\nox AA1 K S\nx-ray EH1 K S\n"
    assert list(language.parse_cmudict(text)) == [("aalborg", "AO1 L B"), ("read", "R EH1 D")]


SOURCE = '''
class A:
    def first(self, x: int,
              y: int = 0) -> int:
        """Add them.

        More words.
        """
        # A comment.
        return x + y

    def undocumented(self):
        return 1

    def one_line(self): "Doc."; return 2

    def abstract(self):
        """Someone else's work."""
        raise NotImplementedError

    def empty(self):
        """Only a docstring."""
'''


def test_functions_come_with_signature_first_paragraph_and_body() -> None:
    signature = "def first(self, x: int,\n          y: int = 0) -> int:"
    assert list(language.functions(SOURCE)) == [(signature, "Add them.", "# A comment.\nreturn x + y")]


def test_body_key_ignores_layout_but_not_meaning() -> None:
    assert language.body_key("return a+b") == language.body_key("# add\nreturn (a + b)")
    assert language.body_key("return a+b") != language.body_key("return a-b")


def test_texts_are_masked() -> None:
    raw = "@some_one  thanks &amp; see http://x.yz/a?b or www.x.yz, mail a@b"
    assert language.clean_text(raw) == "@user thanks & see <link> or <link> mail a@b"


def test_sentiment_rows_come_from_the_nested_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))

    good, bad, neutral = (
        "A film to love and to see again",
        "A film to hate and to sleep through",
        "A film with people and sounds",
    )
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        lines = f"1\t2.5\t{good}\n2\t-2.5\t{bad}\n3\t0.2\t{neutral}\n4\t3.0\tshort\n"
        add(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", lines.encode())
        add(archive, "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt", b"")
        add(archive, "hutto_ICWSM_2014/tweets_GroundTruth.txt", b"")
    sdist = tmp_path / "sdist.tar.gz"
    with tarfile.open(sdist, mode="w:gz") as archive:
        add(archive, "v/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())

    def download(requirement: str, destination: Path, *, source: bool = False) -> Path:
        assert source
        return sdist

    monkeypatch.setattr(language, "pip_download", download)
    rows = list(language.sentiment_rows(tmp_path))
    assert [(row.response, row.label) for row in rows] == [("positive", 1), ("negative", 0)]
    assert rows[0].prompt.endswith(good)


# ------------------------------------------------------------------------------------------------------------- adapters


@each_domain
def test_adapter_is_rank_8_bfloat16_and_finite(domain: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    path = adapter_path(domain) / "adapter_model.safetensors"
    assert path.stat().st_size < 5_500_000
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        assert len(names) == 30 * len(SHAPES) * 2
        for name in names:
            tensor = file.get_tensor(name)
            inputs, outputs = SHAPES[name.split(".")[-3]]
            assert tuple(tensor.shape) == ((8, inputs) if ".lora_A." in name else (outputs, 8))
            assert tensor.dtype == torch.bfloat16
            assert bool(torch.isfinite(tensor).all())
            # B starts at zero: a zero B would mean that nothing was learned.
            assert bool(tensor.any())


@each_domain
def test_adapter_config_names_the_base_on_the_hub(domain: str) -> None:
    config = json.loads((adapter_path(domain) / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (8, 16, "LORA")
    assert config["target_modules"] == sorted(SHAPES)


@each_domain
def test_training_record_and_card_agree(domain: str) -> None:
    folder = adapter_path(domain)
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert record["domain"] == domain
    assert record["steps"] >= 150
    assert record["learning_rate"] > 0
    assert record["rows_seen"] == record["steps"] * record["batch_size"]
    assert len(record["loss_curve"]) == record["steps"] // 10
    base, expert = record["test"]["base"]["loss"], record["test"]["expert"]["loss"]
    assert expert < base
    card = (folder / "README.md").read_text(encoding="utf-8")
    for line in ("base_model_relation: adapter", "library_name: peft", "license: apache-2.0"):
        assert line in card.split("---")[1]
    assert f"| {base:.3f} | {expert:.3f} |" in card
