"""What a user sees when an input is bad: one message, no traceback.

Deep code raises `UserError` where it meets something that only the user can mend: a file, an option, a
combination. Constructors raise `ValueError` for a number out of range; the builder of configurations turns it
into a `UserError` that names the key. The programs print the message and exit with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input. The message says what was expected, what was found and what to do."""


def nearest(word: str, options: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the option closest to `word`, or an empty string where none is close."""
    close = difflib.get_close_matches(word, [str(option) for option in options], n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
