"""From a plan to its coefficients: data checked first, state kept in the folder that a run is given."""

import contextlib
from collections.abc import Generator
from pathlib import Path

from consilience.coefficients import Coefficients
from consilience.engine.plan import Plan
from consilience.errors import InputError, MachineError
from consilience.jit import compilation_shown
from consilience.learned.answers import questions
from consilience.learned.run import Machine, Run, base_folder, groups_of, require_tensorboard
from consilience.progress import NullProgress, Progress
from consilience.tasks.gradients import gradients


def check_data(plan: Plan) -> None:
    """Read every expert's calibration rows, or the target's, so that a wrong file is known before any work.

    Raises:
        InputError: see ``Run.task``, ``Run.target`` and ``base_folder``.
    """
    run = Run(plan, plan.root, where=plan.where)
    base_folder(plan)
    if plan.method.reads_target:
        run.target()
    else:
        for name in run.experts:
            generate = plan.learning.get("responses") == "generate"
            own = plan.learning.get("own_prompts", 0) if generate else 0
            task = run.asked(name, own_prompts=own, key=plan.method.rows_key)
            if generate:
                questions(task)
    if "grouping" in plan.learning:
        groups_of(run, plan.learning["grouping"], plan.learning["exclude"], plan.learning["alphabar"])


def learn_state(
    plan: Plan, folder: Path, *, machine: Machine | None = None, progress: Progress | None = None
) -> Coefficients:
    """Learn the coefficients of a plan with its state in a folder of the caller's, which is kept."""
    if plan.method.learn is None:
        raise InputError(f"{plan.where}: method {plan.method.name!r} learns nothing; see 'consilience methods'")
    run = Run(plan, plan.root, folder, None, machine or Machine(), progress or NullProgress(), plan.where)
    with compilation_shown(run.progress):
        return plan.method.learn(run, **plan.learning)


def check_learning(plan: Plan, tensorboard: Path | None, device: str) -> None:
    """Refuse a plan that learns nothing, packages that are missing, and devices that are not there.

    Raises:
        InputError: names the method, the extra to install, or the device.
    """
    if plan.method.learn is None:
        raise InputError(f"{plan.where}: method {plan.method.name!r} learns nothing; see 'consilience methods'")
    from consilience.tasks.load import check_device, require_transformers

    require_transformers(f"method {plan.method.name!r}")
    check_device(device)
    if tensorboard is not None:
        require_tensorboard()


def learn_plan(
    plan: Plan,
    folder: Path | None = None,
    *,
    threads: int | None = None,
    device: str = "cpu",
    tensorboard: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Coefficients:
    """Learn the coefficients of a plan, with its state in ``folder``; see ``consilience.api.learn``."""
    check_learning(plan, tensorboard, device)
    assert plan.method.learn is not None
    run = Run(
        plan, plan.root, folder, tensorboard, Machine(device, threads, trust_remote_code), progress or NullProgress(),
        plan.where,
    )  # fmt: skip
    with _explained(), compilation_shown(run.progress), gradients():
        return plan.method.learn(run, **plan.learning)


def collect_plan(
    plan: Plan,
    folder: Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    tensorboard: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Collect the statistics that a plan's method makes with the model; return every expert's folder in ``folder``."""
    from consilience.tasks.load import check_device, require_transformers

    require_transformers(f"method {plan.method.name!r}")
    check_device(device)
    assert plan.method.collect is not None
    assert tensorboard is None
    machine = Machine(device, threads, trust_remote_code)
    run = Run(plan, plan.root, folder, None, machine, progress or NullProgress(), plan.where)
    with _explained(), compilation_shown(run.progress):
        return plan.method.collect(run, folder)


@contextlib.contextmanager
def _explained() -> Generator[None]:
    """Turn a lack of memory into an error of the machine that says what to do."""
    try:
        yield
    except MemoryError as error:
        raise _full(str(error)) from error
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise _full(str(error)) from error


def _full(said: str) -> MachineError:
    first = (said.strip().splitlines() or ["no more is known"])[0][:200]
    return MachineError(
        f"out of memory while learning; lower batch_tokens, set checkpoint=true or precision=bfloat16 ({first})"
    )
