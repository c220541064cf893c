"""Losses of the experts' tasks as a function of merge weights: what probe data are asked.

    f_k(alpha) = loss of task k at theta_0 + sum_j alpha_j tau_j,     df_k/dalpha_j = <grad f_k, tau_j>

Everything that the doctor measures with data lies in the span of the task vectors, so K numbers say where, and
gradients are K numbers each, whatever the size of the model.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from consilience.doctor.evidence.case import Case
from consilience.doctor.theory.geometry import Vector
from consilience.errors import InputError


class Landscape(Protocol):
    """Losses of K tasks, each with its own rows."""

    def rows(self, task: int) -> Sequence[int]:
        """Return the numbers of a task's rows."""
        ...

    def loss(self, task: int, alpha: Vector) -> float:
        """Return a task's mean loss, in nats, at weights alpha [K]."""
        ...

    def slope(self, task: int, alpha: Vector, rows: Sequence[int]) -> tuple[float, Vector]:
        """Return the mean loss of some of a task's rows, and its derivatives by alpha, [K]."""
        ...


class RecipeLandscape:
    """The landscape of a recipe's experts, a language model's, by each one's ``data.probe``; ``close`` it when done."""

    def __init__(
        self,
        case: Case,
        *,
        rows: int = 0,
        device: str = "cpu",
        threads: int | None = None,
        trust_remote_code: bool = False,
        precision: Any = "mixed",
        tokens: int = 4096,
    ) -> None:
        """Load the base and read the rows: the first ``rows`` of each file (0: all).

        Raises:
            InputError: the base is no Hugging Face folder, a file is missing or wrong, or a row has no response.
        """
        from consilience.learned.run import Data, Machine, Run, groups_of, open_workshop
        from consilience.objectives.objective import Objective
        from consilience.objectives.target import Target

        run = Run(case.plan, case.root, machine=Machine(device, threads, trust_remote_code), where=case.where)
        for name in case.names:
            task = run.task(name, key="probe", rows=rows)
            for index, row in enumerate(task.rows):
                if not row.labelled:
                    raise InputError(f"{task.where(index)}: has no response; the doctor measures losses on answers")
        self.run = run
        self.start = groups_of(run, "global", (), [0.0] * len(case.names))
        self.data = Data(samples=rows, positions="response", key="probe", tokens=tokens)
        self.shop = open_workshop(run, self.start, self.data, teachers=False, precision=precision)
        self.problem = self.shop.problem(Objective(terms=(Target(1.0),), total="mean"))
        self._rows = [
            [i for i, sample in enumerate(self.shop.samples) if sample.expert == k] for k in range(len(case.names))
        ]

    def close(self) -> None:
        """Stop the workers."""
        self.shop.close()

    def facts(self, parameters: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return what is written of a learned method's run."""
        from consilience.learned.facts import facts_of

        return facts_of(self.run, self.shop, parameters, self.data, seconds)

    def rows(self, task: int) -> Sequence[int]:
        """Return the numbers of a task's rows."""
        return self._rows[task]

    def loss(self, task: int, alpha: Vector) -> float:
        """Return a task's mean loss per answered token."""
        terms, _ = self.problem.evaluate(alpha[:, None], self._rows[task], gradient=False)
        return sum(terms.values())

    def slope(self, task: int, alpha: Vector, rows: Sequence[int]) -> tuple[float, Vector]:
        """Return the mean loss of some rows, and its derivatives by alpha."""
        terms, gradient = self.problem.evaluate(alpha[:, None], rows, gradient=True)
        assert gradient is not None
        return sum(terms.values()), np.asarray(gradient[:, 0], np.float64)
