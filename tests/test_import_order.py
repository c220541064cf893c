"""The parts stand on each other: a module imports, when it is loaded, only from its own part and from parts below."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "consilience"
#: From the ground up. What is imported within functions is loaded when it is used, and may lie above.
ORDER = (
    "errors", "contents", "numbers", "name_filter", "progress", "workdir", "cache", "jit", "pages", "checkpoints",
    "kernels", "experts", "methods", "recipe", "coefficients", "engine", "tasks", "training", "student", "objectives",
    "optimizers", "learned", "mixing", "doctor", "routing", "moe", "api", "sweeps", "cli",
)  # fmt: skip


def part_of(module: str) -> str:
    """Return the part that a module of the package is in; the package itself holds its version only."""
    return module.split(".")[1] if "." in module else ""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield ".".join(("consilience", *path.relative_to(SOURCE).with_suffix("").parts)), path


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports when it is loaded."""
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] == "consilience":
            assert statement.module is not None
            yield from (f"{statement.module}.{name.name}" for name in statement.names)
        elif isinstance(statement, ast.Import):
            yield from (name.name for name in statement.names if name.name.split(".")[0] == "consilience")


def test_every_part_has_a_place() -> None:
    parts = {path.stem if path.is_file() else path.name for path in SOURCE.iterdir() if path.name[0] not in "_."}
    assert {part for part in parts if part != "py"} == set(ORDER)


@pytest.mark.parametrize("module", [name for name, _ in modules()])
def test_modules_import_from_below(module: str) -> None:
    own = part_of(module)
    if own not in ORDER:
        return  # the package's own __init__ and __main__
    for name in imported(dict(modules())[module]):
        part = part_of(name)
        if part in ORDER:
            assert ORDER.index(part) <= ORDER.index(own), f"{module} imports {name}, which lies above it"
