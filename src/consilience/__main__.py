"""Entry point: run a command and turn every ending into one line and an exit status.

0 done and verified; 2 the user's input is wrong; 1 the machine failed; 130 interrupted. ``--debug`` shows tracebacks.
"""

import os
import signal
import sys
from typing import Any


def _terminate(*_: object) -> None:
    """Treat a polite kill as Ctrl-C: stop workers, keep the partial output, exit 130."""
    raise KeyboardInterrupt


def _say(message: str) -> None:
    sys.stderr.write(f"consilience: {message}\n")


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status."""
    import click

    from consilience.cli.app import app
    from consilience.errors import ConsilienceError

    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        result: Any = app(arguments, prog_name="consilience", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stdout.write(error.ctx.get_help() + "\n" if error.ctx else "")
        return 0
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "consilience"
        _say(f"{' '.join(error.format_message().split())} (see '{where} --help')")
        return 2
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted; partial output is kept, run the same command again to continue")
        return 130
    except ConsilienceError as error:
        if debug:
            raise
        _say(str(error))
        return error.exit_status
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - keeps the interpreter's last flush from failing
        return 0
    except Exception as error:
        if debug:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        _say(f"internal error ({type(error).__name__}: {first}); run again with --debug and report it")
        return 1


def main() -> None:
    """Run the command line of this process."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
