"""One side of `benchmarks.coefficient_step` in a process of its own: a few steps, timed whole and part by part.

    python -m benchmarks.step_sides SPEC.json FOUND.json        # one process of benchmarks.coefficient_step

All sides read the same synthetic tokens at the same coefficients, with as many torch threads, on as many cores.
"""

import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from benchmarks.adapters import factors_of
from benchmarks.step_experts import SCALE, Kind
from benchmarks.worker import work_on

Side = Literal["floor", "ours", "straightforward"]
ALPHA = 0.3
"""Every coefficient at the start."""


@dataclass(frozen=True)
class Spec:
    """What a process is to do.

    Arguments:
        side: whose step.
        kind: of the experts.
        base: the base's folder.
        experts: the experts' folders by name.
        tokens: of the one sample in a step.
        repeat: timed steps, after one that is not.
        threads: of torch, and of the bank.
        pinned: whether the process may use that many cores and no more.
        parts: whether the parts are timed too, and the step with hidden alignment.
    """

    side: Side
    kind: Kind
    base: Path
    experts: dict[str, Path]
    tokens: int
    repeat: int
    threads: int
    pinned: bool
    parts: bool


@dataclass(frozen=True)
class Found:
    """What a process found.

    Arguments:
        seconds: of every repeat, by what was timed: "step" and the parts of it.
        cpu: processor seconds of the same, all threads together.
        gradient: dL/dalpha [K] of the first step by tensor; none for the floor, whose loss is another.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    cpu: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    gradient: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    @contextmanager
    def timed(self, name: str) -> Generator[None]:
        """Add what happens in the context to the repeats of ``name``."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - wall)
        self.cpu.setdefault(name, []).append(time.process_time() - cpu)

    def forget(self) -> None:
        """Drop what was timed so far: the first step pays for compilation and fresh memory."""
        self.seconds.clear()
        self.cpu.clear()


def tokens_of(vocabulary: int, count: int, expert: int) -> list[int]:
    """Return the token ids of one expert's sample."""
    import torch

    generator = torch.Generator().manual_seed(7_000 + expert)
    return torch.randint(vocabulary, (count,), generator=generator).tolist()


def floor(spec: Spec) -> Found:
    """Run the plain model between two passes over the task vectors; see `benchmarks.step_floor`."""
    import torch

    from benchmarks.step_floor import plain_model, task_vectors

    model = plain_model(spec.base)
    vectors = task_vectors(spec.kind, spec.base, list(spec.experts.values()))
    parameters = {name: value for name, value in model.named_parameters() if name in vectors.names}
    for value in parameters.values():
        value.requires_grad_(True)
    weights = {name: value.data for name, value in parameters.items()}
    ids = torch.tensor([tokens_of(model.config.vocab_size, spec.tokens, 0)])
    targets = torch.tensor(tokens_of(model.config.vocab_size, spec.tokens, 1))
    alpha = torch.full((len(spec.experts),), ALPHA)
    found = Found()
    for number in range(spec.repeat + 1):
        with found.timed("step"):
            with found.timed("blend"):
                vectors.blend(alpha, weights)
            with found.timed("compute"):
                logits = model(input_ids=ids, use_cache=False).logits[0]
                torch.nn.functional.cross_entropy(logits, targets).backward()
                del logits
            with found.timed("products"):
                vectors.products({name: value.grad for name, value in parameters.items() if value.grad is not None})
                model.zero_grad(set_to_none=True)
        if not number:
            found.forget()
    return found


def ours(spec: Spec) -> Found:
    """Run the package: evaluate the problem and step the optimizer, the samples of all experts in turn."""
    from consilience.api import build_recipe
    from consilience.engine.plan import make_plan
    from consilience.learned.run import Run, groups_of

    named = {name: str(folder) for name, folder in spec.experts.items()}
    plan = make_plan(build_recipe("expert_merging", str(spec.base), named, {}))
    start = groups_of(Run(plan), "tensor", ("vision",), (ALPHA,) * len(named))
    try:
        return _descend(spec, plan, start)
    finally:
        plan.close()


