"""Time and memory of whole-matrix methods, against their bare products and decompositions and against published steps.

    python -m benchmarks.matrix_methods                # five task vectors of 1024 x 4096; some ten minutes
    python -m benchmarks.matrix_methods --quick        # 256 x 1024, and a tenth of the steps

Sides run in turn in one process with the same threads: the method through ``cs.merge``; its products, eliminations and
decompositions alone, on arrays that are there already; and what is published, restated in torch: 300 steps of Adam on
the interference by per-expert products in float32 (WUDI), or every task vector's full decomposition in float32 (TSV-M).
Memory is the peak of numpy's allocations as a multiple of the stack. Results go to
docs/results/bench/matrix_methods.json with a page.
"""

import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import consilience as cs
from benchmarks import records, rounds
from benchmarks.options import make_parser, positive
from benchmarks.page import compose
from benchmarks.records import Results
from benchmarks.synthetic import CACHE
from benchmarks.tables import Table, at_least, at_most, cell
from benchmarks.terminal import make_console, show_page

PACKAGES = ("consilience", "numpy", "torch")
FLOOR_AIM = 1.3
#: Method -> how many times faster than what is published it has to be.
AIMS = {"wudi": 30.0, "swudi_a": 10.0, "tsv_m": 5.0}
METHODS = ("wudi", "actmat", "swudi_a", "tsv_m", "iso_c")
EXPERTS, SHAPE, SMALL, STEPS = 5, (1024, 4096), (256, 1024), 300

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One method: seconds by side, its peak of memory over the stack's size, and interference losses by side."""

    method: str
    shape: tuple[int, int]
    wall_s: dict[str, list[float]]
    copies: float
    losses: dict[str, float]
    distance: float = 0.0


def task_vectors(shape: tuple[int, int]) -> list[Array]:
    """Return float32 task vectors of falling spectra, half of their directions shared, as fine-tuning leaves them."""
    rng = np.random.default_rng(0)
    size = min(shape)
    common = rng.standard_normal((size, shape[1])).astype(np.float32)
    weights = (0.99 ** np.arange(size)).astype(np.float32)
    found: list[Array] = []
    for k in range(EXPERTS):
        own = rng.standard_normal((size, shape[1])).astype(np.float32)
        left = rng.standard_normal((shape[0], size)).astype(np.float32) * weights
        found.append(left @ (0.5 * common + own) * np.float32(0.01 / size**0.5 * (1 + 0.2 * k)))
    return found


def interference(tau: Array, vectors: list[Array]) -> float:
    """Return WUDI's loss, in float64."""
    found = 0.0
    for vector in vectors:
        own = vector.astype(np.float64)
        found += float(np.square((tau - own) @ own.T).sum() / np.square(own).sum())
    return found


def descend(vectors: list[Array], steps: int) -> Array:
    """Take WUDI's published steps: Adam at 1e-5 from the sum, one product per expert in float32."""
    import torch

    stack = torch.from_numpy(np.stack(vectors))
    merged = torch.nn.Parameter(stack.sum(0))
    adam = torch.optim.Adam([merged], lr=1e-5)
    norms = stack.square().sum((1, 2), keepdim=True)
    for _ in range(steps):
        adam.zero_grad()
        inner = (merged[None] - stack) @ stack.transpose(1, 2)
        (inner.square() / norms).sum().backward()
        adam.step()
    return merged.detach().numpy()


def decompose(vectors: list[Array]) -> Array:
    """Do TSV-M as published: full decompositions in float32, and two of what is put together."""
    import torch

    share = min(vectors[0].shape) // len(vectors)
    parts = [torch.linalg.svd(torch.from_numpy(vector), full_matrices=False) for vector in vectors]
    u = torch.cat([part[0][:, :share] for part in parts], 1)
    s = torch.cat([part[1][:share] for part in parts])
    v = torch.cat([part[2][:share] for part in parts])
    (a, _, b), (c, _, d) = (torch.linalg.svd(one, full_matrices=False) for one in (u, v))
    return (a @ b @ torch.diag(s) @ c @ d).numpy()


def bare(method: str, vectors: list[Array]) -> Callable[[], object]:
    """Return what a method cannot do without: products, eliminations and decompositions on arrays that are there."""
    if method == "tsv_m":
        return lambda: _bare_triples(vectors)
    if method == "iso_c":
        return lambda: _bare_triples([np.sum(vectors, 0)])
    wide = [vector.astype(np.float64) for vector in vectors]
    rows = np.concatenate(wide)

    def run() -> object:
        gram = rows.T @ rows
        load = np.sum([(one @ one.T) @ one for one in wide], 0)
        if method != "swudi_a":
            return np.linalg.solve(gram, load.T)
        values, basis = np.linalg.eigh(gram)
        return ((load @ basis) / values) @ basis.T

    return run


