"""The student: one model in memory whose weights are rebuilt from the stored base and task vectors at every step.

Its weights are leaf tensors that are rewritten in place (there is no drift: each time from the stored values, in
float32). One ordinary backward pass gives dL/dtheta, which the bank turns into dL/dalpha. Adapters on linear layers
work on activations instead (``factored.py``), where the layer keeps the base's weight. The same model also plays every
expert, one after another, so memory never holds a second one.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np

from consilience.coefficients.coefficients import Alpha
from consilience.engine.plan import Plan, TensorPlan
from consilience.errors import InputError
from consilience.student.bank import Bank
from consilience.student.factored import Factored, Leaf, layers_of, suits
from consilience.student.names import doubtful, parameters_of, renamed, untie

Precision = Literal["float32", "mixed", "bfloat16", "float64"]
#: What of the last blend or write the weights hold.
BLEND = -1
#: Bytes of factors that may be held in memory, as a part of the model's.
HELD = 0.25


@dataclass(frozen=True)
class Settings:
    """How the student computes.

    ``precision``: "float32"; "mixed" (float32 weights, bfloat16 matrix products); "bfloat16" (weights too: blended in
    float32, rounded once; half the memory); "float64" for checks. ``checkpoint``: recompute each block's activations in
    the backward pass instead of keeping them.
    """

    precision: Precision = "mixed"
    device: str = "cpu"
    checkpoint: bool = False
    trust_remote_code: bool = False


def blocks_of(model: Any) -> Any:
    """Return a transformers model's decoder blocks (a ``ModuleList``).

    Raises:
        InputError: there is none.
    """
    decoder = model
    # A model without a separate decoder has no such method, or a placeholder that raises: search it whole.
    with contextlib.suppress(AttributeError, NotImplementedError):
        decoder = model.get_decoder() or model
    lists = _outer_lists(decoder)
    if not lists:
        raise InputError(
            f"{type(model).__name__}: has no list of blocks, so hidden states cannot be aligned; set hidden_weight=0"
        )
    # Some decoders hold their vision tower too: the config says how many blocks the language model has.
    config = model.config.get_text_config() if hasattr(model, "config") else None
    counted = [one for one in lists if len(one) == getattr(config, "num_hidden_layers", None)]
    return max(counted or lists, key=lambda one: sum(p.numel() for p in one.parameters()))


def _outer_lists(module: Any) -> list[Any]:
    """Return the module lists that lie in no other one (a mixture's experts are lists inside a block)."""
    import torch

    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(part, torch.nn.ModuleList) and len(part) and not inside:
            found[name] = part
    return list(found.values())


def _folder(plan: Plan) -> Any:
    base = plan.base
    if base is None or base.checkpoint is None or base.checkpoint.folder is None:
        raise InputError(
            f"{base.reference if base else 'base_model'}: learning needs a Hugging Face folder (config.json, weights, "
            "tokenizer) as the base"
        )
    coded = next((name for name, info in base.checkpoint.tensors.items() if info.codec is not None), None)
    if coded is not None:
        raise InputError(
            f"{base.reference}: its weights are quantised ({coded!r} for one), and learning runs the base; write it as "
            "floats first: a recipe with merge_method: linear and this model alone does"
        )
    vocabulary, tokens = plan.alignment.vocabulary, plan.alignment.tokens
    if tokens is not None and tokens.changes:
        raise InputError(
            f"{base.reference}: tokenizer: {tokens.choice.label} gives the output another vocabulary than the base's, "
            "and learning runs the base; leave it out, or use a data-free method"
        )
    if vocabulary.tensors:
        raise InputError(
            f"{base.reference}: has a vocabulary of {vocabulary.before} rows and the experts of {vocabulary.after}; "
            "learning runs the base: resize the base to the experts' tokenizer, or use a data-free method"
        )
    return base.checkpoint.folder


def load_any(folder: Any, *, trust_remote_code: bool = False) -> Any:
    """Load a causal, encoder-decoder or image-text model in float32 from a folder, strictly.

    Raises:
        InputError: it does not load, or tensors are missing.
    """
    from consilience.tasks.load import load_model

    return load_model(folder, trust_remote_code=trust_remote_code)


@dataclass
class Student:
    """A model whose weights follow the coefficients; see ``make_student``.

    ``parameters`` maps stored tensor names to the model's parameters (tied names share one). ``held`` says whose
    weights are in memory: an expert's index, or -1 for the base or a blend. ``factored`` holds the tensors whose
    update is made from activations, ``leaf`` the coefficients that they follow.
    """

    model: Any
    bank: Bank
    plan: Plan
    settings: Settings
    parameters: dict[str, Any]
    held: int = BLEND
    factored: dict[str, Factored] = field(default_factory=dict[str, Factored])
    leaf: Leaf = field(default_factory=Leaf)
    _foreign: set[str] = field(default_factory=set[str])

    @property
    def merged(self) -> dict[str, Any]:
        """Flat views of the parameters that are rebuilt from coefficients."""
        return {n: self.parameters[n].data.view(-1) for n in self.bank.tensors if n not in self.factored}

    def set(self, alpha: Alpha) -> None:
        """Rebuild the weights: base plus coefficients times task vectors; everything else is the base's."""
        for name in sorted(self._foreign - self.bank.tensors.keys()):
            self.bank.write(name, None, self.parameters[name].data.view(-1))
        self._foreign.clear()
        self.bank.blend(alpha, self.merged)
        self.follow(alpha)
        self.held = BLEND

    def follow(self, alpha: Alpha) -> None:
        """Let the factored tensors have these coefficients."""
        import torch

        self._play(None)
        if self.factored:
            kind = torch.float64 if self.settings.precision == "float64" else torch.float32
            self.leaf.alpha = torch.tensor(alpha, dtype=kind, device=self.settings.device, requires_grad=True)

    def slopes(self) -> Alpha:
        """Return dL/dalpha [K, N] of the factored tensors, accumulated since ``set``; zero elsewhere."""
        alpha = self.leaf.alpha
        if alpha is None or alpha.grad is None:
            return np.zeros((len(self.bank.experts), self.bank.count))
        return np.asarray(alpha.grad.double().cpu().numpy())

    def become(self, expert: int) -> None:
        """Take an expert's weights, in every tensor it changes (also those that have no coefficients)."""
        if self.held == expert:
            return
        for tensor in self.plan.tensors:
            if not tensor.rows or tensor.name != tensor.stream or tensor.name in self.factored:
                continue
            if tensor.name not in self.parameters:
                self.check_unheld(tensor, expert)
                continue
            flat = self.parameters[tensor.name].data.view(-1)
            if not tensor.rows[expert].untouched:
                self.bank.write(tensor.name, expert, flat)
                self._foreign.add(tensor.name)
            elif tensor.name in self._foreign or tensor.name in self.bank.tensors:
                self.bank.write(tensor.name, None, flat)
        self._play(expert)
        self.held = expert

    def become_base(self) -> None:
        """Take the base's weights: those of coefficients 0, without making updates that are 0."""
        self.set(np.zeros((len(self.bank.experts), self.bank.count)))
        self._play(None)

    def _play(self, expert: int | None) -> None:
        """Let the factored tensors be an expert's, or (None) the base's until ``follow``."""
        self.leaf.play(expert)
        for made in self.factored.values():
            made.forget()

    def check_unheld(self, tensor: TensorPlan, expert: int) -> None:
        """Refuse to play an expert that changes a tensor which the loaded model does not hold as it is stored."""
        import torch

        own, base = torch.empty(2, tensor.numel)
        self.bank.write(tensor.name, expert, own)
        self.bank.write(tensor.name, None, base)
        if not torch.equal(own, base):
            raise InputError(
                f"{self.plan.experts[expert].reference}: it changes tensor {tensor.name!r}, which is not a parameter "
                f"of the loaded {type(self.model).__name__} (it may be fused or split there), so the expert cannot be "
                "run in its place; use a data-free method"
            )

    def compute(self) -> Any:
        """Return the context of a forward pass: autocast where the precision asks for it."""
        import torch

        device = torch.device(self.settings.device).type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.settings.precision == "mixed")

    @contextlib.contextmanager
    def generating(self) -> Generator[None]:
        """Return the context of generation: ``compute``, with all weights in the type that autocast makes of them.

        Otherwise each token would convert them anew, and what runs between matrix products would be twice as wide.
        Memory grows by half of the float32 weights until the context ends.
        """
        import torch

        from consilience.tasks.readout import apart

        if self.settings.precision != "mixed":
            with self.compute():
                yield
            return
        wide = [(p, p.data) for p in self.model.parameters() if p.dtype == torch.float32]
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        handles = (
            [head.register_forward_pre_hook(lambda _module, args: (apart(args[0]), *args[1:]))]
            if head is not None
            else []
        )
        try:
            for parameter, values in wide:
                parameter.data = values.to(torch.bfloat16)
            with self.compute():
                yield
        finally:
            for parameter, values in wide:
                parameter.data = values
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def gradients(self, sink: Callable[[str, Any], None]) -> Generator[None]:
        """Within the context a backward pass hands every merged tensor's gradient to ``sink`` and then forgets it."""
        handles: list[Any] = []
        for name in self.merged:
            parameter = self.parameters[name]

            def taken(held: Any, name: str = name) -> None:
                gradient, held.grad = held.grad, None
                sink(name, gradient.reshape(-1))

            handles.append(parameter.register_post_accumulate_grad_hook(taken))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take_gradients(self) -> dict[str, Any]:
        """Return the accumulated gradients by tensor name and clear them."""
        found: dict[str, Any] = {}
        for name in self.merged:
            parameter = self.parameters[name]
            if parameter.grad is not None:
                found[name] = parameter.grad.reshape(-1)
                parameter.grad = None
        return found


