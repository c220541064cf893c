"""Expert Merging on image rows: from JSONL and pictures to a merged image-text model."""

import importlib
import json
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

import consilience as cs
from consilience.api import build_recipe, merge_recipe
from consilience.coefficients import load_coefficients
from consilience.errors import InputError
from consilience.student.calibration import encode_task
from consilience.student.images import encode_image, load_processor, open_image
from consilience.tasks.load import load_model
from consilience.tasks.rows import Row, Task, read_rows

hf: Any = importlib.import_module("transformers")

TOWER = {"qwen2_vl": ("visual.blocks.", "visual.patch_embed."), "internvl": ("vision_tower.",)}


@dataclass(frozen=True)
class Family:
    """A base, two experts and the rows of each; pictures lie in a folder beside the rows."""

    name: str
    folder: Path

    @property
    def experts(self) -> dict[str, str]:
        return {name: str(self.folder / name) for name in ("math", "code")}

    @property
    def rows(self) -> dict[str, str]:
        return {name: str(self.folder / f"{name}.jsonl") for name in ("math", "code")}

    @property
    def processor(self) -> Any:
        return load_processor(self.folder / "base")


@pytest.fixture(scope="module", params=["qwen2_vl", pytest.param("internvl", marks=pytest.mark.slow)])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save_family(folder, getattr(tiny, request.param))
    (folder / "pictures").mkdir()
    tiny.write_image(folder / "pictures" / "red.png", (200, 30, 10))
    tiny.write_image(folder / "pictures" / "blue.jpg", (10, 30, 200), (10, 24))
    red, blue = "pictures/red.png", str(folder / "pictures" / "blue.jpg")
    tiny.write_rows(
        folder / "math.jsonl",
        {"image": red, "prompt": "what colour?", "response": "red"},
        {"image": blue, "prompt": "and this?"},
        {"prompt": "say one"},
    )
    tiny.write_rows(
        folder / "code.jsonl",
        {"image": blue, "prompt": "is it red?", "response": "no"},
        {"prompt": "f(x)", "response": "x + 1"},
    )
    return Family(request.param, folder)


def test_merge_learns_from_images_and_leaves_the_vision_tower_alone(family: Family, tmp_path: Path):
    data = {name: {"calibration": path} for name, path in family.rows.items()}
    # All rows at every step: losses of other rows, which a random model's answers make, cannot be compared.
    parameters = {"steps": 15, "precision": "float32", "learning_rate": 0.1, "gamma": 0.0, "batch": 0}
    recipe = build_recipe("expert_merging", str(family.folder / "base"), family.experts, parameters, data=data)
    merge_recipe(recipe, tmp_path / "out")
    facts = load_coefficients(tmp_path / "out").facts
    losses = [line["loss"] for line in facts["history"]]
    assert losses[-1] < 0.9 * losses[0]
    base, math, out = (
        load_file(folder / "model.safetensors")
        for folder in (family.folder / "base", family.folder / "math", tmp_path / "out")
    )
    tower = [name for name in base if name.startswith(TOWER[family.name])]
    language = [name for name in base if "layers." in name and name not in tower]
    assert tower
    assert language
    assert all(torch.equal(out[name], base[name]) for name in tower)
    assert not any(torch.equal(math[name], base[name]) for name in tower)
    assert not any(torch.equal(out[name], base[name]) for name in language)


