"""The plain values in a pickle of settings, read off its opcodes: nothing is imported, called or restored.

The Trainer's ``training_args.bin`` is a torch file whose pickle builds an object of a class, which unpickling would
have to import and run. Its opcodes are walked here by a machine that has no classes and functions: what names one
becomes a ``Named``, and what it would be called with or be given as its state stays beside it as plain values.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast


@dataclass(eq=False, slots=True)
class Named:
    """A class or function by its name, what it would be called with, and the state it would be given."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict[str, Any])


_PLAIN = (bool, int, float, str, type(None))
_MARK = object()
#: Opcodes whose argument is the value.
_VALUES = frozenset([
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES",
    "SHORT_BINBYTES",
])  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": lambda: _MARK,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = frozenset(["PROTO", "FRAME"])


def read_pickle(data: bytes) -> Any:
    """Return what a pickle builds, with ``Named`` in the place of every object that only code could make.

    Raises:
        ValueError: it is malformed, or has an opcode that settings do not need.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return stack.pop()
            _step(opcode.name, argument, stack, memo)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"malformed pickle ({type(error).__name__})") from None
    raise ValueError("the pickle has no end")


def plain_values(state: dict[str, Any]) -> dict[str, Any]:
    """Return what is a number, text or a flat mapping of them; a member of an enumeration is what it is made with."""
    values = {
        key: value.arguments[0] if isinstance(value, Named) and len(value.arguments) == 1 else value
        for key, value in state.items()
    }
    return {key: value for key, value in values.items() if _flat(value)}


def _flat(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(one, _PLAIN) for one in cast(dict[str, Any], value).values())
    return isinstance(value, _PLAIN)


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _VALUES:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name]())
    elif name in _TUPLES:
        stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name not in _NOTHING:
        _build(name, argument, stack)


def _build(name: str, argument: Any, stack: list[Any]) -> None:
    """Do an opcode that makes or fills something of what lies on the stack."""
    if name == "GLOBAL":
        stack.append(Named(argument.replace(" ", ".")))
    elif name == "STACK_GLOBAL":
        stack[-2:] = [Named(f"{stack[-2]}.{stack[-1]}")]
    elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
        given = stack.pop() if name != "NEWOBJ_EX" else (stack.pop(), stack.pop())[1]
        stack[-1] = Named(stack[-1].name, tuple(given))
    elif name == "BUILD":
        state = stack.pop()
        if isinstance(stack[-1], Named) and isinstance(state, dict):
            stack[-1].state = cast(dict[str, Any], state)
    elif name == "BINPERSID":
        stack[-1] = Named("persistent")
    elif name in ("TUPLE", "LIST", "APPENDS", "SETITEMS", "ADDITEMS", "POP_MARK"):
        _since_mark(name, stack)
    elif name == "APPEND":
        value = stack.pop()
        _append(stack[-1], [value])
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _set(stack[-1], [key, value])
    elif name == "POP":
        stack.pop()
    else:
        raise ValueError(f"opcode {name}")


def _since_mark(name: str, stack: list[Any]) -> None:
    start = len(stack) - 1 - next(i for i, value in enumerate(reversed(stack)) if value is _MARK)
    items = stack[start + 1 :]
    del stack[start:]
    if name == "TUPLE":
        stack.append(tuple(items))
    elif name == "LIST":
        stack.append(items)
    elif name == "SETITEMS":
        _set(stack[-1], items)
    elif name != "POP_MARK":
        _append(stack[-1], items)


def _append(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        cast(list[Any], target).extend(items)


def _set(target: Any, items: list[Any]) -> None:
    """Fill a dict; settings have texts as keys, and hashing another key could take for ever."""
    if isinstance(target, dict):
        pairs = zip(items[::2], items[1::2], strict=True)
        cast(dict[str, Any], target).update((key, value) for key, value in pairs if isinstance(key, str))
