"""Entry point: run a command and turn every ending into one line and an exit status.

0 done and verified; 2 the user's input is wrong; 1 the machine failed; 130 interrupted. ``--debug`` shows tracebacks.
"""

import gc
import json
import os
import signal
import sys
from typing import Any


def _terminate(*_: object) -> None:
    """Treat a polite kill as Ctrl-C: stop workers, keep the partial output, exit 130."""
    raise KeyboardInterrupt


def _say(message: str) -> None:
    from consilience.errors import one_line

    sys.stderr.write(f"consilience: {one_line(message)}\n")


def _failed(message: str, status: int, as_json: bool) -> int:
    """Say what went wrong, with ``--json`` on standard output too, and return the exit status."""
    from consilience.errors import one_line

    _say(message)
    if as_json:
        said = {"ok": False, "error": one_line(message), "status": status}
        sys.stdout.write(json.dumps(said, ensure_ascii=False) + "\n")
    return status


def _interrupted(as_json: bool) -> int:
    return _failed("interrupted; partial output is kept, run the same command again to continue", 130, as_json)


def _is_help(error: Any) -> bool:
    """Whether a usage error only asks for the help page (its class is not public everywhere)."""
    return type(error).__name__ == "NoArgsIsHelpError"


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status."""
    import typer

    from consilience.cli.app import app
    from consilience.errors import ConsilienceError, command_line, missing_extra
    from consilience.workdir import whole_command

    # Newer typers carry their own click, older ones use the package: BadParameter's parents are right in both.
    usage_error: Any = typer.BadParameter.__mro__[1]
    debug, as_json = "--debug" in arguments, "--json" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        for argument in arguments:
            if any("\ud800" <= c <= "\udfff" for c in argument):  # bytes that are not UTF-8 arrive as surrogates
                raise usage_error(f"argument {argument!r} is not UTF-8 text; rename the file")
        with whole_command(), command_line():
            result: Any = app(arguments, prog_name="consilience", standalone_mode=False)
        return (_interrupted(as_json) if result == 130 else result) if isinstance(result, int) else 0
    except usage_error as error:
        if _is_help(error):
            sys.stdout.write(error.format_message() + "\n")
            return 0
        where = error.ctx.command_path if error.ctx else "consilience"
        return _failed(f"{error.format_message()} (see '{where} --help')", 2, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(as_json)
    except ConsilienceError as error:
        if debug:
            raise
        return _failed(str(error), error.exit_status, as_json)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - keeps the interpreter's last flush from failing
        return 0
    except Exception as error:
        if debug:
            raise
        missing = (
            missing_extra(error, f"this command ({_shown(arguments)})") if isinstance(error, ImportError) else None
        )
        if missing is not None:
            return _failed(str(missing), missing.exit_status, as_json)
        return _failed(_unforeseen(error), 1, as_json)


def _shown(arguments: list[str]) -> str:
    """Return the command's words, up to its first option or path."""
    words = arguments[: 2 if arguments[:1] == ["route"] else 1]
    return " ".join(["consilience", *words])


def _unforeseen(error: Exception) -> str:
    """Say what no part of the program has put into words."""
    if isinstance(error, MemoryError):
        return "out of memory; free some, then run the same command again"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; mend it, then run the same command again"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"internal error ({type(error).__name__}: {first}); run again with --debug and report it"


def main() -> None:
    """Run the command line of this process."""
    signal.signal(signal.SIGTERM, _terminate)
    gc.set_threshold(200_000, 50, 50)  # a plan of 20,000 tensors is millions of objects, and none of them garbage
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
