"""Runs a command for as long as its parent lives: ``python server_guard.py COMMAND...`` with a pipe as stdin.

A program that is killed with -9 cannot stop what it started. The kernel closes its pipes, though: the guard
waits for the end of its stdin and then ends the command with its whole process group. prctl(PR_SET_PDEATHSIG)
would need no process of its own, but it needs code between fork and exec (unsafe beside threads, and Ray and
Prefect start many), follows the life of the *thread* that forked, misses grandchildren and is Linux only.

Started in a session of its own (so that Ctrl-C reaches the parent alone). Uses the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from types import FrameType

STOP_SECONDS = 10.0
"""Time for an orderly end, after which the group is killed."""
POLL_SECONDS = 0.25


def main() -> None:
    """Run the command until it ends or the parent does; the guard takes on its exit code."""
    if os.getpgrp() != os.getpid():
        sys.exit("server_guard: start it in a session of its own, it ends its whole process group")
    # A handler, not SIG_IGN, which the command would inherit: the signal below reaches the guard too.
    signal.signal(signal.SIGTERM, _nothing)
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)  # noqa: S603 -- given by the parent
    while command.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
        if readable and not os.read(sys.stdin.fileno(), 1):
            _end(command)
    sys.exit(command.returncode if command.returncode >= 0 else 128 - command.returncode)


def _end(command: subprocess.Popen[bytes]) -> None:
    """End the whole group, this process included."""
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        command.wait(STOP_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _nothing(signum: int, frame: FrameType | None) -> None:
    pass


if __name__ == "__main__":
    main()