def _bare_triples(vectors: list[Array]) -> object:
    """Take every matrix' triples by its Gram matrix in float64, then what makes one update of them.

    That is the product of its triples for one matrix, the decompositions for two polar factors and their products for
    several.
    """
    share = min(vectors[0].shape) // len(vectors)
    left: list[Array] = []
    right: list[Array] = []
    for vector in vectors:
        wide = vector.astype(np.float64)
        own = np.linalg.eigh(wide @ wide.T)[1][:, -share:]
        left.append(own.astype(np.float32))
        # all triples have weak ones among them, whose products float32 would lose
        right.append((own.T @ wide).astype(np.float32) if share == min(vector.shape) else left[-1].T @ vector)
    u, v = np.concatenate(left, 1), np.concatenate(right)
    if len(vectors) == 1:
        return u @ v
    for gram in (u.T.astype(np.float64) @ u, v.astype(np.float64) @ v.T):
        np.linalg.eigh(gram)
    small = u.T @ u
    return (u @ (small @ small)) @ v


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long a call took, and what it returned."""
    begun = time.perf_counter()
    found = run()
    return time.perf_counter() - begun, found


def run_method(method: str, shape: tuple[int, int], repeat: int, steps: int) -> Row:
    """Measure one method; what is published runs once, since its steps take minutes."""
    vectors = task_vectors(shape)
    base = np.zeros(shape, np.float32)
    tuned = {f"e{k}": {"w": vector} for k, vector in enumerate(vectors)}

    def own() -> Any:
        merged: Any = cs.merge({"w": base}, tuned, method=method)
        return merged["w"]

    own()  # compiles
    floor = bare(method, vectors)
    seconds: dict[str, list[float]] = {"bare": [], "merge": [], "published": []}
    merged = base
    for _ in range(repeat):
        seconds["bare"].append(timed(floor)[0])
        taken, merged = timed(own)
        seconds["merge"].append(taken)
    losses = {"merge": interference(merged, vectors)}
    if method in AIMS:
        taken, found = timed(lambda: decompose(vectors) if method == "tsv_m" else descend(vectors, steps))
        seconds["published"].append(taken)
        losses["published"] = interference(found, vectors)
    tracemalloc.start()
    own()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    distance = 0.0
    if method == "swudi_a":
        nearest: Any = cs.merge({"w": base}, tuned, method="wudi")
        distance = float(np.linalg.norm(merged - nearest["w"]) / np.linalg.norm(nearest["w"]))
    return Row(method, shape, seconds, peak / (4 * EXPERTS * shape[0] * shape[1]), losses, distance)


def tables(results: Results[Row]) -> list[Table]:
    """Return the page's tables."""
    times: list[tuple[str, ...]] = []
    losses: list[tuple[str, ...]] = []
    for row in results.rows:
        merge, floor, published = (row.wall_s[side] for side in ("merge", "bare", "published"))
        faster = published[0] / (rounds.median(merge) or 1.0) if published else None
        aimed = at_least(faster, AIMS[row.method]) if row.method in AIMS else ("", "", "")
        middle = [cell(rounds.median(side)) for side in (floor, merge)]
        once = cell(published[0] if published else None, ".1f")
        ratio = at_most(rounds.median_ratio(merge, floor), FLOOR_AIM)
        times.append((row.method, *middle, *ratio, once, *aimed, cell(row.copies, ".1f")))
        if row.method in AIMS:
            values = [cell(row.losses.get(side), ".3g") for side in ("merge", "published")]
            losses.append((row.method, *values, cell(row.distance or None, ".2f")))
    first = (
        "method",
        "bare (s)",
        "merge (s)",
        "ratio",
        "aim",
        "",
        "published (s)",
        "times faster",
        "aim",
        "",
        "copies",
    )
    second = ("method", "merge", "published", "distance from wudi")
    return [Table("Time and memory", first, tuple(times)), Table("WUDI's interference", second, tuple(losses))]


def page(results: Results[Row], source: str) -> str:
    """Return the Markdown page of a run."""
    height, width = results.rows[0].shape
    introduction = results.made_by("python -m benchmarks.matrix_methods") + (
        f" {EXPERTS} task vectors of {height} x {width} in float32. *Bare*: the method's products, eliminations and "
        "decompositions on arrays that are there already. *Published*: Adam's steps or full decompositions, once. "
        "*Copies*: numpy's peak of memory over the size of the stack. *Distance*: of the merged task vectors, over "
        "WUDI's length."
    )
    return compose(source, "python -m benchmarks.matrix_methods --page", introduction, tables(results), [])


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark."""
    import torch

    parser = make_parser("benchmarks.matrix_methods", __doc__)
    parser.add_argument("--quick", action="store_true", help="smaller matrices and a tenth of the steps")
    parser.add_argument("--repeat", type=positive, default=3, help="timed rounds (default 3)")
    parser.add_argument("--results", type=Path, default=records.KEPT / "matrix_methods.json", help="where results go")
    parser.add_argument("--page", type=Path, default=None, help="write the page of this results file, and no more")
    options = parser.parse_args(arguments)
    if options.page is not None:
        records.rewrite_page(Results[Row], options.page, page)
        return 0
    shape, steps = (SMALL, STEPS // 10) if options.quick else (SHAPE, STEPS)
    rows = tuple(run_method(method, shape, options.repeat, steps) for method in METHODS)
    settings = {"threads": str(torch.get_num_threads()), "repeat": str(options.repeat), "steps": str(steps)}
    records.save(records.results_of(rows, CACHE, PACKAGES, settings), options.results, page)
    show_page(make_console(), options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
