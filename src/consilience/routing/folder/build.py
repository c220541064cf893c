"""Build a routed model's folder from a recipe: its experts, the vectors they are recognised by, their instructions."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from consilience.checkpoints.adapter_files import adapter_files
from consilience.checkpoints.files import stamp
from consilience.checkpoints.reference import resolve
from consilience.engine.plan import resolve_file
from consilience.engine.unchanged import check_stamps
from consilience.errors import InputError
from consilience.experts.expert_set import expert_names
from consilience.progress import Progress, ProgressOption, open_progress
from consilience.routing.expert import Expert, read_factors
from consilience.routing.folder import store
from consilience.routing.folder.recipe import RoutedEntry, RouteRecipe
from consilience.routing.install import check_fit
from consilience.routing.instructions.semantics import Instructions, InstructionSettings
from consilience.routing.instructions.semantics import Source as Described
from consilience.routing.local.arrow import directions
from consilience.routing.local.gate_settings import GateSettings
from consilience.routing.queries import Texts
from consilience.routing.settings import Settings
from consilience.routing.values import read_settings
from consilience.tasks.encoding import encode, vocabulary_of
from consilience.tasks.gradients import gradients
from consilience.tasks.load import check_folder, load_model, load_tokenizer, require_transformers
from consilience.tasks.readout import decoder_start
from consilience.tasks.rows import Task, read_rows
from consilience.training.data import Examples, right
from consilience.workdir import digest_of, workdir

#: What else may be named beside experts, in commands and results.
RESERVED = ("base", "uniform", "own", "routed", "collapsed")
#: Prompts of each expert that its instruction is made of.
EXAMPLES = 64
#: Unfinished trainings of gates, in OUT.partial: each is named by all it depends on.
GATES = "gates"


@dataclass(frozen=True)
class Source:
    """One expert as the recipe names it: where its adapter is, and the folder that relative paths start from."""

    name: str
    adapter: Path
    entry: RoutedEntry
    root: Path | None

    def task(self, *, labelled: bool) -> Task | None:
        """Read the expert's rows: ``data.train``, or where answers are not needed ``data.calibration``.

        Raises:
            InputError: the file cannot be read.
        """
        data = self.entry.data
        value = None if data is None else data.train or (None if labelled else data.calibration)
        if value is None:
            return None
        path = resolve_file(value, self.root)
        return Task(self.name, read_rows(path), path)


@dataclass(frozen=True, eq=False)
class Base:
    """The base while a routed model is built on it: loaded when it is first needed."""

    folder: Path
    device: str
    trust_remote_code: bool
    loaded: list[tuple[Any, Any]] = field(default_factory=list[tuple[Any, Any]])

    def __call__(self) -> tuple[Any, Any]:
        """Return the model, in the dtype it is stored in and frozen, and its tokenizer."""
        if not self.loaded:
            settings: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
            tokenizer = load_tokenizer(self.folder, **settings)
            model = load_model(self.folder, device=self.device, dtype="auto", **settings).requires_grad_(False)
            self.loaded.append((model, tokenizer))
        return self.loaded[0]

    def examples(self, task: Task) -> Examples:
        """Return a task's rows as the model is given them; of choices, the right one."""
        model, tokenizer = self()
        config = model.config
        encodes = bool(getattr(config, "is_encoder_decoder", False))
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        start, context = decoder_start(model) if encodes else None, getattr(text, "max_position_embeddings", None)
        rows = vocabulary_of(model)
        found = encode(task, tokenizer, decoder_start=start, context=context, vocabulary=rows)
        return Examples(task, right(task, found))

    def prompts(self, task: Task) -> tuple[str, ...]:
        """Return the queries that a task's first rows are."""
        first = Task(task.name, task.rows[:EXAMPLES], task.path)
        if all(row.prompt is not None for row in first.rows):
            return tuple(str(row.prompt) for row in first.rows)
        texts = Texts.of(self()[1])
        found = self.examples(first).sequences
        return tuple(texts(one.inputs[: one.positions[0] + 1] if one.targets else one.inputs) for one in found)


