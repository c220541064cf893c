"""Hostile and mistaken inputs, as a table: one line that names what is wrong, exit status 2, nothing left or lost.

Every case runs the command line's entry in process, in a folder of its own, and compares that whole folder before and
after: so neither OUT nor OUT.partial nor a folder made on the way exists, and no input has changed.
"""

import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from consilience.__main__ import run

Arrays = dict[str, Any]
EMBED, FIRST, SECOND, HEAD, STEP = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.weight",
    "model.layers.1.mlp.weight",
    "lm_head.weight",
    "step",
)
MERGE = ["merge", "base", "out", "-e", "a=a", "-e", "b=b"]
RECIPE = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"


def weights(seed: int) -> Arrays:
    """A model of two layers, with an integer buffer."""
    rng = np.random.default_rng(seed)
    shapes = {EMBED: (6, 4), FIRST: (4, 4), SECOND: (4, 4)}
    found: Arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {STEP: np.array([7], np.int64)}


def write_model(folder: Path, arrays: Arrays, config: Mapping[str, Any] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "toy"}), encoding="utf-8")


def raw_file(path: Path, header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> None:
    """Write a safetensors file without any of its rules."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def spec(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_adapter(folder: Path, arrays: Arrays, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    value = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["mlp"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(value), encoding="utf-8")
    save_file(arrays, folder / "adapter_model.safetensors")


def factors(module: str = "model.layers.0.mlp", rank: int = 2, out: int = 4, into: int = 4) -> Arrays:
    stem = f"base_model.model.{module}"
    return {
        f"{stem}.lora_A.weight": np.ones((rank, into), np.float32),
        f"{stem}.lora_B.weight": np.ones((out, rank), np.float32),
    }


class Code:
    """Runs code when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.flag),))


def pickled(path: Path, value: Any) -> None:
    """Write ``value`` in both shapes torch knows: a zip archive (.pt) or a bare pickle (.bin)."""
    if path.suffix == ".bin":
        path.write_bytes(pickle.dumps(value, protocol=2))
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
        archive.writestr("archive/version", "3\n")


def torch_file(path: Path, value: Any) -> None:
    import torch

    torch.save(value, path)


def edit(folder: str, change: Callable[[Arrays], Any], config: Mapping[str, Any] | None = None) -> None:
    """Rewrite one of the models: ``change`` edits its arrays in place."""
    arrays = load_file(Path(folder) / "model.safetensors")
    change(arrays)
    write_model(Path(folder), arrays, config)


def put(name: str, value: Any) -> Callable[[Arrays], Any]:
    return lambda arrays: arrays.update({name: value})


def drop(name: str) -> Callable[[Arrays], Any]:
    return lambda arrays: arrays.pop(name)


def recipe(text: str, name: str = "recipe.yaml") -> list[str]:
    Path(name).write_text(text, encoding="utf-8")
    return ["merge", name, "out"]