def _descend(spec: Spec, plan: Any, start: Any) -> Found:
    import torch

    from consilience.learned.problem import Problem
    from consilience.learned.run import middle
    from consilience.objectives.alignment import Hidden, Logits
    from consilience.objectives.objective import Objective
    from consilience.optimizers.anchor import Anchor
    from consilience.optimizers.gradient import Gradient
    from consilience.optimizers.parameterisation import parameterise
    from consilience.optimizers.settings import Descent
    from consilience.student.bank import Bank
    from consilience.student.calibration import Batch, Sample
    from consilience.student.outputs import Reader
    from consilience.student.student import Settings, make_student
    from consilience.student.teachers import Teachers
    from consilience.tasks.encoding import Encoded
    from consilience.tasks.rows import Row

    experts = range(len(spec.experts))
    bank = Bank(plan, start.groups, threads=spec.threads)
    student = make_student(plan, bank, Settings("float32"))
    places = tuple(range(spec.tokens))
    encoded = [
        Encoded(0, None, (), tuple(tokens_of(student.model.config.vocab_size, spec.tokens, k)), places, ())
        for k in experts
    ]
    samples = [Sample(k, encoded[k], "", Row(text="synthetic")) for k in experts]
    reader = Reader(student, Batch(0, (samples[0],), (0,)), middle(student, "middle"))
    teachers = Teachers(student, reader, samples, None)
    teachers.prepare(spec.tokens)

    def problem_of(objective: Objective) -> Problem:
        return Problem(student, reader, teachers, samples, objective, tokens=spec.tokens)

    # The mean over the one sample of a step: what the straightforward side minimises too.
    plain = problem_of(Objective(total="mean"))
    hidden = problem_of(Objective(terms=(Logits(), Hidden(1.0)), total="mean"))
    found = Found()

    def optimizer_of(problem: Problem) -> Callable[[int], Any]:
        mapped = parameterise("real", start.alpha, start.learned)
        optimizer = Gradient(Descent(), mapped, Anchor(mapped.start, mapped.learned, 0.8))

        def loss(alpha: Any, step: int, *, gradient: bool) -> Any:
            terms, slope = problem.evaluate(alpha, [step % len(samples)], gradient=gradient)
            if not found.gradient and slope is not None:
                for name, extent in bank.extents.items():
                    found.gradient[name] = slope[:, extent.indices].sum(1).tolist()
            return terms, slope

        return lambda number: optimizer.step(loss, number)

    step, step_hidden = optimizer_of(plain), optimizer_of(hidden)
    largest = torch.zeros(max(t.numel for t in bank.tensors.values())) if spec.parts else None

    # Functions, for a mock of its own making would keep what it is called with: every gradient.
    def no_blend(*_: Any) -> None:
        return None

    def no_products(_: Any) -> Any:
        return start.alpha * 0

    try:
        for number in range(spec.repeat + 1):
            with found.timed("step"):
                step(number)
            if largest is not None:
                with found.timed("step, hidden too"):
                    step_hidden(number)
                with found.timed("blend"):
                    student.set(start.alpha)
                with (
                    mock.patch.object(bank, "blend", no_blend),
                    mock.patch.object(bank, "products", no_products),
                    found.timed("compute"),
                ):
                    plain.evaluate(start.alpha, [number % len(samples)], gradient=True)
                with found.timed("products"):
                    for name in student.merged:
                        bank.products({name: largest[: bank.tensors[name].numel]})
            if not number:
                found.forget()
    finally:
        bank.close()
    return found


def straightforward(spec: Spec) -> Found:
    """Let autograd do it: task vectors in memory, merged tensors through ``functional_call``, the expert run each step.

    To its advantage all steps are on one expert's sample, whose weights are in memory; the other experts are there as
    task vectors only.
    """
    import torch
    from torch.func import functional_call

    from benchmarks.step_floor import mapped, plain_model

    model = plain_model(spec.base)
    base = dict(model.named_parameters())
    vectors: list[dict[str, torch.Tensor]] = []
    for folder in spec.experts.values():
        stored = mapped(folder)
        if spec.kind == "dense":
            vectors.append({name: value.float() - base[name] for name, value in stored.items()})
        else:
            vectors.append({name: SCALE * (b @ a) for name, (b, a) in factors_of(stored).items()})
    expert = {name: base[name] + value for name, value in vectors[0].items()}
    names = list(vectors[0])
    alpha = torch.full((len(vectors), len(names)), ALPHA, requires_grad=True)
    optimizer = torch.optim.Adam([alpha], lr=0.02)
    ids = torch.tensor([tokens_of(model.config.vocab_size, spec.tokens, 0)])
    inputs = {"input_ids": ids, "use_cache": False}
    found = Found()
    for number in range(spec.repeat + 1):
        with found.timed("step"):
            with found.timed("expert"), torch.no_grad():
                theirs = torch.log_softmax(functional_call(model, expert, (), inputs).logits[0], -1)
            with found.timed("blend"):
                merged: dict[str, torch.Tensor] = {}
                for i, name in enumerate(names):
                    merged[name] = base[name]
                    for k, vector in enumerate(vectors):
                        merged[name] = merged[name] + alpha[k, i] * vector[name]
            with found.timed("compute"):
                ours = torch.log_softmax(functional_call(model, merged, (), inputs).logits[0], -1)
                (theirs.exp() * (theirs - ours)).sum(-1).mean().backward()
                del ours, theirs, merged
            assert alpha.grad is not None
            if not number:
                found.gradient.update({name: alpha.grad[:, i].tolist() for i, name in enumerate(names)})
            optimizer.step()
            optimizer.zero_grad()
        if not number:
            found.forget()
    return found


SIDES: dict[Side, Callable[[Spec], Found]] = {"floor": floor, "ours": ours, "straightforward": straightforward}


def work(spec: Spec) -> Found:
    """Run the side of a process."""
    if spec.pinned:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec.threads])
    import torch

    torch.set_num_threads(spec.threads)
    return SIDES[spec.side](spec)


if __name__ == "__main__":
    work_on(sys.argv[1:], Spec, work)