def sources_of(recipe: RouteRecipe, root: Path | None, where: str) -> list[Source]:
    """Return a recipe's experts.

    Raises:
        InputError: an expert is no adapter, or two have one name.
    """
    names = expert_names([(entry.model, entry.name) for entry in recipe.models], where)
    return [source_of(name, entry, root, where) for name, entry in zip(names, recipe.models, strict=True)]


def source_of(name: str, entry: RoutedEntry, root: Path | None, where: str) -> Source:
    """Return one expert.

    Raises:
        InputError: it is no adapter, or its name cannot name a folder.
    """
    if not store.is_name(name) or "=" in name:
        raise InputError(f"{where}: expert {name!r} cannot name a folder; give it a name: without / \\ . or =")
    if name in RESERVED:
        raise InputError(f"{where}: expert {name!r}: means something else to route's commands; give it another name:")
    place, said = resolve(entry.model, root), f"{where}: expert {name!r}: {entry.model}"
    files = adapter_files(place.adapter or place.model)
    if files is None:
        raise InputError(
            f"{said} is no LoRA adapter (no adapter_config.json, no tensors of one); make one of a fine-tuned model "
            "with: consilience route extract BASE MODEL OUT"
        )
    folder = files.folder
    if folder is None:
        raise InputError(
            f"{said} is no adapter in PEFT's form; make one: consilience merge BASE OUT -e {name}={entry.model} "
            "--as-adapter cat"
        )
    store.check_adapter(folder)
    return Source(name, folder, entry, root)


def build(
    recipe: RouteRecipe,
    out: Path | str,
    *,
    root: Path | None = None,
    where: str = "recipe",
    force: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: ProgressOption = False,
) -> store.Description:
    """Build a routed model from a base and its adapters.

    Everything is made in OUT.partial, and OUT appears whole; an interrupted build goes on where it stopped.

    Args:
        recipe: the base, the experts and how they are routed.
        out: the folder to make.
        root: the folder that the recipe's relative paths start from.
        where: what errors call the recipe.
        force: replace what stands at ``out``.
        device: where the base runs, if gates, mean activations or instructions need it.
        trust_remote_code: run ``.py`` files that come with the base.
        progress: as ``build_routed`` takes it.

    Raises:
        InputError: the recipe, an adapter or a row is wrong; nothing is left behind.
        MachineError: memory or disk ran out; the same call continues.
    """
    require_transformers("routing")
    settings, out = recipe.settings(where), Path(out)
    gates = read_settings(GateSettings, recipe.gates | {"seed": recipe.seed}, f"{where}: gates")
    told = _instruction_settings(recipe, settings, root, where)
    folder = resolve(recipe.base_model, root).model
    check_folder(folder)
    sources = sources_of(recipe, root, where)
    inputs = [folder, *_read(sources, told), *([Path(where)] if Path(where).is_file() else [])]
    if int(recipe.routing.get("top_k") or 0) > len(sources):
        raise InputError(
            f"{where}: routing: top_k: {settings.top_k} of {len(sources)} experts; write 0 for all of them, or add some"
        )
    described = store.Base.of(folder, recipe.base_model)
    read = [file for path in inputs for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
    before = [stamp(file) for file in read]
    states = [one[:3] for one in before if one.path != where]  # of the recipe counts what it says
    digest = digest_of({"base": asdict(described), "recipe": recipe.model_dump(), "inputs": states})
    base = Base(folder, device, trust_remote_code)
    with (
        gradients(),
        open_progress(progress) as shown,
        workdir(out, digest, force=force, inputs=inputs, keep=(GATES,)) as work,
    ):
        if work.delivered is not None:
            return store.read_description(out)
        experts = [Expert(source.name, read_factors(source.adapter)) for source in sources]
        for expert in experts:
            check_fit(base()[0], expert)
        # First all that may fail; gates are trained for hours.
        recipes = Work(base, settings, gates, work.path / GATES, shown)
        rows = [recipes.rows(source, where) for source in sources]
        instructions = None if told is None else instruct(base, told, sources, shown)
        if settings.scale == "adaptive" and instructions is not None and instructions.adaptive is None:
            raise InputError(
                f"{where}: scale: adaptive is fitted on examples of two experts at least, and there are not so many; "
                "give the experts data and held_in above 0, or a number for scale"
            )
        made = [recipes.vectors(expert, examples) for expert, examples in zip(experts, rows, strict=True)]
        records = {"gates": {source.name: one for source, (_, one) in zip(sources, made, strict=True) if one}}
        description = store.Description(described, settings, store.names_of(experts), records=records)
        result = work.new_result()
        for source, (vectors, _) in zip(sources, made, strict=True):
            store.write_expert(result, source.name, source.adapter, vectors)
        if instructions is not None:
            name = store.write_instructions(result, instructions.tensors())
            description = replace(description, instructions=instructions.to_dict(), tensors=name)
        store.write_description(result, description)
        check_stamps(before, "build")
        work.deliver({})
    return description


@dataclass(frozen=True)
class Work:
    """How an expert's vectors are made; ``state`` keeps unfinished trainings."""

    base: Base
    settings: Settings
    gates: GateSettings
    state: Path
    progress: Progress

    def rows(self, source: Source, where: str) -> list[Examples]:
        """Return the rows that an expert's vectors are learned from; none where the local router needs none.

        Raises:
            InputError: the local router needs rows that the recipe does not name, or they cannot be read.
        """
        if self.settings.local not in ("phatgoose", "average"):
            return []
        task = source.task(labelled=True)
        if task is None:
            raise InputError(
                f"{where}: expert {source.name!r}: {self.settings.local} learns from the expert's own rows; "
                "give it data: {train: FILE.jsonl}, or use local: arrow"
            )
        return [self.base.examples(task)]

    def vectors(
        self, expert: Expert, rows: list[Examples]
    ) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any] | None]:
        """Return an expert's vectors by kind, and how its gates were trained; Arrow's need nothing and always come."""
        found: dict[str, Mapping[str, Tensor]] = {"arrow": directions(expert.factors)}
        if not rows:
            return found, None
        if self.settings.local == "average":
            from consilience.routing.local.average import average_activations

            model = self.base()[0]
            means = average_activations(model, expert.name, expert.factors, rows, progress=self.progress)
            return found | {"average": means}, None
        from consilience.routing.local.gate_training import train_gates

        trained, record = train_gates(
            self.base()[0], expert.name, expert.factors, rows, self.gates, self.state, self.progress
        )
        return found | {"phatgoose": trained}, record.to_dict()


