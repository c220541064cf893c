"""The loss of a set of coefficients on calibration samples, and its gradient: one pass over the task vectors each."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.objectives.objective import Objective
from consilience.objectives.term import Compared
from consilience.optimizers.gradient import Terms
from consilience.student.calibration import Batch, Sample, batches
from consilience.student.outputs import Reader
from consilience.student.student import Student
from consilience.student.teachers import Teachers


class Problem:
    """An objective on samples, as a function of the coefficients.

    With one batch a step every tensor's gradient is reduced to its inner products as soon as the backward pass has
    made it, so that no second copy of the model exists; with more, gradients are accumulated first and the task
    vectors are read once.
    """

    def __init__(
        self,
        student: Student,
        reader: Reader,
        teachers: Teachers | None,
        samples: Sequence[Sample],
        objective: Objective,
        *,
        tokens: int,
    ) -> None:
        self.student, self.reader, self.teachers = student, reader, teachers
        self.samples, self.objective, self.tokens = list(samples), objective, tokens
        # What an expert's rows are compared with is its own; who reads them is the student in any case.
        self.mixed = not objective.layers and (teachers is None or teachers.one_head)

    def evaluate(self, alpha: Alpha, chosen: Sequence[int], *, gradient: bool) -> tuple[Terms, Alpha | None]:
        """Return the weighted terms on the chosen samples and, if asked for, dL/dalpha [K, N].

        Raises:
            InputError: the loss is not finite.
        """
        import torch

        self.student.set(alpha)
        weights = self._weights(chosen)
        parts = batches(self.samples, chosen, self.tokens, mixed=self.mixed, packed=self.reader.packs)
        total = np.zeros((len(self.student.bank.experts), self.student.bank.count))
        terms: Terms = {}
        with torch.set_grad_enabled(gradient):
            if gradient and len(parts) == 1:
                with _Reducer(self.student) as reducer:
                    self._add(terms, self._batch(parts[0], weights, gradient))
                total = reducer.total
            else:
                for part in parts:
                    self._add(terms, self._batch(part, weights, gradient))
                if gradient:
                    total = self.student.bank.products(self.student.take_gradients())
            if gradient:
                total = total + self.student.slopes()
        if not np.isfinite(sum(terms.values())) or not np.isfinite(total).all():
            raise InputError(
                "the loss is not finite at the present coefficients; lower learning_rate, or use precision=float32"
            )
        return terms, total if gradient else None

    def _add(self, terms: Terms, more: Terms) -> None:
        for name, value in more.items():
            terms[name] = terms.get(name, 0.0) + value

    def _weights(self, chosen: Sequence[int]) -> dict[int, float]:
        """What one position of every chosen sample counts."""
        objective = self.objective
        counts = {i: len(self.samples[i].encoded.positions) for i in chosen}
        experts = len({sample.expert for sample in self.samples})
        present = len({self.samples[i].expert for i in chosen})
        out: dict[int, float] = {}
        for i in chosen:
            own = [j for j in chosen if self.samples[j].expert == self.samples[i].expert]
            tokens = sum(counts[j] for j in own) if objective.mean == "tokens" else counts[i] * len(own)
            weight = 1.0 / tokens
            # In the sum each expert counts in full, whichever of them a small batch holds.
            weight *= len(own) / len(chosen) if objective.total == "mean" else experts / present
            beta = objective.beta[self.samples[i].expert] if objective.beta else 1.0
            out[i] = beta * weight
        return out

    def _batch(self, batch: Batch, weights: dict[int, float], gradient: bool) -> Terms:
        import torch

        objective = self.objective
        counted = objective.weights
        if not any(weights[i] for i in batch.indices):
            return dict.fromkeys(counted, 0.0)
        each = torch.tensor(
            [weights[i] for i, s in zip(batch.indices, batch.samples, strict=True) for _ in s.encoded.positions],
            dtype=torch.float64 if self.student.settings.precision == "float64" else torch.float32,
            device=self.student.settings.device,
        )
        with self.student.compute():
            ours, targets = self.reader.run(batch)
            expert = self.teachers.outputs(batch) if self.teachers is not None else None
            variances = self.teachers.variances[batch.expert] if self.teachers is not None else {}
            at = Compared(ours, expert, targets, each, variances, self.reader.readout.vocabulary)
            found = objective.losses(at)
        total: Any = sum(counted[name] * value for name, value in found.items())
        if gradient and total.requires_grad:
            torch.autograd.backward(total)
        return {name: counted[name] * float(value.detach()) for name, value in found.items()}


class _Reducer:
    """Reduces gradients to inner products beside the backward pass, a bounded number of tensors at a time."""

    def __init__(self, student: Student) -> None:
        self.student = student
        self.total = np.zeros((len(student.bank.experts), student.bank.count))
        self._free = threading.Semaphore(2)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reduce")
        self._waiting: list[Future[Alpha]] = []

    def _take(self, name: str, gradient: Any) -> None:
        self._free.acquire()

        def run(held: list[Any]) -> Alpha:
            try:
                return self.student.bank.products({name: held.pop()})
            finally:
                self._free.release()

        self._waiting.append(self._pool.submit(run, [gradient]))

    def __enter__(self) -> "_Reducer":
        self._context = self.student.gradients(self._take)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        self._pool.shutdown()
        if error[0] is None:
            for future in self._waiting:
                self.total += future.result()
