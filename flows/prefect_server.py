"""One Prefect server for the length of a run: the configured one, or one of our own on the loopback address.

Without it every flow starts Prefect's temporary in-process server: the same work then took twice as long.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flows import server_guard
from flows.boundary import one_line, redacted
from flows.config import cache_folder
from lrpq.errors import ConfigError

LOOPBACK = "127.0.0.1"
START_SECONDS = 180.0
"""Longest wait for a server: it takes 7 s on a free machine, 14 s with a new database, more on a busy one."""
STOP_SECONDS = server_guard.STOP_SECONDS + 5
REQUEST_SECONDS = 5.0
DRAIN_SECONDS = 5.0
POLL_SECONDS = 0.1
ATTEMPTS = 3
"""Ports tried: another process may take the free one between the look and the start."""
KEPT_LOGS = 5
WATCH_SECONDS = 0.5
RESTARTS = 5
"""Of a server that ends while it is needed; a run goes on without one, but nobody sees how far it is."""

PRIVATE: Mapping[str, str] = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
FOR_DEPLOYMENTS = (
    "CANCELLATION_CLEANUP",
    "CLEANUP_RECONCILER",
    "FOREMAN",
    "LATE_RUNS",
    "PAUSE_EXPIRATIONS",
    "REPOSSESSOR",
    "SCHEDULER",
    "TRIGGERS",
)
"""Services that look through the database every few seconds, for deployments, workers and automations. A server that is
there for one run has none of them to serve, and those in the user's database are not its business."""


def quiet_prefect() -> None:
    """Set what Prefect reads when it is imported: no telemetry, warnings only. Call before importing it."""
    for name, value in {**PRIVATE, "PREFECT_LOGGING_LEVEL": "WARNING"}.items():
        os.environ.setdefault(name, value)


@contextmanager
def prefect_api(*, deployments: bool = False) -> Iterator[str]:
    """Yield the URL of a Prefect API that answers; flows run inside use it.

    If PREFECT_API_URL is set (in the environment or a profile), that is the one. Otherwise a server is
    started; it ends with the context, on exceptions and Ctrl-C too, and if this process is killed
    (server_guard). Its runs stay in Prefect's own database: ``prefect server start`` shows them later.

    Args:
        deployments: a server that is started also serves those (``FOR_DEPLOYMENTS``).

    Raises:
        ConfigError: the configured server does not answer, or none could be started (its log is named).
    """
    with starting_api(deployments=deployments) as url:
        yield url()


@contextmanager
def starting_api(*, deployments: bool = False) -> Iterator[Callable[[], str]]:
    """As ``prefect_api``, for a caller who has something else to start meanwhile: a server takes seconds.

    Yields what waits until the API answers and returns its URL, to be called once; flows run after it use the API. It
    raises what ``prefect_api`` does.
    """
    quiet_prefect()
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    configured = PREFECT_API_URL.value()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_failures_left_to_the_caller())
        if configured is not None:
            yield partial(_checked, str(configured))
            return
        answering = stack.enter_context(_own_server(cache_folder() / "logs", deployments=deployments))

        def url() -> str:
            own = answering()
            # The environment is for processes started inside, the settings for this one.
            stack.enter_context(_environment({"PREFECT_API_URL": own, **_direct()}))
            # A heartbeat tells a server that others ask of a flow run that it lives, and takes up to a second to end
            # with it. Nobody asks a server that ends with this process.
            stack.enter_context(temporary_settings({PREFECT_API_URL: own, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}))
            stack.callback(_send_what_waits)
            return own

        yield url


@contextmanager
def _own_server(log_folder: Path, *, deployments: bool) -> Iterator[Callable[[], str]]:
    """Start a server; yields what waits for it and returns its URL."""
    log = _new_log(log_folder)
    with contextlib.ExitStack() as stack:

        def started() -> _Server:
            server = _Server(_free_port(), log, deployments=deployments)
            stack.callback(server.stop)
            return server

        server = started()

        def answering() -> str:
            nonlocal server
            for left in reversed(range(ATTEMPTS)):
                if _wait_until_healthy(server.guard, server.port, log):
                    stack.enter_context(server.watched())
                    return f"http://{LOOPBACK}:{server.port}/api"
                if not left or "is already in use" not in log.read_text(errors="replace"):
                    break
                server.stop()
                server = started()
            raise ConfigError(f"the Prefect server ended while it started: {_last_line(log)}; its log is {log}")

        yield answering