def make_student(plan: Plan, bank: Bank, settings: Settings, *, factored: bool = True) -> Student:
    """Load the base and make its merged weights trainable leaves; every other weight is frozen.

    Args:
        plan: the plan.
        bank: the tensors that get coefficients.
        settings: how the student computes.
        factored: let adapters of linear layers work on activations.

    Raises:
        InputError: the base is no transformers folder, or a merged tensor is not a parameter of the loaded model.
    """
    import torch

    folder = _folder(plan)
    model = load_any(folder, trust_remote_code=settings.trust_remote_code)
    kinds = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    model.to(device=settings.device, dtype=kinds[settings.precision]).eval().requires_grad_(False)
    shapes = {t.name: t.shape for t in plan.tensors}
    untie(model, shapes, plan.alignment.untied)
    parameters = parameters_of(model, shapes, bank.tensors, str(folder))
    student = Student(model, bank, plan, settings, parameters)
    _prove(student, str(folder))
    for name in bank.tensors:
        if not parameters[name].data.is_contiguous():
            parameters[name].data = parameters[name].data.contiguous()
    if factored and settings.precision != "bfloat16":  # there the merged weight's rounding is part of what is learned
        _factor(student)
    if settings.precision == "mixed":
        _narrow(student)
    for name in student.merged:
        parameters[name].requires_grad_(True)
    if settings.checkpoint:
        _checkpoint_blocks(blocks_of(model))
    return student


