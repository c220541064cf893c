"""Texts to vectors of length 1, whose inner products are cosines.

=========  ==========================================================================================================
embedder   vector of a text
=========  ==========================================================================================================
base       mean over its tokens of the base's last hidden state, experts off; standardised over the experts' texts
model      mean over its tokens of a local encoder's last hidden state, such as all-MiniLM-L6-v2's
tfidf      weighted words and pairs of words (``tfidf.py``)
=========  ==========================================================================================================

A decoder's states are nearly collinear, and a few dimensions have most of their length: raw cosines of unrelated texts
are 0.6 to 0.9. Standardising, each dimension less its mean and divided by its deviation over the experts' texts, makes
them tell texts apart (Timkey and van Schijndel, arXiv:2109.04404). What is fitted stays as it is when experts come and
go, so that no vector changes. Sentence encoders are trained for cosines and are used as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from consilience.checkpoints.json_files import read_object
from consilience.errors import InputError
from consilience.routing.instructions.describe import Plain
from consilience.routing.instructions.tfidf import TfIdf
from consilience.routing.unit import unit
from consilience.routing.values import PlainValues, check_choice, check_text, check_whole

Kind = Literal["base", "model", "tfidf"]
#: From texts to [n, E] float32.
States = Callable[[Sequence[str]], Tensor]

#: Dimensions that hardly vary over the experts' texts are not blown up: deviations are at least this share of their
#: median.
_LEAST_DEVIATION = 0.5
#: Texts in one forward pass on an accelerator. On a CPU a text goes alone, so that its vector depends on nothing else.
_BATCH = 32


@dataclass(frozen=True, slots=True)
class EmbedderSettings(PlainValues):
    """What turns texts into vectors.

    Attributes:
        kind: "base", "model" or "tfidf"; see this module's table.
        model: of "model": the folder of a local encoder.
        tokens: of "base" and "model": longer texts are cut here.
        words: of "tfidf": the most words and pairs of words that are told apart.

    Raises:
        InputError: a value is out of its range, or belongs to another kind.
    """

    kind: Kind = "base"
    model: str = ""
    tokens: int = 256
    words: int = 16384

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_text("model", self.model)
        check_whole("tokens", self.tokens, 8)
        check_whole("words", self.words, 1)
        if self.kind == "model" and not self.model:
            raise InputError("model: is missing; name the folder of a sentence encoder")
        if self.kind != "model" and self.model:
            raise InputError(f"model: belongs to kind: model, not to {self.kind}")


class Embedder(Protocol):
    """Texts to unit vectors [n, E] float32, on the CPU; a text that says nothing is 0."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors [n, E]."""
        ...

    def fitted(self, groups: Sequence[Sequence[str]]) -> "Embedder":
        """Return an embedder for experts with these texts, a group each."""
        ...

    def remembering(self) -> "Embedder":
        """Return an embedder that runs no text twice."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return what is fitted, in plain values."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what is fitted, in tensors."""
        ...


@dataclass(frozen=True, eq=False)
class Encoder:
    """Vectors as they come from a sentence encoder: ``unit(states(text))``."""

    states: States

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors [n, E]."""
        return unit(self.states(texts))

    def fitted(self, groups: Sequence[Sequence[str]]) -> "Encoder":
        """Return itself: nothing is fitted."""
        return self

    def remembering(self) -> "Encoder":
        """Return an encoder that runs no text twice."""
        return replace(self, states=remembered(self.states))

    def to_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


@dataclass(frozen=True, eq=False)
class Standardised:
    """Vectors ``unit((states(text) - centre) / deviation)``; ``centre`` and ``deviation`` are [E]."""

    states: States
    centre: Tensor | None = None
    deviation: Tensor | None = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors [n, E]."""
        assert self.centre is not None
        assert self.deviation is not None
        states = self.states(texts)
        said = states.abs().amax(-1, keepdim=True) > 0
        return unit(torch.where(said, (states - self.centre) / self.deviation, 0.0))

    def fitted(self, groups: Sequence[Sequence[str]]) -> "Standardised":
        """Return an embedder with mean and deviation over these texts, all groups counting alike.

        A single text has nothing to be told apart from: nothing is subtracted then.
        """
        states = [self.states(group) for group in groups]
        if sum(map(len, states)) < 2:
            one = states[0][0]
            return replace(self, centre=torch.zeros_like(one), deviation=torch.ones_like(one))
        centre = torch.stack([group.mean(0) for group in states]).mean(0)
        spread = torch.stack([(group - centre).square().mean(0) for group in states]).mean(0).sqrt()
        least = float(spread.median()) * _LEAST_DEVIATION
        deviation = spread.clamp_min(least) if least > 0 else torch.ones_like(spread)
        return replace(self, centre=centre, deviation=deviation)

    def remembering(self) -> "Standardised":
        """Return an embedder that runs no text twice."""
        return replace(self, states=remembered(self.states))

    def to_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return what is fitted."""
        assert self.centre is not None
        assert self.deviation is not None
        return {"centre": self.centre, "deviation": self.deviation}


def make_embedder(settings: EmbedderSettings, model: Any, tokenizer: Any, plain: Plain) -> Embedder:
    """Return an embedder that is not fitted yet; an encoder of its own is loaded on first use.

    Args:
        settings: which.
        model: the base, for "base".
        tokenizer: the base's.
        plain: switches the base's experts off.

    Raises:
        InputError: the base is needed, and there is none, or the encoder's folder does not do.
    """
    if settings.kind == "tfidf":
        return TfIdf(settings.words)
    if settings.kind == "model":
        check_encoder(Path(settings.model))
        return Encoder(_stranger(Path(settings.model), settings.tokens))
    if model is None or tokenizer is None:
        raise InputError("embedder: base needs the base, which is not loaded; choose tfidf or a model folder")
    return Standardised(base_states(model, tokenizer, plain, settings.tokens))


def load_embedder(
    made: Embedder, value: Mapping[str, Any], tensors: Mapping[str, Tensor], width: int, where: str
) -> Embedder:
    """Return an embedder as it was fitted, from ``to_dict`` and ``tensors``; ``width`` is E.

    Raises:
        InputError: something is missing or of another size.
    """
    if isinstance(made, Encoder):
        return made
    for name in ("idf",) if isinstance(made, TfIdf) else ("centre", "deviation"):
        if name not in tensors or tuple(tensors[name].shape) != (width,):
            raise InputError(f"{where}: {name!r} is missing or not of {width} numbers; restore the file")
    if isinstance(made, Standardised):
        if not bool((tensors["deviation"] > 0).all()):
            raise InputError(f"{where}: 'deviation' is not positive; restore the file")
        return replace(made, centre=tensors["centre"].float(), deviation=tensors["deviation"].float())
    assert isinstance(made, TfIdf)
    words: Any = value.get("vocabulary")
    if not isinstance(words, list) or len(words) != width or not all(isinstance(word, str) for word in words):
        raise InputError(f"{where}: the vocabulary is missing or has not {width} words; restore the file")
    return TfIdf(made.most, tuple(words), tensors["idf"].float())


def base_states(model: Any, tokenizer: Any, plain: Plain, tokens: int) -> States:
    """Return mean last hidden states of a language model: its encoder's, if it has one; special tokens do not count."""
    encodes = bool(getattr(model.config, "is_encoder_decoder", False))
    trunk = model.get_encoder() if encodes else model.base_model

    def states(texts: Sequence[str]) -> Tensor:
        with plain():
            return mean_states(trunk, tokenizer, texts, tokens, special=False)

    return states


