"""``lrpq submit`` against a real Ray head with its job server: start, follow, find again, stop, logs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipeline_case import start_server, write_model

from flows.cli import run

ROOT = Path(__file__).parents[2]
START_SECONDS = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the job server of a Ray head of two cores."""
    start_server(request)  # the job uses the session's Prefect server
    folder = tmp_path_factory.mktemp("head")
    port, dashboard = free_port(), free_port()
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [str(scripts / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # the usual one may be another head's
    command += [f"--dashboard-port={dashboard}", "--include-dashboard=true", "--object-store-memory=150000000"]
    address = f"http://127.0.0.1:{dashboard}"
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("wb") as log:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(address, process, folder / "log")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    from flows.submission import Jobs
    from lrpq.errors import ConfigError

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            Jobs(address).list()
        except ConfigError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"Ray did not start: {log.read_text(errors='replace')[-2000:]}")


def write_config(folder: Path, *, budget: float = 3.5, windows: int = 2) -> Path:
    model = folder / "model"
    if not model.is_dir():
        write_model(model)
    document = {
        "run": {
            "model": str(model),
            "calibration": {"source": "pydoc:calibrate", "num_windows": windows, "length": 48},
            "candidates": {"bits": [3, 4]},
            "shards": 2,
        },
        "plan": {"budget_bits": budget},
        "evaluation": {"enabled": False},
        "cluster": {"workers": 1, "device": "cpu"},
        "output": str(folder / "output"),
        "store": str(folder / "store"),
    }
    path = folder / "job.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_a_job_from_start_to_logs(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20 s on 2 cores: a real head runs the real command."""
    config = write_config(tmp_path)
    code = run(["submit", str(config), "--address", head, "--id", "first", "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    found = json.loads(shown.out)
    assert (found["id"], found["status"]) == ("first", "SUCCEEDED")
    assert "job first: started" in shown.err
    assert "profile" in shown.err, "what the job writes is passed on"
    assert (tmp_path / "output" / "lrpq.json").is_file()
    assert run(["submit", "--logs", "first", "--address", head]) == 0
    assert "seconds" in capsys.readouterr().out, "the closing table is in the log"
    assert run(["submit", "--list", "--address", head, "--json"]) == 0
    assert [job["id"] for job in json.loads(capsys.readouterr().out)["jobs"]] == ["first"]


def test_a_job_is_found_again_and_stopped(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, windows=64)
    assert run(["submit", str(config), "--address", head, "--id", "second", "--detach"]) == 0
    capsys.readouterr()
    assert run(["submit", str(config), "--address", head, "--id", "third", "--detach", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["id"] == "second"
    assert "under way already" in shown.err
    assert run(["submit", "--stop", "second", "--address", head, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stopped_now"]
    assert run(["submit", "--follow", "second", "--address", head]) == 2
    assert "job second stopped" in capsys.readouterr().err


def test_a_job_that_fails_says_why(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    document = json.loads(config.read_text())
    document["run"]["model"] = str(tmp_path / "nowhere")
    config.write_text(json.dumps(document))
    assert run(["submit", str(config), "--address", head, "--id", "fails"]) == 2
    shown = capsys.readouterr()
    assert "no such folder" in shown.err
    assert "job fails failed" in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--status", "nobody"], "job nobody: the cluster at"),
        (["--list", "--stop", "x"], "give one of"),
        ([], "give one of"),
    ],
)
def test_mistakes(head: str, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert run(["submit", *arguments, "--address", head]) == 2
    assert said in capsys.readouterr().err


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--list", "--address", f"http://127.0.0.1:{free_port()}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the job server at http://127.0.0.1:")
    assert len(error.splitlines()) == 1
