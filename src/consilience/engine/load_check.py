"""Whether what a merge writes is what its own library opens: known from the plan, before any work.

Names, shapes and config decide that, so one check holds for all merges that agree on them (and on the library's
version), and is remembered in the cache; there is none where they are the base's own. An error is a name that is
missing, ignored or of another shape *and is not so in the base itself*.
"""

import atexit
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from consilience import cache
from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.open import open_checkpoint
from consilience.engine.adapter_files import CONFIG, WEIGHTS
from consilience.engine.chosen_files import files_of_output, output_configs
from consilience.engine.output import output_config
from consilience.engine.plan import Plan
from consilience.errors import InputError
from consilience.experts.vocabulary import is_tokenizer_file, tokenizer_digest
from consilience.progress import NullProgress, Progress

#: Seconds after which no answer is expected any more.
_PATIENCE = 300.0
#: The base's own names, shapes and config need no check.
OWN = "the names, shapes and config are the base's own"


@dataclass(frozen=True)
class LoadCheck:
    """How an output is checked: ``force`` it, even where it is the base's own; run code that comes with the base."""

    force: bool = False
    trust_remote_code: bool = False


def check_model(plan: Plan, how: LoadCheck, progress: Progress | None = None) -> str:
    """Open a merge's output with transformers, from the plan alone, and return what to say of it.

    Raises:
        InputError: transformers would make up, ignore or misread tensors that it does not in the base; or the check was
            asked for and cannot be done.
    """
    donor = plan.alignment.donor.checkpoint
    if donor is None or donor.folder is None:
        return _unopened("a flat state dict has no loader of its own", how)
    chosen = output_configs(plan)[0]
    config = output_config(chosen, plan) if chosen else {}
    _check_tokenizer(plan, config)
    tensors = {t.name: (t.out_dtype.name, t.shape) for t in plan.tensors if not plan.layout.files[t.file].beginning}
    if not how.force and _shapes(tensors) == _shapes(_stored(donor)) and _plain(config) == _plain(donor.config or {}):
        return OWN
    problem = _obstacle(config, donor.folder, how, "transformers")
    if problem is not None:
        return _unopened(problem, how)
    code = str(donor.folder) if how.trust_remote_code and config.get("auto_map") else None
    request = {"config": config, "tensors": tensors, "code": code}
    # With a head that the base lacks the output is of another class, which may ignore what the base's own class has.
    own = {"config": plan.alignment.heads.config(donor.config or {}), "tensors": _stored(donor), "code": code}
    return _verdict("the output", request, own, ("transformers",), how, progress)


def _check_tokenizer(plan: Plan, config: dict[str, Any]) -> None:
    """Open a tokenizer that is made for the output with transformers, if that is here.

    Raises:
        InputError: transformers does not open it, or gives its tokens other ids than the rows have.
    """
    tokens, source = plan.alignment.tokens, files_of_output(plan).tokenizer_folder
    if tokens is None or not tokens.choice.files or source is None or find_spec("transformers") is None:
        return
    facts = [
        tokenizer_digest(source),
        tokens.choice.digest,
        tokens.choice.files,
        config,
        metadata.version("transformers"),
    ]
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=20).hexdigest()
    folder = cache.cache_root() / "tokenizers"
    found = cache.recall(folder, key)
    if found is None:
        with tempfile.TemporaryDirectory(prefix="consilience-tokenizer-") as made:
            own = [path for path in source.iterdir() if is_tokenizer_file(path.name) and path.is_file()]
            for path in own:
                if path.name not in tokens.choice.left and path.name not in tokens.choice.files:
                    shutil.copyfile(path, Path(made) / path.name)
            expected = dict(tokens.choice.ids)
            for name, content in {**tokens.choice.files, "config.json": config, "expected.json": expected}.items():
                text = content if isinstance(content, str) else json.dumps(content)
                (Path(made) / name).write_text(text, encoding="utf-8")
            try:
                found = LOADER.ask({"tokenizer": made})
            except (OSError, ValueError):
                return  # as with a model: no answer is no verdict
        cache.remember(folder, key, found)
    wrong = [*found["missing"], *found["mismatched"]]
    if found["error"] or wrong:
        why = found["error"] or f"{wrong[0]!r} has another id there than {tokens.choice.ids[wrong[0]]}, or none"
        raise InputError(
            f"{plan.where}: tokenizer: {tokens.choice.label}: transformers would not open the output's tokenizer as it "
            f"is meant ({why}); choose base or a model's"
        )


def check_adapter_output(plan: Plan, result: Path, how: LoadCheck, progress: Progress | None = None) -> str:
    """Open a written adapter with PEFT on the base's architecture, and return what to say of it.

    Raises:
        InputError: PEFT would make up, ignore or misread factors that it does not in the experts' own adapters; or the
            check was asked for and cannot be done.
    """
    donor = plan.alignment.donor.checkpoint
    if donor is None or donor.folder is None:
        return _unopened("the base is a flat state dict, which has no loader of its own", how)
    config = donor.config or {}
    problem = _obstacle(config, donor.folder, how, "transformers", "peft")
    if problem is not None:
        return _unopened(problem, how)
    code = str(donor.folder) if how.trust_remote_code and config.get("auto_map") else None
    base: dict[str, Any] = {"config": config, "tensors": {}, "code": code}
    written = open_checkpoint(result / WEIGHTS)
    request = base | {"adapter": {"config": read_object(result / CONFIG), "tensors": _stored(written)}}
    written.storage.close()
    first = next(expert.adapter for expert in plan.experts if expert.adapter is not None)
    own = base | {"adapter": {"config": first.config, "tensors": _stored(first.checkpoint)}}
    return _verdict("the adapter", request, own, ("peft", "transformers"), how, progress)


