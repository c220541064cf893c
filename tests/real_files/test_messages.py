"""An error is of the right class, and its words name the true cause, the place, and a way out that works."""

import contextlib
import errno
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import consilience as cs
from tests.real_files.support import Outcome, adapter, cli, hf, merged, moved, real_file, refused, state, tiny

TRUE = "refused, true cause"
LEADS = "the message"


def models(folder: Path, family: str = "Llama", **config: Any) -> Path:
    """Save ``base`` and ``a`` (all weights moved) in a folder, and a recipe of them; return its path."""
    tiny(family, tie_word_embeddings=False, **config).save_pretrained(folder / "base")
    moved(tiny(family, tie_word_embeddings=False, **config), 7).save_pretrained(folder / "a")
    return recipe(folder, method="task_arithmetic")


def recipe(folder: Path, **keys: Any) -> Path:
    value = {"base_model": "base", "models": [{"model": "a"}]} | keys
    (folder / "r.yaml").write_text(yaml.safe_dump(value), encoding="utf-8")
    return folder / "r.yaml"


def merge(folder: Path, *words: str | Path) -> Outcome:
    """Merge ``a`` into ``base`` with these words."""
    return cli("merge", folder / "base", folder / "out", "-e", f"a={folder}/a", *words)


def without(outcome: Outcome, *words: str) -> None:
    """Assert that none of these words were said."""
    assert not any(word in outcome.said for word in words), outcome.said


# ----------------------------------------------------------------------------------------------------------------------
# Recipes and arguments.


@real_file(11, family="recipe", option="keys in capitals", expected=LEADS, before="wrong cause named", now=TRUE)
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("method: linear\nModels: [{model: a}]\nmodels: [{model: a}]", ("'Models'", "did you mean 'models'")),
        ("method: linear\nSeed: 1\nmodels: [{model: a}]", ("'Seed'", "did you mean 'seed'")),
        ("method: linear\nfloat: 1\nmodels: [{model: a}]", ("'float'",)),
        ("method: linear\nmodels: [{Model: a}]", ("'models.0.Model'", "did you mean 'model'")),
        ("method: linear\nmodels: [{model: a, Data: {}}]", ("'models.0.Data'", "did you mean 'data'")),
        ("method: linear\nmodels: [{model: a}]\non: 1", ("'on'",)),
        ("method: linear\nmodels: [{model: a}]\n1: 2", ("'1'",)),
        (
            "method: linear\nmodels: [{model: a}]\nparameters: {weight: [{filter: mlp, vlaue: 1}]}",
            ("'vlaue'", "'value'"),
        ),
    ],
)
def test_keys_that_are_not_known(tmp_path: Path, text: str, told: tuple[str, ...]) -> None:
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    outcome = cli("check", tmp_path / "r.yaml")
    refused(outcome, "r.yaml", "unknown key", *told)
    without(outcome, "the recipe'")


@real_file(11, family="recipe", option="two documents", expected=LEADS, before="wrong cause named", now=TRUE)
def test_a_stream_of_documents(tmp_path: Path) -> None:
    document = "method: linear\nmodels: [{model: a}]\n"
    (tmp_path / "r.yaml").write_text(f"{document}---\n{document}", encoding="utf-8")
    outcome = cli("check", tmp_path / "r.yaml")
    refused(outcome, "documents 1 and 2 have no name")
    without(outcome, "not valid")


@real_file(11, family="recipe", option="numbers that are words", expected=LEADS, before="wrong cause named", now=TRUE)
@pytest.mark.parametrize(
    ("weight", "told"),
    [("'0.5'", "write 0.5 without quotes"), ("50%", "write 0.5"), ("yes", "YAML reads yes"), ("much", "not a word")],
)
def test_weights_that_are_no_numbers(tmp_path: Path, weight: str, told: str) -> None:
    models(tmp_path)
    (tmp_path / "r.yaml").write_text(
        f"method: ties\nbase_model: base\nmodels: [{{model: a, parameters: {{weight: {weight}}}}}]\n", encoding="utf-8"
    )
    refused(cli("check", tmp_path / "r.yaml"), "r.yaml", "models.0.parameters.weight", told)


