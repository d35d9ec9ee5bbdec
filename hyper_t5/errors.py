"""The one exception that a user's mistake raises."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: a file, a field, a flag.

    The message is one line that names the file, the field and the remedy. The command line prints
    it without a traceback and exits with code 2.
    """
