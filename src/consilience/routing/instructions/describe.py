"""What an expert or a query does, in one sentence, and who says so.

===========  ===================================================  =======================================
describer    an expert's text                                     a query's text
===========  ===================================================  =======================================
none         none: its examples are embedded                      the query itself
template     the user's, else the first sentence of its card      the query itself
             that no other expert's card has
model        the user's, else written by a local model            written by that model
endpoint     the user's, else written behind a chat endpoint      written there
===========  ===================================================  =======================================

GLIDER (arXiv:2410.07172) has GPT-4-turbo write both sides from three examples each. Its prompt is in neither the paper
nor the code: the one here, and that a query is described by itself alone, are ours. A model must be able to follow it:
SmolLM2-135M-Instruct answers requests instead of describing them, and routes far worse than "none".
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from consilience.errors import InputError
from consilience.routing.instructions.card import card_sentences, sentences
from consilience.routing.instructions.endpoint import Endpoint, check_url
from consilience.routing.values import PlainValues, check_above, check_choice, check_text, check_whole

Kind = Literal["none", "template", "model", "endpoint"]
#: From prompts to answers.
Writer = Callable[[Sequence[str]], list[str]]
#: Switches the experts of a routed model off, and all that listens to it.
Plain = Callable[[], AbstractContextManager[None]]

#: An example is shown to a writer up to this many characters.
_SHOWN = 800


@dataclass(frozen=True, slots=True)
class DescriberSettings(PlainValues):
    """Who says what experts and queries do.

    Attributes:
        kind: "none", "template", "model" or "endpoint"; see this module's table.
        examples: how many of an expert's examples a writer is shown.
        model: of "model", the folder of a local instruct model (empty: the base itself, experts off); of "endpoint",
            the model's name there.
        url: of "endpoint": an OpenAI-compatible address, ending in /chat/completions or just before it.
        key: of "endpoint": the environment variable that holds the key; empty: none is sent.
        timeout: of "endpoint": seconds until a request is given up.
        retries: of "endpoint": further attempts where network or server fail.
        tokens: the most tokens of what is written.

    Raises:
        InputError: a value is out of its range, or belongs to another kind.
    """

    kind: Kind = "none"
    examples: int = 3
    model: str = ""
    url: str = ""
    key: str = ""
    timeout: float = 30.0
    retries: int = 2
    tokens: int = 64

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_whole("examples", self.examples, 1)
        check_above("timeout", self.timeout, 0)
        check_whole("retries", self.retries, 0)
        check_whole("tokens", self.tokens, 1)
        for key in ("model", "url", "key"):
            check_text(key, getattr(self, key))
        if self.kind != "endpoint" and (self.url or self.key):
            raise InputError(f"{'url' if self.url else 'key'}: belongs to kind: endpoint, not to {self.kind}")
        if self.kind not in ("model", "endpoint") and self.model:
            raise InputError(f"model: belongs to kind: model or endpoint, not to {self.kind}")
        if self.kind == "endpoint":
            check_url(self.url)
            if not self.model:
                raise InputError("model: is missing; name the model that the endpoint is asked for")

    @property
    def writes(self) -> bool:
        """Whether a language model writes the texts, queries' included."""
        return self.kind in ("model", "endpoint")


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of an expert: its name, the user's own text, its card, and examples of what it is asked.

    ``examples`` are prompts without answers, as queries will be; a few dozen are enough.
    """

    name: str
    text: str | None = None
    card: Path | None = None
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Describer:
    """Says in one sentence what experts and queries do; ``write`` is None where no language model does."""

    settings: DescriberSettings
    write: Writer | None = None

    def expert(self, source: Source, known: Sequence[str] = ()) -> str:
        """Return an expert's text, "" with kind "none"; ``known`` sentences of cards are passed over.

        Raises:
            InputError: the source has not what the describer needs.
            MachineError: an endpoint failed.
        """
        if source.text is not None:
            return self._given(source, source.text)
        if self.settings.kind == "none":
            return ""
        if self.write is None:
            return _card_text(source, known)
        shown = source.examples[: self.settings.examples]
        if not shown:
            raise InputError(
                f"expert {source.name!r}: {self.settings.kind} describes it by its examples, and there are none; give "
                "it data, or a text of your own"
            )
        said = first_sentence(self.write([request(shown)])[0])
        if not said:
            raise InputError(f"expert {source.name!r}: the describer wrote nothing; give it a text of your own")
        return said

    def queries(self, texts: Sequence[str]) -> list[str]:
        """Return the queries' texts. Where a language model writes nothing, the query stands for itself.

        Raises:
            MachineError: an endpoint failed.
        """
        if self.write is None or not texts:
            return list(texts)
        answers = self.write([request([text]) for text in texts])
        return [first_sentence(answer) or text for text, answer in zip(texts, answers, strict=True)]

    def _given(self, source: Source, text: str) -> str:
        if self.settings.kind == "none":
            raise InputError(
                f"expert {source.name!r}: has a text, which describer none does not use; choose template, or drop it"
            )
        if not text.strip():
            raise InputError(f"expert {source.name!r}: its text is empty; say what it does, or drop it")
        return " ".join(text.split())


def make_describer(settings: DescriberSettings, model: Any, tokenizer: Any, plain: Plain) -> Describer:
    """Return a describer; a local model of its own is loaded on first use.

    Args:
        settings: which.
        model: the base, which "model" without a folder has write.
        tokenizer: the base's.
        plain: switches the base's experts off.

    Raises:
        InputError: the base is to write, and there is none.
    """
    if settings.kind == "endpoint":
        given = (settings.url, settings.model, settings.key, settings.timeout, settings.retries, settings.tokens)
        return Describer(settings, Endpoint(*given))
    if settings.kind != "model":
        return Describer(settings)
    if settings.model:
        return Describer(settings, _stranger(Path(settings.model), settings.tokens))
    if model is None or tokenizer is None:
        raise InputError("describer: the base is to write the texts, and is not loaded; name a model folder")
    return Describer(settings, local_writer(model, tokenizer, plain, settings.tokens))


def local_writer(model: Any, tokenizer: Any, plain: Plain, tokens: int) -> Writer:
    """Return a writer of at most ``tokens`` tokens: a loaded model, greedy, with what is laid over it switched off."""
    from consilience.tasks.generate import sample

    def write(prompts: Sequence[str]) -> list[str]:
        with plain():
            return sample(model, tokenizer, list(prompts), tokens)

    return write


def _stranger(folder: Path, tokens: int) -> Writer:
    from consilience.tasks.generate import sample
    from consilience.tasks.load import load_model, load_tokenizer

    @cache
    def loaded() -> tuple[Any, Any]:
        return load_model(folder).requires_grad_(False), load_tokenizer(folder)

    def write(prompts: Sequence[str]) -> list[str]:
        return sample(*loaded(), list(prompts), tokens)

    return write


def refusal(url: str, where: str) -> Writer:
    """Return a writer for an endpoint that the user has not agreed to: it raises ``InputError``."""

    def write(prompts: Sequence[str]) -> list[str]:
        raise InputError(
            f"{where}: {len(prompts)} queries would be sent to {url}; allow that with allow_endpoint, or use scale: 0"
        )

    return write


def request(examples: Sequence[str]) -> str:
    """Return what a writer is asked, of an expert's examples or of a single query."""
    shown = [text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..." for text in examples]
    if len(shown) == 1:
        head, what = f"Here is a request:\n\n{shown[0]}", "what this request"
    else:
        listed = "\n\n".join(f"Request {number}:\n{text}" for number, text in enumerate(shown, 1))
        head, what = f"Here are {len(shown)} requests of one kind:\n\n{listed}", "what requests of this kind"
    return (
        f"{head}\n\nDo not answer. Write one sentence that says {what} asks for and which skill or knowledge it takes."
        " Begin with a verb, and write nothing but the sentence."
    )


def first_sentence(answer: str) -> str:
    """Return the first sentence of what was written, without quotes around it; "" where there is none."""
    lines = [line.strip() for line in answer.splitlines()]
    first = next((line for line in lines if any(c.isalnum() for c in line)), "")
    found = sentences(first.strip("\"'“”‘’`* "))
    return found[0] if found else ""


def common_sentences(sources: Sequence[Source]) -> list[str]:
    """Return the sentences that the cards of several experts have: they tell nothing apart."""
    seen: dict[str, int] = {}
    for source in sources:
        if source.card is not None:
            for one in dict.fromkeys(card_sentences(source.card)):
                seen[one] = seen.get(one, 0) + 1
    return [one for one, count in seen.items() if count > 1]


def _card_text(source: Source, known: Sequence[str]) -> str:
    if source.card is None:
        raise InputError(
            f"expert {source.name!r}: template needs a text or a card, and there is neither; say what it does"
        )
    found = next((one for one in card_sentences(source.card) if one not in known), None)
    if found is None:
        raise InputError(
            f"expert {source.name!r}: {source.card} has no sentence of its own; say in a text what the expert does"
        )
    return found
