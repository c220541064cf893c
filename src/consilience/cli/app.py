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
from consilience.cli.doctor import EPILOG as DOCTOR_EPILOG
from consilience.cli.doctor import doctor
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

MERGE_EPILOG = """Examples:

\b
  consilience merge recipe.yaml merged/
  consilience merge base/ merged/ -e math=adapters/math -e code=adapters/code --method ties --set density=0.2
  consilience merge base/ merged/ -e math=a -e code=b --set weight=0.5 --set math.weight=0.3
  consilience merge recipe.yaml merged/ --dry-run
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
    list[str] | None, typer.Option("--expert", "-e", metavar="NAME=PATH", help="An expert (repeatable).")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A parameter, or EXPERT.KEY=VALUE (repeatable).")
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
TokenizerChoice = Annotated[str | None, typer.Option("--tokenizer", metavar="NAME", help="Whose tokenizer to take.")]
TemplateChoice = Annotated[
    str | None, typer.Option("--chat-template", metavar="NAME", help="Whose chat template to take.")
]
Private = Annotated[
    list[str] | None, typer.Option("--private", metavar="FILTER", help="Tensors that are not merged (repeatable).")
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse differences that change what the model computes.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Workers (default: this machine's cores). Never changes the result.")
]


def parse_assignment(text: str, option: str) -> tuple[str, str]:
    """Split ``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise InputError(f"{option} {text!r}: write it as {'NAME=PATH' if option == '-e' else 'KEY=VALUE'}")
    return key, value


def parse_values(settings: list[str]) -> dict[str, Any]:
    """Return the values of ``--set`` options by key.

    Raises:
        InputError: a key is given twice, or a value is not written as YAML has it.
    """
    from consilience.recipe.yaml_file import parse_yaml

    values: dict[str, Any] = {}
    for text in settings:
        key, raw = parse_assignment(text, "--set")
        if key in values:
            raise InputError(f"--set {key}: is given twice; keep one")
        values[key] = parse_yaml(raw, f"--set {key}")
    return values


def parse_settings(settings: list[str], experts: dict[str, str]) -> dict[str, Any]:
    """Return the method's parameters from ``--set`` options; per-expert ones as mappings by expert name."""
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for key, value in parse_values(settings).items():
        name, dot, parameter = key.partition(".")
        if dot and name not in experts:
            from consilience.errors import nearest

            raise InputError(f"--set {key}: there is no expert {name!r}{nearest(name, list(experts))}")
        if dot:
            own.setdefault(parameter, {})[name] = value
        else:
            shared[key] = value
    for parameter, values in own.items():
        if parameter in shared:
            values |= {name: shared[parameter] for name in experts if name not in values}
        shared[parameter] = values
    return shared


def choices(
    config: list[str] | None, tokenizer: str | None, chat_template: str | None, private: list[str] | None
) -> dict[str, Any]:
    """Return what the options choose beside the weights, by option."""
    from consilience.recipe.yaml_file import parse_yaml

    chosen: Any = None
    if config and len(config) == 1 and "=" not in config[0]:
        chosen = config[0]
    elif config:
        pairs = [parse_assignment(text, "--config") for text in config]
        chosen = {key: parse_yaml(value, f"--config {key}") for key, value in pairs}
    return {"--config": chosen, "--tokenizer": tokenizer, "--chat-template": chat_template, "--private": private}


