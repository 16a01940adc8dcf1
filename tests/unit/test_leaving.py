"""The end of a process whose threads are still freeing tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest

BUSY = """
import atexit, sys, threading
import torch
from flows.leaving import leave

def free():
    while True:
        del [torch.zeros(1) for _ in range(100)][:]

atexit.register(lambda: print("registered"))
for _ in range(4):
    threading.Thread(target=free, daemon=True).start()
threading.Event().wait(0.3)
print("done", end=" ")
"""


@pytest.mark.parametrize("code", [0, 2])
def test_a_process_ends_with_its_own_exit_status(code: int) -> None:
    """Threads that come back to an interpreter being taken down abort the process; what is registered has run."""
    found = subprocess.run([sys.executable, "-c", f"{BUSY}leave({code})"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (code, "done registered\n"), found.stderr


def test_output_that_nobody_takes_is_an_error() -> None:
    command = f"PYTHONUNBUFFERED= {sys.executable} -c 'from flows.leaving import leave; print(1); leave(0)'"
    found = subprocess.run(["bash", "-c", f"{command} | (exec 0<&-; sleep 1); exit ${{PIPESTATUS[0]}}"])
    assert found.returncode == 120
