"""What Prefect's UI shows of a run, on a real server: artifacts, names, states that tell the truth, deployments."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline_case import Job, start_pool, start_server, write_model

from lrpq.errors import CalibrationError, ConfigError

ROOT = Path(__file__).parents[2]
READY_SECONDS = 90.0


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> str:
    return start_server(request)


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, server: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(start_pool(request), tmp_path_factory.mktemp("shows"))


@pytest.fixture
def client(server: str) -> Iterator[Any]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as found:
        yield found


def flow_runs(client: Any, run_id: str) -> list[Any]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags

    return client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[f"run:{run_id}"])))


def artifacts_of(client: Any, flow_run_id: Any) -> dict[str, Any]:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    )
    return {artifact.key: artifact for artifact in found}


def test_a_run_is_shown(job: Job, client: Any) -> None:
    model = write_model(job.folder / "model")
    manifest = job(model, "shown", run_id="shown")
    (run,) = flow_runs(client, "shown")
    assert (run.name, run.state_name) == ("shown · 3.5 bits", "Completed")
    found = artifacts_of(client, run.id)
    assert {"bits-per-layer", "bits-by-block", "cost-curves", "result"} <= set(found)
    progress = {key: artifact.data for key, artifact in found.items() if key.startswith("progress-")}
    assert {f"progress-{stage}" for stage in ("profile", "forecast", "refine", "guard", "assemble")} <= set(progress)
    assert set(progress.values()) == {100.0}
    table = json.loads(found["bits-per-layer"].data)
    assert [row["bits"] for row in table] == [module["bits"] for module in manifest["modules"]]
    for key in ("bits-by-block", "cost-curves"):
        picture = base64.b64decode(found[key].data.removeprefix("data:image/png;base64,"))
        assert picture.startswith(b"\x89PNG")
    assert f"{manifest['evaluation']['lrpq']['kl_nats']:.4f}" in found["result"].data
    tasks = client.read_task_runs(flow_run_filter=_only(run.id))
    names = {task.name for task in tasks}
    assert {"profile · block 0", "candidates · block 1", "refine · block 0", "assemble", "evaluate"} <= names
    assert "run:shown" in run.tags
    assert not any(task.tags for task in tasks), "Prefect asks its server before every task run with tags, and waits"


def _only(flow_run_id: Any) -> Any:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    return FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))


def test_a_failed_run_says_so(job: Job, client: Any) -> None:
    model = write_model(job.folder / "model")
    with pytest.raises(CalibrationError):
        job(model, "failed", run_id="failed", run__calibration__source=f"text:{job.folder / 'missing.txt'}",
            evaluation__enabled=False)  # fmt: skip
    (run,) = flow_runs(client, "failed")
    assert run.state_name == "Failed"
    assert "missing.txt" in run.state.message


KILLED = """
import os, signal
from prefect import flow
from flows.states import tagged

@flow(name="compress", flow_run_name="killed")
def killed():
    os.kill(os.getpid(), signal.SIGKILL)

with tagged("killed"):
    killed()