def read_input(
    recipe: str,
    experts: list[str] | None,
    method: str | None,
    settings: list[str] | None,
    extra: dict[str, Any],
    calibration: list[str] | None = None,
    target: list[str] | None = None,
    statistics: list[str] | None = None,
) -> Any:
    """Return what the user asked to merge: a recipe file's path, or a recipe made of a base and ``-e`` options."""
    from consilience.api import build_recipe

    if not experts:
        path = Path(recipe)
        if path.is_dir():
            raise InputError(f"{recipe}: is a folder; name experts with -e NAME=PATH, or pass a recipe file")
        options = (("--method", method), ("--set", settings), ("--calibration", calibration), ("--target", target))
        options = (*options, ("--statistics", statistics), *extra.items())
        given = [name for name, value in options if value is not None and value != []]
        if given:
            raise InputError(f"{given[0]}: only goes with -e; write it in the recipe {recipe}")
        return path
    if Path(recipe).suffix in (".yaml", ".yml") and not Path(recipe).is_dir():
        raise InputError(
            f"{recipe}: is a recipe, which names its experts, and -e names experts of a base; pass the recipe alone, "
            "or the base with -e"
        )
    named: dict[str, str] = {}
    for text in experts:
        name, path = parse_assignment(text, "-e")
        if name in named:
            raise InputError(f"-e {text!r}: expert {name!r} is named twice; choose another name")
        named[name] = path
    keys = {"--dtype": "out_dtype"}
    chosen = {
        keys.get(option, option.removeprefix("--").replace("-", "_")): value
        for option, value in extra.items()
        if value is not None
    }
    base = None if recipe in ("none", "-") else recipe
    default = "coefficients" if "coefficients" in chosen else "task_arithmetic"
    data: dict[str, dict[str, str]] = {}
    for key, texts in (("calibration", calibration), ("statistics", statistics)):
        for text in texts or []:
            name, path = parse_assignment(text, f"--{key}")
            if key in data.get(name, {}):
                raise InputError(f"--{key} {text!r}: expert {name!r} has a file already; give one file per expert")
            data.setdefault(name, {})[key] = path
    if target:
        chosen["target"] = dict(parse_assignment(text, "--target") for text in target)
    return build_recipe(method or default, base, named, parse_settings(settings or [], named), data=data, **chosen)


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
    dtype: Annotated[str | None, typer.Option(help="Output dtype: bfloat16, float16, float32, float64.")] = None,
    config: ConfigChoice = None,
    tokenizer: TokenizerChoice = None,
    chat_template: TemplateChoice = None,
    private: Private = None,
    strict: Strict = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of random methods.")] = None,
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
) -> None:
    """Merge a base and its experts into one verified checkpoint."""
    from consilience.cli.merging import merge_command, show_plan

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
    if dry_run:
        show_plan(
            source, out, as_adapter, rank, force=force, threads=threads, check_load=check_load, learning=learning,
            **settings,
        )  # fmt: skip
        return
    merge_command(
        source,
        out,
        quiet=quiet,
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
    config: ConfigChoice = None,
    tokenizer: TokenizerChoice = None,
    chat_template: TemplateChoice = None,
    private: Private = None,
    strict: Strict = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, errors included.")] = False,
) -> None:
    """Check a recipe and its models from headers alone, for CI: exit 0 if the merge can start, 2 if not.

    Example: consilience check recipe.yaml --json
    """
    from consilience.api import plan_recipe

    try:
        extra: dict[str, Any] = {"--coefficients": None if coefficients is None else str(coefficients)}
        extra |= choices(config, tokenizer, chat_template, private)
        plan = plan_recipe(
            read_input(recipe, expert, method, set_, extra, calibration, target, statistics), strict=strict
        )
    except InputError as error:
        if as_json:
            typer.echo(json.dumps({"ok": False, "error": str(error)}, ensure_ascii=False))
            raise typer.Exit(2) from None
        raise
    from consilience.engine.describe import estimate
    from consilience.engine.differences import by_level
    from consilience.engine.stream import thread_count

    cost = estimate(plan, thread_count(None))
    facts: dict[str, Any] = {
        "ok": True,
        "method": plan.method.name,
        "experts": [e.name for e in plan.experts],
        "tensors": len(plan.tensors),
        "merged": sum(t.program is not None for t in plan.tensors),
        "parameters": sum(t.numel for t in plan.tensors),
        "bytes_read": cost.read,
        "bytes_written": cost.written,
        "warnings": by_level(plan.differences, "warning"),
        "notes": [*plan.alignment.notes, *plan.notes, *by_level(plan.differences, "note")],
        "differences": [asdict(one) for one in plan.differences],
    }
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
    else:
        merged = f"{facts['merged']} of {facts['tensors']} tensors merged"
        typer.echo(f"ok: {facts['method']} of {len(plan.experts)} experts, {merged}")
        lines = [f"  warning: {text}" for text in by_level(plan.differences, "warning")]
        lines += [
            f"  note: {text}" for text in (*plan.alignment.notes, *plan.notes, *by_level(plan.differences, "note"))
        ]
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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Say what a model or adapter is, from its headers, or what learned coefficients are.

    Example: consilience inspect merged/ --fingerprint

    Example: consilience inspect merged/consilience --plot coefficients.png
    """
    from consilience.cli.listing import inspect_facts, inspect_lines, plot_coefficients

    if plot is not None:
        plot_coefficients(path, plot)
    facts = inspect_facts(path, tensors, fingerprint)
    typer.echo(json.dumps(facts, indent=1, ensure_ascii=False) if as_json else "\n".join(inspect_lines(facts)))


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
    if not quiet:
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