def _prove(student: Student, where: str) -> None:
    """Check that parameters hold the stored base's values, and bring in a base's own adapter.

    Looked at are the tensors that some expert or that adapter changes, and all whose names the library changed.
    """
    import torch

    renames = renamed(student.model, student.parameters)
    base = student.plan.base
    model_files = base.checkpoint.storage if base is not None and base.checkpoint is not None else None
    equal: set[str] = set()
    for tensor in student.plan.tensors:
        parameter = student.parameters.get(tensor.name)
        if parameter is None or not parameter.is_floating_point() or tensor.name != tensor.stream:
            continue
        own = tensor.base.pair is not None or tensor.base.storage is not model_files
        if not tensor.rows and tensor.name not in renames and not own:
            continue
        stored = torch.empty_like(parameter.data, memory_format=torch.contiguous_format).view(-1)
        student.bank.write(tensor.name, None, stored)
        if own:
            parameter.data.copy_(stored.view_as(parameter))
        elif torch.equal(stored.view_as(parameter), parameter.data):
            equal.add(tensor.name)
        else:
            raise InputError(_misplaced(where, tensor.name))
    for name in doubtful(student.model, renames, equal & renames.keys()):
        raise InputError(_misplaced(where, name))


def _factor(student: Student) -> None:
    """Let the adapters of linear layers work on activations, where a trial shows that this is the same model.

    A layer that the trial does not call, or all of them if some model uses a layer's weight in a way of its own, are
    left to the bank.
    """
    bank, model = student.bank, student.model
    whole = bank.tensors if bank.trimmed is None else {}
    able = [name for name, stack in whole.items() if suits(stack, len(bank.extents[name].indices))]
    layers = layers_of(model, student.parameters, able)
    handles: dict[str, Any] = {}
    for name, layer in layers.items():
        made = bank.factored(name, student.leaf, student.settings.device)
        student.factored[name] = made
        handles[name] = layer.register_forward_hook(made.hook)
    if not layers:
        return
    if student.settings.device == "cpu":
        student.leaf.room = HELD * sum(p.nbytes for p in model.parameters())
    alpha = np.random.default_rng(0).random((len(bank.experts), bank.count))
    same, called = _tried(student, alpha)
    for name, handle in handles.items():
        if not (same and name in called):
            handle.remove()
            del student.factored[name]
        else:
            layers[name].register_forward_pre_hook(student.leaf.narrowed)
    student.leaf.alpha = None


