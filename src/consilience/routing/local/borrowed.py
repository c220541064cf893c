"""A base lent to work that hooks into its layers, and given back exactly as it was."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from torch import nn

from consilience.routing.layer import RoutedLinear, put

#: Puts a module in the place of the one with this name.
Replace = Callable[[str, nn.Module], None]


@contextmanager
def borrowed(model: nn.Module) -> Generator[Replace]:
    """Lend a model frozen, in evaluation mode and without other experts; give the function that replaces its modules.

    At the end every module is in its place again, and takes gradients and is in training as before.
    """
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    originals: dict[str, nn.Module] = {}

    def replace(name: str, module: nn.Module) -> None:
        originals.setdefault(name, model.get_submodule(name))
        put(model, name, module)

    try:
        for name, module in list(model.named_modules()):
            if isinstance(module, RoutedLinear):
                replace(name, module.plain())
        model.eval().requires_grad_(False)
        yield replace
    finally:
        for name, module in originals.items():
            put(model, name, module)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
