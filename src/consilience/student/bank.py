"""The bank: a base and its task vectors, streamed from where they are stored, for learning coefficients.

    blend      theta = theta_0 + sum_k alpha_k tau_k           into the student's weights
    products   dL/dalpha[k, s] = < dL/dtheta[s], tau_k[s] >    from the gradient of the student's weights

Both are one pass over the stacks of base and experts in cache-sized blocks, as the streaming merge reads them: the same
bytes, in the same arithmetic, for full weights, adapters, shards and whatever mixes them. Nothing of the
size of a task vector is ever held, so memory does not depend on the number of experts.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from consilience.coefficients import Coefficients, Group
from consilience.coefficients.coefficients import Alpha, Trimmed
from consilience.engine.plan import Plan, segments, span
from consilience.engine.selection import Piece, Selection
from consilience.engine.stream import thread_count
from consilience.errors import InputError
from consilience.experts.block import Loader, Scratch, finite_errors
from consilience.experts.stack import Block, Stack
from consilience.kernels import pieces as kernels
from consilience.kernels.select import keep
from consilience.methods.ties import elect, kept
from consilience.student import low_rank, on_device, packed
from consilience.student.extents import cuts, cuts_by_piece, extents_of

if TYPE_CHECKING:
    from consilience.student.factored import Factored, Leaf

#: A stack's name, and a segment of it.
Job = tuple[str, int]


class Bank:
    """The stacks of a plan's tensors that get coefficients, with their pieces.

    ``tensors`` maps the name of every grouped tensor that some expert changes to its stack; tensors that no expert
    changes have no influence and are left out.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Sequence[Group],
        *,
        trimmed: Trimmed | None = None,
        threads: int | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        self.experts = tuple(expert.name for expert in plan.experts)
        self.groups, self.trimmed, self.allow_nonfinite = tuple(groups), trimmed, allow_nonfinite
        self.count = sum(group.chunks for group in groups)
        self.threads = thread_count(threads)
        self.extents = extents_of(groups)
        self._all = {tensor.name: tensor.stack for tensor in plan.tensors}
        self._index = {tensor.name: tensor.index for tensor in plan.tensors}
        self.tensors = {
            name: stack for name, stack in self._all.items() if name in self.extents and not stack.untouched
        }
        self._local = threading.local()
        self._seen: set[str] = set()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="bank")
        self._selection = None if trimmed is None else self._select(trimmed.density)

    def close(self) -> None:
        """Stop the workers; the plan's files stay open."""
        self._pool.shutdown()

    @property
    def nbytes(self) -> int:
        """Bytes that one pass reads."""
        return sum(stack.nbytes for stack in self.tensors.values())

    def _scratch(self) -> Scratch:
        """Return the buffers of the thread that asks."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        return self._local.scratch

    def _select(self, density: float) -> Selection:
        """Rank the magnitudes of all tensors together, as the streaming merge does, and return which are kept."""
        total = sum(stack.numel for stack in self.tensors.values())
        count = kept(total, density)
        jobs = self._jobs(sorted(self.tensors))  # ties must not depend on how files are cut
        selection = Selection([count] * len(self.experts), total, [self._piece(*job) for job in jobs])

        def each(visit: Callable[[Piece, Loader, int, int], None], *, check: bool) -> None:
            def run(name: str, segment: int) -> None:
                loader = self.tensors[name].loader(self._scratch(), check=check and not self.allow_nonfinite)
                with finite_errors():
                    visit(self._piece(name, segment), loader, *span(self.tensors[name].numel, segment))

            self._each(jobs, run)

        selection.find(
            lambda visit: each(lambda piece, *block: visit(*block), check=False),
            lambda visit: each(lambda piece, loader, start, stop: visit(piece, loader, start, stop, None), check=True),
        )
        return selection

    def _piece(self, name: str, segment: int) -> Piece:
        return self._index[name], segment

    def _blocks(self, name: str, segment: int) -> Iterator[Block]:
        """Yield the blocks of one segment, trimmed if task vectors are."""
        stack, selection = self.tensors[name], self._selection
        check = name not in self._seen and not self.allow_nonfinite
        ranks = None if selection is None else selection.kept(self._piece(name, segment))
        for block in stack.blocks(*span(stack.numel, segment), scratch=self._scratch(), check=check):
            if ranks is not None and self.trimmed is not None:
                keep(block.vectors, ranks)
                if self.trimmed.elect:
                    elect(block.vectors, block.start, None)
            yield block

    def _each(self, jobs: Sequence[Job], run: Callable[[str, int], Any]) -> list[Any]:
        """Run every job on the pool and return the results in order; the first failure is raised."""
        if self.threads == 1:
            return [run(*job) for job in jobs]
        futures = [self._pool.submit(run, *job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:  # whoever catches it may close the files
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    def _jobs(self, names: Iterable[str]) -> list[Job]:
        return [(name, segment) for name in names for segment in range(segments(self.tensors[name].numel))]

    def _is_low_rank(self, name: str) -> bool:
        return self.trimmed is None and low_rank.suits(self.tensors[name])

    def _is_packed(self, name: str) -> bool:
        return self.trimmed is None and packed.suits(self.tensors[name])

    def _runs_there(self, name: str, values: Any) -> bool:
        return self.trimmed is None and on_device.suits(values)

    def blend(self, alpha: Alpha, weights: "dict[str, Any]") -> None:
        """Write ``theta_0 + sum_k alpha_k tau_k`` into ``weights``.

        Args:
            alpha: [K, N].
            weights: for every name in ``tensors`` a flat, writable torch tensor on any device and of any float dtype;
                the sum is made in float32 or wider and rounded once.

        Raises:
            InputError: a stored value is NaN or Inf.
        """

        factored = [name for name in weights if self._is_low_rank(name)]
        moved = [name for name in weights if name not in factored and self._runs_there(name, weights[name])]
        for name in factored:
            self._blend_factors(name, alpha, weights[name])
        for name in moved:
            tensor, extent, scratch = self.tensors[name], self.extents[name], self._scratch()
            on_device.blend(tensor, alpha[:, extent.indices], extent.starts, extent.stops, weights[name], scratch)
            self._check_finite(name, weights[name])

        def run(name: str, segment: int) -> None:
            extent, out = self.extents[name], weights[name]
            if name in self._seen and self._is_packed(name):
                scale = alpha.astype(np.float32)
                for start, stop, bits, rows in packed.blocks(self.tensors[name], segment):
                    values, done = _room(out, start, stop, np.dtype(np.float32), self._scratch())
                    for low, high, index in cuts(extent, start, stop):
                        kernels.blend_bf16(bits, tuple(scale[rows, index]), low, high, values)
                    done()
                return
            for start, stop, stack, base in self._blocks(name, segment):
                values, done = _room(out, start, stop, stack.dtype, self._scratch())
                for low, high, index in cuts(extent, start, stop):
                    kernels.blend(stack, tuple(map(stack.dtype.type, alpha[:, index])), base, low, high, values)
                done()

        done_already = {*factored, *moved}
        self._each(self._jobs(name for name in weights if name not in done_already), run)
        self._seen.update(weights)

    def _blend_factors(self, name: str, alpha: Alpha, out: Any) -> None:
        import torch

        tensor, extent = self.tensors[name], self.extents[name]
        theta = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        info, storage = tensor.base.dense, tensor.base.storage
        assert info is not None
        assert storage is not None
        buffer = self._scratch().array("stored", (info.nbytes,), np.uint8)  # fresh memory would cost page faults
        theta.copy_(on_device.read_flat(info, storage, buffer))
        factors = low_rank.read_factors(tensor, self._scratch(), out.device)
        low_rank.add_update(factors, alpha[:, extent.indices], extent.starts, extent.stops, _matrix(tensor, theta))
        self._check_finite(name, theta)
        if theta is not out:
            out.copy_(theta)

    def _check_finite(self, name: str, theta: Any) -> None:
        import torch

        if name not in self._seen and not self.allow_nonfinite and not bool(torch.isfinite(theta).all()):
            raise InputError(_broken(name))

    def products(self, gradients: "dict[str, Any]") -> Alpha:
        """Return ``< gradient[s], tau_k[s] >`` summed over every chunk: [K, N], zero where ``gradients`` has no tensor.

        Args:
            gradients: flat torch tensors by name, on any device and of any float dtype.
        """

        out = np.zeros((len(self.experts), self.count))
        factored = [name for name in gradients if self._is_low_rank(name)]
        for name in factored:
            tensor, extent = self.tensors[name], self.extents[name]
            factors = low_rank.read_factors(tensor, self._scratch(), gradients[name].device)
            matrix = _matrix(tensor, gradients[name].detach().float())
            found = low_rank.inner_products(factors, matrix, extent.starts, extent.stops, len(self.experts))
            np.add.at(out.T, extent.indices, found)
        moved = [name for name in gradients if name not in factored and self._runs_there(name, gradients[name])]
        for name in moved:
            extent = self.extents[name]
            tensor, scratch = self.tensors[name], self._scratch()
            found = on_device.products(tensor, gradients[name], extent.starts, extent.stops, scratch)
            np.add.at(out.T, extent.indices, found)

        def run(name: str, segment: int) -> Any:
            extent = self.extents[name]
            total = np.zeros((len(extent.indices), len(self.experts)))
            if self._is_packed(name):
                for at, end, bits, rows in packed.blocks(self.tensors[name], segment):
                    gradient = _host(gradients[name][at:end], np.float32)
                    part = np.zeros(len(rows))
                    for low, high, piece in cuts_by_piece(extent, at, end):
                        part[:] = 0
                        kernels.products_bf16(bits, gradient, low, high, part)
                        total[piece, rows] += part
                return total
            for at, end, stack, _ in self._blocks(name, segment):
                gradient = _host(gradients[name][at:end], stack.dtype)
                for low, high, piece in cuts_by_piece(extent, at, end):
                    kernels.products(stack, gradient, low, high, total[piece])
            return total

        jobs = self._jobs(name for name in gradients if name not in {*factored, *moved})
        for (name, _), total in zip(jobs, self._each(jobs, run), strict=True):
            np.add.at(out.T, self.extents[name].indices, total)
        return out

    def write(self, name: str, expert: int | None, out: Any) -> None:
        """Write one tensor of one expert (None: of the base) into ``out``, a flat torch tensor; no coefficients."""
        stack = self._all[name]
        row, check = expert if stack.rows else None, name not in self._seen and not self.allow_nonfinite
        for start, stop, own in stack.own(row, scratch=self._scratch(), check=check):
            values, done = _room(out, start, stop, own.dtype, self._scratch())
            values[:] = own
            done()

    def rows(self, name: str, size: int, wanted: Callable[[int, int], bool] | None = None) -> Iterator[tuple[int, Any]]:
        """Yield (first row, task vectors [K, n, columns]) of a matrix, ``size`` rows at a time.

        Args:
            name: a tensor of two dimensions; its task vectors are not trimmed.
            size: most rows of one block.
            wanted: whether the rows from ``first`` to ``last + 1`` are of use; blocks of no use are not read.

        The array is overwritten by the next block.
        """
        stack = self.tensors[name]
        height, width = stack.shape
        check = name not in self._seen and not self.allow_nonfinite
        loader = stack.loader(self._scratch(), check=check)
        with finite_errors():
            for low in range(0, height, size):
                high = min(height, low + size)
                if wanted is None or wanted(low, high):
                    vectors, _ = loader.load(low * width, high * width)
                    yield low, vectors.reshape(-1, high - low, width)

    def factored(self, name: str, leaf: "Leaf", device: Any) -> "Factored":
        """Return a tensor's adapters as an update of its layer's output.

        Raises:
            InputError: a stored value is NaN or Inf.
        """
        from consilience.student.factored import Factored

        made = Factored(self.tensors[name], self.extents[name], leaf, device)
        if not made.finite and not self.allow_nonfinite:
            raise InputError(_broken(name))
        return made

    def factors(self, name: str, device: Any) -> low_rank.Factors | None:
        """Return all experts' factors of a matrix; None: some expert's task vector does not come as factors."""
        tensor = self.tensors[name]
        if not tensor.low_rank:
            return None
        return low_rank.read_factors(tensor, self._scratch(), device)

    def l1(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return ``||tau_k||_1`` [K] of every tensor."""

        def run(name: str, segment: int) -> Any:
            total = np.zeros(len(self.experts))
            for _, _, stack, _ in self._blocks(name, segment):
                total += np.abs(stack).sum(1, dtype=np.float64)
            return total

        jobs = self._jobs(self.tensors)
        out: dict[str, npt.NDArray[np.float64]] = {}
        for (name, _), total in zip(jobs, self._each(jobs, run), strict=True):
            out[name] = out[name] + total if name in out else total
        return out

    def gram(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return the inner products of ``theta_0, tau_1 ... tau_K`` [1 + K, 1 + K] of every tensor, in float64.

        Raises:
            InputError: a stored value is NaN or Inf.
        """
        size = 1 + len(self.experts)

        def run(name: str, segment: int) -> Any:
            if self._is_low_rank(name):
                factors = low_rank.read_factors(self.tensors[name], self._scratch(), "cpu")
                return low_rank.gram(factors, self._base_rows(self.tensors[name]), len(self.experts))
            total = np.zeros((size, size))
            for start, stop, stack, base in self._blocks(name, segment):
                rows = self._scratch().array("gram", (size, stop - start), np.float64)
                rows[0], rows[1:] = base, stack
                total += rows @ rows.T
            return total

        jobs = [job for job in self._jobs(self.tensors) if job[1] == 0 or not self._is_low_rank(job[0])]
        out = {name: np.zeros((size, size)) for name in self.tensors}
        for (name, _), total in zip(jobs, self._each(jobs, run), strict=True):
            out[name] += total
        for name, total in out.items():
            if not self.allow_nonfinite and not np.isfinite(total).all():
                raise InputError(_broken(name))
        return out

    def _base_rows(self, stack: Stack) -> Iterator[tuple[int, Any]]:
        """Yield (first row, float32 values [n, columns]) of a tensor's base, which the next block overwrites."""
        import torch

        loader, (height, width) = stack.loader(self._scratch(), check=False), _sides(stack)
        step = max(1, loader.size // max(1, width))
        for first in range(0, height, step):
            last = min(height, first + step)
            yield first, torch.from_numpy(loader.base(first * width, last * width, None)).view(-1, width)


def _broken(name: str) -> str:
    return f"tensor {name!r}: the base or an expert holds NaN or Inf; repair the model, or drop it"


def _sides(tensor: Stack) -> tuple[int, int]:
    """Return how many rows and columns a tensor has in the form that factors multiply to: [rows, the rest]."""
    return tensor.shape[0], tensor.numel // max(1, tensor.shape[0])


def _matrix(tensor: Stack, flat: Any) -> Any:
    """Return a flat tensor in the form that factors multiply to."""
    return flat.view(_sides(tensor))


def _room(out: Any, start: int, stop: int, real: Any, scratch: Scratch) -> tuple[Any, Callable[[], None]]:
    """Return an array to fill with elements ``start ... stop`` of ``out``, and what to call when it is full."""
    import torch

    target = out[start:stop]
    if target.device.type == "cpu" and target.dtype in (torch.float32, torch.float64):
        view = target.numpy()
        if view.dtype == real:
            return view, lambda: None
    values = scratch.array("room", (stop - start,), real)

    def done() -> None:
        target.copy_(torch.from_numpy(values))

    return values, done


def _host(values: Any, real: Any) -> Any:
    """Return a torch tensor's values as an array of type ``real`` in this machine's memory."""
    import torch

    kind = torch.float64 if real == np.float64 else torch.float32
    return values.detach().to(device="cpu", dtype=kind).numpy()


def mergeable(plan: Plan, excluded: Callable[[str], bool]) -> list[tuple[str, int]]:
    """Return (name, number of elements) of the tensors that get coefficients.

    Those that some expert changes, that are not private, not excluded, no running statistics, and not the alias of a
    tied tensor.
    """
    return [
        (t.name, t.numel)
        for t in plan.tensors
        if t.program is not None
        and t.program.space == "task_vectors"
        and t.name == t.stream
        and not excluded(t.name)
        and not all(row.untouched for row in t.rows)
    ]


def check_bank(coefficients: Coefficients) -> None:
    """Refuse to learn nothing.

    Raises:
        InputError: no tensor is left to learn coefficients for.
    """
    if not coefficients.groups:
        raise InputError("exclude: leaves no tensor that an expert changes, so there is nothing to learn; exclude less")
