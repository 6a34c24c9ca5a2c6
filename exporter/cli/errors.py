"""Exit codes: 0 done, 1 parity missed, 2 bad input or a machine that cannot, 130 Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import click

from mvlm_export.engines.errors import MissingPackageError, MvlmError, ParityError

EXTRA_OF_PACKAGE = {
    "torch": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "onnx_graphsurgeon": "export",
    "safetensors": "export",
    "onnxruntime": "cpu",
    "tensorrt_rtx": "rtx",
}


def describe_missing(error: ModuleNotFoundError) -> MissingPackageError | None:
    """A message for a package that an extra brings; None for any other module."""
    package = (error.name or "").split(".")[0]
    extra = EXTRA_OF_PACKAGE.get(package)
    if extra is None:
        return None
    return MissingPackageError(
        f"This command needs the package {package!r}, which is not installed. "
        f"Install it with `pip install 'mvlm-export[{extra}]'`."
    )


def _fail(message: str, code: int) -> int:
    click.echo(f"Error: {message}", err=True)
    return code


def _stop_cleanly_on_sigterm() -> None:
    """Make ``kill`` do what Ctrl-C does, so that temporary folders go."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def run_command(command: click.Command, arguments: list[str] | None, name: str) -> int:
    """Run a click command; every expected failure becomes one message and an exit code."""
    _stop_cleanly_on_sigterm()
    try:
        outcome: Any = command.main(arguments, prog_name=name, standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted; nothing half-made is left.", 130)
    except click.ClickException as error:
        error.show()
        return 2
    except ParityError as error:
        return _fail(str(error), 1)
    except MvlmError as error:
        return _fail(str(error), 2)
    except ModuleNotFoundError as error:
        missing = describe_missing(error)
        if missing is None:
            raise
        return _fail(str(missing), 2)
    except BrokenPipeError:
        # The reader (head, less) went away: no more output, and none at shutdown either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail("out of memory. Close other programs or use a larger machine.", 2)
    except UnicodeError as error:
        return _fail(f"text that is not UTF-8: {error}. Use a UTF-8 locale and files.", 2)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{place}. Free space or mend the path.", 2)


def entry_point(command: click.Command, name: str) -> Callable[[], None]:
    """A function for ``[project.scripts]``."""

    def main() -> None:
        sys.exit(run_command(command, None, name))

    return main