def test_merged_folder_generates_about_an_image(family: Family, tmp_path: Path):
    out = tmp_path / "out"
    options: dict[str, Any] = {"steps": 2, "precision": "float32", "checkpoint": True, "positions": "response"}
    cs.merge(
        str(family.folder / "base"), family.experts, out, method="expert_merging", calibration=family.rows, **options
    )  # fmt: skip
    model, report = hf.AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    row = read_rows(family.rows["math"])[1]
    one, extra = encode_image(row, Path(family.rows["math"]), load_processor(out), "here")
    ids = torch.tensor([one.inputs])
    written = model.generate(input_ids=ids, **extra, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > ids.shape[1]


def test_sequence_is_what_the_processor_makes_of_the_conversation(family: Family):
    path = Path(family.rows["math"])
    row = read_rows(path)[0]
    processor = family.processor
    one, extra = encode_image(row, path, processor, "here")
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.prompt}]}
    prompt = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    picture = open_image(row.image or "", path, "here")
    made = processor(images=[picture], text=[prompt + "red<|im_end|>"], return_tensors="pt", add_special_tokens=False)
    ids = made["input_ids"][0].tolist()
    assert [*one.inputs, one.targets[-1]] == ids
    assert processor.tokenizer.decode(one.targets) == "red<|im_end|>"
    assert [ids[p + 1] for p in one.positions] == list(one.targets)
    assert torch.equal(extra["pixel_values"], made["pixel_values"])
    assert set(extra) == set(made) - {"input_ids", "attention_mask"}
    if "mm_token_type_ids" in extra:
        assert torch.equal(extra["mm_token_type_ids"], made["mm_token_type_ids"][:, :-1])
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert one.inputs.count(token) >= 2
    bare, _ = encode_image(row.model_copy(update={"response": None}), path, processor, "here")
    assert bare.inputs == one.inputs[: len(bare.inputs)]
    # Unlabelled rows are compared everywhere, at the image's tokens too.
    assert (bare.positions, bare.targets) == (tuple(range(len(bare.inputs))), ())


def test_digest_of_a_sample_knows_its_image(family: Family, tmp_path: Path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", {"image": "one.png", "prompt": "x"})
    digests: list[str] = []
    for colour in ((9, 9, 200), (9, 200, 9), (9, 9, 200)):
        tiny.write_image(tmp_path / "one.png", colour)
        config = hf.AutoConfig.from_pretrained(family.folder / "base")
        task = Task("t", read_rows(path), path)
        (sample,) = encode_task(task, 0, None, config, processor=family.processor)
        digests.append(sample.digest)
    assert digests[0] == digests[2] != digests[1]


def test_image_token_in_the_prompt_says_where_the_image_goes(family: Family):
    path = Path(family.rows["math"])
    processor = family.processor
    place = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "internvl": "<IMG_CONTEXT>\n"}[family.name]
    row = Row(image="pictures/red.png", prompt="colour?")
    expected, _ = encode_image(row, path, processor, "here")
    told, _ = encode_image(Row(image=row.image, prompt=place + "colour?"), path, processor, "here")
    assert told == expected
    processor.chat_template = None
    with pytest.raises(InputError, match=r"^rows:3: .* no chat template, .* put \S+ into it$"):
        encode_image(row, path, processor, "rows:3")
    plain, extra = encode_image(
        Row(image=row.image, prompt=place + "colour? ", response="red"), path, processor, "here"
    )
    assert "pixel_values" in extra
    assert processor.tokenizer.decode(plain.targets) == "red"


def test_chat_template_must_write_the_image(family: Family):
    processor = family.processor
    processor.chat_template = processor.chat_template.replace("<|image_pad|>", "").replace("<IMG_CONTEXT>\n", "")
    processor.chat_template = processor.chat_template.replace("<|vision_start|><|vision_end|>", "")
    with pytest.raises(InputError, match=r"^rows:1: the base's chat template leaves images out"):
        encode_image(Row(image="pictures/red.png", prompt="x"), Path(family.rows["math"]), processor, "rows:1")


class Straddling:
    """A processor that reads the prompt otherwise once an answer follows it."""

    def __init__(self, own: Any):
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def __call__(self, **inputs: Any) -> Any:
        made = self.own(**inputs)
        if inputs["text"][0].endswith("red<|im_end|>"):
            made["input_ids"][0, 0] = 9
        return made


def test_pieces_are_joined_where_a_token_would_straddle_them(family: Family):
    path = Path(family.rows["math"])
    processor = family.processor
    row = read_rows(path)[0]
    expected = encode_image(row, path, processor, "here")
    one, extra = encode_image(row, path, Straddling(processor), "here")
    assert one == expected[0]
    assert extra.keys() == expected[1].keys()
    assert all(torch.equal(extra[key], expected[1][key]) for key in extra)


