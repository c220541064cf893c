"""``consilience merge --sweep``: one merge for every point of a grid, with progress lines and a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from consilience.cli.inputs import parse_assignment
from consilience.cli.printing import print_json
from consilience.errors import InputError, printable


def parse_grid(texts: list[str], settings: list[str], given: Mapping[str, Any] | None = None) -> dict[str, list[Any]]:
    """Return the values of ``--sweep KEY=VALUE,VALUE`` options by key.

    Args:
        texts: the values of ``--sweep``.
        settings: the values of ``--set``.
        given: what other options that can be swept say, by key; None where one is not given.

    Raises:
        InputError: a key is given twice, or by another option too, or values are not written as YAML has them.
    """
    from consilience.recipe.yaml_file import parse_yaml

    grid: dict[str, list[Any]] = {}
    fixed = {text.partition("=")[0] for text in settings}
    for text in texts:
        key, raw = parse_assignment(text, "--sweep")
        if key in grid:
            raise InputError(f"--sweep {key}: is given twice; list its values in one")
        if key in fixed:
            raise InputError(f"--sweep {key}: is given by --set too; keep one")
        if (given or {}).get(key) is not None:
            raise InputError(f"--sweep {key}: is given by --{key} too; keep one")
        grid[key] = parse_yaml(f"[{raw}]", f"--sweep {key}")
    return grid


def sweep_command(
    source: Any, out: Path, grid: dict[str, list[Any]], *, quiet: bool, as_json: bool, **settings: Any
) -> None:
    """Merge every point and print the table, or all results as JSON."""
    from consilience.jit import skip_blas
    from consilience.sweeps import sweep, table

    skip_blas()
    result = sweep(source, out, grid, progress=not quiet, told=None if quiet else _tell, **settings)
    if as_json:
        print_json({"ok": True} | result.to_dict())
    elif not quiet:
        typer.echo("\n".join(map(printable, table(result))))


def _tell(line: str) -> None:
    typer.echo(f"consilience: {printable(line)}", err=True)


def show_sweep(source: Any, out: Path, grid: dict[str, list[Any]], *, as_json: bool, **settings: Any) -> None:
    """Print what a sweep would merge (``--dry-run``); nothing is touched."""
    from consilience.sweeps import plan_sweep

    points, done = plan_sweep(source, out, grid, **settings)
    size = sum(point.bytes for point, there in zip(points, done, strict=True) if not there)
    if as_json:
        listed = [{"name": p.name, "values": p.values, "bytes_written": p.bytes, "finished": d}
                  for p, d in zip(points, done, strict=True)]  # fmt: skip
        print_json({"ok": True, "out": str(out), "points": listed, "bytes_written": size})
        return
    typer.echo(f"sweep    {len(points)} merges, {sum(done)} of them finished; write {size / 1e9:.2f} GB")
    for point, there in zip(points, done, strict=True):
        typer.echo(printable(f"  {out / point.name}" + ("  (finished)" if there else "")))