def _narrow(student: Student) -> None:
    """Hold weights that nothing rewrites in bfloat16, which is what autocast makes of them anyway.

    They are those of factored layers, and the output layer's, beside embeddings that stay wide. The products are the
    same to the bit, without a conversion at every pass, that is, at every generated token.
    """
    import torch

    layers = layers_of(student.model, student.parameters, list(student.factored))
    for layer in layers.values():
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.to(torch.bfloat16)
    model = student.model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is torch.nn.Linear and not _changes(student, head.weight):
        head.weight = torch.nn.Parameter(head.weight.data.to(torch.bfloat16), requires_grad=False)


def _changes(student: Student, parameter: Any) -> bool:
    """Whether some expert, or a set of coefficients, may give a parameter other values than the base's."""
    changed = {tensor.stream for tensor in student.plan.tensors if tensor.rows}
    return any(student.parameters.get(name) is parameter for name in changed)


def _tried(student: Student, alpha: Alpha) -> tuple[bool, set[str]]:
    """Return whether updates on activations give the outputs of merged weights, and the layers that were called.

    Outside autocast: bfloat16 products would hide what differs.
    """
    flat = {name: student.parameters[name].data.view(-1) for name in student.factored}
    base = _probe(student.model)
    student.follow(alpha)
    beside = _probe(student.model)
    called = {name for name, made in student.factored.items() if made.calls}
    student.leaf.alpha = None
    student.bank.blend(alpha, flat)
    merged = _probe(student.model)
    for name, values in flat.items():
        student.bank.write(name, None, values)
    if base is None or beside is None or merged is None:
        return False, called
    error, effect = float((beside - merged).norm()), float((merged - base).norm())
    return error <= 1e-3 * effect + 1e-5 * float(merged.norm()), called


def _probe(model: Any) -> Any:
    """Return a model's logits on a few token ids; None: it does not run on token ids alone."""
    import torch

    config = model.config.get_text_config()
    count = min(32, config.vocab_size)
    ids = (torch.arange(count, device=model.device) * max(1, config.vocab_size // count))[None]
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    with torch.no_grad():
        try:
            return model(**inputs).logits
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return None


def _misplaced(where: str, name: str) -> str:
    return (
        f"{where}: tensor {name!r} is not surely what the loaded model holds under that name (transformers may rename "
        "or reorder it as it loads); exclude it, or use a data-free method"
    )


def _checkpoint_blocks(blocks: Any) -> None:
    """Make each block recompute its activations in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    for block in blocks:
        forward = block.forward

        def again(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        block.forward = again


@contextlib.contextmanager
def watching(model: Any, layers: Sequence[int]) -> Generator[dict[int, Any]]:
    """Collect the outputs [B, T, H] of blocks by number (1 is the first) during forward passes inside the context."""
    seen: dict[int, Any] = {}
    handles: list[Any] = []
    blocks = blocks_of(model) if layers else []
    for layer in layers:

        def hook(_module: Any, _args: Any, output: Any, layer: int = layer) -> None:
            seen[layer] = cast(Any, output)[0] if isinstance(output, tuple) else output

        handles.append(blocks[layer - 1].register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
