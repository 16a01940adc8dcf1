"""The Prefect server of a run: it answers, it ends with the run, and no process outlives its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows import prefect_server, server_guard

ENDED_SECONDS = 30.0

RUN_A_FLOW = """
import os, sys, urllib.request
from flows.prefect_server import prefect_api

with prefect_api() as url:
    from prefect import flow, task
    from prefect.client.orchestration import get_client
    from prefect.logging import get_run_logger

    @flow(name="succeeds")
    def succeeds():
        get_run_logger().warning("kept on the server")
        return 3

    @flow(name="fails")
    def fails():
        raise ValueError("seen by the caller")

    assert os.environ["PREFECT_API_URL"] == url
    assert succeeds() == 3
    try:
        fails()
    except ValueError as error:
        print("caught:", error)
    with get_client(sync_client=True) as client:
        print(sorted(run.state_name for run in client.read_flow_runs()))
    # As Ctrl-C would: the context must close on anything.
    print("interrupted", flush=True)
    sys.stdin.readline()
    raise KeyboardInterrupt
"""

WAIT = """
import sys
from flows.prefect_server import prefect_api

with prefect_api() as url:
    print(url, flush=True)
    sys.stdin.readline()
"""


def group_members(group: int) -> list[int]:
    """Live processes of a process group; what has ended and waits to be reaped does not count."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(pgrp) == group and state != "Z":
                found.append(int(entry.name))
    return found


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + ENDED_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Prefect's own folder and ours, away from the user's; shared, for making a new database takes seconds."""
    folder = tmp_path_factory.mktemp("prefect")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PREFECT_HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "cache")}


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start a process with pipes; what is left of it is killed in the end."""
    with contextlib.ExitStack() as stack:

        def run(command: list[str], *, session: bool = False) -> subprocess.Popen[str]:
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=session
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


def test_server_serves_flows_and_ends_with_the_context(
    start: Callable[..., subprocess.Popen[str]], environment: dict[str, str]
) -> None:
    process = start([sys.executable, "-c", RUN_A_FLOW])
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if lines[-1] == "interrupted":
            break
    assert lines == ["caught: seen by the caller", "['Completed', 'Failed']", "interrupted"]
    guards = [pid for pid in children(process.pid) if os.getpgid(pid) == pid]
    assert len(guards) == 1
    assert len(group_members(guards[0])) == 2, "the guard and the server"
    _, errors = process.communicate("\n")
    assert process.returncode != 0
    assert wait_for(lambda: not group_members(guards[0]))
    assert errors.count("Traceback") == 1, errors  # of the KeyboardInterrupt that ends the script
    assert "KeyboardInterrupt" in errors
    assert "seen by the caller" not in errors
    assert "Error logging to API" not in errors
    (log,) = (Path(environment["XDG_CACHE_HOME"]) / "lrpq" / "logs").glob("prefect-server-*.log")
    assert log.stat().st_size > 0


