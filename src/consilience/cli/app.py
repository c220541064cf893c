"""The command line: a thin face over the library. Every command is one public function."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from consilience.cli.advise import EPILOG as ADVISE_EPILOG
from consilience.cli.advise import advise
from consilience.cli.align import EPILOG as ALIGN_EPILOG
from consilience.cli.align import align
from consilience.cli.completion import EPILOG as COMPLETION_EPILOG
from consilience.cli.completion import complete, completion
from consilience.cli.doctor import EPILOG as DOCTOR_EPILOG
from consilience.cli.doctor import doctor
from consilience.cli.inputs import choices, read_input
from consilience.cli.printing import print_json
from consilience.cli.route import route
from consilience.cli.stats import EPILOG as STATS_EPILOG
from consilience.cli.stats import JOIN_EPILOG, stats, stats_join
from consilience.errors import InputError, printable

app = typer.Typer(
    name="consilience",
    help="One model from many experts: merge, measure and inspect fine-tuned models and LoRA adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(route, name="route")
app.command(epilog=DOCTOR_EPILOG)(doctor)
app.command(epilog=ADVISE_EPILOG)(advise)
app.command(epilog=ALIGN_EPILOG)(align)
app.command(epilog=STATS_EPILOG)(stats)
app.command("stats-join", epilog=JOIN_EPILOG)(stats_join)
app.command(epilog=COMPLETION_EPILOG)(completion)
app.command(hidden=True)(complete)

MERGE_EPILOG = """Examples:

\b
  consilience merge recipe.yaml merged/
  consilience merge base/ merged/ -e math=adapters/math -e code=adapters/code --method ties --set density=0.2
  consilience merge base/ merged/ -e math=a -e code=b --set weight=0.5 --set math.weight=0.3
  consilience merge recipe.yaml merged/ --dry-run
  consilience merge recipe.yaml merged/ --method dare_ties --set density=0.3 --dtype float16
  consilience merge recipe.yaml sweep/ --sweep weight=0.2,0.4,0.6 --tasks code=heldout/code.jsonl
  consilience merge base/ merged/ -e math=a -e code=b --method expert_merging \\
      --calibration math=prompts/math.jsonl --calibration code=prompts/code.jsonl
  consilience merge base/ merged/ -e math=a -e code=b --coefficients merged/consilience

\b
A recipe is mergekit's models: form:
  merge_method: ties
  base_model: path/or/hub-id
  models:
    - {model: path/to/math, parameters: {weight: 0.5, density: [0.1, 0.3]}}
    - {model: path/to/code, parameters: {weight: [{filter: mlp, value: 0.4}, {value: 0.6}]}}
  out_dtype: bfloat16
