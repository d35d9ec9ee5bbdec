"""Exceptions that end a command, and their exit codes."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from typing import ParamSpec

from hyper_t5.utils import environment

P = ParamSpec("P")


class UserError(Exception):
    """Invalid input: a file, a config field or a flag.

    The message is one line that names the file, the field and the remedy.
    """


class PreemptedError(Exception):
    """Preemption after a checkpoint; the same command resumes the run."""


EXIT_CODES = {UserError: 2, FloatingPointError: 1, PreemptedError: 75, KeyboardInterrupt: 130}


def exit_status(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the one-line message of an error in ``EXIT_CODES``."""
    code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    return code, " ".join(str(error).split()) or "interrupted"


def handle_errors(program: str) -> Callable[[Callable[P, None]], Callable[P, int]]:
    """Decorate a main function to return an exit code; an error prints one line on stderr."""

    def decorate(main: Callable[P, None]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            environment.set_defaults()
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):  # of any encoding, such as ASCII
                    stream.reconfigure(errors="backslashreplace")
            try:
                main(*args, **kwargs)
            except tuple(EXIT_CODES) as error:
                code, message = exit_status(error)
                print(f"{program}: error: {message}", file=sys.stderr, flush=True)
                return code
            return 0

        return run

    return decorate
