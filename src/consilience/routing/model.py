"""A routed model: a ``transformers`` model whose linear layers hold experts, and how it is spoken to."""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from consilience.errors import InputError
from consilience.routing.expert import Expert
from consilience.routing.install import install, installed
from consilience.routing.queries import Queries, Texts
from consilience.routing.router import Router, Semantics, Watcher
from consilience.routing.settings import Settings


class Routing:
    """What a routed model has more than its base; it is the model's attribute ``routing``.

    The model itself is used as any other: ``generate``, batches, caches and pipelines. Sequences of a batch may belong
    to different tasks.
    """

    def __init__(
        self,
        model: Any,
        experts: Sequence[Expert],
        settings: Settings,
        tokenizer: Any,
        semantics: Semantics | None = None,
    ) -> None:
        """Install experts into a loaded model, which becomes the routed one.

        Raises:
            InputError: an expert does not fit the model, or instructions count and there are none.
        """
        _check(settings, semantics)
        self.model = model
        self.router: Router = install(model, experts, settings)
        self.experts = tuple(installed(model, experts))
        encodes = bool(getattr(model.config, "is_encoder_decoder", False))
        self.asked = Queries(self.router, Texts.of(tokenizer), semantics, encodes)
        model.register_forward_pre_hook(self.asked.before_forward, with_kwargs=True)
        if hasattr(model, "generate"):
            model.generate = self.asked.generating(model.generate)
        model.routing = self

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names."""
        return self.router.experts

    @property
    def settings(self) -> Settings:
        """How tokens are routed; ``set`` changes it."""
        return self.router.settings

    def set(self, **changes: Any) -> None:
        """Change settings: ``model.routing.set(scale=10.0, top_k=1)``.

        Raises:
            InputError: a value is out of its range, the experts lack what a local router needs, or there are no
                instructions.
        """
        settings = replace(self.settings, **changes)
        _check(settings, self.asked.semantics)
        if settings.local != self.settings.local:
            self._reinstall(self.experts, settings)
        self.router.settings = settings
        self.asked.again()

    def queries(self, texts: Sequence[str]) -> AbstractContextManager[None]:
        """Name the query of every sequence within, instead of reading them from the inputs."""
        return self.asked.hold(texts)

    def only(self, weights: str | Sequence[float] | Tensor) -> AbstractContextManager[None]:
        """Use one expert within, by its name, or fixed weights [K] or [B, K]."""
        if isinstance(weights, str):
            index = self.router.index(weights)
            weights = torch.zeros(len(self.names)).index_fill(0, torch.tensor(index), 1.0)
        return self.router.only(weights)

    def plain(self) -> AbstractContextManager[None]:
        """Be the base alone within."""
        return self.router.only(torch.zeros(len(self.names)))

    @contextmanager
    def silent(self) -> Generator[None]:
        """Be the base alone within, unseen by watchers; what else is set comes back afterwards."""
        watchers, held = self.router.watchers, self.asked.held
        self.router.watchers, self.asked.held = [], True
        try:
            with self.plain():
                yield
        finally:
            self.router.watchers, self.asked.held = watchers, held

    def without(self, *names: str) -> AbstractContextManager[None]:
        """Leave experts out within."""
        return self.router.without(*names)

    def watched(self, watcher: Watcher) -> AbstractContextManager[None]:
        """Tell ``watcher(layer, weights [sequences, tokens, K])`` of every layer's weights within."""
        return self.router.watched(watcher)

    @contextmanager
    def expecting(self, queries: dict[tuple[int, ...], str]) -> Generator[None]:
        """Within, sequences with these ids belong to these queries: they hold more than it, such as an answer."""
        before = self.asked.expected
        self.asked.expected = {**before, **queries}
        try:
            yield
        finally:
            self.asked.expected = before

    def replace(self, experts: Sequence[Expert], semantics: Semantics | None) -> None:
        """Go on with other experts; those that stay keep their factors, vectors and embeddings.

        Raises:
            InputError: an expert does not fit, or experts are fixed, left out or held by queries; nothing has changed.
        """
        if self.router.fixed is not None or self.router.excluded is not None or self.asked.held:
            raise InputError("experts: cannot change within only, plain, without or queries; leave these first")
        self._reinstall(experts, self.settings)
        self.asked.semantics = semantics

    def _reinstall(self, experts: Sequence[Expert], settings: Settings) -> None:
        install(self.model, experts, settings, self.router)
        self.experts = tuple(installed(self.model, experts))


def _check(settings: Settings, semantics: Semantics | None) -> None:
    if settings.instructed and semantics is None:
        raise InputError("scale: instructions count (scale > 0), and this model was built without; use scale: 0")
