"""The end of the process: what is registered for it runs, then it is gone, with no interpreter being taken down.

Threads of Prefect and Ray run on when a command is done, and free what tasks have held, tensors among it. A thread that
comes back to an interpreter on its way out is ended by Python through C++ code that may not be left that way, and the
process aborts: exit status -6 for a job that is complete (seen after a store's outage, when many events had queued up).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import NoReturn

EXIT_UNWRITTEN = 120
"""What Python itself ends with where the last of the output could not be written."""


def leave(code: int) -> NoReturn:
    """End the process with this exit status."""
    with contextlib.suppress(BaseException):  # what one of them raises is printed already
        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        code = code or EXIT_UNWRITTEN
    os._exit(code)