def _instruction_settings(
    recipe: RouteRecipe, settings: Settings, root: Path | None, where: str
) -> InstructionSettings | None:
    if recipe.instructions is None:
        if settings.instructed:
            raise InputError(
                f"{where}: scale: {settings.scale!r} makes instructions count, and the recipe does not say how "
                "they are made; add instructions: {describer: none, embedder: base}, or use scale: 0"
            )
        return None
    return InstructionSettings.from_plain(recipe.instructions, f"{where}: instructions").located(root)


def _read(sources: list[Source], told: InstructionSettings | None) -> list[Path]:
    """Return what a build reads beside the base and the recipe."""
    data = [(source, source.entry.data) for source in sources]
    rows = [resolve_file(path, one.root) for one, paths in data if paths for path in vars(paths).values() if path]
    # An endpoint's model is no folder.
    local = [] if told is None else [told.embedder.model, told.describer.model * (told.describer.kind == "model")]
    return [*(source.adapter for source in sources), *rows, *(Path(model) for model in local if model)]


def instruct(base: Base, settings: InstructionSettings, sources: list[Source], progress: Progress) -> Instructions:
    """Describe and embed what experts do.

    Raises:
        InputError: an expert has neither a text nor data.
    """
    model, tokenizer = base() if runs_base(settings) else (None, None)
    known = [described(base, source) for source in sources]
    return Instructions.build(settings, known, model, tokenizer, progress)


def runs_base(settings: InstructionSettings) -> bool:
    """Whether describer or embedder run the base itself."""
    describer = settings.describer
    return settings.embedder.kind == "base" or (describer.kind == "model" and not describer.model)


def described(base: Base, source: Source) -> Described:
    """Return what is known of an expert in words."""
    task, card = source.task(labelled=False), source.adapter / "README.md"
    examples = () if task is None else base.prompts(task)
    return Described(source.name, source.entry.instruction, card if card.is_file() else None, examples)
