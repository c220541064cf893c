"""``consilience route``: build, use and look into models that route tokens among experts."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from consilience.errors import InputError

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
    from consilience.cli.app import parse_assignment
    from consilience.recipe.yaml_file import parse_yaml
    from consilience.routing import Settings, load_routed

    changes = {
        key: parse_yaml(raw, f"--set {key}") for key, raw in (parse_assignment(t, "--set") for t in settings or [])
    }
    Settings.from_dict(changes, "--set")
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

    made = build_routed(recipe, out, force=force, device=device, trust_remote_code=trust_remote_code)
    if not quiet:
        names = ", ".join(made.experts)
        typer.echo(f"{out}: {len(made.experts)} experts ({names}), local router {made.settings.local}")


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
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
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
