"""The global router: what queries ask for, compared with what experts do.

    c_k = e_query . e_k,    z_k = s_k + a c_k

e are unit vectors of instructions: of what a describer says (``describe.py``), as an embedder sees it (``embed.py``).
With describer "none" e_k is the mean over the expert's examples of their vectors, made a unit vector again.

Source: GLIDER (arXiv:2410.07172). There an instruction is written and embedded once a task, and looked up by the task's
name (``Instructions.lookup``); here every query has its own, kept by its text so that it is made once.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from consilience.errors import InputError, nearest
from consilience.progress import NullProgress, Progress
from consilience.routing.expert import Instruction
from consilience.routing.instructions.adaptive import Adaptive
from consilience.routing.instructions.describe import (
    Describer,
    DescriberSettings,
    Plain,
    Source,
    common_sentences,
    make_describer,
    refusal,
)
from consilience.routing.instructions.embed import Embedder, EmbedderSettings, load_embedder, make_embedder
from consilience.routing.instructions.held_in import HeldIn, leave_experts_out
from consilience.routing.instructions.told import Told
from consilience.routing.router import Similarity
from consilience.routing.settings import Settings
from consilience.routing.values import PlainValues, check_whole, read_settings

__all__ = ["InstructionSettings", "Instructions", "Latency", "Lookup", "Source"]


@dataclass(frozen=True, slots=True)
class InstructionSettings(PlainValues):
    """How instructions are made.

    Attributes:
        describer: who says what experts and queries do.
        embedder: what turns that into vectors.
        held_in: examples of each expert that fit the adaptive scale; 0: it is not fitted. A describer that writes is
            asked once for each.
        cache: queries whose text and vector are kept.

    Raises:
        InputError: a value is out of its range.
    """

    describer: DescriberSettings = field(default_factory=DescriberSettings)
    embedder: EmbedderSettings = field(default_factory=EmbedderSettings)
    held_in: int = 16
    cache: int = 1024

    def __post_init__(self) -> None:
        check_whole("held_in", self.held_in, 0)
        check_whole("cache", self.cache, 1)

    @classmethod
    def from_plain(cls, value: Any, where: str) -> "InstructionSettings":
        """Return settings from a mapping; ``describer`` and ``embedder`` are mappings, or their kind alone.

        Raises:
            InputError: a key is unknown, or a value is out of its range.
        """
        parts: dict[str, Any] = {"describer": DescriberSettings, "embedder": EmbedderSettings}
        if isinstance(value, Mapping):
            given = cast(Mapping[str, Any], value)
            read = {
                key: parts[key].from_plain(one, f"{where}: {key}") if key in parts else one
                for key, one in given.items()
            }
            return read_settings(cls, read, where)
        return read_settings(cls, value, where)

    def located(self, root: Path | None) -> "InstructionSettings":
        """Return settings whose model folders are absolute paths; relative ones start from ``root``."""
        describer, embedder = self.describer, self.embedder
        if describer.kind == "model" and describer.model:
            describer = replace(describer, model=str(((root or Path()) / describer.model).absolute()))
        if embedder.model:
            embedder = replace(embedder, model=str(((root or Path()) / embedder.model).absolute()))
        return replace(self, describer=describer, embedder=embedder)


@dataclass(slots=True)
class Latency:
    """What queries have cost.

    Attributes:
        count: queries asked.
        cached: of these, queries that were known already.
        describing: seconds spent on describing the others.
        embedding: seconds spent on embedding them.
    """

    count: int = 0
    cached: int = 0
    describing: float = 0.0
    embedding: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds per query that was not known."""
        return (self.describing + self.embedding) / max(self.count - self.cached, 1)