def with_header(header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> None:
    raw_file(Path("a/model.safetensors"), header, data, length)


def cut(at: Callable[[int], int]) -> None:
    path = Path("a/model.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: at(len(data))])


def shards(weight_map: Mapping[str, Any], files: Mapping[str, Arrays]) -> None:
    """Turn ``a`` into a sharded model."""
    Path("a/model.safetensors").unlink()
    for name, arrays in files.items():
        save_file(arrays, Path("a") / name)
    Path("a/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def halves(**moved: str) -> tuple[dict[str, str], dict[str, Arrays]]:
    """An index and two shards; ``moved`` puts tensors (by the last word of their name's middle) elsewhere."""
    arrays = weights(1)
    place = {EMBED: "x.safetensors", FIRST: "x.safetensors", SECOND: "y.safetensors", STEP: "y.safetensors"}
    files: dict[str, Arrays] = {"x.safetensors": {}, "y.safetensors": {}}
    for name, file in place.items():
        files[file][name] = arrays[name]
    return place | moved, files


@dataclass(frozen=True)
class Case:
    """``arrange`` spoils the folder it is called in and returns the command line; ``says`` must be in the message."""

    name: str
    says: tuple[str, ...]
    arrange: Callable[[], Any]
    status: int = 2

    def arguments(self) -> list[str]:
        found = self.arrange()
        return cast(list[str], found) if isinstance(found, list) else MERGE


A_FILE = "a/model.safetensors"
BOMB = [2**60] * 400
HEADERS = [
    Case("empty file", (A_FILE, "truncated", "download"), lambda: Path(A_FILE).write_bytes(b"")),
    Case("truncated in header", (A_FILE, "truncated", "download"), lambda: cut(lambda size: 40)),
    Case("truncated in data", (A_FILE, SECOND, "truncated", "download"), lambda: cut(lambda size: size - 8)),
    Case(
        "trailing bytes", (A_FILE, "3 bytes after", "restore"), lambda: with_header({"x": spec([1], 0, 4)}, b"1234567")
    ),
    Case("header is not JSON", (A_FILE, "not valid JSON", "restore"), lambda: with_header(b'{"x": }')),
    Case("header is not UTF-8", (A_FILE, "utf-8", "restore"), lambda: with_header(b'{"\xff": 1}')),
    Case("header is a list", (A_FILE, "does not start", "restore"), lambda: with_header(b"[]")),
    Case("header length bomb", (A_FILE, "truncated"), lambda: with_header(b"{}", length=2**63)),
    Case(
        "nested JSON bomb", (A_FILE, "restore"), lambda: with_header(b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    ),
    Case("shape bomb", (A_FILE, "'x'", "shape", "restore"), lambda: with_header({"x": spec([2**60], 0, 4)}, b"1234")),
    Case("shape product bomb", (A_FILE, "'x'", "shape"), lambda: with_header({"x": spec(BOMB, 0, 4)}, b"1234")),
    Case("bomb hidden by a zero", (A_FILE, "'x'", "shape"), lambda: with_header({"x": spec([2**59, 2**59, 0], 0, 0)})),
    Case("negative size", (A_FILE, "'x'", "[-1]", "restore"), lambda: with_header({"x": spec([-1], 0, 4)}, b"1234")),
    Case("bool as size", (A_FILE, "'x'", "[True]"), lambda: with_header({"x": spec([True], 0, 4)}, b"1234")),
    Case("float as offset", (A_FILE, "'x'", "data_offsets"), lambda: with_header({"x": spec([1], 0.0, 4)}, b"1234")),
    Case("offsets reversed", (A_FILE, "'x'", "restore"), lambda: with_header({"x": spec([1], 4, 0)}, b"1234")),
    Case("shape and bytes disagree", (A_FILE, "'x'", "needs 8"), lambda: with_header({"x": spec([2], 0, 4)}, b"1234")),
    Case(
        "overlapping tensors",
        (A_FILE, "'y'", "overlap", "restore"),
        lambda: with_header({"x": spec([2], 0, 8), "y": spec([1], 4, 8)}, b"12345678"),
    ),
    Case(
        "hole between tensors",
        (A_FILE, "'y'", "4 unclaimed", "restore"),
        lambda: with_header({"x": spec([1], 0, 4), "y": spec([1], 8, 12)}, b"123456789012"),
    ),
    Case(
        "tensor named twice",
        (A_FILE, "'x'", "twice", "restore"),
        lambda: with_header(b'{"x":' + json.dumps(spec([1], 0, 4)).encode() + b',"x":1}', b"1234"),
    ),
    Case(
        "unknown dtype", (A_FILE, "'x'", "'F7'", "convert"), lambda: with_header({"x": spec([1], 0, 4, "F7")}, b"1234")
    ),
    Case("dtype is a list", (A_FILE, "'x'", "convert"), lambda: with_header({"x": spec([1], 0, 4, ["F32"])}, b"1234")),
    Case("entry with a stray key", (A_FILE, "'x'"), lambda: with_header({"x": spec([1], 0, 4) | {"y": 1}}, b"1234")),
    Case("metadata is not text", (A_FILE, "__metadata__"), lambda: with_header({"__metadata__": {"a": 1}})),
    Case("name is half a character", (A_FILE, "surrogates"), lambda: with_header(b'{"\\ud800": 1}')),
    Case("no tensors at all", (A_FILE.removesuffix("/model.safetensors"), "no tensors"), lambda: with_header(b"{}")),
    Case(
        "name writes to the terminal", ("\\x1b[2J",), lambda: with_header({"\x1b[2J": spec([1], 0, 4, "F7")}, b"1234")
    ),
]


def index_case(**moved: Any) -> None:
    place, files = halves()
    shards(place | {EMBED: moved.get("embed", place[EMBED])}, files)


def absent_tensor() -> None:
    place, files = halves()
    shards(place | {"ghost": "x.safetensors"}, files)


def unlisted_tensor() -> None:
    place, files = halves()
    shards({k: v for k, v in place.items() if k != STEP}, files)


def two_shards() -> None:
    place, files = halves()
    files["y.safetensors"][EMBED] = files["x.safetensors"][EMBED]
    shards(place, files)


def missing_shard() -> None:
    index_case()
    Path("a/y.safetensors").unlink()


def both_forms() -> None:
    index_case()
    save_file(weights(1), "a/model.safetensors")


def pipe(name: str) -> None:
    Path(name).unlink(missing_ok=True)
    os.mkfifo(name)


def endless(name: str) -> None:
    Path(name).unlink(missing_ok=True)
    Path(name).symlink_to("/dev/zero")


INDEX = "a/model.safetensors.index.json"
FOLDERS = [
    Case(
        "index leads out by ..",
        (INDEX, EMBED, "'../x.safetensors'", "restore"),
        lambda: index_case(embed="../x.safetensors"),
    ),
    Case("index names an absolute path", (INDEX, EMBED, "leads out"), lambda: index_case(embed="/x.safetensors")),
    Case(
        "index names a subfolder", (INDEX, EMBED, "'sub/x.safetensors'"), lambda: index_case(embed="sub/x.safetensors")
    ),
    Case("index names a backslash path", (INDEX, EMBED, "leads out"), lambda: index_case(embed="..\\x.safetensors")),
    Case("index names a number", (INDEX, EMBED, "restore"), lambda: index_case(embed=5)),
    Case("index names a pickle", (INDEX, EMBED, "'x.bin'", "restore"), lambda: index_case(embed="x.bin")),
    Case("index names a missing shard", (INDEX, "y.safetensors", "missing", "download"), missing_shard),
    Case("index lists an absent tensor", (INDEX, "'ghost'", "x.safetensors", "restore"), absent_tensor),
    Case("index leaves a tensor out", (INDEX, f"'{STEP}'", "restore"), unlisted_tensor),
    Case("tensor in two shards", ("a/y.safetensors", EMBED, "restore"), two_shards),
    Case("index and a single file", ("a: ", "both model.safetensors and", "remove one"), both_forms),
    Case("index is not JSON", (INDEX, "restore"), lambda: (index_case(), Path(INDEX).write_text("{"))),
    Case(
        "index is deeply nested",
        (INDEX, "levels deep"),
        lambda: (index_case(), Path(INDEX).write_text('{"x":' + "[" * 500 + "]" * 500 + "}")),
    ),
    Case("config is not JSON", ("a/config.json", "restore"), lambda: Path("a/config.json").write_text("{")),
    Case("config never ends", ("a/config.json", "regular file"), lambda: endless("a/config.json")),
    Case("weights are a pipe", (A_FILE, "regular file"), lambda: pipe(A_FILE)),
    Case("weights are a folder", (A_FILE, "regular file"), lambda: (Path(A_FILE).unlink(), Path(A_FILE).mkdir())),
    Case("folder without weights", ("a: ", "no model weights"), lambda: Path(A_FILE).unlink()),
    Case(
        "two files, no index",
        ("a: ", "2 weight files", "index"),
        lambda: (Path(A_FILE).rename("a/1.safetensors"), save_file(weights(1), "a/2.safetensors")),
    ),
    Case(
        "a file that is no weights",
        ("notes.txt", "convert"),
        lambda: (Path("notes.txt").write_text("x"), ["merge", "base", "out", "-e", "a=notes.txt"])[1],
    ),
    Case(
        "base has a dangling link",
        ("base/tokenizer.json", "restore"),
        lambda: Path("base/tokenizer.json").symlink_to("gone"),
    ),
    Case(
        "base links to a folder",
        ("base/docs", "link to a folder", "copy"),
        lambda: (occupied("elsewhere"), Path("base/docs").symlink_to("../elsewhere")),
    ),
    Case("base has a pipe", ("base/vocab.txt", "regular file"), lambda: pipe("base/vocab.txt")),
    Case(
        "base holds our folder's name", ("base/consilience", "rename"), lambda: Path("base/consilience").write_text("x")
    ),
]


def single(name: str, write: Callable[[Path], Any]) -> list[str]:
    write(Path(name))
    return ["merge", "base", "out", "-e", f"a={name}"]


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1_000_000)
        archive.writestr("archive/version", "3\n")


def expanded(path: Path) -> None:
    import torch

    torch_file(path, {"w": torch.zeros(1).expand(1 << 40)})


def sparse(path: Path) -> None:
    import torch

    torch_file(path, {"w": torch.eye(3).to_sparse()})


def complex_numbers(path: Path) -> None:
    import torch

    torch_file(path, {"w": torch.zeros(2, dtype=torch.complex128)})


PICKLES = [
    Case(
        "code in .pt",
        ("evil.pt", "run code", "safetensors"),
        lambda: single("evil.pt", lambda p: pickled(p, {"w": Code(Path("ran").absolute())})),
    ),
    Case(
        "code in .bin",
        ("evil.bin", "run code", "safetensors"),
        lambda: single("evil.bin", lambda p: pickled(p, {"w": Code(Path("ran").absolute())})),
    ),
    Case(
        "pt is not a state dict",
        ("list.pt", "state dict", "save"),
        lambda: single("list.pt", lambda p: torch_file(p, [1, 2])),
    ),
    Case(
        "pt holds numbers",
        ("numbers.pt", "state dict"),
        lambda: single("numbers.pt", lambda p: torch_file(p, {"a": 1})),
    ),
    Case(
        "pt is text", ("text.pt", "torch file", "download"), lambda: single("text.pt", lambda p: p.write_text("hello"))
    ),
    Case("pt is empty", ("empty.pt", "torch file"), lambda: single("empty.pt", lambda p: p.write_bytes(b""))),
    Case("pt is compressed", ("bomb.pt", "'archive/data.pkl'", "compressed"), lambda: single("bomb.pt", compressed)),
    Case("pt holds an expanded view", ("view.pt", "'w'", "contiguous"), lambda: single("view.pt", expanded)),
    Case("pt holds a sparse tensor", ("sparse.pt", "'w'", "sparse", "dense"), lambda: single("sparse.pt", sparse)),
    Case(
        "pt holds complex numbers",
        ("complex.pt", "'w'", "complex128", "convert"),
        lambda: single("complex.pt", complex_numbers),
    ),
]

TIED = {"model_type": "toy", "tie_word_embeddings": True}


def tied_base(expert_head: float) -> None:
    """A tied base; the expert writes its head, equal to its embeddings but for ``expert_head``."""
    edit("base", lambda arrays: None, TIED)
    edit("a", lambda arrays: arrays.update({HEAD: arrays[EMBED] + np.float32(expert_head)}))


def huge_weights() -> list[str]:
    for name in ("a", "b"):
        edit(name, put(FIRST, np.full((4, 4), 6e4, np.float32)))
    return [*MERGE, "--dtype", "float16"]


def quantised(name: str, dtype: str) -> None:
    arrays = weights(1)
    header: dict[str, Any] = {}
    data = b""
    for key, value in arrays.items():
        raw = value.tobytes() if key != name else bytes(value.size)
        code = {"float32": "F32", "int64": "I64"}[value.dtype.name] if key != name else dtype
        header[key] = spec(list(value.shape), len(data), len(data) + len(raw), code)
        data += raw
    with_header(header, data)


FIT = [
    Case("missing tensor", ("a: ", FIRST, "missing", "private"), lambda: edit("a", drop(FIRST))),
    Case(
        "extra tensor",
        ("a: ", "'model.layers.9.mlp.weight'", "private"),
        lambda: edit("a", put("model.layers.9.mlp.weight", np.ones(3, np.float32))),
    ),
    Case(
        "renamed tensor",
        ("a: ", FIRST, "did you mean 'model.layers.0.ffn.weight'"),
        lambda: edit("a", lambda s: s.update({"model.layers.0.ffn.weight": s.pop(FIRST)})),
    ),
    Case(
        "misshapen tensor",
        ("a: ", FIRST, "[2, 4]", "[4, 4]", "architecture"),
        lambda: edit("a", put(FIRST, np.ones((2, 4), np.float32))),
    ),
    Case("transposed tensor", ("a: ", FIRST, "[2, 8]"), lambda: edit("a", put(FIRST, np.ones((2, 8), np.float32)))),
    Case(
        "vocabulary grew",
        ("a: ", EMBED, "6 rows", "7", "vocabularies", "resize"),
        lambda: edit("a", put(EMBED, np.ones((7, 4), np.float32))),
    ),
    Case(
        "integers for weights",
        ("a: ", FIRST, "I32", "F32", "convert"),
        lambda: edit("a", put(FIRST, np.ones((4, 4), np.int32))),
    ),
    Case(
        "weights for integers", ("a: ", f"'{STEP}'", "F32", "I64"), lambda: edit("a", put(STEP, np.ones(1, np.float32)))
    ),
    Case(
        "untied base, expert has a head",
        ("a: ", HEAD, "private"),
        lambda: edit("a", lambda s: s.update({HEAD: s[EMBED]})),
    ),
    Case("8-bit floats", ("a: ", FIRST, "F8_E4M3", "unquantised"), lambda: quantised(FIRST, "F8_E4M3")),
    Case(
        "GPTQ weights",
        ("a: ", "'model.layers.0.mlp.qweight'", "unquantised"),
        lambda: edit("a", put("model.layers.0.mlp.qweight", np.ones((2, 2), np.int32))),
    ),
    Case(
        "NaN in an expert",
        ("a: ", FIRST, "1 of its 16", "--allow-nonfinite"),
        lambda: edit("a", lambda s: s[FIRST].__setitem__((1, 1), np.nan)),
    ),
    Case(
        "Inf in the base",
        ("base: ", FIRST, "2 of its 16", "repair"),
        lambda: edit("base", lambda s: s[FIRST].__setitem__(1, [0, np.inf, 0, -np.inf])),
    ),
    Case("overflow of float16", (FIRST, "F16", "65504", "wider"), huge_weights),
    Case(
        "weights sum to zero",
        ("sum to zero", "a=1", "b=-1", "normalize"),
        lambda: [*MERGE, "--method", "linear", "--set", "a.weight=1", "--set", "b.weight=-1"],
    ),
    Case("slerp of three models", ("slerp", "exactly 2", "3"), lambda: [*MERGE, "--method", "slerp"]),
    Case(
        "method without its base",
        ("ties", "base_model"),
        lambda: ["merge", "none", "out", "-e", "a=a", "-e", "b=b", "--method", "ties"],
    ),
    Case(
        "base is too long a layer name",
        ("a: ", "missing"),
        lambda: edit("base", put(f"model.layers.{'9' * 5000}.w", np.ones(2, np.float32))),
    ),
]


def yaml_case(text: str) -> Callable[[], list[str]]:
    return lambda: recipe(text)


def parameters(text: str) -> Callable[[], list[str]]:
    return lambda: recipe(
        f"merge_method: ties\nbase_model: base\nmodels: [{{model: a}}, {{model: b}}]\nparameters: {{{text}}}\n"
    )


def raw_recipe(data: bytes) -> list[str]:
    Path("recipe.yaml").write_bytes(data)
    return ["merge", "recipe.yaml", "out"]


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
YAML = "recipe.yaml"
RECIPES = [
    Case("bad YAML", (YAML, "line 2", "fix"), yaml_case("merge_method: ties\n  models: [\n")),
    Case(
        "duplicate keys",
        (YAML, "line 2", "'merge_method'", "twice"),
        yaml_case("merge_method: ties\nmerge_method: linear\n"),
    ),
    Case("duplicate keys inside", (YAML, "'model'", "twice"), yaml_case("models: [{model: a, model: b}]\n")),
    Case("alias bomb", (YAML, "aliases"), yaml_case(LAUGHS)),
    Case("recursive alias", (YAML, "refers to itself"), yaml_case("models: &x [*x]\n")),
    Case("unknown alias", (YAML, "fix"), yaml_case("models: *x\n")),
    Case("nesting bomb", (YAML, "levels deep"), yaml_case("[" * 500_000)),
    Case("number bomb", (YAML, "too long"), yaml_case("seed: 1" + ":1" * 400_000)),
    Case("code in a tag", (YAML, "python/object", "fix"), yaml_case("models: !!python/object/apply:os.mkdir [ran]\n")),
    Case("tag without its value", (YAML, "plainer"), yaml_case("seed: !!int ''\n")),
    Case("two documents", (YAML, "documents 1 and 2", "name"), yaml_case(RECIPE + "---\n" + RECIPE)),
    Case("many documents", (YAML, "more than 100 documents"), yaml_case("--- {}\n" * 10_000)),
    Case("a second document that is none", (YAML, "line 3", "not valid YAML"), yaml_case("a: 1\n---\nb: }\n")),
    Case("empty recipe", (YAML, "empty"), yaml_case("")),
    Case("comment only", (YAML, "empty"), yaml_case("# nothing\n")),
    Case("binary recipe", (YAML, "UTF-8"), lambda: raw_recipe(b"\x80\x81\xff\x00" * 10)),
    Case("NUL in recipe", (YAML, "not valid YAML"), lambda: raw_recipe(b"a\0b")),
    Case("endless recipe", (YAML, "too long"), lambda: (endless(YAML), ["merge", YAML, "out"])[1]),
    Case("recipe is a list", (YAML, "mapping"), yaml_case("[a, b]")),
    Case(
        "recipe is missing",
        ("recipe.yml", "did you mean 'recipe.yaml'"),
        lambda: (recipe(RECIPE), ["merge", "recipe.yml", "out"])[1],
    ),
    Case("recipe is a folder", ("base: ", "-e"), lambda: ["merge", "base", "out"]),
    Case(
        "recipe lies in OUT",
        (YAML, "lies in out", "move"),
        lambda: (
            Path("out").mkdir(),
            recipe(RECIPE, "out/recipe.yaml"),
            ["merge", "out/recipe.yaml", "out", "--force"],
        )[2],
    ),
    Case("unknown key", (YAML, "'mdels'", "did you mean 'models'"), yaml_case("merge_method: ties\nmdels: []\n")),
    Case(
        "unknown inner key",
        (YAML, "'models.1.nam'", "did you mean 'name'"),
        yaml_case("merge_method: ties\nmodels: [{model: a}, {model: b, nam: x}]\n"),
    ),
    Case("unknown method", ("'tise'", "did you mean 'ties'"), yaml_case(RECIPE.replace("task_arithmetic", "tise"))),
    Case("method is missing", (YAML, "merge_method", "consilience methods"), yaml_case("models: [{model: a}]\n")),
    Case("method said twice", (YAML, "merge_method and method", "keep one"), yaml_case("method: ties\n" + RECIPE)),
    Case("models are missing", (YAML, "models", "add it"), yaml_case("merge_method: ties\nbase_model: base\n")),
    Case(
        "models are empty",
        (YAML, "models", "at least one"),
        yaml_case("merge_method: ties\nbase_model: base\nmodels: []\n"),
    ),
    Case(
        "model is text",
        (YAML, "models.0", "key: value"),
        yaml_case("merge_method: ties\nbase_model: base\nmodels: [a]\n"),
    ),
    Case(
        "model is empty",
        (YAML, "models.0.model", "empty"),
        yaml_case("merge_method: ties\nbase_model: base\nmodels: [{model: ''}]\n"),
    ),
    Case(
        "model name leads out",
        (YAML, "models.0.name", "rename"),
        yaml_case("merge_method: ties\nbase_model: base\nmodels: [{model: a, name: ../x}]\n"),
    ),
    Case(
        "model names collide",
        (YAML, "'x'", "twice", "choose"),
        yaml_case("merge_method: ties\nbase_model: base\nmodels: [{model: a, name: x}, {model: b, name: x}]\n"),
    ),
    Case("unknown parameter", (YAML, "parameters.densty", "did you mean 'density'"), parameters("densty: 0.5")),
    Case("density above one", (YAML, "density", "1.5", "[0, 1]"), parameters("density: 1.5")),
    Case("density is NaN", (YAML, "parameters.density", "finite"), parameters("density: .nan")),
    Case("weight is a word", (YAML, "weight", "'abc'", "number"), parameters("weight: abc")),
    Case("weight is a flag", (YAML, "weight", "True", "number"), parameters("weight: true")),
    Case("weight is huge", (YAML, "parameters.weight", "finite"), parameters("weight: 1.0e+999")),
    Case("gradient of words", (YAML, "parameters.weight", "list of numbers"), parameters("weight: [a, b]")),
    Case("empty gradient", (YAML, "parameters.weight"), parameters("weight: []")),
    Case("empty gradient in a filter", (YAML, "parameters.weight"), parameters("weight: [{filter: mlp, value: []}]")),
    Case("flag is a number", (YAML, "normalize", "true or false"), parameters("normalize: 3")),
    Case("choice is unknown", (YAML, "trim", "tensor, model"), parameters("trim: layer")),
    Case(
        "filter matches nothing", (YAML, "'mpl'", "did you mean 'mlp'"), parameters("weight: [{filter: mpl, value: 1}]")
    ),
    Case(
        "filter is no pattern",
        (YAML, "'re:('", "regular expression"),
        parameters("weight: [{filter: 're:(', value: 1}]"),
    ),
    Case(
        "private matches nothing",
        (YAML, "'classifier*'", "matches no tensor"),
        yaml_case(RECIPE + "private: ['classifier*']\n"),
    ),
    Case("dtype typo", (YAML, "'bfloat'", "did you mean 'bfloat16'"), yaml_case(RECIPE + "dtype: bfloat\n")),
    Case("seed is negative", (YAML, "seed", "0"), yaml_case(RECIPE + "seed: -1\n")),
    Case("slices are empty", (YAML, "slices", "at least one"), yaml_case("merge_method: linear\nslices: []\n")),
    Case(
        "base is missing",
        ("bse", "did you mean 'base'"),
        yaml_case(RECIPE.replace("base_model: base", "base_model: bse")),
    ),
]


def command(*arguments: str) -> Callable[[], list[str]]:
    return lambda: list(arguments)


LONG = "x" * 300
COMMANDS = [
    Case("expert path is missing", ("aa", "did you mean 'a'"), command("merge", "base", "out", "-e", "a=aa")),
    Case("expert path is too long", (LONG, "no such file"), command("merge", "base", "out", "-e", f"a={LONG}")),
    Case(
        "expert path has a NUL", ("\\x00", "no such file"), yaml_case(RECIPE.replace("{model: b}", '{model: "b\\0"}'))
    ),
    Case(
        "home of nobody",
        ("~nobody-here/x", "write the folder out"),
        command("merge", "base", "out", "-e", "a=~nobody-here/x"),
    ),
    Case(
        "expert's path without a name is missing", ("aa", "did you mean"), command("merge", "base", "out", "-e", "aa")
    ),
    Case("expert without a name", ("-e '=a'", "NAME=PATH"), command("merge", "base", "out", "-e", "=a")),
    Case("expert is empty", ("-e ''", "NAME=PATH"), command("merge", "base", "out", "-e", "")),
    Case("expert with an empty path", ("-e 'a='", "NAME=PATH"), command("merge", "base", "out", "-e", "a=")),
    Case(
        "expert named twice",
        ("'a'", "twice", "another name"),
        command("merge", "base", "out", "-e", "a=a", "-e", "a=b"),
    ),
    Case("expert's name has a dot", ("'a.b'", "choose another"), command("merge", "base", "out", "-e", "a.b=a")),
    Case("setting without a value", ("--set 'weight'", "KEY=VALUE"), command(*MERGE, "--set", "weight")),
    Case("setting is bad YAML", ("--set weight", "fix"), command(*MERGE, "--set", "weight=[1,")),
    Case("setting of no expert", ("c.weight", "'c'"), command(*MERGE, "--set", "c.weight=1")),
    Case("setting of no parameter", ("wieght", "did you mean 'weight'"), command(*MERGE, "--set", "wieght=1")),
    Case(
        "setting that a recipe has",
        ("--set weight=1", "changes nothing"),
        lambda: [*recipe(RECIPE), "--set", "weight=1"],
    ),
    Case(
        "setting of no parameter of a recipe",
        ("--set wieght=2", "did you mean 'weight'"),
        lambda: [*recipe(RECIPE), "--set", "wieght=2"],
    ),
    Case(
        "setting of no expert of a recipe",
        ("--set c.weight=2", "no expert 'c'", "a, b"),
        lambda: [*recipe(RECIPE), "--set", "c.weight=2"],
    ),
    Case(
        "setting of a recipe is out of range",
        ("--set density=2", "[0, 1]"),
        lambda: [*recipe(RECIPE), "--method", "ties", "--set", "density=2"],
    ),
    Case(
        "setting is an option",
        ("--set seed=3", "use --seed 3"),
        lambda: [*recipe(RECIPE), "--set", "seed=3"],
    ),
    Case(
        "method that a recipe has",
        ("--method task_arithmetic", "changes nothing"),
        lambda: [*recipe(RECIPE), "--method", "task_arithmetic"],
    ),
    Case("no such method", ("--method tise", "'ties'"), lambda: [*recipe(RECIPE), "--method", "tise"]),
    Case("seed that a recipe has", ("--seed 0", "changes nothing"), lambda: [*recipe(RECIPE), "--seed", "0"]),
    Case(
        "setting of an expert that experts share",
        ("--set a.normalize=false", "shared"),
        lambda: [*recipe(RECIPE), "--method", "ties", "--set", "a.normalize=false"],
    ),
    Case("weight beyond float32", ("tensor", "F32", "smaller weights"), command(*MERGE, "--set", "weight=1e39")),
    Case("unknown option", ("--denstiy", "--help"), command(*MERGE, "--denstiy", "1")),
    Case("unknown command", ("mrege", "--help"), command("mrege")),
    Case("missing argument", ("consilience merge --help",), command("merge", "base")),
    Case("no threads", ("--threads", "--help"), command(*MERGE, "--threads", "0")),
    Case("odd shard size", ("--shard-size", "'big'", "500MB"), command(*MERGE, "--shard-size", "big")),
    Case("no shard size", ("--shard-size", "positive"), command(*MERGE, "--shard-size", "-1GB")),
    Case("argument is not text", ("\\udcff", "UTF-8"), command("inspect", os.fsdecode(b"\xff"))),
    Case("no hub id has this form", ("org/na--me", "check the path"), command("inspect", "org/na--me")),
    Case(
        "hub cannot be reached",
        ("no-org/no-name", "hub", "network"),
        command("merge", "no-org/no-name", "out", "-e", "a=a"),
        1,
    ),
]


def occupied(name: str, content: str = "mine") -> Path:
    path = Path(name)
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text(content, encoding="utf-8")
    return path


def linked_input() -> list[str]:
    """The expert's weights are a link into a store, and OUT is that store."""
    Path("store").mkdir()
    Path(A_FILE).rename("store/blob")
    Path(A_FILE).symlink_to("../store/blob")
    return ["merge", "base", "store", "-e", "a=a", "--force"]


def deep_nan() -> list[str]:
    edit("a", put(FIRST, np.full((4, 4), np.nan, np.float32)))
    return ["merge", "base", "new/deep/out", "-e", "a=a"]


def flat(out: str) -> list[str]:
    return ["merge", "base/model.safetensors", out, "-e", f"a={A_FILE}"]


OUTPUTS = [
    Case(
        "OUT below a file",
        ("file/out", "choose"),
        lambda: (Path("file").write_text("x"), ["merge", "base", "file/out", "-e", "a=a"])[1],
    ),
    Case(
        "OUT on a file system without folders",
        ("/proc/consilience-out", "choose"),
        command("merge", "base", "/proc/consilience-out", "-e", "a=a"),
    ),
    Case(
        "OUT's parent cannot be made", ("/proc/x/out", "choose"), command("merge", "base", "/proc/x/out", "-e", "a=a")
    ),
    Case("OUT's name is too long", (LONG, "choose"), command("merge", "base", LONG, "-e", "a=a")),
    Case("OUT.partial's name is too long", ("choose",), command("merge", "base", "x" * 250, "-e", "a=a")),
    Case("OUT is the folder one is in", (".", "name a new folder"), command("merge", "base", ".", "-e", "a=a")),
    Case("OUT is the folder above", ("..", "name a new folder"), command("merge", "base", "a/..", "-e", "a=a")),
    Case("OUT in an input", ("base/out", "lies in", "choose"), command("merge", "base", "base/out", "-e", "a=a")),
    Case("OUT is an input", ("a: ", "choose"), command("merge", "base", "a", "-e", "a=a", "--force")),
    Case(
        "OUT holds an input",
        ("set: ", "set/a", "holds"),
        lambda: (Path("set").mkdir(), Path("a").rename("set/a"), ["merge", "base", "set", "-e", "a=set/a", "--force"])[
            2
        ],
    ),
    Case("OUT holds an input's target", ("store: ", "store/blob", "choose"), linked_input),
    Case(
        "OUT.partial is an input",
        ("out.partial", "choose"),
        lambda: (Path("a").rename("out.partial"), ["merge", "base", "out", "-e", "a=out.partial"])[1],
    ),
    Case("OUT is not empty", ("out: ", "not empty", "--force"), lambda: (occupied("out"), MERGE)[1]),
    Case("OUT is a file", ("out: ", "not empty", "--force"), lambda: (Path("out").write_text("x"), MERGE)[1]),
    Case(
        "OUT is a file, forced",
        ("out: ", "not a folder"),
        lambda: (Path("out").write_text("x"), [*MERGE, "--force"])[1],
    ),
    Case("OUT is a link", ("out: ", "symbolic link"), lambda: (Path("out").symlink_to("elsewhere"), MERGE)[1]),
    Case("OUT.partial is not ours", ("out.partial", "move it"), lambda: (occupied("out.partial"), MERGE)[1]),
    Case("OUT.partial is a file", ("out.partial", "move it"), lambda: (Path("out.partial").write_text("x"), MERGE)[1]),
    Case(
        "OUT.partial is a model",
        ("out.partial", "move it"),
        lambda: (
            occupied("out.partial/consilience"),
            Path("out.partial/consilience/lineage.json").write_text("{}"),
            MERGE,
        )[2],
    ),
    Case("flat file to a folder", ("out: ", ".safetensors"), lambda: flat("out")),
    Case(
        "flat file onto a folder",
        ("out.safetensors", "folder"),
        lambda: (Path("out.safetensors").mkdir(), flat("out.safetensors"))[1],
    ),
    Case("flat file onto an input", (A_FILE, "choose"), lambda: [*flat(A_FILE), "--force"]),
    Case("parents are not left behind", ("a: ", FIRST, "NaN"), deep_nan),
]


def adapter(arrays: Arrays | None = None, **config: Any) -> Callable[[], list[str]]:
    def arrange() -> list[str]:
        write_adapter(Path("lora"), factors() if arrays is None else arrays, **config)
        return ["merge", "base", "out", "-e", "l=lora"]

    return arrange


def evil_adapter() -> list[str]:
    write_adapter(Path("lora"), factors())
    Path("lora/adapter_model.safetensors").unlink()
    pickled(Path("lora/adapter_model.bin"), {"x": Code(Path("ran").absolute())})
    return ["merge", "base", "out", "-e", "l=lora"]


def private_adapter() -> list[str]:
    write_adapter(Path("lora"), factors())
    return recipe(RECIPE.replace("{model: b}", "{model: lora}") + "private: ['*layers.0*']\n")


def bad_base_adapter() -> list[str]:
    write_adapter(Path("lora"), factors(out=9))
    return ["merge", "base+lora", "out", "-e", "a=a"]


def headless_adapter() -> list[str]:
    adapter()()
    Path("lora/adapter_model.safetensors").unlink()
    return ["merge", "base", "out", "-e", "l=lora"]


FIRST_A = "base_model.model.model.layers.0.mlp.lora_A.weight"
FIRST_B = "base_model.model.model.layers.0.mlp.lora_B.weight"
ONES = np.ones((2, 4), np.float32)
CONFIG = "lora/adapter_config.json"
ADAPTERS = [
    Case("prefix tuning", (CONFIG, "'PREFIX_TUNING'", "PEFT"), adapter(peft_type="PREFIX_TUNING")),
    Case("no peft_type", (CONFIG, "peft_type", "PEFT"), adapter(peft_type=None)),
    Case("DoRA", (CONFIG, "use_dora", "PEFT"), adapter(use_dora=True)),
    Case(
        "DoRA by its tensors",
        ("lora/adapter_model.safetensors", "lora_magnitude_vector", "PEFT"),
        adapter(factors() | {FIRST_A.replace("lora_A.weight", "lora_magnitude_vector"): ONES}),
    ),
    Case("PiSSA", (CONFIG, "'pissa_niter_4'", "convert"), adapter(init_lora_weights="pissa_niter_4")),
    Case("an initialisation of the future", (CONFIG, "'svdnext'", "convert"), adapter(init_lora_weights="svdnext")),
    Case("unknown key switched on", (CONFIG, "use_magic", "PEFT"), adapter(use_magic=True)),
    Case("flag is text", (CONFIG, "use_rslora", "'false'", "restore"), adapter(use_rslora="false")),
    Case("rank is text", (CONFIG, "model.layers.0.mlp", "'2'", "restore"), adapter(r="2")),
    Case("rank is missing", (CONFIG, "restore"), adapter(r=None)),
    Case("alpha is huge", (CONFIG, "lora_alpha", "restore"), adapter(lora_alpha=10**400)),
    Case("alpha is NaN", (CONFIG, "nan", "restore"), adapter(lora_alpha=float("nan"))),
    Case("rank mismatch", (CONFIG, "model.layers.0.mlp", "rank 3", "rank 2", "restore"), adapter(r=3)),
    Case("rank pattern is a list", (CONFIG, "rank_pattern", "restore"), adapter(rank_pattern=[1])),
    Case("rank pattern is no pattern", (CONFIG, "'('", "restore"), adapter(rank_pattern={"(": 2})),
    Case(
        "missing B",
        ("lora/adapter_model.safetensors", "model.layers.0.mlp", "lora_B", "download"),
        adapter({FIRST_A: ONES}),
    ),
    Case(
        "factors do not multiply",
        ("lora/adapter_model.safetensors", "model.layers.0.mlp", "[4, 3]"),
        adapter({FIRST_A: ONES, FIRST_B: np.ones((4, 3), np.float32)}),
    ),
    Case(
        "integer factors",
        ("lora/adapter_model.safetensors", "I32"),
        adapter({k: v.astype(np.int32) for k, v in factors().items()}),
    ),
    Case(
        "bias of a factor",
        ("lora/adapter_model.safetensors", "lora_B.bias", "PEFT"),
        adapter(factors() | {FIRST_B.replace("weight", "bias"): ONES}),
    ),
    Case(
        "two adapters in a file",
        ("lora/adapter_model.safetensors", "lora_A.other.weight", "one adapter"),
        adapter(factors() | {FIRST_A.replace("weight", "other.weight"): ONES}),
    ),
    Case(
        "unknown factor",
        ("lora/adapter_model.safetensors", "lora_C", "PEFT"),
        adapter(factors() | {FIRST_A.replace("lora_A", "lora_C"): ONES}),
    ),
    Case("adapter of a wider base", ("lora: ", FIRST, "[9, 4]", "[4, 4]", "another base"), adapter(factors(out=9))),
    Case(
        "adapter of another model",
        ("lora: ", "'model.layers.7.mlp.weight'", "another base"),
        adapter(factors("model.layers.7.mlp")),
    ),
    Case(
        "adapter of an integer buffer",
        ("lora: ", f"'{STEP}'", "I64"),
        adapter({f"base_model.model.{STEP}": np.ones(1, np.float32)}),
    ),
    Case("adapter on a private tensor", ("lora: ", FIRST, "private", "PEFT"), private_adapter),
    Case("wrong adapter on the base", ("base+lora", FIRST, "[9, 4]", "another base"), bad_base_adapter),
    Case(
        "adapter without a base",
        ("lora: ", "base_model"),
        lambda: (adapter()(), ["merge", "none", "out", "-e", "l=lora", "--method", "linear"])[1],
    ),
    Case(
        "adapter as the base", ("lora: ", "base_model"), lambda: (adapter()(), ["merge", "lora", "out", "-e", "a=a"])[1]
    ),
    Case("model after +", ("a: ", "PEFT adapter"), command("merge", "base", "out", "-e", "l=base+a")),
    Case("adapter without weights", ("lora: ", "adapter_model.safetensors", "download"), headless_adapter),
    Case("code in an adapter", ("lora/adapter_model.bin", "run code"), evil_adapter),
    Case(
        "NaN in a factor",
        ("l: ", FIRST, "LoRA factors", "repair"),
        adapter(factors() | {FIRST_A: np.full((2, 4), np.nan, np.float32)}),
    ),
]


def as_adapter(arrays: Arrays, *options: str) -> Callable[[], list[str]]:
    def arrange() -> list[str]:
        write_adapter(Path("lora"), arrays)
        return ["merge", "base", "out", "-e", "l=lora", "--as-adapter", *options]

    return arrange


NAN_FACTORS = factors() | {FIRST_A: np.full((2, 4), np.nan, np.float32)}
AS_ADAPTER = [
    Case("adapter of no kind", ("'cta'", "cat"), as_adapter(factors(), "cta")),
    Case("svd without a rank", ("--rank",), as_adapter(factors(), "svd")),
    Case("rank without svd", ("--rank", "svd"), command(*MERGE, "--rank", "2")),
    Case("adapter of full weights", ("a: ", "not a plain LoRA"), command(*MERGE, "--as-adapter", "cat")),
    Case("NaN into an adapter", ("l: ", FIRST, "repair"), as_adapter(NAN_FACTORS, "cat")),
    Case("NaN into a truncated adapter", ("l: ", FIRST, "repair"), as_adapter(NAN_FACTORS, "svd", "--rank", "1")),
    Case(
        "adapter where OUT.partial is not ours",
        ("out.partial", "move it"),
        lambda: (occupied("out.partial"), as_adapter(factors(), "cat")())[1],
    ),
]

INSPECTED = [
    Case("inspect nothing", ("gone", "check the path"), command("inspect", "gone")),
    Case("inspect a truncated file", (A_FILE, "download"), lambda: (cut(lambda n: 20), ["inspect", "a"])[1]),
    Case(
        "inspect odd lineage",
        ("a/consilience/lineage.json", "restore"),
        lambda: (
            Path("a/consilience").mkdir(),
            Path("a/consilience/lineage.json").write_text('{"output": 3}'),
            ["inspect", "a"],
        )[2],
    ),
    Case("check a bad recipe", (YAML, "slices"), lambda: (recipe("slices: []"), ["check", YAML])[1]),
    Case("dry run of a bad merge", ("a: ", FIRST), lambda: (edit("a", drop(FIRST)), [*MERGE, "--dry-run"])[1]),
]

CASES = [*HEADERS, *FOLDERS, *PICKLES, *FIT, *RECIPES, *COMMANDS, *OUTPUTS, *ADAPTERS, *AS_ADAPTER, *INSPECTED]


def snapshot(root: Path) -> dict[str, Any]:
    """Everything below ``root``: links by target, files by content and modification time."""
    found: dict[str, Any] = {}
    for top, folders, files in os.walk(root):
        for path in (Path(top) / name for name in [*folders, *files]):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[str(path)] = os.readlink(path)
            elif stat.S_ISREG(mode):
                found[str(path)] = (path.read_bytes(), path.stat().st_mtime_ns)
            else:
                found[str(path)] = stat.S_IFMT(mode)
    return found


@pytest.fixture(autouse=True)
def _world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two experts, in the current folder, on a machine without a hub."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-cache"))
    root = tmp_path / "world"
    for seed, name in enumerate(("base", "a", "b")):
        write_model(root / name, weights(seed))
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = case.arguments()
    before = snapshot(Path.cwd())
    status = run(arguments)
    captured = capsys.readouterr()
    assert status == case.status, captured.err
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("consilience: ")
    assert captured.err[:-1].isprintable()
    assert len(captured.err) < 2000
    assert "internal error" not in captured.err
    for part in case.says:
        assert part in captured.err, captured.err
    assert snapshot(Path.cwd()) == before
    assert not Path("ran").exists()


def test_the_table_is_long_and_its_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 45


# ----------------------------------------------------------------------------------------------------------------------
# Odd inputs that are right.


def merged(*arguments: str, out: str = "out") -> Arrays:
    assert run([*arguments, "-q"]) == 0
    assert not Path("out.partial").exists()
    path = Path(out)
    return load_file(path / "model.safetensors" if path.is_dir() else path)


def expected() -> Arrays:
    base, a, b = (load_file(f"{name}/model.safetensors") for name in ("base", "a", "b"))
    return {k: v if k == STEP else base[k] + (a[k] - base[k]) + (b[k] - base[k]) for k, v in base.items()}


def same(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)


def snapshot_of(folder: str, cache: Path) -> Path:
    """Move a model into a hub's cache: every file a link from the snapshot to a blob."""
    repository = cache / f"models--org--{folder}"
    place = repository / "snapshots" / "0123abcd"
    place.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(Path(folder).iterdir())):
        path.rename(repository / "blobs" / f"{number:040x}")
        (place / path.name).symlink_to(f"../../blobs/{number:040x}")
    return place