def test_server_ends_when_its_parent_is_killed(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start([sys.executable, "-c", WAIT])
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    guards = [pid for pid in children(process.pid) if os.getpgid(pid) == pid]
    assert len(guards) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wait_for(lambda: not group_members(guards[0]))


BESIDE = """
import sys
from contextlib import contextmanager
from flows.prefect_server import starting_api

@contextmanager
def workers():
    print("started", flush=True)
    sys.stdin.readline()
    try:
        if sys.argv[1] == "failing":
            raise OSError("no cluster")
        yield
    finally:
        print("closed", flush=True)

with starting_api() as api, workers():
    print(api(), flush=True)
    raise OSError("in a run")
"""


@pytest.mark.parametrize("case", ["failing", "running"])
def test_what_starts_beside_a_server_ends_with_it(start: Callable[..., subprocess.Popen[str]], case: str) -> None:
    """The server is on its way while the workers start; where these fail, or the run does, none of both is left."""
    process = start([sys.executable, "-c", BESIDE, case])
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    guards = [pid for pid in children(process.pid) if os.getpgid(pid) == pid]
    assert len(guards) == 1, "a server starts before anybody waits for it"
    out, errors = process.communicate("\n")
    lines = out.splitlines()
    assert lines[-1] == "closed"
    assert len(lines) == (1 if case == "failing" else 2)
    assert errors.strip().endswith("OSError: no cluster" if case == "failing" else "OSError: in a run")
    assert wait_for(lambda: not group_members(guards[0]))


def test_a_server_that_cannot_start_closes_what_started_beside_it(
    start: Callable[..., subprocess.Popen[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    database = tmp_path / "no-folder"
    database.write_text("a file")
    url = f"sqlite+aiosqlite:///{database}/prefect.db"
    program = f"import os; os.environ['PREFECT_API_DATABASE_CONNECTION_URL'] = {url!r}\n" + BESIDE
    process = start([sys.executable, "-c", program, "running"])
    out, errors = process.communicate("\n")
    assert out.splitlines() == ["started", "closed"]
    assert "lrpq.errors.ConfigError: the Prefect server ended while it started" in errors
    assert not [pid for pid in group_members(process.pid) if pid != process.pid]


def test_configured_server_that_does_not_answer(
    environment: dict[str, str],
) -> None:
    """Refused in one line, without the password, and without starting another server."""
    configured = {**environment, "PREFECT_API_URL": "http://me:hidden@127.0.0.1:9/api"}
    program = (
        "from flows.prefect_server import prefect_api\n"
        "from lrpq.errors import ConfigError\n"
        "try:\n    prefect_api().__enter__()\nexcept ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=configured, check=True)
    assert done.stdout.count("\n") == 1
    assert "http://***@127.0.0.1:9/api does not answer" in done.stdout
    assert "unset PREFECT_API_URL" in done.stdout


def guarded(program: str, *, stop_seconds: float = 0.5) -> list[str]:
    """Command of a guard that waits shortly before it kills."""
    runner = f"import sys, flows.server_guard as g; g.STOP_SECONDS = {stop_seconds}; g.main()"
    return [sys.executable, "-c", runner, sys.executable, "-S", "-c", program]


@pytest.mark.parametrize(
    "program",
    [
        "print('up', flush=True); import time; time.sleep(600)",
        # deaf to the polite signal
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
        # with a child of its own
        "import subprocess as s, time; s.Popen(['sleep', '600']); print('up', flush=True); time.sleep(600)",
    ],
)
def test_guard_ends_everything_with_its_pipe(start: Callable[..., subprocess.Popen[str]], program: str) -> None:
    guard = start(guarded(program), session=True)
    assert guard.stdout is not None
    assert guard.stdin is not None
    assert guard.stdout.readline() == "up\n"
    time.sleep(2 * server_guard.POLL_SECONDS)
    assert len(group_members(guard.pid)) >= 2, "it must not end before its pipe"
    guard.stdin.close()
    assert wait_for(lambda: not group_members(guard.pid))


def test_guard_ends_with_its_command(start: Callable[..., subprocess.Popen[str]]) -> None:
    guard = start(guarded("raise SystemExit(7)"), session=True)
    assert guard.wait(ENDED_SECONDS) == 7


def test_guard_refuses_to_share_a_group(start: Callable[..., subprocess.Popen[str]]) -> None:
    """It ends its whole group: in that of its parent this would be the parent."""
    guard = start(guarded("pass"))
    _, errors = guard.communicate(timeout=ENDED_SECONDS)
    assert guard.returncode == 1
    assert "session of its own" in errors


def test_services_for_deployments_are_called_as_prefect_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings.models.server.services import ServerServicesSettings

    for name in prefect_server.FOR_DEPLOYMENTS:
        assert getattr(ServerServicesSettings(), name.lower()).enabled
        monkeypatch.setenv(f"PREFECT_SERVER_SERVICES_{name}_ENABLED", "false")
        assert not getattr(ServerServicesSettings(), name.lower()).enabled
    assert ServerServicesSettings().task_run_recorder.enabled
    assert ServerServicesSettings().event_persister.enabled