@real_file(11, family="recipe", option="an unknown method", expected=LEADS, before="wrong cause named", now=TRUE)
def test_an_unknown_method_names_the_file(tmp_path: Path) -> None:
    refused(cli("check", recipe(tmp_path, method="dare-ties")), "r.yaml", "did you mean 'dare_ties'")


@real_file(11, family="recipe", option="weights that sum to 0", expected=LEADS, before="wrong cause named", now=TRUE)
def test_weights_that_cancel_name_the_file(tmp_path: Path) -> None:
    models(tmp_path)
    entries = [{"model": "a", "name": n, "parameters": {"weight": w}} for n, w in (("x", 1), ("y", -1))]
    refused(cli("check", recipe(tmp_path, method="linear", models=entries)), "r.yaml", "sum to zero", "x=1, y=-1")


@real_file(
    11, family="recipe", option="dtypes that are not written", expected=LEADS, before="wrong cause named", now=TRUE
)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "nf4"])
def test_dtypes_that_are_not_written(tmp_path: Path, dtype: str) -> None:
    models(tmp_path)
    outcome = merge(tmp_path, "--dtype", dtype)
    refused(outcome, dtype, "float32, float16, bfloat16, float64")
    without(outcome, "did you mean")


@real_file(11, family="recipe", option="a typo in --set", expected=LEADS, before="wrong cause named", now=TRUE)
def test_a_typo_without_a_recipe(tmp_path: Path) -> None:
    models(tmp_path)
    outcome = merge(tmp_path, "--set", "wieght=1")
    refused(outcome, "wieght", "did you mean 'weight'")
    without(outcome, "recipe:")


@real_file(11, family="recipe", option="a recipe and -e", expected=LEADS, before="wrong cause named", now=TRUE)
def test_a_recipe_and_experts(tmp_path: Path) -> None:
    path = models(tmp_path)
    outcome = cli("merge", path, tmp_path / "out", "-e", f"x={tmp_path}/a")
    refused(outcome, "r.yaml", "is a recipe", "-e")
    without(outcome, "convert")


@real_file(
    11, family="recipe", option="the only expert is the base", expected=LEADS, before="wrong cause named", now=TRUE
)
def test_a_merge_of_the_base_alone(tmp_path: Path) -> None:
    models(tmp_path)
    outcome = cli("check", recipe(tmp_path, method="ties", models=[{"model": "base"}]))
    refused(outcome, "the only model", "base itself")
    without(outcome, "names 0")


# ----------------------------------------------------------------------------------------------------------------------
# Files.


def loop(place: Path) -> None:
    place.symlink_to(place.name)


def dangling(place: Path) -> None:
    place.symlink_to("gone")


@real_file(11, family="links", option="loop, dangling link", expected=LEADS, before="wrong cause named", now=TRUE)
@pytest.mark.parametrize(("make", "told"), [(loop, "leads back to itself"), (dangling, "is a link to gone")])
@pytest.mark.parametrize("command", ["merge", "inspect", "evaluate", "doctor"])
def test_links_that_lead_nowhere(tmp_path: Path, command: str, make: Callable[[Path], None], told: str) -> None:
    tiny("Llama").save_pretrained(tmp_path / "base")
    make(tmp_path / "a")
    words: dict[str, tuple[str | Path, ...]] = {
        "merge": ("merge", tmp_path / "base", tmp_path / "out", "-e", f"x={tmp_path}/a"),
        "inspect": ("inspect", tmp_path / "a"),
        "evaluate": ("evaluate", tmp_path / "a", "rows.jsonl"),
        "doctor": ("doctor", tmp_path / "base", "-e", f"x={tmp_path}/a"),
    }
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    words["evaluate"] = ("evaluate", tmp_path / "a", tmp_path / "rows.jsonl")
    outcome = cli(*words[command])
    refused(outcome, f"{tmp_path}/a", told)
    without(outcome, "did you mean")


@real_file(11, family="links", option="a loop as recipe, as rows", expected=LEADS, before="wrong cause named", now=TRUE)
def test_other_links_that_lead_nowhere(tmp_path: Path) -> None:
    loop(tmp_path / "r.yaml")
    refused(cli("check", tmp_path / "r.yaml"), "r.yaml", "leads back to itself")
    tiny("Llama").save_pretrained(tmp_path / "base")
    loop(tmp_path / "rows.jsonl")
    refused(cli("evaluate", tmp_path / "base", tmp_path / "rows.jsonl"), "rows.jsonl", "leads back to itself")


