"""``consilience completion``: the shell completes commands, options, methods, parameters, experts and their values.

The script that a shell reads asks a hidden command, ``consilience complete LINE``, which prints one candidate a line:
none where a file is wanted, which the shell itself completes. A candidate that ends in ``=`` or ``.`` goes on.
"""

import contextlib
import shlex
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from consilience.errors import InputError, nearest

_BASH = r"""
_consilience() {
    local line="${COMP_LINE:0:COMP_POINT}" word IFS=$'\n'
    COMPREPLY=($(consilience complete -- "$line" 2>/dev/null))
    word="${line##* }"
    word="${word%"${word##*[=:]}"}"  # bash replaces only what comes after these
    COMPREPLY=("${COMPREPLY[@]#"$word"}")
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _consilience consilience
"""

_ZSH = r"""
#compdef consilience
_consilience() {
    local -a found
    found=(${(f)"$(consilience complete -- "${(j: :)words[1,CURRENT]}" 2>/dev/null)"})
    if (( ${#found} )); then
        compadd -Q -S '' -- ${(M)found:#*[=.]}
        compadd -Q -- ${found:#*[=.]}
    else
        compset -P '*='
        _files
    fi
}
compdef _consilience consilience
"""

_FISH = r"""
complete --command consilience --arguments '(consilience complete -- (commandline --cut-at-cursor))'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}

EPILOG = """Examples:

\b
  source <(consilience completion bash)                  # in ~/.bashrc
  source <(consilience completion zsh)                   # in ~/.zshrc, after compinit
  consilience completion fish > ~/.config/fish/completions/consilience.fish
"""

#: Values of options, by the option.
_FIXED = {
    "--dtype": ("bfloat16", "float16", "float32", "float64"),
    "--as-adapter": ("cat", "svd"),
    "--device": ("cpu", "cuda"),
}


def completion(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="The shell to complete for.")],
) -> None:
    """Print what a shell reads to complete commands, methods and recipe keys."""
    if shell not in SCRIPTS:
        known = nearest(shell, list(SCRIPTS)) or f"; use {', '.join(SCRIPTS)}"
        raise InputError(f"shell {shell!r} is not one that is completed for{known}")
    typer.echo(SCRIPTS[shell].strip())


def complete(line: Annotated[str, typer.Argument()]) -> None:
    """Print candidates for the last word of a command line."""
    with contextlib.suppress(Exception):  # what is typed is unfinished: nothing is an error
        typer.echo("\n".join(candidates(line)), nl=False)


def candidates(line: str) -> list[str]:
    """Return what the last word of a command line may become; nothing where that is a file."""
    from consilience.cli.app import app

    words, word = _split(line)
    command, words = _command(typer.main.get_command(app), words[1:])
    options = {name: one for one in command.params for name in (*one.opts, *one.secondary_opts) if name[0] == "-"}
    previous = words[-1] if words else ""
    if previous in options and not _is_flag(options[previous]):
        found = _values(previous, word, words[:-1])
    elif word.startswith("-"):
        found = [name for name, one in options.items() if one.multiple or not {*one.opts} & {*words}]
        found += ["--help"]
    else:
        found = list(_commands(command))
    return sorted({one for one in found if one.startswith(word)}, key=found.index)


def _split(line: str) -> tuple[list[str], str]:
    """Return the finished words of a line and the one that is being typed."""
    for ending in ("", "'", '"'):
        with contextlib.suppress(ValueError):
            words = shlex.split(line + ending)
            return (words, "") if not ending and line[-1:].isspace() else (words[:-1], words[-1] if words else "")
    return [], ""


def _commands(command: Any) -> dict[str, Any]:
    return {name: one for name, one in getattr(command, "commands", {}).items() if not one.hidden}


def _command(command: Any, words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that words name, and the words after it."""
    while words and words[0] in _commands(command):
        command, words = _commands(command)[words[0]], words[1:]
    return command, words


def _is_flag(option: Any) -> bool:
    return bool(getattr(option, "is_flag", False)) or bool(getattr(option, "count", False))


def _values(option: str, word: str, words: list[str]) -> list[str]:
    """Return the values of an option, given the words before it."""
    from consilience.methods.registry import names

    if option in ("--method", "--try"):
        return names()
    if option in _FIXED:
        return list(_FIXED[option])
    if option in ("--tokenizer", "--config", "--chat-template"):
        return ["base", *_Typed(words).experts]
    if option in ("--calibration", "--statistics"):
        return [] if "=" in word else [f"{name}=" for name in _Typed(words).experts]
    if option in ("--set", "--sweep"):
        return _assignments(option, word, words)
    return []


def _assignments(option: str, word: str, words: list[str]) -> list[str]:
    from consilience.methods.registry import load, names
    from consilience.recipe.overrides import text_of

    typed = _Typed(words)
    parameters = {key: one for key, one in load(typed.method).parameters.items() if one.effective}
    key, equals, value = word.partition("=")
    if equals:
        one = parameters.get(key.rpartition(".")[2])
        known: list[str] = [] if one is None else list(map(text_of, one.choices))
        known = ["true", "false"] if one is not None and one.kind == "flag" else known
        more = {"method": names(), "dtype": list(_FIXED["--dtype"])} if option == "--sweep" else {}
        before = value[: value.rfind(",") + 1] if option == "--sweep" else ""
        return [f"{key}={before}{each}" for each in more.get(key, known)]
    if "." in key:
        expert = key.rpartition(".")[0]
        return [f"{expert}.{name}=" for name, one in parameters.items() if one.per_expert]
    found = [f"{name}=" for name in parameters]
    found += [f"{name}=" for name in ("method", "seed", "dtype")] if option == "--sweep" else []
    return [*found, *(f"{name}." for name in typed.experts)]


class _Typed:
    """The method and the experts that the words of a command name so far."""

    def __init__(self, words: list[str]) -> None:
        self.method, self.experts = "task_arithmetic", list[str]()
        recipe = next((word for word in words if Path(word).suffix in (".yaml", ".yml")), None)
        if recipe is not None:
            with contextlib.suppress(InputError):
                self._read(recipe)
        experts = list(_after(words, ("-e", "--expert")))
        if experts:
            from consilience.cli.inputs import named_experts

            with contextlib.suppress(InputError):
                self.experts = list(named_experts(experts))
        self.method = next(iter(_after(words, ("--method",))), self.method)

    def _read(self, path: str) -> None:
        from consilience.experts.expert_set import expert_names
        from consilience.recipe.stages import read_recipe

        recipe = read_recipe(path)
        self.method = recipe.merge_method
        self.experts = expert_names([(entry.model, entry.name) for entry in recipe.models], path)


def _after(words: list[str], options: Iterable[str]) -> Iterable[str]:
    return (word for option, word in pairwise(words) if option in options)
