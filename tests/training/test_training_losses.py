"""The loss and its gradient against the plain formula: every row alone, all logits, a sum of log-probabilities."""

from typing import Any

import pytest
import torch
from tiny_base import make_llama, make_tokenizer

from consilience.tasks import Encoded, Row, Task, encode
from consilience.training.losses import batch_loss, collate, token_losses

ANSWERS = (("say a", "a"), ("say cat twice", "cat cat"), ("the mat?", "on the mat, where the cat sat"))


@pytest.fixture(scope="module")
def examples() -> tuple[Encoded, ...]:
    rows = tuple(Row(prompt=prompt, response=response) for prompt, response in ANSWERS)
    return encode(Task("rows", rows), make_tokenizer())


def plain_nats(model: Any, one: Encoded) -> Any:
    log = model(torch.tensor([one.inputs])).logits[0].log_softmax(-1)
    return -torch.stack([log[p, t] for p, t in zip(one.positions, one.targets, strict=True)])


def test_losses_are_those_of_each_row_alone(examples: tuple[Encoded, ...]):
    model = make_llama()
    batch = collate(examples, [0, 1, 0])
    with torch.no_grad():
        nats = token_losses(model, batch)
        expected = torch.cat([plain_nats(model, one) for one in examples])
    assert nats.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert batch.tasks.tolist() == [k for k, one in zip((0, 1, 0), examples, strict=True) for _ in one.targets]


def test_the_gradient_is_that_of_the_mean_over_tasks_of_the_mean_over_tokens(examples: tuple[Encoded, ...]):
    model, other = make_llama(), make_llama()
    loss, parts = batch_loss(token_losses(model, batch := collate(examples, [0, 1, 0])), batch.tasks)
    torch.autograd.backward(loss)
    first, second, third = (plain_nats(other, one) for one in examples)
    of_zero = (first.sum() + third.sum()) / (len(first) + len(third))
    torch.autograd.backward((of_zero + second.mean()) / 2)
    assert parts == pytest.approx({0: of_zero.item(), 1: second.mean().item()}, rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_what_a_model_does_to_its_logits_counts(examples: tuple[Encoded, ...]):
    """Some architectures scale or cap their logits after the output layer."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = make_llama()

        def get_output_embeddings(self) -> Any:
            return self.own.get_output_embeddings()

        def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
            out = self.own(input_ids, use_cache=use_cache)
            out.logits = out.logits * 0.5
            return out

    model = Scaled()
    with torch.no_grad():
        nats = token_losses(model, collate(examples, [0, 0, 0]))
        expected = torch.cat([plain_nats(model, one) for one in examples])
    assert nats.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
