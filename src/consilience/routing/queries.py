"""Which query every sequence of a forward pass belongs to, and what its instruction says: found by the model itself.

The first pass over a prompt, recognised by an empty cache, has the prompt's tokens: their text is the query. Later
passes of the same generation keep what was found. Where labels are given, only what comes before them is the query:
answers must not route themselves.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from torch import Tensor

from consilience.errors import InputError
from consilience.routing.router import Router, Semantics

#: What a label is where there is none.
IGNORED = -100
#: What transformers calls the argument that holds earlier tokens: since 5.24, and before.
CACHES = ("cache", "past_key_values")


@dataclass(frozen=True, eq=False)
class Texts:
    """Token ids to the text of a query: without special tokens, and without what the chat template puts around it."""

    tokenizer: Any
    before: str = ""
    after: str = ""

    @classmethod
    def of(cls, tokenizer: Any) -> "Texts":
        """Find out what the tokenizer's chat template puts around a user's turn."""
        plain = cls(tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            return plain
        one, other = (plain(plain.encode(text)) for text in ("b", "y"))
        before = 0
        while before < min(len(one), len(other)) and one[before] == other[before]:
            before += 1
        after = 0
        while after < min(len(one), len(other)) - before and one[-1 - after] == other[-1 - after]:
            after += 1
        return cls(tokenizer, one[:before], one[len(one) - after :])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt, as the model is asked it."""
        if not getattr(self.tokenizer, "chat_template", None):
            return list(self.tokenizer(text).input_ids)
        turn = [{"role": "user", "content": text}]
        shown = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(shown, add_special_tokens=False).input_ids)

    def __call__(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt's ids."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
        if self.before and text.startswith(self.before):
            text = text[len(self.before) :]
        if self.after and text.endswith(self.after):
            text = text[: len(text) - len(self.after)]
        return text.strip()


@dataclass(eq=False)
class Queries:
    """Sets a router's bias before a model's forward passes.

    Attributes:
        router: whose bias is set.
        texts: from ids to text.
        semantics: the global router; None: instructions do not count.
        encodes: the model has an encoder, whose inputs are the query; labels are another sequence.
        expected: the query of sequences that hold more than it, by their ids.
        held: the bias was set by hand, or by a generation that is under way.
        texts_held: the queries that it was set to.
        busy: a generation is under way that read its queries itself.
        lock: such a generation's, for threads that generate wait for each other.
    """

    router: Router
    texts: Texts
    semantics: Semantics | None = None
    encodes: bool = False
    expected: Mapping[tuple[int, ...], str] = field(default_factory=dict[tuple[int, ...], str])
    held: bool = False
    texts_held: tuple[str, ...] | None = None
    busy: bool = False
    lock: Any = field(default_factory=RLock, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the lock, which can be neither copied nor stored."""
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state, with a lock of its own."""
        self.__dict__.update(state, lock=RLock())

    def ask(self, queries: Sequence[str]) -> None:
        """Set what the instructions of these queries say, one a sequence.

        Raises:
            InputError: instructions count, and the model has none.
        """
        if not self.router.settings.instructed or self.router.fixed is not None:
            self.router.instruct(None)
            return
        if self.semantics is None:
            raise InputError("scale: instructions count (scale > 0), and this model was built without; use scale: 0")
        self.router.instruct(self.semantics(queries, self.router.settings))

    @contextmanager
    def hold(self, queries: Sequence[str]) -> Generator[None]:
        """Keep these queries within, whatever the forward passes see."""
        before, said, settings = (self.held, self.texts_held), self.router.said, self.router.settings
        self.ask(queries)
        self.held, self.texts_held = True, tuple(queries)
        try:
            yield
        finally:
            self.held, self.texts_held = before
            if self.router.settings is settings:
                self.router.instruct(said)
            else:
                self.again()

    @contextmanager
    def alone(self) -> Generator[None]:
        """Be the only generation within; others, of other threads, wait."""
        with self.lock:
            before, self.busy = self.busy, True
            try:
                yield
            finally:
                self.busy = before

    def again(self) -> None:
        """Ask for the held queries again, since settings have changed."""
        if self.texts_held is not None:
            self.ask(self.texts_held)
        elif not self.held:
            self.router.instruct(None)

    def of(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None) -> list[str]:
        """Return the queries of a batch [B, T]."""
        found: list[str] = []
        for row in range(len(ids)):
            kept = ids[row]
            known = mask[row].bool() if mask is not None and mask.shape == ids.shape else None
            if labels is not None and labels.shape == ids.shape and bool((labels[row] != IGNORED).any()):
                first = int((labels[row] != IGNORED).nonzero()[0, 0])
                kept, known = kept[:first], None if known is None else known[:first]
            tokens: list[int] = (kept if known is None else kept[known]).tolist()
            expected = self.expected.get(tuple(tokens))
            found.append(self.texts(tokens) if expected is None else expected)
        return found

    def before_forward(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the bias from the inputs of a first pass; the forward pre-hook of a model.

        Raises:
            InputError: the inputs hold no tokens to read a query from.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        own = (ids, kwargs.get("decoder_input_ids"), kwargs.get("labels") if self.encodes else None)
        self.router.tokens = frozenset(one.numel() for one in own if isinstance(one, Tensor))
        if self.held or not self.router.settings.instructed or self.router.fixed is not None:
            return
        if any(_filled(kwargs.get(name)) for name in CACHES) or kwargs.get("encoder_outputs") is not None:
            return
        if ids is None:
            raise InputError(
                "routing: instructions are read from input_ids, and there are none; name the queries with "
                "model.routing.queries([...])"
            )
        labels = None if self.encodes else kwargs.get("labels")
        self.ask(self.of(ids, kwargs.get("attention_mask"), labels))

    def generating(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a model's ``generate`` that reads the queries from its inputs and keeps them to the end."""
        return Generate(original, self)


@dataclass(eq=False)
class Generate:
    """A model's own ``generate``, with its queries held."""

    original: Callable[..., Any]
    queries: Queries

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate; the arguments are those of ``transformers``."""
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is None or (self.queries.held and not self.queries.busy):
            return self.original(inputs, *args, **kwargs)
        with self.queries.alone():
            # Held here by a generation of this thread that calls for another.
            if self.queries.held:
                return self.original(inputs, *args, **kwargs)
            with self.queries.hold(self.queries.of(ids, kwargs.get("attention_mask"), None)):
                return self.original(inputs, *args, **kwargs)


def _filled(cache: Any) -> bool:
    """Whether a cache holds tokens: the pass goes on with sequences that were begun before."""
    if cache is None:
        return False
    length = getattr(cache, "get_seq_length", None)
    return bool(length()) if length is not None else True