"""


def test_a_killed_run_is_closed_by_the_next_one(server: str, client: Any) -> None:
    from flows.states import close_abandoned, tagged

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    (run,) = flow_runs(client, "killed")
    assert run.state_name == "Running", "nobody could say that it was killed"
    with tagged("killed"):
        assert close_abandoned("killed") == 1
    (run,) = flow_runs(client, "killed")
    assert run.state_name == "Crashed"
    assert "is gone" in run.state.message
    assert close_abandoned("killed") == 0


def test_a_run_does_not_need_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    from flows import artifacts
    from flows.states import close_abandoned

    class Refusing:
        def __enter__(self) -> Any:
            raise httpx.ConnectError("refused")

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("flows.states.get_client", lambda **_: Refusing())
    assert close_abandoned("x") == 0

    def refuse(*_: object, **__: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(artifacts, "create_progress_artifact", refuse)
    from pipeline_case import Silent

    progress = artifacts.ArtifactProgress(Silent())
    progress.stage("profile", 1)
    progress.advance("profile")
    progress.done("profile", seconds=1.0, reused=False)


def configuration(folder: Path) -> dict[str, Any]:
    return {
        "run": {
            "model": str(write_model(folder / "model")),
            "calibration": {"source": "pydoc:calibrate", "num_windows": 2, "length": 48},
            "candidates": {"bits": [3, 4]},
            "shards": 2,
        },
        "plan": {"budget_bits": 3.5},
        "evaluation": {"enabled": False},
        "cluster": {"workers": 1, "device": "cpu"},
        "output": str(folder / "output"),
        "store": str(folder / "store"),
    }


def test_deployments_are_served(server: str, client: Any, tmp_path: Path) -> None:
    """A process serves, the server starts a run in it."""
    path = tmp_path / "job.json"
    path.write_text(json.dumps(configuration(tmp_path)), encoding="utf-8")
    command = [sys.executable, "-m", "flows.cli", "serve", "--config", str(path), "--cron", "0 3 * * *"]
    with (tmp_path / "log").open("wb") as log:
        serving = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_RUNNER_POLL_FREQUENCY": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            scheduled = _deployment(client, "compress-deployed/scheduled", serving, tmp_path / "log")
            manual = _deployment(client, "compress-deployed/by-hand", serving, tmp_path / "log")
            assert [schedule.schedule.cron for schedule in scheduled.schedules] == ["0 3 * * *"]
            assert manual.schedules == []
            _refused(client, manual.id, tmp_path)
            # a run is made and ends with the line of the command; what a whole run takes, test_submit.py pays for
            asked = configuration(tmp_path)
            asked["run"]["calibration"]["source"] = f"text:{tmp_path / 'missing.txt'}"
            run = client.create_flow_run_from_deployment(manual.id, parameters={"configuration": asked})
            state = _end(client, run.id, tmp_path / "log")
            assert state.name == "Failed"
            assert "missing.txt: no such file; check the name" in state.message
        finally:
            serving.send_signal(signal.SIGINT)
            try:
                serving.wait(30)
            except subprocess.TimeoutExpired:
                serving.kill()
                serving.wait()


def _refused(client: Any, deployment: Any, folder: Path) -> None:
    """The server itself says what is wrong with parameters."""
    from prefect.exceptions import PrefectHTTPStatusError

    good = configuration(folder)
    wrong = [
        ({**good, "plan": {"budget_bits": "3.5"}}, "3.5"),
        ({**good, "budget": 3.5}, "budget"),
        ({**good, "run": {**good["run"], "threads": 0}}, "0"),
    ]
    for parameters, said in wrong:
        with pytest.raises(PrefectHTTPStatusError) as refused:
            client.create_flow_run_from_deployment(deployment, parameters={"configuration": parameters})
        assert refused.value.response.status_code in (409, 422)
        assert said in refused.value.response.text


def _deployment(client: Any, name: str, serving: subprocess.Popen[bytes], log: Path) -> Any:
    from prefect.exceptions import ObjectNotFound

    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and serving.poll() is None:
        try:
            return client.read_deployment_by_name(name)
        except ObjectNotFound:
            time.sleep(0.5)
    raise AssertionError(log.read_text(errors="replace")[-2000:])


def _end(client: Any, run_id: Any, log: Path) -> Any:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        state = client.read_flow_run(run_id).state
        if state.is_final():
            return state
        time.sleep(1.0)
    raise AssertionError(log.read_text(errors="replace")[-2000:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"plan": {"budget_bits": 0.5}}, "the smallest possible is"),
        ({"plans": {}}, "plans"),
        ({"plan": {"budget_bits": 3.5, "budget_bytes": 10}}, "two budgets"),
        ({"evaluation": {"enabled": "no"}}, "expected a boolean"),
    ],
)
def test_what_no_schema_says_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    from flows.deployments import checked_configuration
    from lrpq.errors import LrpqError

    with pytest.raises(LrpqError, match=said):
        checked_configuration({**configuration(tmp_path), **change})


def test_a_bad_schedule_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import run
    from flows.deployments import checked_configuration, serve_forever

    assert run(["serve", "--cron", "0 3 * * *"]) == 2
    assert "--cron needs a configuration" in capsys.readouterr().err
    config = checked_configuration(configuration(tmp_path))
    with pytest.raises(ConfigError, match="--cron 'at three'"):
        serve_forever([config], cron="at three")
