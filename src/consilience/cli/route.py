"""``consilience route``: build, use and look into models that route tokens among experts."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from consilience.errors import InputError
from consilience.workdir import write_file

route = typer.Typer(
    help="Models that route every token to the right experts.", no_args_is_help=True, rich_markup_mode=None
)

BUILD_EPILOG = """Examples:

\b
  consilience route build routed.yaml routed/
  consilience route build routed.yaml routed/ --force

\b
A recipe names the base, the adapters, and how tokens are routed:
  base_model: path/or/hub-id
  models:
    - {model: adapters/code, name: code, data: {train: code.jsonl}}
    - {model: adapters/math, name: math, data: {train: math.jsonl}}
  routing: {local: arrow, top_k: 2}
"""

Folder = Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that 'route build' made.")]
BaseOption = Annotated[str | None, typer.Option("--base", help="Where the base is, if it has moved.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A routing setting, such as scale=3 (repeatable)."),
]


def loaded(folder: Path, base: str | None, device: str, dtype: str, settings: list[str] | None) -> Any:
    """Load a routed model with settings changed."""
    from consilience.cli.inputs import parse_values
    from consilience.routing import Settings, load_routed
    from consilience.routing.folder import store

    changes = parse_values(settings or [])
    # A wrong setting is told before the model is loaded.
    description = store.read_description(folder)
    used = Settings.from_plain(description.settings.to_dict() | changes, "--set").top_k
    if "top_k" in changes and used > len(description.experts):
        raise InputError(f"--set top_k={used}: of {len(description.experts)} experts; write 0 for all of them")
    model = load_routed(folder, base=base, device=device, dtype=dtype)
    if changes:
        model.routing.set(**changes)
    return model


@route.command(epilog=BUILD_EPILOG)
def build(
    recipe: Annotated[Path, typer.Argument(help="A YAML file.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    force: Annotated[bool, typer.Option(help="Replace a non-empty OUT.")] = False,
    device: Device = "cpu",
    trust_remote_code: Annotated[bool, typer.Option(help="Run .py files that come with the base.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
) -> None:
    """Build a routed model from a base and LoRA adapters. An interrupted build continues."""
    from consilience.routing import build_routed

    made = build_routed(
        recipe, out, force=force, device=device, trust_remote_code=trust_remote_code, progress=not quiet
    )
    if not quiet:
        names = ", ".join(made.experts)
        typer.echo(f"{out}: {len(made.experts)} experts ({names}), local router {made.settings.local}")


@route.command()
def add(
    folder: Folder,
    expert: Annotated[str, typer.Argument(metavar="NAME=ADAPTER", help="The new expert's name and its PEFT adapter.")],
    data: Annotated[Path | None, typer.Option(help="The expert's own rows (JSONL).")] = None,
    instruction: Annotated[str | None, typer.Option(help="What it does, in one sentence.")] = None,
    base: BaseOption = None,
    device: Device = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
) -> None:
    """Add an expert to a routed model; nothing of the others changes.

    Example: consilience route add routed/ law=adapters/law --data law.jsonl
    """
    from consilience.cli.inputs import parse_assignment
    from consilience.routing.folder.change import add_expert

    name, adapter = parse_assignment(expert, "-e")
    made = add_expert(
        folder, name, adapter, data=data, instruction=instruction, base=base, device=device, progress=not quiet
    )
    if not quiet:
        typer.echo(f"{folder}: {len(made.experts)} experts ({', '.join(made.experts)})")


@route.command()
def remove(
    folder: Folder,
    expert: Annotated[str, typer.Argument(metavar="NAME", help="The expert that goes.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary.")] = False,
) -> None:
    """Remove an expert from a routed model, with its files; nothing of the others changes.

    Example: consilience route remove routed/ law
    """
    from consilience.routing.folder.change import remove_expert

    made = remove_expert(folder, expert)
    if not quiet:
        typer.echo(f"{folder}: {len(made.experts)} experts ({', '.join(made.experts)})")


@route.command()
def generate(
    folder: Folder,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts; - reads one a line from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    settings: Setting = None,
    expert: Annotated[str | None, typer.Option(help="Use this expert alone, or 'base'.")] = None,
    base: BaseOption = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt.")] = False,
) -> None:
    """Answer prompts; each is routed on its own, whatever the others of the batch are about.

    Example: consilience route generate routed/ "Pronounce the word: stable" "Translate to Spanish: Good day."
    """
    from consilience.tasks.generate import sample

    if prompts == ["-"]:
        prompts = _lines(sys.stdin.buffer.read())
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise InputError("PROMPT: is empty; write what the model is asked")
    model = loaded(folder, base, device, dtype, settings)
    if expert is None:
        answers = sample(model, model.tokenizer, prompts, max_new_tokens)
    else:
        with model.routing.plain() if expert == "base" else model.routing.only(expert):
            answers = sample(model, model.tokenizer, prompts, max_new_tokens)
    for prompt, answer in zip(prompts, answers, strict=True):
        typer.echo(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) if as_json else answer)


def _lines(given: bytes) -> list[str]:
    try:
        return [line.rstrip("\r") for line in given.decode().split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: byte {error.start} is not UTF-8; convert the prompts to UTF-8") from None


@route.command("eval")
def evaluate(
    folder: Folder,
    tasks: Annotated[list[str], typer.Argument(metavar="TASKS", help="JSONL files, as PATH or NAME=PATH.")],
    beside: Annotated[
        list[str] | None, typer.Option(help="Also measure: base, uniform, own, or an expert (repeatable).")
    ] = None,
    settings: Setting = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 32,
    max_examples: Annotated[int | None, typer.Option(min=1, help="Use the first rows of each task only.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Score the first tokens of each row only.")] = None,
    products: Annotated[str, typer.Option("--dtype", help="float32, or bfloat16 (2-3 times as fast).")] = "float32",
    base: BaseOption = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="A list of JSON objects.")] = False,
) -> None:
    """Measure a routed model on held-out rows: every row is routed by its prompt, never by its task's name.

    Example: consilience route eval routed/ code=code.jsonl math=math.jsonl --beside own --beside base
    """
    from rich.console import Console

    from consilience.routing.evaluation import evaluate_routed
    from consilience.tasks import render

    if products not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {products!r}: use float32 or bfloat16")
    model = loaded(folder, base, device, "float32", settings)
    found = evaluate_routed(
        model,
        tasks,
        beside=beside or (),
        batch_size=batch_size,
        max_examples=max_examples,
        max_tokens=max_tokens,
        dtype=products,
        progress=True,
    )
    if as_json:
        typer.echo("[" + ",\n".join(one.to_json() for one in found) + "]")
        return
    Console().print(render(found))


@route.command()
def collapse(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    tasks: Annotated[list[str], typer.Argument(metavar="TASKS", help="JSONL files, as PATH or NAME=PATH.")],
    held_out: Annotated[
        list[str] | None, typer.Option("--eval", metavar="NAME=FILE", help="Measure on these rows (repeatable).")
    ] = None,
    settings: Setting = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 16,
    max_examples: Annotated[int | None, typer.Option(min=1, help="Use the first rows of each task only.")] = None,
    base: BaseOption = None,
    device: Device = "cpu",
    force: Annotated[bool, typer.Option(help="Replace a non-empty OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no tables.")] = False,
) -> None:
    """Distil a routed model to one checkpoint: every module's mean weights on prompts become its coefficients.

    Example: consilience route collapse routed/ merged/ code=code.jsonl math=math.jsonl --set top_k=0
    """
    from rich.console import Console

    from consilience.routing.conversion.collapse import collapse as distil
    from consilience.tasks import render

    found = distil(
        folder,
        tasks,
        out,
        model=loaded(folder, base, device, "float32", settings),
        held_out=held_out or (),
        base=base,
        batch_size=batch_size,
        max_examples=max_examples,
        force=force,
        progress=not quiet,
    )
    if not quiet:
        typer.echo(f"{out}: one model of {len(found.coefficients.experts)} experts, verified")
        Console().print(render(found.evaluations))


@route.command("explain")
def explain_answer(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model is asked.")],
    answer: Annotated[str | None, typer.Option(help="Explain this answer instead of the model's own.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with a map of all weights.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 32,
    settings: Setting = None,
    base: BaseOption = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with all weights.")] = False,
) -> None:
    """Say which expert took which token at which layer, for one prompt and its answer.

    Example: consilience route explain routed/ "Translate to Spanish: Good day." --html routing.html
    """
    from consilience.routing.explaining.explain import explain

    if html is not None and html.is_dir():
        raise InputError(f"--html {html}: is a folder; name a file in it")
    if html is not None and not html.absolute().parent.is_dir():
        raise InputError(f"--html {html}: there is no folder {html.parent}; make it first")
    if html is not None and not os.access(html if html.exists() else html.absolute().parent, os.W_OK):
        raise InputError(f"--html {html}: cannot be written; name another file")
    model = loaded(folder, base, device, dtype, settings)
    found = explain(model, prompt, max_new_tokens=max_new_tokens, answer=answer, progress=True)
    typer.echo(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else found.to_text(), nl=as_json)
    if html is not None:
        write_file(html.resolve(), found.to_html())
        typer.echo(f"{html}: open it in a browser", err=True)


@route.command()
def extract(
    base: Annotated[str, typer.Argument(help="The model that the expert was tuned from.")],
    expert: Annotated[str, typer.Argument(help="A fine-tuned model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the adapter to.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Largest rank of a layer.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of every layer's update to keep, in (0, 1].")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the factors: bfloat16, float32 (default: the base's).")] = None,
    force: Annotated[bool, typer.Option(help="Replace a non-empty OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
) -> None:
    """Write the low-rank part of a fully fine-tuned model as a LoRA adapter, to route or merge it. Interruptible.

    Example: consilience route extract base/ tuned/ adapters/tuned --rank 16
    """
    from consilience.routing.conversion.extract import extract as extracted

    found = extracted(base, expert, out, rank=rank, energy=energy, dtype=dtype, force=force, progress=not quiet)
    if not quiet:
        typer.echo(f"{out}: {found}")