@contextlib.contextmanager
def nobody() -> Generator[None]:
    """Be a user whom permissions bind, as the superuser's do not."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@real_file(
    11, family="permissions", option="an unreadable folder", expected=LEADS, before="wrong cause named", now=TRUE
)
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_folder_that_may_not_be_read(mode: int) -> None:
    place = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        place.chmod(0o755)
        tiny("Llama").save_pretrained(place / "a")
        calls = [("inspect", place / "a"), ("merge", place / "a", place / "out", "-e", "x=b")]
        assert [cli(*words).code for words in calls] == [0, 2]  # so that all is imported before the user changes
        (place / "a").chmod(mode)
        with nobody():
            for words in calls:
                refused(cli(*words), str(place / "a"), "ermission")
    finally:
        (place / "a").chmod(0o700)
        shutil.rmtree(place)


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
)
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


@real_file(
    11,
    family="hub",
    option="git-lfs pointers, web pages as files",
    expected=LEADS,
    before="wrong cause named",
    now=TRUE,
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
@pytest.mark.parametrize(("text", "told"), [(POINTER, "git lfs pull"), (PAGE, "web page")])
def test_files_that_stand_for_others(tmp_path: Path, name: str, text: str, told: str) -> None:
    models(tmp_path)
    if name == "pytorch_model.bin":
        (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / name).write_text(text, encoding="utf-8")
    refused(merge(tmp_path), f"a/{name}", told)


@real_file(11, family="hub", option="an adapter's pointer", expected=LEADS, before="wrong cause named", now=TRUE)
def test_an_adapter_that_is_a_pointer(tmp_path: Path) -> None:
    model = tiny("Qwen2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    adapter(model, tmp_path / "x", target_modules=["q_proj"])
    (tmp_path / "x" / "adapter_model.safetensors").write_text(POINTER, encoding="utf-8")
    refused(merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "x"), "adapter_model.safetensors", "git lfs pull")


@real_file(11, family="Llama", option="index entries 3, null", expected=LEADS, before="wrong cause named", now=TRUE)
@pytest.mark.parametrize("entry", [3, None])
def test_index_entries_that_are_no_names(tmp_path: Path, entry: Any) -> None:
    models(tmp_path)
    tensors = state(tmp_path / "a")
    shutil.move(tmp_path / "a" / "model.safetensors", tmp_path / "a" / "model-1.safetensors")
    weight_map = dict.fromkeys(tensors, "model-1.safetensors") | {"lm_head.weight": entry}
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    outcome = merge(tmp_path)
    refused(outcome, "index.json", "lm_head.weight", f"{entry!r} is no file name")
    without(outcome, "leads out")


@real_file(
    11, family="Llama", option="a tensor of one layer missing", expected=LEADS, before="wrong cause named", now=TRUE
)
def test_a_missing_tensor_is_no_other_layers(tmp_path: Path) -> None:
    models(tmp_path)
    tensors = state(tmp_path / "a")
    value = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.layers.7.mlp.up_proj.weight"] = value
    save_file(tensors, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    outcome = merge(tmp_path)
    refused(outcome, "'model.layers.1.mlp.up_proj.weight'", "missing")
    without(outcome, "did you mean")


@real_file(
    11, family="Llama", option="a bias that the base lacks", expected=LEADS, before="wrong cause named", now=TRUE
)
def test_an_extra_tensor_is_none_that_is_there(tmp_path: Path) -> None:
    models(tmp_path)
    tensors = state(tmp_path / "a")
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(tensors, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    outcome = merge(tmp_path)
    refused(outcome, "q_proj.bias")
    without(outcome, "did you mean")


@real_file(11, family="Qwen2", option="merged into a Llama base", expected=LEADS, before="wrong cause named", now=TRUE)
def test_another_architecture_leads(tmp_path: Path) -> None:
    models(tmp_path)
    moved(tiny("Qwen2", tie_word_embeddings=False), 7).save_pretrained(tmp_path / "q")
    outcome = cli("merge", tmp_path / "base", tmp_path / "out", "-e", f"a={tmp_path}/q")
    refused(outcome, "architecture", "qwen2", "llama")
    without(outcome, "private")


@real_file(11, family="JSONL", option="fields of another type", expected=LEADS, before="wrong cause named", now=TRUE)
@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": 3}, ("prompt", "is a number", "must be text")),
        ({"text": True}, ("text", "is true or false", "must be text")),
        ({"prompt": "a", "response": ["b"]}, ("response", "is a list", "must be text")),
        ({"messages": "hello"}, ("messages", "is text", "must be a list")),
        ({"messages": [{"role": "user", "content": 3}]}, ("messages.0.content", "is a number", "must be text")),
    ],
)
def test_rows_of_another_type(tmp_path: Path, row: dict[str, Any], told: tuple[str, ...]) -> None:
    tiny("Llama").save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a"}}\n{json.dumps(row)}\n', encoding="utf-8")
    outcome = cli("evaluate", tmp_path / "base", tmp_path / "rows.jsonl")
    refused(outcome, "rows.jsonl:2", *told)
    without(outcome, "Input should")


# ----------------------------------------------------------------------------------------------------------------------
# Models that are loaded.

CODE = "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    model_type = 'own'\n"


@real_file(
    11, family="remote code", option="evaluate without trust", expected=LEADS, before="wrong cause named", now=TRUE
)
def test_a_model_with_code_of_its_own(tmp_path: Path) -> None:
    tiny("Llama").save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "base" / "own.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    outcome = cli("evaluate", tmp_path / "base", tmp_path / "rows.jsonl")
    refused(outcome, "base", "--trust-remote-code")
    with pytest.raises(cs.InputError, match="trust_remote_code=True") as told:
        cs.evaluate(str(tmp_path / "base"), tmp_path / "rows.jsonl")
    assert "--" not in str(told.value)


class Pickled:
    """An object that is no tensor."""


@real_file(11, family="pickles", option="evaluate", expected=LEADS, before="wrong cause named", now=TRUE)
def test_pickled_objects_are_not_recommended(tmp_path: Path) -> None:
    model = tiny("Llama")
    model.save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(dict(model.state_dict()) | {"extra": Pickled()}, tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    outcome = cli("evaluate", tmp_path / "base", tmp_path / "rows.jsonl")
    refused(outcome, "base", "could run code", "safetensors")
    without(outcome, "weights_only")


def tokenizer(folder: Path) -> None:
    """Save a tokenizer of single letters beside a model."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    words = {c: i for i, c in enumerate(["<unk>", *"abcdefghijklmnopqrstuvwxyz "])}
    made = Tokenizer(kinds.WordLevel(words, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)


@real_file(11, family="torch", option="devices that are not here", expected=LEADS, before="wrong cause named", now=TRUE)
@pytest.mark.parametrize(
    ("device", "told"),
    [
        # The one name of these that a machine with an accelerator may rightly take.
        pytest.param(
            "cuda", "has no cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is a device here")
        ),
        ("nonsense", "knows none"),
        ("cuda:99", "no cuda"),
        ("meta", "has no meta"),
    ],
)
def test_devices_that_are_not_here(tmp_path: Path, device: str, told: str) -> None:
    models(tmp_path)
    tokenizer(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n' * 6, encoding="utf-8")
    path = recipe(
        tmp_path,
        method="expert_merging",
        models=[{"model": "a", "data": {"calibration": "rows.jsonl", "probe": "rows.jsonl"}}],
    )
    for words in (
        ("evaluate", tmp_path / "base", rows),
        ("merge", path, tmp_path / "out"),
        ("doctor", path, "-q"),
        ("train", tmp_path / "base", tmp_path / "out", rows, "--steps", "1", "--learning-rate", "0.1"),
    ):
        refused(cli(*words, "--device", device), repr(device), told, "use cpu")


NO_TORCH = """
import sys
for name in ("torch", "transformers", "peft"):
    sys.modules[name] = None
from consilience.__main__ import run
sys.exit(run(sys.argv[1:]))
"""


@real_file(11, family="torch", option="not installed", expected=LEADS, before="wrong cause named", now=TRUE)
def test_without_torch(tmp_path: Path) -> None:
    path = models(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", NO_TORCH, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    examined = run("doctor", path, "-q")
    assert examined.returncode == 0, examined.stderr
    recipe(tmp_path, method="expert_merging", models=[{"model": "a", "data": {"calibration": "rows.jsonl"}}])
    (tmp_path / "route.yaml").write_text("base_model: base\nmodels: [{model: a, name: x}]\n", encoding="utf-8")
    for words in (("merge", path, "out"), ("route", "build", "route.yaml", "out")):
        failed = run(*words)
        assert failed.returncode == 2
        assert "needs torch; install it with: pip install 'consilience[hf]'" in failed.stderr, failed.stderr
        assert "internal error" not in failed.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The machine.


def full(source: Any, target: Any, *_: Any, **__: Any) -> None:
    """Fail as the system's copy does: the error names the source first."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))


@real_file(
    11, family="disk", option="full while files are copied", expected=LEADS, before="wrong cause named", now="right"
)
def test_a_disk_that_fills_while_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path)
    monkeypatch.setattr(shutil, "copyfile", full)
    outcome = merge(tmp_path)
    assert outcome.code == 1
    assert f"consilience: {tmp_path}/out: needs " in outcome.err, outcome.err
    assert "GB of disk" in outcome.err
    assert "base" not in outcome.err


@real_file(11, family="disk", option="full for an adapter", expected=LEADS, before="wrong cause named", now="right")
def test_a_disk_too_full_for_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    adapter(model, tmp_path / "x", target_modules=["q_proj"])
    usage = type(shutil.disk_usage("."))(10**9, 10**9 - 10, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # pyright: ignore[reportUnknownLambdaType]
    outcome = merged(tmp_path / "base", tmp_path / "out", "--as-adapter", "cat", x=tmp_path / "x")
    assert outcome.code == 1
    assert f"consilience: {tmp_path}/out: needs " in outcome.err, outcome.err


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers a byte at a time."""

    def do_POST(self) -> None:
        if self.path.startswith("/headers"):
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        else:
            self.send_response(200)
            self.end_headers()
        for _ in range(100):
            with contextlib.suppress(OSError):  # the client has hung up
                self.wfile.write(b" ")
                self.wfile.flush()
            time.sleep(0.1)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@real_file(
    11, family="endpoint", option="an answer a byte at a time", expected=LEADS, before="silent loss", now="right"
)
@pytest.mark.parametrize("path", ["body", "headers"])
def test_a_timeout_bounds_the_whole_answer(path: str) -> None:
    from consilience.routing.instructions.endpoint import Endpoint

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{path}"
        started = time.monotonic()
        with pytest.raises(cs.MachineError, match=r"did not answer within 0\.5 s"):
            Endpoint(url, "m", timeout=0.5, retries=0)(["hello"])
        assert time.monotonic() - started < 2
        server.shutdown()


@real_file(11, family="endpoint", option="passwords in addresses", expected=LEADS, before="silent loss", now="right")
def test_passwords_are_not_repeated(tmp_path: Path) -> None:
    from consilience.routing.instructions.endpoint import Endpoint, check_url

    secret = "hunter2"
    url = f"http://me:{secret}@127.0.0.1:1/v1"
    with pytest.raises(cs.InputError, match="environment variable") as told:
        check_url(url)
    assert secret not in str(told.value)
    with pytest.raises(cs.MachineError) as failed:
        Endpoint(url, "m", timeout=1, retries=0)(["hello"])
    assert secret not in str(failed.value)
    outcome = cli("inspect", f"https://me:{secret}@huggingface.co/owner/name")
    refused(outcome, "no such file")
    without(outcome, secret)
    refused(cli("merge", f"https://{secret}@huggingface.co/owner/name", tmp_path / "out", "-e", "a=b"), "no such file")
    without(cli("merge", f"https://{secret}@huggingface.co/owner/name", tmp_path / "out", "-e", "a=b"), secret)


# ----------------------------------------------------------------------------------------------------------------------
# From Python.

ARRAYS = {"w": np.arange(4, dtype=np.float32).reshape(2, 2)}
TUNED = {"w": ARRAYS["w"] + 1}
CALLS: dict[str, Callable[[], Any]] = {
    "experts None": lambda: cs.merge(ARRAYS, None),  # pyright: ignore[reportArgumentType]
    "experts 3": lambda: cs.merge(ARRAYS, 3),  # pyright: ignore[reportArgumentType]
    "experts a path": lambda: cs.merge("base", Path("a"), "out"),  # pyright: ignore[reportArgumentType]
    "experts a text": lambda: cs.merge("base", "abc", "out"),
    "experts one state dict": lambda: cs.merge(ARRAYS, TUNED),
    "an expert None": lambda: cs.merge(ARRAYS, [None]),
    "an expert a module": lambda: cs.merge(ARRAYS, [torch.nn.Linear(2, 2)]),
    "base an int": lambda: cs.merge(3, [TUNED]),  # pyright: ignore[reportArgumentType]
    "base with an integer key": lambda: cs.merge({0: ARRAYS["w"]}, [TUNED]),  # pyright: ignore[reportArgumentType]
    "expert with an integer key": lambda: cs.merge(ARRAYS, [{0: ARRAYS["w"]}]),
    "threads a text": lambda: cs.merge(ARRAYS, [TUNED], threads="2"),  # pyright: ignore[reportArgumentType]
    "out an int": lambda: cs.merge("base", ["a"], 3),  # pyright: ignore[reportArgumentType]
    "diagnose None": lambda: cs.diagnose(None),  # pyright: ignore[reportArgumentType]
    "diagnose 3": lambda: cs.diagnose(3),  # pyright: ignore[reportArgumentType]
    "diagnose an empty dict": lambda: cs.diagnose({}),
    "merge_recipe None": lambda: cs.merge_recipe(None, "out"),  # pyright: ignore[reportArgumentType]
    "merge_recipe with a key of no text": lambda: cs.merge_recipe({1: 2}, "out"),  # pyright: ignore[reportArgumentType]
    "load_routed None": lambda: cs.load_routed(None),  # pyright: ignore[reportArgumentType]
    "build_routed 3": lambda: cs.build_routed(3, "out"),  # pyright: ignore[reportArgumentType]
    "dtype a type": lambda: cs.merge(ARRAYS, [TUNED], out_dtype=torch.int8),
    "seed a float": lambda: cs.merge(ARRAYS, [TUNED], seed=1.5),  # pyright: ignore[reportArgumentType]
    "seed a flag": lambda: cs.merge(ARRAYS, [TUNED], seed=True),
    "weight None": lambda: cs.merge(ARRAYS, [TUNED], weight=None),
    "weight an array of words": lambda: cs.merge(ARRAYS, [TUNED], weight=np.array([["a"]])),
    "shard size a text": lambda: cs.merge_recipe({"models": [{"model": "a"}]}, "out", shard_size="5GB"),  # pyright: ignore
    "private None": lambda: cs.merge("base", ["a"], "out", private=None),  # pyright: ignore[reportArgumentType]
    "calibration a list": lambda: cs.merge("base", ["a"], "out", calibration=["x"]),  # pyright: ignore
    "open_checkpoint 3": lambda: cs.open_checkpoint(3),  # pyright: ignore[reportArgumentType]
    "load_coefficients None": lambda: cs.load_coefficients(None),  # pyright: ignore[reportArgumentType]
    "read_recipe 3": lambda: cs.read_recipe(3),  # pyright: ignore[reportArgumentType]
    "evaluate 3": lambda: cs.evaluate("base", 3),  # pyright: ignore[reportArgumentType]
    "batch size a text": lambda: cs.evaluate("base", "r.jsonl", batch_size="3"),  # pyright: ignore[reportArgumentType]
    "weight of no name": lambda: cs.merge(ARRAYS, {"a": TUNED}, weight={1: 2}),
    "calibration of nothing learned": lambda: cs.merge("base", {"a": "a"}, "out", calibration={"a": "rows.jsonl"}),
}


@real_file(11, family="Python", option="arguments of other types", expected=LEADS, before="wrong cause named", now=TRUE)
@pytest.mark.parametrize("call", CALLS)
def test_arguments_of_other_types(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cs.InputError) as told:
        CALLS[call]()
    assert "--" not in str(told.value)
    assert not list(tmp_path.iterdir())


@real_file(11, family="Python", option="values of numpy and torch", expected="formula", before="wrongly refused")
def test_values_of_other_libraries() -> None:
    base = {"classifier.w": ARRAYS["w"], "w": ARRAYS["w"]}
    tuned = {name: value + 1 for name, value in base.items()}
    for dtype, kind in ((torch.float64, np.float64), (np.float16, np.float16), (np.dtype("float64"), np.float64)):
        out = cs.merge(base, [tuned], seed=np.int64(3), out_dtype=dtype, weight=np.float32(0.5))  # pyright: ignore
        assert isinstance(out, dict)
        assert out["w"].dtype == kind
        np.testing.assert_allclose(out["w"], ARRAYS["w"] + 0.5)


@real_file(11, family="Python", option="private as one text", expected="bytes", before="wrongly refused")
def test_private_as_one_text(tmp_path: Path) -> None:
    models(tmp_path)
    cs.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", private="lm_head.*")
    torch.testing.assert_close(state(tmp_path / "out")["lm_head.weight"], state(tmp_path / "base")["lm_head.weight"])
    assert (tmp_path / "out" / "consilience" / "heads" / "a.safetensors").is_file()


@real_file(11, family="Python", option="recipes as dict, path as text", expected="bytes", before="wrongly refused")
def test_recipes_as_plain_values(tmp_path: Path) -> None:
    path = models(tmp_path)
    value = {"method": "task_arithmetic", "base_model": tmp_path / "base", "models": [{"model": tmp_path / "a"}]}
    cs.merge_recipe(value, tmp_path / "one")
    assert cs.read_recipe(str(path)).merge_method == "task_arithmetic"
    assert cs.diagnose(value).base == str(tmp_path / "base")
    torch.testing.assert_close(state(tmp_path / "one")["lm_head.weight"], state(tmp_path / "a")["lm_head.weight"])


@real_file(11, family="Python", option="OUT exists", expected=LEADS, before="wrong cause named", now=TRUE)
def test_python_is_told_of_arguments(tmp_path: Path) -> None:
    models(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(cs.InputError, match=r"pass force=True"):
        cs.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    refused(merge(tmp_path), "pass --force")


@real_file(
    11,
    family="Python",
    option="build_routed under no_grad",
    expected="it is built",
    before="wrong cause named",
    now="right",
)
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gates_are_trained_where_gradients_are_off(tmp_path: Path, off: Any) -> None:
    model = tiny("Llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    adapter(model, tmp_path / "x", target_modules=["q_proj"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n' * 4, encoding="utf-8")
    value = {
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "x"), "name": "x", "data": {"train": str(rows)}}],
        "routing": {"local": "phatgoose"},
        "gates": {"steps": 2},
    }
    with off():
        made = cs.build_routed(value, tmp_path / "out")
    assert list(made.experts) == ["x"]


@real_file(11, family="routing", option="top_k: 99 of 2", expected=LEADS, before="silent loss", now=TRUE)
def test_more_experts_than_there_are(tmp_path: Path) -> None:
    model = tiny("Llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    adapter(model, tmp_path / "x", target_modules=["q_proj"])
    value = {"base_model": str(tmp_path / "base"), "models": [{"model": str(tmp_path / "x"), "name": "x"}]}
    text = yaml.safe_dump(value | {"routing": {"local": "arrow", "top_k": 99}})
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    refused(cli("route", "build", tmp_path / "r.yaml", tmp_path / "out"), "top_k: 99 of 1", "write 0")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(value | {"routing": {"local": "arrow"}}), encoding="utf-8")
    assert cli("route", "build", tmp_path / "r.yaml", tmp_path / "out", "-q").code == 0
    refused(cli("route", "generate", tmp_path / "out", "a", "--set", "top_k=99"), "top_k=99", "write 0")


# ----------------------------------------------------------------------------------------------------------------------
# Mixing.


class Net(torch.nn.Module):
    """A layer of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.layer(inputs)


def mixed(**changes: Any) -> Any:
    """Mix two nets with these arguments."""
    torch.manual_seed(0)
    value: dict[str, Any] = {
        "module": Net(), "experts": {"a": Net().state_dict(), "b": Net().state_dict()},
        "target": (torch.randn(8, 3), torch.arange(8) % 2), "steps": 2, "holdout": 0,
    } | changes  # fmt: skip
    module, experts, target = (value.pop(key) for key in ("module", "experts", "target"))
    return cs.mix(module, experts, target, **value)


def loss_of(function: Any) -> Any:
    from consilience.mixing.target import LossOf

    return LossOf(function)


def score_of(function: Any) -> Any:
    from consilience.mixing.target import ScoreOf

    return ScoreOf(function)


MIXES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no target": ({"target": None}, ("target", "missing")),
    "a module for an expert": ({"experts": {"a": Net()}}, ("expert 'a'", "state_dict()")),
    "experts None": ({"experts": None}, ("experts", "NoneType")),
    "module None": ({"module": None}, ("module", "NoneType")),
    "a loss that is a vector": (
        {"measure": loss_of(lambda z, y: torch.nn.functional.cross_entropy(z, y, reduction="none"))},
        ("loss returned a tensor of shape [8]", "mean"),
    ),
    "a score of None": ({"measure": score_of(lambda module, inputs, labels: None)}, ("score returned None",)),
    "a label out of range": (
        {"target": (torch.randn(8, 3), torch.arange(8))},
        ("label is out of range", "0 to 7", "2 outputs"),
    ),
    "NaN inputs": ({"target": (torch.full((8, 3), torch.nan), torch.arange(8) % 2)}, ("8 of its 8 rows hold NaN",)),
    "labels that are no classes": ({"target": (torch.randn(8, 3), torch.rand(8))}, ("labels of torch.float32",)),
    "steps below 0": ({"steps": -1}, ("steps: -1",)),
    "a loss that is never finite": ({"measure": loss_of(lambda z, y: z.sum() * torch.inf)}, ("it was never finite",)),
}


@real_file(
    11, family="torch modules", option="mix, wrong arguments", expected=LEADS, before="wrong cause named", now=TRUE
)
@pytest.mark.parametrize("case", MIXES)
def test_mixing_with_wrong_arguments(case: str) -> None:
    changes, told = MIXES[case]
    with pytest.raises(cs.InputError) as error:
        mixed(**changes)
    assert all(word in str(error.value) for word in told), error.value
    assert "learning_rate" not in str(error.value)


@real_file(
    11, family="torch modules", option="mix, experts in a list", expected="it is mixed", before="wrongly refused"
)
def test_mixing_a_list_of_experts() -> None:
    assert mixed(experts=[Net().state_dict(), Net().state_dict()]).names == ("expert-1", "expert-2")


@real_file(
    11,
    family="torch modules",
    option="mix under no_grad",
    expected="it is mixed",
    before="wrong cause named",
    now="right",
)
def test_mixing_where_gradients_are_off() -> None:
    with torch.no_grad():
        assert len(mixed(optimizer="sgd").movement) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Training logs.

LOGS = {
    "a negative rate": ("step,loss,learning_rate\n1,2.0,-0.1\n2,1.9,0.1\n", "step 1: learning_rate '-0.1'"),
    "an absurd rate": ("step,loss,learning_rate\n1,2.0,1e9\n2,1.9,0.1\n", "step 1: learning_rate '1e9'"),
    "a negative step": ("step,loss\n-4,2.0\n2,1.9\n", "step '-4'"),
    "an absurd step": ("step,loss\n1,2.0\n1e300,1.9\n", "step '1e300'"),
    "ragged rows": ("step,loss,lr\n1,2.0\n2,1.9,0.1,7\n3,1.8,0.1\n", "2 rows have more or fewer fields"),
}


@real_file(
    10, family="CSV log", option="absurd values, ragged rows", expected="one line", before="silent loss", now="warned"
)
@pytest.mark.parametrize("case", LOGS)
def test_values_that_no_log_can_have(tmp_path: Path, case: str) -> None:
    text, told = LOGS[case]
    models(tmp_path)
    (tmp_path / "log.csv").write_text(text, encoding="utf-8")
    path = recipe(tmp_path, method="ties", models=[{"model": "a", "data": {"logs": "log.csv"}}])
    outcome = cli("doctor", path, "-q")
    assert outcome.code == 0, outcome.said
    assert told in outcome.out, outcome.out


@real_file(11, family="recipe", option="config and chat_template of other kinds", expected="the message",
           before="wrong cause named", now="refused, true cause")  # fmt: skip
def test_choices_of_other_kinds(tmp_path: Path) -> None:
    models(tmp_path)
    for value in (3, ["a"]):
        outcome = cli("check", recipe(tmp_path, method="ties", config=value))
        refused(outcome, "config must be base, a model's name, or a mapping")
        without(outcome, "constrained")
    path = recipe(tmp_path, method="ties", chat_template="friendly")
    refused(cli("check", path), "no model 'friendly'", "a format: auto, alpaca, chatml", "write the template itself")