A learned method also reads each model's data: {calibration: prompts.jsonl}; the rows need no responses.
"""

Expert = Annotated[
    list[str] | None,
    typer.Option(
        "--expert", "-e", metavar="[NAME=]PATH", help="An expert, by default named after its path (repeatable)."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A parameter, or EXPERT.KEY=VALUE; replaces a recipe's (repeatable)."
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FILE", help="An expert's calibration rows, for learned methods (repeatable)."),
]
StatisticsFolders = Annotated[
    list[str] | None,
    typer.Option(
        "--statistics", metavar="NAME=FOLDER", help="An expert's statistics, for regmean, lot and fisher (repeatable)."
    ),
]
TargetFiles = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="KEY=FILE", help="Labelled rows: train=FILE, validation=FILE; for glue."),
]
CoefficientsFile = Annotated[
    Path | None, typer.Option("--coefficients", help="Apply coefficients that were learned before.")
]
ConfigChoice = Annotated[
    list[str] | None,
    typer.Option("--config", metavar="NAME|KEY=VALUE", help="Whose config.json to take, or its values (repeatable)."),
]
TokenizerChoice = Annotated[
    str | None, typer.Option("--tokenizer", metavar="NAME", help="Whose tokenizer to take, or union.")
]
TemplateChoice = Annotated[
    str | None, typer.Option("--chat-template", metavar="NAME", help="Whose chat template to take.")
]
Private = Annotated[
    list[str] | None, typer.Option("--private", metavar="FILTER", help="Tensors that are not merged (repeatable).")
]
Dtype = Annotated[str | None, typer.Option(help="Output dtype: bfloat16, float16, float32, float64.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of random methods.")]
Sweep = Annotated[
    list[str] | None,
    typer.Option("--sweep", metavar="KEY=V1,V2,...", help="One merge a value, in OUT/01-KEY=V1 (repeat: a grid)."),
]
SweepTasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", metavar="FILE", help="With --sweep: measure each merge, as evaluate does (repeatable)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, errors included; all else to stderr.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse differences that change what the model computes.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Workers (default: this machine's cores). Never changes the result.")
]


@app.command(epilog=MERGE_EPILOG)
def merge(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|BASE", help="A recipe file, or (with -e) the base model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write (a .safetensors file for flat state dicts).")],
    expert: Expert = None,
    method: Annotated[str | None, typer.Option(help="Merge method (default: task_arithmetic).")] = None,
    set_: Set = None,
    calibration: Calibration = None,
    statistics: StatisticsFolders = None,
    target: TargetFiles = None,
    coefficients: CoefficientsFile = None,
    dtype: Dtype = None,
    config: ConfigChoice = None,
    tokenizer: TokenizerChoice = None,
    chat_template: TemplateChoice = None,
    private: Private = None,
    strict: Strict = False,
    seed: Seed = None,
    as_adapter: Annotated[
        str | None, typer.Option(metavar="cat|svd", help="Write a PEFT adapter (all experts must be LoRA).")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of an svd adapter.")] = None,
    force: Annotated[bool, typer.Option(help="Replace a non-empty OUT.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and touch nothing.")] = False,
    threads: Threads = None,
    shard_size: Annotated[str | None, typer.Option(help="Largest weight file, such as 2GB (default: 5GB).")] = None,
    stochastic_rounding: Annotated[bool, typer.Option(help="Round at random with the right expectation.")] = False,
    allow_nonfinite: Annotated[bool, typer.Option(help="Let NaN, Inf and overflow through.")] = False,
    device: Annotated[str, typer.Option(help="Where a learned method runs the model: cpu, cuda, ...")] = "cpu",
    tensorboard: Annotated[Path | None, typer.Option(help="Log a learned method's losses to this folder.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run .py files that come with the base.")] = False,
    check_load: Annotated[
        bool, typer.Option("--check-load", help="Open OUT with its own library, even if nothing but values is new.")
    ] = False,
    sweep: Sweep = None,
    tasks: SweepTasks = None,
    max_examples: Annotated[
        int | None, typer.Option(min=1, help="With --tasks: use the first rows of each task only.")
    ] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
) -> None:
    """Merge a base and its experts into one verified checkpoint."""
    from consilience.cli.merging import merge_command, show_plan
    from consilience.cli.sweeping import parse_grid, show_sweep, sweep_command

    extra = {"--dtype": dtype, "--seed": seed, "--coefficients": None if coefficients is None else str(coefficients)}
    extra |= choices(config, tokenizer, chat_template, private)
    source = read_input(recipe, expert, method, set_, extra, calibration, target, statistics)
    settings = {
        "shard_size": None if shard_size is None else parse_size(shard_size),
        "stochastic_rounding": stochastic_rounding,
        "allow_nonfinite": allow_nonfinite,
        "strict": strict,
    }
    learning = {"device": device, "tensorboard": tensorboard, "trust_remote_code": trust_remote_code}
    if not sweep and (tasks or max_examples is not None):
        idle = "--tasks" if tasks else "--max-examples"
        raise InputError(f"{idle}: only goes with --sweep; measure one merge by consilience evaluate")
    if sweep:
        if check_load or tensorboard is not None:
            raise InputError(
                f"--{'check-load' if check_load else 'tensorboard'}: goes with one merge, not with --sweep"
            )
        grid = parse_grid(sweep, set_ or [], {"method": method, "dtype": dtype, "seed": seed})
        points: dict[str, Any] = {
            "tasks": tasks or (), "max_examples": max_examples, "as_adapter": as_adapter, "rank": rank, "force": force,
            "device": device, "trust_remote_code": trust_remote_code, "as_json": as_json, **settings,
        }  # fmt: skip
        if dry_run:
            show_sweep(source, out, grid, **points)
        else:
            sweep_command(source, out, grid, quiet=quiet, threads=threads, **points)
        return
    if dry_run:
        show_plan(
            source, out, as_adapter, rank, force=force, threads=threads, check_load=check_load, as_json=as_json,
            learning=learning, **settings,
        )  # fmt: skip
        return
    merge_command(
        source,
        out,
        quiet=quiet,
        as_json=as_json,
        as_adapter=as_adapter,
        rank=rank,
        force=force,
        threads=threads,
        check_load=check_load,
        **learning,
        **settings,
    )


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``500MB`` or ``2GiB``."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BGIKMbgikm")
    unit = text.strip()[len(number) :].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise InputError(f"--shard-size {text!r}: write a size such as 500MB or 5GB") from None
    if size < 1:
        raise InputError(f"--shard-size {text!r}: must be positive")
    return size


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|BASE", help="A recipe file, or (with -e) the base model.")],
    expert: Expert = None,
    method: Annotated[str | None, typer.Option(help="Merge method (default: task_arithmetic).")] = None,
    set_: Set = None,
    calibration: Calibration = None,
    statistics: StatisticsFolders = None,
    target: TargetFiles = None,
    coefficients: CoefficientsFile = None,
    dtype: Dtype = None,
    config: ConfigChoice = None,
    tokenizer: TokenizerChoice = None,
    chat_template: TemplateChoice = None,
    private: Private = None,
    strict: Strict = False,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Check a recipe and its models from headers alone, for CI: exit 0 if the merge can start, 2 if not.

    Example: consilience check recipe.yaml --json
    """
    from consilience.api import plan_recipe
    from consilience.engine.describe import plan_facts
    from consilience.engine.stream import thread_count

    extra: dict[str, Any] = {"--dtype": dtype, "--seed": seed}
    extra |= {"--coefficients": None if coefficients is None else str(coefficients)}
    extra |= choices(config, tokenizer, chat_template, private)
    plan = plan_recipe(read_input(recipe, expert, method, set_, extra, calibration, target, statistics), strict=strict)
    facts: dict[str, Any] = {"ok": True} | plan_facts(plan, thread_count(None))
    plan.close()
    if as_json:
        print_json(facts)
        return
    merged = f"{facts['merged']} of {facts['tensors']} tensors merged" if plan.merges else f"{facts['tensors']} tensors"
    typer.echo(f"ok: {facts['method']} of {len(plan.experts)} experts, {merged}")
    lines = [f"  warning: {text}" for text in facts["warnings"]] + [f"  note: {text}" for text in facts["notes"]]
    for line in lines:
        typer.echo(printable(line))


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="A list of objects, for programs.")] = False) -> None:
    """List the merge methods and their parameters.

    Example: consilience methods --json
    """
    from consilience.cli.listing import method_facts, method_lines

    typer.echo(json.dumps(method_facts(), indent=1, ensure_ascii=False) if as_json else "\n".join(method_lines()))


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(help="A model folder, weight file, adapter, hub reference, or coefficients file.")
    ],
    tensors: Annotated[bool, typer.Option(help="List every tensor (of coefficients: every group's values).")] = False,
    fingerprint: Annotated[bool, typer.Option(help="Read all weights and print their fingerprint.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw coefficients into FILE.png.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a model or adapter is, from its headers, or what learned coefficients are.

    Example: consilience inspect merged/ --fingerprint

    Example: consilience inspect merged/consilience --plot coefficients.png
    """
    from consilience.cli.listing import inspect_facts, inspect_lines, plot_coefficients

    if plot is not None:
        plot_coefficients(path, plot)
    facts = inspect_facts(path, tensors, fingerprint)
    if as_json:
        print_json({"ok": True} | facts)
    else:
        typer.echo("\n".join(inspect_lines(facts)))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, MODEL+ADAPTER, or hub reference.")],
    tasks: Annotated[list[str], typer.Argument(metavar="TASKS", help="JSONL files, as PATH or NAME=PATH.")],
    reference: Annotated[str | None, typer.Option(help="Also measure KL(reference || model) per token.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 32,
    max_examples: Annotated[int | None, typer.Option(min=1, help="Use the first rows of each task only.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Score the first tokens of each row only.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 (2-3 times as fast on many CPUs).")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Threads = None,
    cache: Annotated[bool, typer.Option(help="Read and write the cache of results.")] = True,
    trust_remote_code: Annotated[bool, typer.Option(help="Run .py files that come with the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Measure a model on held-out rows: loss per token, accuracy where rows have choices, divergence.

    Rows are JSONL: text | prompt + response | messages; choices + label for rank classification.

    Example: consilience evaluate merged/ code=heldout/code.jsonl sentiment=heldout/sentiment.jsonl --dtype bfloat16
    """
    from consilience.tasks import evaluate as run
    from consilience.tasks import render

    result = run(
        model,
        tasks,
        reference=reference,
        batch_size=batch_size,
        max_examples=max_examples,
        max_tokens=max_tokens,
        dtype="bfloat16" if dtype in ("bfloat16", "bf16") else "float32" if dtype in ("float32", "fp32") else dtype,  # pyright: ignore
        device=device,
        threads=threads,
        cache=cache,
        progress=True,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        typer.echo(result.to_json())
        return
    from rich.console import Console

    Console().print(render([result]))
    for note in result.notes:
        typer.echo(f"note: {printable(note)}")


TRAIN_EPILOG = """Examples:

\b
  consilience train base/ expert/ code=train/code.jsonl --steps 200 --learning-rate 1e-4
  consilience train base/ adapter/ code=train/code.jsonl --lora 8 --steps 200 --learning-rate 1e-3
  consilience train base/ mixture/ code=train/code.jsonl math=train/math.jsonl --lora 8 --steps 600 --learning-rate 1e-3
"""


@app.command(epilog=TRAIN_EPILOG)
def train(
    base: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to make: a model, or with --lora a PEFT adapter.")],
    tasks: Annotated[list[str], typer.Argument(metavar="TASKS", help="JSONL files with responses, PATH or NAME=PATH.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")],
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")],
    lora: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="Train LoRA factors, not all weights.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a step.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of rows and of the factors.")] = 0,
    precision: Annotated[str, typer.Option(help="mixed (bfloat16 products), or float32.")] = "mixed",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Threads = None,
    force: Annotated[bool, typer.Option(help="Replace a non-empty OUT.")] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
) -> None:
    """Fine-tune a model on one task (an expert), or on several together (mixture training).

    Rows of all tasks are taken in equal shares; the loss is on responses only. An interrupted run continues.
    """
    from consilience.training import fine_tune

    record = fine_tune(
        base,
        tasks,
        out,
        learning_rate=learning_rate,
        steps=steps,
        lora_rank=lora,
        batch_size=batch_size,
        seed=seed,
        precision=precision,  # pyright: ignore[reportArgumentType]
        threads=threads,
        device=device,
        force=force,
        progress=not quiet,
    )
    if as_json:
        print_json({"ok": True, "out": str(out)} | asdict(record))
    elif not quiet:
        typer.echo(f"{out}: {record.steps} steps, final loss {record.final_loss:.4f}, {record.seconds:.0f} s")


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command."""
    del debug  # read by consilience.__main__ before the command line is parsed
    if version:
        from consilience import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        sys.exit(0)