def _claim(path: Path, size: int) -> None:
    """Write a PNG file of a few bytes whose header claims many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(header) - 4) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT" + bytes(13))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are not pictures."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.png").write_text("not a picture")
    (folder / "folder.png").mkdir()
    tiny.write_image(folder / "good.png", (1, 2, 3))
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    for name, size in {"large.png": 9000, "larger.png": 10_000, "bomb.png": 60_000}.items():
        _claim(folder / name, size)
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("god.png", r"image .*god\.png: no such file; did you mean 'good\.png'"),
        ("nul\0.png", "no such file"),
        ("folder.png", "is a folder"),
        ("text.png", "cannot be read as an image"),
        ("cut.png", "cannot be read as an image"),
        ("script.eps", "cannot be read as an image"),
        ("large.png", "more than 64,000,000 pixels"),
        ("larger.png", "more than 64,000,000 pixels"),
        ("bomb.png", "more than 64,000,000 pixels"),
    ],
)
def test_wrong_image_is_one_line_that_names_the_row(bad: Path, name: str, message: str):
    with pytest.raises(InputError, match=message) as error:
        open_image(name, bad / "rows.jsonl", "rows.jsonl:7")
    assert str(error.value).startswith("rows.jsonl:7: ")
    assert "\n" not in str(error.value)


def test_image_is_upright_and_rgb(tmp_path: Path):
    picture = Image.new("LA", (8, 4), (0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(str(tmp_path / "turned.png"), Path("elsewhere/rows.jsonl"), "here")
    assert (upright.mode, upright.size) == ("RGB", (4, 8))


def test_wrong_rows_leave_nothing_behind(family: Family, tmp_path: Path):
    def merged(*rows: dict[str, Any], **options: Any) -> str:
        path = tiny.write_rows(tmp_path / "rows.jsonl", *rows)
        calibration = family.rows | {"code": str(path)}
        with pytest.raises(InputError) as error:
            cs.merge(
                str(family.folder / "base"), family.experts, tmp_path / "out", method="expert_merging",
                calibration=calibration, steps=1, precision="float32", **options,
            )  # fmt: skip
        assert "\n" not in str(error.value)
        assert {path.name for path in tmp_path.iterdir()} <= {"rows.jsonl", "cache"}
        return str(error.value).replace(str(tmp_path), "")

    picture = str(family.folder / "pictures" / "red.png")
    assert merged({"prompt": "a"}, {"prompt": "b", "image": "gone.png"}).startswith(
        "/rows.jsonl:2: image /gone.png: no"
    )
    assert "needs prompt" in merged({"text": "a", "image": picture}, responses="given")
    assert "text is no prompt" in merged({"text": "a", "image": picture})
    assert "the model takes 256" in merged({"prompt": "many words " * 90, "image": picture})


def test_processor_must_be_there(family: Family, tmp_path: Path):
    tokenizer = family.processor.tokenizer
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="processor") as error:
        load_processor(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    text, reader = tiny.llama()
    text.save_pretrained(tmp_path / "text")
    reader.save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match="holds no processor of images and text"):
        load_processor(tmp_path / "text")


def test_processor_loads_from_the_hubs_files_too(family: Family, tmp_path: Path):
    shutil.copytree(family.folder / "base", tmp_path, dirs_exist_ok=True)
    whole = json.loads((tmp_path / "processor_config.json").read_text())
    pictures = whole.pop("image_processor") | {"processor_class": whole["processor_class"]}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pictures))
    (tmp_path / "video_preprocessor_config.json").write_text('{"video_processor_type": "NoSuchVideoProcessor"}')
    path = Path(family.rows["math"])
    row = read_rows(path)[0]
    ours, theirs = (encode_image(row, path, load_processor(folder), "x") for folder in (tmp_path, path.parent / "base"))
    assert ours[0] == theirs[0]
    assert torch.equal(ours[1]["pixel_values"], theirs[1]["pixel_values"])


def test_loading_is_strict(family: Family, tmp_path: Path):
    from safetensors.torch import save_file

    config = json.loads((family.folder / "base" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(family.folder / "base" / "model.safetensors")
    dropped = next(name for name in state if name.startswith(TOWER[family.name]))
    save_file({k: v for k, v in state.items() if k != dropped}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="missing or misshapen"):
        load_model(tmp_path)
    assert type(load_model(family.folder / "base")) is type(getattr(tiny, family.name)()[0])
