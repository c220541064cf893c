"""Tiny models with one random expert each and the expert's own rows, as the makers of local routers get them."""

from collections.abc import Callable
from typing import Any

import torch
from routed_models import LLAMA, T5, make_expert
from torch import Tensor

from consilience.routing.expert import Expert
from consilience.tasks.encoding import Encoded, encode
from consilience.tasks.rows import Row, Task
from consilience.training.data import Examples
from tests.tasks.tiny_models import make_llama, make_t5, make_tokenizer

MAKE: dict[str, Callable[[], Any]] = {"llama": make_llama, "t5": make_t5}
TARGETS = {"llama": LLAMA, "t5": T5}

COPY = (("say a", "a"), ("say cat twice", "cat cat"), ("the mat?", "on the mat, where the cat sat"), ("b", "bb b"))
JUDGE = (("good day", "yes"), ("is it bad?", "no, it is good"), ("f(x)", "return x"))


def own_expert(kind: str, seed: int = 3) -> Expert:
    """An expert of the tiny model of this kind."""
    return make_expert(MAKE[kind](), "own", seed, targets=TARGETS[kind])


def own_tasks(kind: str) -> list[Examples]:
    """Two tasks of different sizes, encoded for the tiny model of this kind."""
    tokenizer = make_tokenizer() if kind == "llama" else make_tokenizer(None)
    found: list[Examples] = []
    for name, pairs in (("copy", COPY), ("judge", JUDGE)):
        task = Task(name, tuple(Row(prompt=prompt, response=response) for prompt, response in pairs))
        found.append(Examples(task, encode(task, tokenizer, decoder_start=0 if kind == "t5" else None)))
    return found


def nats(model: Any, one: Encoded) -> Tensor:
    """Nats of a row's response tokens, from all logits of the row alone."""
    if one.source:
        logits = model(input_ids=torch.tensor([one.source]), decoder_input_ids=torch.tensor([one.inputs])).logits[0]
    else:
        logits = model(input_ids=torch.tensor([one.inputs])).logits[0]
    log = logits.log_softmax(-1)
    return -torch.stack([log[p, t] for p, t in zip(one.positions, one.targets, strict=True)])
