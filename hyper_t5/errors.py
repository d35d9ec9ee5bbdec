"""The exceptions that the command line answers with one line and an exit code of their own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from hyper_t5 import quiet

P = ParamSpec("P")


class UserError(Exception):
    """A mistake in what the user gave: a file, a field, a flag.

    The message is one line that names the file, the field and the remedy. The command line prints
    it without a traceback and exits with code 2.
    """


class PreemptedError(Exception):
    """The machine is taken away and the run is saved; exit code 75: start it again to go on."""


def exit_code(program: str) -> Callable[[Callable[P, None]], Callable[P, int]]:
    """For the main function of a script: it returns 0, or 2 after one line that tells a mistake."""

    def decorate(main: Callable[P, None]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            quiet.libraries()
            try:
                main(*args, **kwargs)
            except UserError as error:
                print(f"{program}: error: {error}", file=sys.stderr)
                return 2
            return 0

        return run

    return decorate