def mean_states(
    model: Any, tokenizer: Any, texts: Sequence[str], tokens: int, *, special: bool, batch: int | None = None
) -> Tensor:
    """Return the mean over a text's tokens of the last hidden state, [n, E] float32 on the CPU.

    Args:
        model: a transformer without a head.
        tokenizer: its tokenizer.
        texts: n of them; one without tokens gives 0.
        tokens: texts are cut after these.
        special: whether the tokens that the tokenizer puts around a text count.
        batch: texts in a forward pass; None: 1 on a CPU.
    """
    config = model.config.get_text_config()
    limit = min(tokens, getattr(config, "max_position_embeddings", None) or tokens, tokenizer.model_max_length)
    rows = [_encoded(tokenizer, text, int(limit), special) for text in texts]
    device = next(model.parameters()).device
    batch = batch or (1 if device.type == "cpu" else _BATCH)
    found = torch.zeros(len(rows), int(config.hidden_size))
    order = sorted((i for i, (_, counted) in enumerate(rows) if any(counted)), key=lambda i: len(rows[i][0]))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            found[chosen] = _batch_means(model, [rows[i] for i in chosen], device)
    finally:
        model.train(training)
    return found


def _encoded(tokenizer: Any, text: str, limit: int, special: bool) -> tuple[list[int], list[bool]]:
    """Return a text's ids, and which of them count."""
    made = tokenizer(text, truncation=True, max_length=limit, return_special_tokens_mask=True, verbose=False)
    return list(made.input_ids), [special or not added for added in made.special_tokens_mask]


def _batch_means(model: Any, rows: Sequence[tuple[list[int], list[bool]]], device: Any) -> Tensor:
    width = max(len(ids) for ids, _ in rows)
    ids, mask, counted = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for row, (own, counts) in enumerate(rows):
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
        counted[row, : len(own)] = torch.tensor(counts)
    with torch.no_grad():
        states = model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()
    return (states * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)


def remembered(states: States) -> States:
    """Return the same function, which runs no text twice."""
    known: dict[str, Tensor] = {}

    def again(texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, states(new), strict=True))
        return torch.stack([known[text] for text in texts])

    return again


def check_encoder(folder: Path) -> None:
    """Check that a folder can be a sentence encoder that takes the mean of its tokens' states.

    Raises:
        InputError: it is no model folder, or its makers mean its vectors to be made in another way.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"embedder: {folder} holds no config.json; give a Hugging Face encoder folder")
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        used = [key for key, value in read_object(pooling).items() if key.startswith("pooling_mode") and value is True]
        if used != ["pooling_mode_mean_tokens"]:
            raise InputError(f"embedder: {pooling}: pools by {', '.join(used)}; give an encoder that pools by the mean")
    on_top = sorted(folder.glob("[0-9]_Dense"))
    if on_top:
        raise InputError(
            f"embedder: {on_top[0]}: a layer on top of the mean is not known here; give an encoder without"
        )


def _stranger(folder: Path, tokens: int) -> States:
    from consilience.tasks.load import explained, load_tokenizer, quiet

    @cache
    def loaded() -> tuple[Any, Any]:
        from transformers import AutoModel

        with quiet(), explained(f"embedder: {folder}", "does not load as an encoder"):
            model, report = AutoModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        absent = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if absent:
            raise InputError(f"embedder: {folder}: tensor {absent[0]!r} is missing in the weights; restore the files")
        return model.requires_grad_(False).eval(), load_tokenizer(folder)

    return lambda texts: mean_states(*loaded(), texts, tokens, special=True)