class _Server:
    """A server of ours; one that is ended from outside is started again on its port, with its database."""

    def __init__(self, port: int, log: Path, *, deployments: bool) -> None:
        self.port = port
        self.log = log
        self.deployments = deployments
        self.guard = _start(port, log, deployments=deployments)
        self._closing = threading.Event()
        self._stopped = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the server is started again when it ends, a few times."""
        thread = threading.Thread(target=self._watch, name="prefect-server-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closing.set()
            thread.join()

    def stop(self) -> None:
        """End the server, once: the number of a process that has ended may be another's later."""
        if not self._stopped:
            self._stopped = True
            _stop(self.guard)

    def _watch(self) -> None:
        for _ in range(RESTARTS):
            while self.guard.poll() is None:
                if self._closing.wait(WATCH_SECONDS):
                    return
            if self._closing.is_set():
                return
            _stop(self.guard)
            self.guard = _start(self.port, self.log, deployments=self.deployments)


def _start(port: int, log: Path, *, deployments: bool) -> subprocess.Popen[bytes]:
    left_out = {} if deployments else {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in FOR_DEPLOYMENTS}
    server = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port)]
    # -I: the guard needs nothing from the current folder or the user's site-packages
    command = [sys.executable, "-I", server_guard.__file__, *server]
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 -- fixed command, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**left_out, **os.environ, **PRIVATE},
        )


def _wait_until_healthy(guard: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    """Wait for the server; False if it ended."""
    deadline = time.monotonic() + START_SECONDS
    while guard.poll() is None:
        if _answers(f"http://{LOOPBACK}:{port}/api/health") and guard.poll() is None:
            return True
        if time.monotonic() > deadline:
            raise ConfigError(f"the Prefect server did not answer within {START_SECONDS:.0f} s; its log is {log}")
        time.sleep(POLL_SECONDS)
    return False


def _stop(guard: subprocess.Popen[bytes]) -> None:
    """Close the guard's pipe, which ends the server; whatever is left of its group is killed."""
    if guard.stdin is not None:
        guard.stdin.close()
    try:
        guard.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also if Ctrl-C is pressed again while waiting
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know our loopback
    try:
        with opener.open(url, timeout=REQUEST_SECONDS) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _checked(url: str) -> str:
    """The configured URL, whose server answers."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error is not None:
        reason = one_line(str(error) or type(error).__name__, max_chars=200)
        raise ConfigError(
            f"the Prefect server at PREFECT_API_URL {redacted(url)} does not answer ({reason}); start it, "
            "correct the URL, or unset PREFECT_API_URL to have one started here"
        )
    return url


def _send_what_waits() -> None:
    """Have Prefect's background threads send logs and states while the server still listens."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=DRAIN_SECONDS)
    APILogWorker.drain_all(timeout=DRAIN_SECONDS)


@contextmanager
def _failures_left_to_the_caller() -> Iterator[None]:
    """Keep the tracebacks of failed flow and task runs off the console: the caller gets the exception itself.

    They still go to the Prefect server. Not done where the user has set a level of logging other than ours.
    """
    import prefect.main  # noqa: F401 -- sets up the handlers
    from prefect.logging.handlers import PrefectConsoleHandler

    if os.environ.get("PREFECT_LOGGING_LEVEL") != "WARNING":
        yield
        return
    consoles = [h for h in logging.getLogger().handlers if isinstance(h, PrefectConsoleHandler)]
    for console in consoles:
        console.addFilter(_is_no_failed_run)
    try:
        yield
    finally:
        for console in consoles:
            console.removeFilter(_is_no_failed_run)


def _is_no_failed_run(record: logging.LogRecord) -> bool:
    of_a_run = record.name.startswith(("prefect.flow_runs", "prefect.task_runs"))
    return not (of_a_run and record.levelno >= logging.ERROR)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _direct() -> dict[str, str]:
    """Variables that keep HTTP clients from asking a proxy for our loopback address."""
    if not any(os.environ.get(name) for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")):
        return {}
    names = ("no_proxy", "NO_PROXY")
    return {name: ",".join(filter(None, [os.environ.get(name), LOOPBACK])) for name in names}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _new_log(folder: Path) -> Path:
    """Path of a new log; of the older ones the last few are kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = sorted(folder.glob("prefect-server-*.log"))
        for path in old[: -(KEPT_LOGS - 1)]:
            path.unlink(missing_ok=True)
        log = folder / f"prefect-server-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        log.touch(mode=0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot write the log of the Prefect server to {folder} ({error.strerror}); make it writable, "
            "or set XDG_CACHE_HOME"
        ) from error
    return log


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return one_line(lines[-1], max_chars=200) if lines else "it wrote nothing"
