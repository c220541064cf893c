"""The bank: a base and its task vectors, streamed from where they are stored, for learning coefficients.

    blend      theta = theta_0 + sum_k alpha_k tau_k           into the student's weights
    products   dL/dalpha[k, s] = < dL/dtheta[s], tau_k[s] >    from the gradient of the student's weights

Both are one pass over the stored base and experts in cache-sized blocks, through the loader of the streaming merge: the
same bytes are read, in the same arithmetic, for full weights, adapters, shards and whatever mixes them. Nothing of the
size of a task vector is ever held, so memory does not depend on the number of experts.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from consilience.coefficients import Coefficients, Group
from consilience.coefficients.coefficients import Alpha, Trimmed
from consilience.engine.plan import Plan, TensorPlan
from consilience.engine.selection import Selection
from consilience.engine.stream import Streamer, thread_count
from consilience.engine.worker import Worker
from consilience.errors import InputError
from consilience.experts.block import NonFinite, count_tensor
from consilience.kernels import pieces as kernels
from consilience.methods.program import Elect, Program, Trim, WeightedSum
from consilience.student import low_rank, on_device, packed
from consilience.student.extents import cuts, cuts_by_piece, extents_of

if TYPE_CHECKING:
    from consilience.student.factored import Factored, Leaf

Job = tuple[TensorPlan, int]


class _Nowhere:
    """The sink of workers that only read."""

    def write(self, tensor: TensorPlan, start: int, data: Any) -> None:
        """Refuse: a bank writes no files."""
        raise AssertionError("a bank writes no files")


class Bank:
    """The tensors of a plan that get coefficients, with their pieces.

    ``tensors`` maps the name of every grouped tensor that some expert changes to its plan; tensors that no expert
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
        self.plan = replace(plan, allow_nonfinite=allow_nonfinite)
        self.experts = tuple(expert.name for expert in plan.experts)
        self.groups, self.trimmed = tuple(groups), trimmed
        self.count = sum(group.chunks for group in groups)
        self.threads = thread_count(threads)
        self.extents = extents_of(groups)
        stages = _stages(trimmed, len(self.experts))
        self.tensors = {
            t.name: replace(t, program=Program("task_vectors", WeightedSum((1.0,) * len(t.rows)), stages))
            for t in plan.tensors
            if t.name in self.extents and t.rows and not all(row.untouched for row in t.rows)
        }
        self._all = {t.name: t for t in plan.tensors}
        self._local = threading.local()
        self._stop = threading.Event()
        self._seen: set[str] = set()
        self._selection: Selection | None = None
        if trimmed is not None:
            ranked = tuple(self._ranked(t) for t in plan.tensors)
            self._selection = Streamer(replace(plan, tensors=ranked), _Nowhere(), threads=self.threads).select()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="bank")

    def _ranked(self, tensor: TensorPlan) -> TensorPlan:
        """Return a tensor as the streaming merge ranks it: a tied tensor's stored alias counts as well."""
        held = self.tensors.get(tensor.stream)
        return replace(tensor, program=held.program) if held else replace(tensor, program=None, rows=())

    def close(self) -> None:
        """Stop the workers; the plan's files stay open."""
        self._pool.shutdown()

    @property
    def nbytes(self) -> int:
        """Bytes that one pass reads."""
        return sum(t.bytes_read // t.passes for t in self.tensors.values())

    def _worker(self) -> Worker:
        if not hasattr(self._local, "worker"):
            self._local.worker = Worker(self.plan, _Nowhere(), self._stop)
        return self._local.worker

    def _blocks(self, tensor: TensorPlan, segment: int) -> Iterator[tuple[int, int, Any, Any]]:
        """Yield (first, last + 1, stack [K, n], base [n] or None) of one segment, its stages done."""
        worker = self._worker()
        loader = worker.loader(tensor, first=tensor.name not in self._seen)
        program, selection = tensor.program, self._selection
        assert program is not None
        quota = selection.quota((tensor.index, segment)) if selection and program.stages else []
        stages = worker.stages(tensor, program, selection, quota) if program.stages else None
        start, stop = tensor.span(segment)
        try:
            for at in range(start, stop, loader.size):
                end = min(stop, at + loader.size)
                stack, base = loader.load(at, end)
                if stages is not None:
                    stages(stack, at)
                yield at, end, stack, base
        except NonFinite as error:
            raise count_tensor(error) from None

    def _each(self, jobs: Sequence[Job], run: Callable[[TensorPlan, int], Any]) -> list[Any]:
        """Run every job on the pool and return the results in order; the first failure is raised."""
        if self.threads == 1:
            return [run(tensor, segment) for tensor, segment in jobs]
        futures = [self._pool.submit(run, tensor, segment) for tensor, segment in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:  # whoever catches it may close the files
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    def _jobs(self, tensors: Sequence[TensorPlan]) -> list[Job]:
        return [(tensor, segment) for tensor in tensors for segment in range(tensor.segments)]

    def blend(self, alpha: Alpha, weights: "dict[str, Any]") -> None:
        """Write ``theta_0 + sum_k alpha_k tau_k`` into ``weights``.

        Args:
            alpha: [K, N].
            weights: for every name in ``tensors`` a flat, writable torch tensor on any device and of any float dtype;
                the sum is made in float32 or wider and rounded once.

        Raises:
            InputError: a stored value is NaN or Inf.
        """

        factored = [name for name in weights if low_rank.suits(self.tensors[name])]
        moved = [n for n in weights if n not in factored and on_device.suits(self.tensors[n], weights[n])]
        for name in factored:
            self._blend_factors(name, alpha, weights[name])
        for name in moved:
            tensor, extent, scratch = self.tensors[name], self.extents[name], self._worker().scratch
            on_device.blend(tensor, alpha[:, extent.indices], extent.starts, extent.stops, weights[name], scratch)
            self._check_finite(name, weights[name])

        def run(tensor: TensorPlan, segment: int) -> None:
            extent, out = self.extents[tensor.name], weights[tensor.name]
            if tensor.name in self._seen and packed.suits(tensor):
                scale = alpha.astype(np.float32)
                for start, stop, bits, rows in packed.blocks(tensor, segment):
                    values, done = _room(out, start, stop, np.dtype(np.float32), self._worker())
                    for low, high, index in cuts(extent, start, stop):
                        kernels.blend_bf16(bits, tuple(scale[rows, index]), low, high, values)
                    done()
                return
            for start, stop, stack, base in self._blocks(tensor, segment):
                values, done = _room(out, start, stop, stack.dtype, self._worker())
                for low, high, index in cuts(extent, start, stop):
                    kernels.blend(stack, tuple(map(stack.dtype.type, alpha[:, index])), base, low, high, values)
                done()

        done_already = {*factored, *moved}
        self._each(self._jobs([self.tensors[name] for name in weights if name not in done_already]), run)
        self._seen.update(weights)

    def _blend_factors(self, name: str, alpha: Alpha, out: Any) -> None:
        import torch

        tensor, extent = self.tensors[name], self.extents[name]
        theta = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        info, storage = tensor.base.dense, tensor.base.storage
        assert info is not None
        assert storage is not None
        buffer = self._worker().scratch.array("stored", (info.nbytes,), np.uint8)  # fresh memory would cost page faults
        theta.copy_(on_device.read_flat(info, storage, buffer))
        factors = low_rank.read_factors(tensor, self._worker().scratch, out.device)
        low_rank.add_update(factors, alpha[:, extent.indices], extent.starts, extent.stops, _matrix(tensor, theta))
        self._check_finite(name, theta)
        if theta is not out:
            out.copy_(theta)

    def _check_finite(self, name: str, theta: Any) -> None:
        import torch

        if name not in self._seen and not self.plan.allow_nonfinite and not bool(torch.isfinite(theta).all()):
            raise InputError(_broken(name))

    def products(self, gradients: "dict[str, Any]") -> Alpha:
        """Return ``< gradient[s], tau_k[s] >`` summed over every chunk: [K, N], zero where ``gradients`` has no tensor.

        Args:
            gradients: flat torch tensors by name, on any device and of any float dtype.
        """

        out = np.zeros((len(self.experts), self.count))
        factored = [name for name in gradients if low_rank.suits(self.tensors[name])]
        for name in factored:
            tensor, extent = self.tensors[name], self.extents[name]
            factors = low_rank.read_factors(tensor, self._worker().scratch, gradients[name].device)
            matrix = _matrix(tensor, gradients[name].detach().float())
            found = low_rank.inner_products(factors, matrix, extent.starts, extent.stops, len(self.experts))
            np.add.at(out.T, extent.indices, found)
        moved = [n for n in gradients if n not in factored and on_device.suits(self.tensors[n], gradients[n])]
        for name in moved:
            extent = self.extents[name]
            tensor, scratch = self.tensors[name], self._worker().scratch
            found = on_device.products(tensor, gradients[name], extent.starts, extent.stops, scratch)
            np.add.at(out.T, extent.indices, found)

        def run(tensor: TensorPlan, segment: int) -> Any:
            extent = self.extents[tensor.name]
            total = np.zeros((len(extent.indices), len(self.experts)))
            if packed.suits(tensor):
                for at, end, bits, rows in packed.blocks(tensor, segment):
                    gradient = _host(gradients[tensor.name][at:end], np.float32)
                    part = np.zeros(len(rows))
                    for low, high, piece in cuts_by_piece(extent, at, end):
                        part[:] = 0
                        kernels.products_bf16(bits, gradient, low, high, part)
                        total[piece, rows] += part
                return total
            for at, end, stack, _ in self._blocks(tensor, segment):
                gradient = _host(gradients[tensor.name][at:end], stack.dtype)
                for low, high, piece in cuts_by_piece(extent, at, end):
                    kernels.products(stack, gradient, low, high, total[piece])
            return total

        jobs = self._jobs([self.tensors[name] for name in gradients if name not in {*factored, *moved}])
        for (tensor, _), total in zip(jobs, self._each(jobs, run), strict=True):
            np.add.at(out.T, self.extents[tensor.name].indices, total)
        return out

    def write(self, name: str, expert: int | None, out: Any) -> None:
        """Write one tensor of one expert (None: of the base) into ``out``, a flat torch tensor; no coefficients."""
        plan = self._all[name]
        if expert is None or not plan.rows:
            plan = replace(plan, rows=(), row_names=(), program=Program("task_vectors", WeightedSum(())))
        else:
            row, who = plan.rows[expert], plan.row_names[expert]
            plan = replace(plan, rows=(row,), row_names=(who,), program=Program("weights", WeightedSum((1.0,))))

        def run(tensor: TensorPlan, segment: int) -> None:
            for start, stop, stack, base in self._blocks(tensor, segment):
                values, done = _room(out, start, stop, stack.dtype, self._worker())
                values[:] = stack[0] if len(stack) else base
                done()

        self._each(self._jobs([plan]), run)

    def rows(self, name: str, size: int, wanted: Callable[[int, int], bool] | None = None) -> Iterator[tuple[int, Any]]:
        """Yield (first row, task vectors [K, n, columns]) of a matrix, ``size`` rows at a time.

        Args:
            name: a tensor of two dimensions; its task vectors are not trimmed.
            size: most rows of one block.
            wanted: whether the rows from ``first`` to ``last + 1`` are of use; blocks of no use are not read.

        The array is overwritten by the next block.
        """
        tensor = self.tensors[name]
        height, width = tensor.shape
        loader = self._worker().loader(tensor, first=name not in self._seen)
        try:
            for low in range(0, height, size):
                high = min(height, low + size)
                if wanted is None or wanted(low, high):
                    stack, _ = loader.load(low * width, high * width)
                    yield low, stack.reshape(-1, high - low, width)
        except NonFinite as error:
            raise count_tensor(error) from None

    def factored(self, name: str, leaf: "Leaf", device: Any) -> "Factored":
        """Return a tensor's adapters as an update of its layer's output.

        Raises:
            InputError: a stored value is NaN or Inf.
        """
        from consilience.student.factored import Factored

        made = Factored(self.tensors[name], self.extents[name], leaf, device)
        if not made.finite and not self.plan.allow_nonfinite:
            raise InputError(_broken(name))
        return made

    def factors(self, name: str, device: Any) -> low_rank.Factors | None:
        """Return all experts' factors of a matrix; None: some expert's task vector does not come as factors."""
        tensor = self.tensors[name]
        if any(row.dense is not None for row in tensor.rows):
            return None
        return low_rank.read_factors(tensor, self._worker().scratch, device)

    def l1(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return ``||tau_k||_1`` [K] of every tensor."""

        def run(tensor: TensorPlan, segment: int) -> Any:
            total = np.zeros(len(self.experts))
            for _, _, stack, _ in self._blocks(tensor, segment):
                total += np.abs(stack).sum(1, dtype=np.float64)
            return total

        jobs = self._jobs(list(self.tensors.values()))
        out: dict[str, npt.NDArray[np.float64]] = {}
        for (tensor, _), total in zip(jobs, self._each(jobs, run), strict=True):
            out[tensor.name] = out[tensor.name] + total if tensor.name in out else total
        return out

    def gram(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return the inner products of ``theta_0, tau_1 ... tau_K`` [1 + K, 1 + K] of every tensor, in float64.

        Raises:
            InputError: a stored value is NaN or Inf.
        """
        size = 1 + len(self.experts)

        def run(tensor: TensorPlan, segment: int) -> Any:
            if low_rank.suits(tensor):
                factors = low_rank.read_factors(tensor, self._worker().scratch, "cpu")
                return low_rank.gram(factors, self._base_rows(tensor), len(self.experts))
            total = np.zeros((size, size))
            for start, stop, stack, base in self._blocks(tensor, segment):
                rows = self._worker().scratch.array("gram", (size, stop - start), np.float64)
                rows[0], rows[1:] = base, stack
                total += rows @ rows.T
            return total

        counts = {name: 1 if low_rank.suits(tensor) else tensor.segments for name, tensor in self.tensors.items()}
        jobs = [(self.tensors[name], segment) for name, count in counts.items() for segment in range(count)]
        out = {name: np.zeros((size, size)) for name in self.tensors}
        for (tensor, _), total in zip(jobs, self._each(jobs, run), strict=True):
            out[tensor.name] += total
        for name, total in out.items():
            if not self.plan.allow_nonfinite and not np.isfinite(total).all():
                raise InputError(_broken(name))
        return out

    def _base_rows(self, tensor: TensorPlan) -> Iterator[tuple[int, Any]]:
        """Yield (first row, float32 values [n, columns]) of a tensor's base, which the next block overwrites."""
        import torch

        loader, (height, width) = self._worker().loader(tensor, first=False), _sides(tensor)
        step = max(1, loader.size // max(1, width))
        for first in range(0, height, step):
            last = min(height, first + step)
            yield first, torch.from_numpy(loader.base(first * width, last * width, None)).view(-1, width)


def _broken(name: str) -> str:
    return f"tensor {name!r}: the base or an expert holds NaN or Inf; repair the model, or drop it"


def _sides(tensor: TensorPlan) -> tuple[int, int]:
    """Return how many rows and columns a tensor has in the form that factors multiply to: [rows, the rest]."""
    return tensor.shape[0], tensor.numel // max(1, tensor.shape[0])


def _matrix(tensor: TensorPlan, flat: Any) -> Any:
    """Return a flat tensor in the form that factors multiply to."""
    return flat.view(_sides(tensor))


def _stages(trimmed: Trimmed | None, experts: int) -> tuple[Trim | Elect, ...]:
    if trimmed is None:
        return ()
    trim = Trim((0,) * experts, (trimmed.density,) * experts, "model")
    return (trim, Elect()) if trimmed.elect else (trim,)


def _room(out: Any, start: int, stop: int, real: Any, worker: Worker) -> tuple[Any, Callable[[], None]]:
    """Return an array to fill with elements ``start ... stop`` of ``out``, and what to call when it is full."""
    import torch

    target = out[start:stop]
    if target.device.type == "cpu" and target.dtype in (torch.float32, torch.float64):
        view = target.numpy()
        if view.dtype == real:
            return view, lambda: None
    values = worker.scratch.array("room", (stop - start,), real)

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