def test_models_made_of_links_work() -> None:
    """Hub caches hold every file as a link into a store of that model."""
    wanted = expected()
    base, a, b = (str(snapshot_of(name, Path("hub"))) for name in ("base", "a", "b"))
    same(merged("merge", base, "out", "-e", f"a={a}", "-e", f"b={b}"), wanted)
    assert not Path("out/config.json").is_symlink()


def test_a_link_within_the_folder_is_copied_as_the_file_it_leads_to() -> None:
    Path("base/vocabulary.txt").write_text("a b c")
    Path("base/vocab.txt").symlink_to("vocabulary.txt")
    merged(*MERGE)
    assert not Path("out/vocab.txt").is_symlink()
    assert Path("out/vocab.txt").read_text() == "a b c"


@pytest.mark.parametrize("target", ["../elsewhere.txt", "../hub/models--org--base/blobs/0"])
def test_a_link_that_leads_out_of_its_folder_is_refused_by_name(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one is a blob of a hub's cache, but the link does not lie in a snapshot of it."""
    Path("hub/models--org--base/blobs").mkdir(parents=True)
    (Path("base") / target).write_text("mine")
    Path("base/notes.txt").symlink_to(target)
    assert run([*MERGE, "-q"]) == 2
    assert "base/notes.txt: is a link to a file outside" in capsys.readouterr().err
    assert not Path("out").exists()
    Path("base/notes.txt").unlink()
    same(merged(*MERGE), expected())


def test_a_snapshot_may_not_link_to_another_models_blobs(capsys: pytest.CaptureFixture[str]) -> None:
    base, other = snapshot_of("base", Path("hub")), snapshot_of("a", Path("hub"))
    (base / "notes.txt").symlink_to((other / "config.json").resolve())
    assert run(["merge", str(base), "out", "-e", "b=b", "-q"]) == 2
    assert "notes.txt: is a link" in capsys.readouterr().err


def test_weights_that_the_user_names_through_a_link_are_merged() -> None:
    wanted = expected()
    Path("store").mkdir()
    for name in ("base", "a", "b"):
        Path(name).rename(f"store/{name}")
        Path(name).symlink_to(f"store/{name}")
    Path("store/a/model.safetensors").rename("store/weights")
    Path("store/a/model.safetensors").symlink_to("../weights")
    same(merged(*MERGE), wanted)


def test_force_replaces_out_and_nothing_else() -> None:
    occupied("out")
    kept = [occupied("out.kept"), occupied("out.old")]
    same(merged(*MERGE, "--force"), expected())
    assert not Path("out/thesis.txt").exists()
    assert [(path / "thesis.txt").read_text(encoding="utf-8") for path in kept] == ["mine", "mine"]
    assert Path("out.kept-2/thesis.txt").read_text(encoding="utf-8") == "mine"  # nor was that ours to delete
    names = ["a", "b", "base", "out", "out.kept", "out.kept-2", "out.old"]
    assert sorted(p.name for p in Path.cwd().iterdir()) == names


def test_force_keeps_what_was_added_to_a_merge_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Of an older merge only what that merge wrote goes: not what was added since, nor what was changed since."""
    merged(*MERGE, "--method", "linear")
    Path("out/evaluation").mkdir()
    Path("out/evaluation/scores.json").write_text("{}")
    Path("out/link").symlink_to("../base")
    Path("out/README.md").write_text("my own words")
    assert run([*MERGE, "--force"]) == 0
    assert "note: 3 file(s) at out had not been written by Consilience; they are now in out.kept" in (
        capsys.readouterr().out
    )
    same(load_file("out/model.safetensors"), expected())
    found = sorted(str(path) for path in Path("out.kept").rglob("*") if not path.is_dir() or path.is_symlink())
    assert found == ["out.kept/README.md", "out.kept/evaluation/scores.json", "out.kept/link"]
    assert Path("out.kept/README.md").read_text() == "my own words"
    assert Path("out.kept/link").is_symlink()
    assert not Path("out/evaluation").exists()


def test_an_empty_out_is_free() -> None:
    Path("out").mkdir()
    same(merged(*MERGE), expected())


def test_an_unfinished_merge_is_not_in_the_way() -> None:
    Path("out.partial/consilience").mkdir(parents=True)
    Path("out.partial/consilience/plan.json").write_text('{"digest": "another"}', encoding="utf-8")
    Path("out.partial/weights-00000.part").write_bytes(b"old")
    same(merged(*MERGE), expected())


def test_a_flat_file_is_one_file_whatever_the_shard_size() -> None:
    found = merged(*flat("out.safetensors"), "--shard-size", "64", out="out.safetensors")
    assert found.keys() == weights(0).keys()


def test_private_tensors_need_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        f"merge_method: linear\nmodels: [{{model: {A_FILE}}}, {{model: b/model.safetensors}}]\nprivate: ['*embed*']\n"
    )
    assert run([*recipe(text)[:2], "out.safetensors"]) == 2
    assert "private tensors" in capsys.readouterr().err


def test_integers_of_another_width_are_copied_from_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    edit("a", put(STEP, np.array([9], np.int32)))
    assert run(MERGE) == 0
    assert "step: integer values of a differ" in capsys.readouterr().out
    assert load_file("out/model.safetensors")[STEP].dtype == np.int64


CARDS = {
    "alias bomb": "---\n" + LAUGHS + "license: *a11\n---\n",
    "bad tag": "---\nx: !!timestamp y\n---\n",
    "nesting bomb": "---\nx: " + "[" * 60_000 + "\n---\n",
    "not text": "---\nlicense: \ud800\n---\n",
    "a list": "---\n- license\n---\n",
}


@pytest.mark.parametrize("card", CARDS)
def test_a_hostile_model_card_changes_nothing(card: str) -> None:
    for name in ("base", "a"):
        (Path(name) / "README.md").write_bytes(CARDS[card].encode("utf-8", "surrogatepass"))
    began = time.perf_counter()
    same(merged(*MERGE), expected())
    assert time.perf_counter() - began < 20


def test_an_endless_model_card_changes_nothing() -> None:
    endless("a/README.md")
    pipe("base/README.md")
    same(merged(*MERGE), expected())


def test_a_recipe_may_begin_with_a_mark_and_come_through_a_pipe() -> None:
    Path("recipe.yaml").write_bytes(b"\xef\xbb\xbf" + RECIPE.encode())
    same(merged("merge", "recipe.yaml", "out"), expected())
    reader, writer = os.pipe()
    os.write(writer, RECIPE.encode())
    os.close(writer)
    same(merged("merge", f"/dev/fd/{reader}", "again", out="again"), expected())
    os.close(reader)


def test_files_whose_names_are_not_text_come_along() -> None:
    odd = os.fsdecode(b"\xff")
    Path(A_FILE).rename(f"a/{odd}.safetensors")
    Path(f"base/{odd}.txt").write_text("x", encoding="utf-8")
    Path("base/two\nlines.txt").write_text("y", encoding="utf-8")
    assert run([*MERGE, "-q"]) == 0
    assert Path(f"out/{odd}.txt").read_text(encoding="utf-8") == "x"
    document = json.loads(Path("out/consilience/lineage.json").read_text(encoding="utf-8"))
    assert document["models"][1]["files"][0]["file"] == f"{odd}.safetensors"


def test_an_adapter_may_be_made_from_a_flat_base() -> None:
    write_adapter(Path("lora"), factors())
    assert run(["merge", "base/model.safetensors", "out", "-e", "l=lora", "--as-adapter", "cat", "-q"]) == 0
    assert Path("out/adapter_model.safetensors").is_file()


def test_names_do_not_write_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "a"):
        edit(name, put("x\x1b[2Jy", np.ones(3, np.float32)))
    for arguments in (["inspect", "a", "--tensors"], ["merge", "base", "out", "-e", "a=a", "--dry-run"]):
        assert run(arguments) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "\\x1b[2J" in out


def test_safetensors_go_before_pickles() -> None:
    torch_file(Path("a/pytorch_model.bin"), {"w": None})
    Path("a/pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "pytorch_model.bin"}}', encoding="utf-8")
    same(merged(*MERGE), expected())


def test_tensors_that_share_memory_in_a_pickle_are_all_kept() -> None:
    """Shared memory is a tie, until a model holds two values of it; the transpose of a tensor is not."""
    import torch

    square = torch.arange(9.0).reshape(3, 3)
    other = square + 1
    torch_file(Path("x.pt"), {"a": square, "b": square, "t": square.T})
    torch_file(Path("y.pt"), {"a": other, "b": other, "t": square.T + 3})
    torch_file(Path("z.pt"), {"a": other, "b": other + 1, "t": square.T})
    found = merged("merge", "x.pt", "out.safetensors", "-e", "y=y.pt", out="out.safetensors")
    for name, value in {"a": other, "b": other, "t": square.T + 3}.items():
        np.testing.assert_array_equal(found[name], value.numpy())
    found = merged("merge", "x.pt", "untied.safetensors", "-e", "z=z.pt", out="untied.safetensors")
    for name, value in {"a": other, "b": other + 1, "t": square.T}.items():
        np.testing.assert_array_equal(found[name], value.numpy())


def test_a_tensor_in_two_pickled_shards_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    Path(A_FILE).unlink()
    for name in ("x.bin", "y.bin"):
        torch_file(Path("a") / name, {"w": torch.zeros(2)})
    Path("a/pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "x.bin", "v": "y.bin"}}', encoding="utf-8")
    assert run(MERGE) == 2
    assert "a/y.bin: tensor 'w' is also in another shard" in capsys.readouterr().err


def test_a_tied_expert_of_an_untied_base_keeps_its_head() -> None:
    base, a = weights(0), weights(1)
    base[HEAD] = a[EMBED] + np.float32(1)
    write_model(Path("base"), base)
    write_model(Path("a"), a, TIED)
    found = merged("merge", "base", "out", "-e", "a=a")
    np.testing.assert_allclose(found[HEAD], a[EMBED], rtol=1e-6, atol=1e-6)


def test_a_tied_base_takes_an_expert_whose_written_head_is_equal() -> None:
    tied_base(0.0)
    found = merged("merge", "base", "out", "-e", "a=a")
    assert HEAD not in found
    np.testing.assert_allclose(found[EMBED], load_file(A_FILE)[EMBED], rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# As a process: nothing but the one line on standard error, and no crash that Python could not catch.


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command_line = [sys.executable, "-m", "consilience", *arguments]
    kept = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    return subprocess.run(
        command_line, capture_output=True, text=True, timeout=120, env=kept | environment, check=False
    )


PROCESSES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "nesting bomb": (yaml_case("- " * 400_000), ("levels deep",)),
    "code in a pickle": (PICKLES[0].arrange, ("run code",)),
    "overflow": (huge_weights, ("F16",)),
    "bytes that are not text": (command("inspect", os.fsdecode(b"a\xff")), ("UTF-8",)),
    "no arguments": (command("merge"), ("--help",)),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_bad_input_to_a_process(name: str) -> None:
    arrange, says = PROCESSES[name]
    arguments: list[str] = arrange()
    before = snapshot(Path.cwd())
    ended = process(*arguments)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1, ended.stderr
    for part in says:
        assert part in ended.stderr
    assert snapshot(Path.cwd()) == before


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "no connection"]
)
def test_an_unreachable_hub_is_said_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    began = time.perf_counter()
    ended = process(
        "merge", "no-org/no-name", "out", "-e", "a=a", HF_HUB_CACHE=str(tmp_path / "no-cache"), **environment
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "no-org/no-name" in ended.stderr
    assert "network" in ended.stderr
    assert time.perf_counter() - began < 10
    assert not Path("out").exists()


def test_an_interrupt_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("consilience.engine.merge.merge_in", interrupted)
    assert run(MERGE) == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "run the same command again" in err
