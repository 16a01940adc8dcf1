"""Flow runs that a person finds again, and whose states tell the truth.

A process that is killed cannot say so: its flow run stays Running on a server that outlives it. Every flow run is
therefore tagged with its host and process; whoever starts the same run again says of those that are gone that they
crashed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from prefect import tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

from flows.artifacts import UNREACHABLE

LRPQ = "lrpq"
RUN, HOST, PROCESS = "run:", "host:", "process:"


@contextmanager
def tagged(run_id: str) -> Iterator[None]:
    """Flow runs started inside carry the run's id, this host and this process."""
    with tags(LRPQ, RUN + run_id, HOST + socket.gethostname(), PROCESS + _identity(os.getpid())):
        yield


def close_abandoned(run_id: str) -> int:
    """Mark flow runs of a run as crashed whose process on this host is gone; returns how many.

    What runs on other hosts is left alone: nothing can be known of it here.
    """
    wanted = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[LRPQ, RUN + run_id, HOST + socket.gethostname()]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])),
    )
    closed = 0
    try:
        with get_client(sync_client=True) as client:
            for found in client.read_flow_runs(flow_run_filter=wanted):
                process = next((tag.removeprefix(PROCESS) for tag in found.tags if tag.startswith(PROCESS)), None)
                if process is not None and not _alive(process):
                    message = f"its process {process.split('@')[0]} is gone: it was killed"
                    client.set_flow_run_state(found.id, Crashed(message=message), force=True)
                    closed += 1
    except UNREACHABLE:  # the server is there for showing: nothing depends on it
        return closed
    return closed


def _identity(pid: int) -> str:
    """A process and when it began: numbers are used again."""
    return f"{pid}@{psutil.Process(pid).create_time():.0f}"


def _alive(identity: str) -> bool:
    pid = identity.split("@")[0]
    try:
        return pid.isdigit() and _identity(int(pid)) == identity
    except psutil.NoSuchProcess:
        return False
