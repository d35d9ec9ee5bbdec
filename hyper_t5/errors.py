"""The exceptions that the command line answers with one line and an exit code of their own."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: a file, a field, a flag.

    The message is one line that names the file, the field and the remedy. The command line prints
    it without a traceback and exits with code 2.
    """


class PreemptedError(Exception):
    """The machine is taken away and the run is saved; exit code 75: start it again to go on."""