def _stored(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of a checkpoint's tensors, but for those of further modules."""
    inner = tuple(f"{module}/" for module in checkpoint.modules)
    tensors: Mapping[str, TensorInfo] = checkpoint.tensors
    return {n: (t.dtype.name, t.shape) for n, t in tensors.items() if not inner or not n.startswith(inner)}


def _shapes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in tensors.items()}


def _plain(config: Any) -> Any:
    """Return a config without its float types: whatever these are, a loader converts."""
    if not isinstance(config, dict):
        return config
    return {key: _plain(value) for key, value in config.items() if key not in ("dtype", "torch_dtype")}


def _obstacle(config: dict[str, Any], folder: Path, how: LoadCheck, *libraries: str) -> str | None:
    """Return why a model cannot be opened here; None: it can be tried."""
    if not (folder / "config.json").is_file():
        return "the base has no config.json"
    if not config.get("model_type"):
        return "config.json names no model_type"
    if config.get("auto_map") and not how.trust_remote_code:
        return "its code comes with it; --trust-remote-code runs it"
    missing = [library for library in ("torch", *libraries) if find_spec(library) is None]
    return f"{missing[0]} is not installed; pip install 'consilience[hf]'" if missing else None


def _unopened(why: str, how: LoadCheck) -> str:
    if how.force:
        raise InputError(f"--check-load: the output cannot be opened: {why}")
    return f"not opened by a loader: {why}"


def _verdict(
    what: str,
    request: dict[str, Any],
    own: dict[str, Any],
    libraries: tuple[str, ...],
    how: LoadCheck,
    progress: Progress | None,
) -> str:
    """Return what to say of a request's report, compared with that of the base's (or an expert's) own files."""
    progress = progress or NullProgress()
    progress.phase(f"opening {what} with {libraries[0]}", 1, "checks")
    try:
        found = _report(request, libraries, how)
        if not any(found.values()):
            progress.advance()
            return f"opened by {libraries[0]} {metadata.version(libraries[0])}"
        before = _report(own, libraries, how)
    except (OSError, ValueError) as failure:
        return _unopened(f"{libraries[0]} gave no answer ({failure})", how)
    progress.advance()
    if before["error"]:
        return _unopened(f"{libraries[0]} does not open the inputs themselves ({before['error']})", how)
    if found["error"]:
        raise InputError(
            f"{what}: {libraries[0]} would not open it, as it does the inputs: {found['error']}; {_ADVICE}"
        )
    wrong = [
        f"{verb} {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for key, verb in (("missing", "makes up"), ("mismatched", "does not fit"), ("unexpected", "ignores"))
        if (names := sorted(set(found[key]) - set(before[key])))
    ]
    if not wrong:
        return f"opened by {libraries[0]} {metadata.version(libraries[0])} as the base is"
    raise InputError(f"{what}: {libraries[0]}, which is to open it, {', '.join(wrong)}; {_ADVICE}")


_ADVICE = "check what 'config:' chooses and which tensors are 'private:', or report this with the recipe"


def _report(request: dict[str, Any], libraries: tuple[str, ...], how: LoadCheck) -> dict[str, Any]:
    """Return the loader's report, from the cache if it has one."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", *libraries)}
    text = json.dumps([request, versions], sort_keys=True)
    code = [hashlib.blake2b(path.read_bytes()).hexdigest() for path in _code(request)]
    key = hashlib.blake2b((text + "".join(code)).encode(), digest_size=20).hexdigest()
    folder = cache.cache_root() / "loads"
    known = None if how.force else cache.recall(folder, key)
    if known is None:
        known = LOADER.ask(request)
        cache.remember(folder, key, known)
    return known


def _code(request: dict[str, Any]) -> list[Path]:
    return sorted(Path(request["code"]).glob("*.py")) if request["code"] else []


class Loader:
    """The process that opens models; started when it is first asked, and again when it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the report of a request.

        Raises:
            OSError: the process ended, or did not answer in time.
            ValueError: its answer makes no sense.
        """
        with self._lock:
            process = self.running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                ready = select.select([process.stdout], [], [], _PATIENCE)[0]
                line = process.stdout.readline() if ready else b""
                if not line:
                    raise TimeoutError("it ended" if ready else f"none in {_PATIENCE:.0f} s")
                return json.loads(line)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the process, if it runs."""
        process, self._process = self._process, None
        if process is not None:
            with process:  # closes its pipes and waits for it
                process.kill()

    def running(self) -> "subprocess.Popen[bytes]":
        """Return the process, started anew where there is none or it has ended."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()  # it ended by itself, having had nothing to do
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "consilience.engine.loader"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | quiet,
        )
        return self._process


LOADER = Loader()
atexit.register(LOADER.close)
