"""How a run ends: with its exit code, or with one message and no traceback where only the user can mend it."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.ranks import rank

Result = TypeVar("Result")
#: Seconds that a process which is not the first waits before it says what went wrong.
_PATIENCE = 3.0
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}


def guarded(run: Callable[[], int]) -> int:
    """Runs, and turns what only the user can mend into one message: gives the exit code.

    `UserError` and a disk or folder that refuses to be written end with 1, Ctrl-C with 130. Any other exception is
    an error of the program and keeps its traceback.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `--help | head`: nobody reads on, not even what is left in the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if not _is_message(error):
            raise
        report(error)
        return 1


def _is_message(error: Exception) -> bool:
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in _REFUSED)


def report(error: Exception) -> None:
    """One line for what the user can mend, a traceback for the rest, or for all with HYDRA_FULL_ERROR=1.

    Of several processes the first one speaks, and the launcher ends the others; where it has nothing to say, they do.
    """
    if rank() > 0:
        time.sleep(_PATIENCE)
    if not _is_message(error) or os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)


def or_exit(run: Callable[[], Result]) -> Result:
    """What `run` gives. Where it ends with a message, so does the program, past Hydra's traceback.

    In a sweep the other jobs would meet the same: the folder of another sweep, a full disk.
    """
    results: list[Result] = []

    def once() -> int:
        results.append(run())
        return 0

    if code := guarded(once):
        raise SystemExit(code)
    return results[0]