class Instructions:
    """What all experts do, and how a query is compared with it: a ``router.Semantics``.

    Attributes:
        settings: how instructions are made.
        names: of the K experts, in their order.
        instructions: theirs, in the same order.
        adaptive: the scale chosen for every query; None: not fitted.
        latency: what queries have cost since this was made.
    """

    def __init__(
        self,
        settings: InstructionSettings,
        describer: Describer,
        embedder: Embedder,
        experts: Mapping[str, Instruction],
        adaptive: Adaptive | None = None,
        common: Sequence[str] = (),
    ) -> None:
        """Take what ``build`` or ``load`` made; ``common`` are sentences that several experts' cards have."""
        self.settings, self.adaptive, self.latency = settings, adaptive, Latency()
        self._describer, self._embedder, self._common = describer, embedder, tuple(common)
        self._experts = dict(experts)
        self._known: OrderedDict[str, Instruction] = OrderedDict()

    @classmethod
    def build(
        cls,
        settings: InstructionSettings,
        sources: Sequence[Source],
        model: Any = None,
        tokenizer: Any = None,
        progress: Progress | None = None,
        *,
        plain: Plain = nullcontext,
    ) -> "Instructions":
        """Describe and embed experts, and fit the adaptive scale where their examples allow it.

        Args:
            settings: how.
            sources: what is known of each expert, in order; their names differ.
            model: the base, if the describer or the embedder runs it; any base of the router's, experts and all.
            tokenizer: the base's.
            progress: told of every step.
            plain: a context in which the model is the base alone, and nothing listens to it.

        Raises:
            InputError: a source lacks what the describer needs, or nothing that the embedder knows is said of it.
            MachineError: an endpoint failed.
        """
        names = [source.name for source in sources]
        if not names:
            raise InputError("instructions: there are no experts; give at least one")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"experts: {twice[0]!r} is named twice; choose another name")
        describer = make_describer(settings.describer, model, tokenizer, plain)
        made = make_embedder(settings.embedder, model, tokenizer, plain)
        common = common_sentences(sources) if settings.describer.kind == "template" else []
        progress = progress or NullProgress()
        progress.phase("instructions", 2 * len(sources))
        told: list[Told] = []
        for source in sources:
            told.append(Told(source, describer.expert(source, common)))
            progress.advance(1, f"described {source.name}")
        remembering = made.remembering()
        fitted = remembering.fitted([one.texts for one in told])
        vectors = torch.stack([one.vector(fitted) for one in told])
        inside: list[HeldIn] = []
        for one in told:
            inside.append(HeldIn.of(one, describer, settings.held_in))
            progress.advance(1, f"read examples of {one.source.name}")
        adaptive = leave_experts_out(remembering, fitted, told, inside)
        kept = load_embedder(made, fitted.to_dict(), fitted.tensors(), vectors.shape[1], "instructions")
        experts = {one.source.name: Instruction(one.text, v) for one, v in zip(told, vectors, strict=True)}
        return cls(settings, describer, kept, experts, adaptive, common)

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(self._experts)

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """What the experts do, in their order."""
        return tuple(self._experts.values())

    def __call__(self, queries: Sequence[str], settings: Settings) -> Similarity:
        """Return cosines [B, K] of B queries, and the scale a [B] of each.

        Raises:
            InputError: the scale is adaptive, and none was fitted.
            MachineError: an endpoint failed.
        """
        return self.similarity(stacked(self.asked(queries)), settings)

    def asked(self, queries: Sequence[str]) -> list[Instruction]:
        """Return the queries' instructions: kept ones, or new ones, which are kept.

        Raises:
            MachineError: an endpoint failed.
        """
        new = [query for query in dict.fromkeys(queries) if query not in self._known]
        self.latency.count += len(queries)
        self.latency.cached += len(queries) - len(new)
        found = {query: self._known[query] for query in queries if query in self._known}
        if new:
            begun = time.perf_counter()
            texts = self._describer.queries(new)
            described = time.perf_counter()
            vectors = self._embedder(texts)
            self.latency.describing += described - begun
            self.latency.embedding += time.perf_counter() - described
            found.update(zip(new, map(Instruction, texts, vectors), strict=True))
        for query in dict.fromkeys(queries):
            self._known[query] = found[query]
            self._known.move_to_end(query)
        while len(self._known) > self.settings.cache:
            self._known.popitem(last=False)
        return [found[query] for query in queries]

    def similarity(self, vectors: Tensor, settings: Settings) -> Similarity:
        """Return the similarity of unit vectors [B, E] to the experts'.

        Raises:
            InputError: the scale is adaptive, and none was fitted.
        """
        # In float64, so that a cosine's float32 value depends on its two vectors alone and not on the batch.
        cosines = (vectors.double() @ stacked(self.instructions).double().t()).float().clamp(-1, 1)
        if settings.scale != "adaptive":
            return Similarity(cosines, torch.full((len(vectors),), float(settings.scale)))
        if self.adaptive is None:
            raise InputError(
                "scale: adaptive was not fitted, which takes two experts with examples at least; give a number, or "
                "build the instructions again with examples and held_in above 0"
            )
        chosen = partial(self.adaptive.scale, most=settings.most_scale)
        return Similarity(cosines, chosen(cosines), chosen)

    def lookup(self, tasks: Mapping[str, str]) -> "Lookup":
        """Return the published protocol: every task has one instruction, and its queries are known to be its own.

        Args:
            tasks: instructions by the tasks' names; they are embedded as they are, once.
        """
        vectors = self._embedder(list(tasks.values())) if tasks else []
        return Lookup(self, dict(zip(tasks, map(Instruction, tasks.values(), vectors), strict=True)))

    def add(self, source: Source) -> None:
        """Add an expert after the others, whose texts and vectors stay the same bits.

        What was fitted stays too: the embedder's statistics or vocabulary, and the adaptive scale. Build again when
        many experts have come.

        Raises:
            InputError: the name is taken, the source lacks what the describer needs, or the embedder knows nothing of
                what is said of it.
            MachineError: an endpoint failed.
        """
        if source.name in self._experts:
            raise InputError(f"expert {source.name!r}: there is one of that name already; choose another")
        known = [*self._common, *(one.text for one in self.instructions)]
        told = Told(source, self._describer.expert(source, known))
        self._experts[source.name] = Instruction(told.text, told.vector(self._embedder))

    def remove(self, name: str) -> None:
        """Remove an expert; the others' texts and vectors stay the same bits.

        Raises:
            InputError: there is none of that name, or no other.
        """
        if name not in self._experts:
            raise InputError(f"expert {name!r}: there is none{nearest(name, self.names)}")
        if len(self._experts) == 1:
            raise InputError(f"expert {name!r}: is the only one; add another before it goes")
        del self._experts[name]

    def to_dict(self) -> dict[str, Any]:
        """Return what is to be stored, in plain values; ``tensors`` has the rest."""
        return {
            "settings": self.settings.to_dict(),
            "experts": [{"name": name, "text": one.text} for name, one in self._experts.items()],
            "adaptive": None if self.adaptive is None else self.adaptive.to_dict(),
            "common": list(self._common),
            "embedder": self._embedder.to_dict(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what is to be stored, in tensors: ``experts`` [K, E], and what the embedder fitted."""
        return {"experts": stacked(self.instructions), **self._embedder.tensors()}

    @classmethod
    def load(
        cls,
        value: Any,
        tensors: Mapping[str, Tensor],
        model: Any = None,
        tokenizer: Any = None,
        *,
        plain: Plain = nullcontext,
        where: str = "instructions",
        allow_endpoint: bool = False,
    ) -> "Instructions":
        """Return what ``to_dict`` and ``tensors`` gave.

        Args:
            value: the plain values.
            tensors: by name.
            model: as in ``build``.
            tokenizer: as in ``build``.
            plain: as in ``build``.
            where: what errors call the values.
            allow_endpoint: send queries, and the key, to the endpoint that the values name. Whoever wrote them chose
                its address, so without this the first query is refused.

        Raises:
            InputError: something is missing or does not fit, or the encoder's folder is not there any more.
        """
        stored = _stored(value, where)
        settings = InstructionSettings.from_plain(stored["settings"], f"{where}: settings")
        vectors = tensors.get("experts")
        if vectors is None or vectors.ndim != 2 or len(vectors) != len(stored["experts"]) or not vectors.shape[1]:
            raise InputError(f"{where}: the experts' vectors are missing or too many or few; restore the file")
        describer = make_describer(settings.describer, model, tokenizer, plain)
        if settings.describer.kind == "endpoint" and not allow_endpoint:
            describer = replace(describer, write=refusal(settings.describer.url, where))
        made = make_embedder(settings.embedder, model, tokenizer, plain)
        embedder = load_embedder(made, stored["embedder"], tensors, vectors.shape[1], where)
        pairs = zip(stored["experts"], vectors.float(), strict=True)
        experts = {one["name"]: Instruction(one["text"], vector) for one, vector in pairs}
        adaptive = None if stored["adaptive"] is None else Adaptive.from_dict(stored["adaptive"], where)
        return cls(settings, describer, embedder, experts, adaptive, stored["common"])


@dataclass(frozen=True, eq=False)
class Lookup:
    """A global router that is told which task a query belongs to: its queries are tasks' names.

    This is what GLIDER's code evaluates: the instruction of a task, written from the task's own examples, is looked up
    by the task's name and serves all of its queries. The router is thus given the task's identity; for tasks that
    experts were trained on, routing is close to looking the expert up. Use it to compare with published numbers, and
    ``Instructions`` for what a user gets, who does not say which task a query is of.
    """

    instructions: Instructions
    tasks: Mapping[str, Instruction]

    def __call__(self, queries: Sequence[str], settings: Settings) -> Similarity:
        """Return the similarity of the tasks that are named.

        Raises:
            InputError: there is no such task.
        """
        for name in queries:
            if name not in self.tasks:
                raise InputError(f"task {name!r}: has no instruction{nearest(name, list(self.tasks))}; add one")
        rows = [self.tasks[name] for name in queries]
        return self.instructions.similarity(stacked(rows), settings)


def stacked(instructions: Sequence[Instruction]) -> Tensor:
    """Return the embeddings of one instruction or more, [n, E]."""
    return torch.stack([one.embedding for one in instructions])


def _stored(value: Any, where: str) -> dict[str, Any]:
    """Check the shape of what was stored."""
    kinds = {"settings": dict, "experts": list, "common": list, "embedder": dict}
    if not isinstance(value, dict) or any(key not in value for key in (*kinds, "adaptive")):
        raise InputError(f"{where}: must have {', '.join(kinds)} and adaptive; restore the file")
    stored = cast(dict[str, Any], value)
    for key, kind in kinds.items():
        if not isinstance(stored[key], kind):
            raise InputError(f"{where}: {key} is not what it should be; restore the file")
    names = [one.get("name") for one in stored["experts"] if isinstance(one, dict)]
    texts = [one.get("text") for one in stored["experts"] if isinstance(one, dict)]
    sound = len(names) == len(stored["experts"]) > 0 and len(set(map(str, names))) == len(names)
    if not sound or not all(isinstance(one, str) for one in (*names, *texts, *stored["common"])):
        raise InputError(f"{where}: experts are not each a name and a text; restore the file")
    return stored
