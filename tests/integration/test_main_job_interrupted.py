"""The command line with its own Ray: interrupted, killed, continued; one worker or two, the same bytes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from pipeline_case import Job, contents, snapshot, start_pool, start_server, write_model
from safetensors.torch import load_file, save_file

import flows.compression
from flows.compress import run_compress

WAIT_SECONDS = 300.0
GONE_SECONDS = 60.0
RAY_AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
"""Ray's own; they look for their raylet once a minute and compute nothing."""
LAYERS = 8
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("interrupted"))


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    return write_model(job.folder / "model", layers=LAYERS)


@pytest.fixture(scope="module")
def undisturbed(job: Job, model: Path) -> Path:
    """The checkpoint that a run on two workers writes when nothing happens to it."""
    job(model, "undisturbed", evaluation__control=False)
    return job.folder / "undisturbed"


def arguments(model: Path, folder: Path, *, workers: int) -> list[str]:
    """The configuration of ``Job.config``, as options; shards and micro-batch come from a file."""
    file = folder / "lrpq.toml"
    file.write_text("[run]\nshards = 4\nmicro_batch = 2\n")
    options = {
        "--budget": "3.5",
        "--output": str(folder / "out"),
        "--store": str(folder / "store"),
        "--calibration": "pydoc:calibrate",
        "--calibration-windows": "6",
        "--length": "48",
        "--group-size": "64",
        "--evaluation-windows": "4",
        "--evaluation-length": "48",
        "--workers": str(workers),
        "--device": "cpu",
        "--config": str(file),
    }
    return ["compress", str(model), "--no-control", "--json", *(part for pair in options.items() for part in pair)]


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str
    children: list[psutil.Process]
    """Every process it had started by the time of the signal."""

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.err.splitlines() if line.startswith('{"event"')]


def run(command: list[str], *, when: Callable[[dict[str, Any]], bool] = lambda event: False, sign: int = 0) -> Ended:
    """Run ``lrpq``; send the signal to its process group, as a terminal would, at the first event that fits.

    The group stands still while its children are listed: on a busy machine it would be done by then.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )
    lines: list[str] = []
    out: list[str] = []
    children: list[psutil.Process] = []
    assert process.stdout is not None
    assert process.stderr is not None
    stdout = process.stdout
    reader = threading.Thread(target=lambda: out.append(stdout.read()))
    reader.start()
    killer = threading.Timer(WAIT_SECONDS, process.kill)
    killer.start()
    try:
        for line in process.stderr:
            lines.append(line)
            if sign and not children and line.startswith('{"event"') and when(json.loads(line)):
                os.killpg(process.pid, signal.SIGSTOP)
                children = psutil.Process(process.pid).children(recursive=True)
                if sign == signal.SIGKILL:
                    process.send_signal(sign)
                else:
                    os.killpg(process.pid, sign)
                os.killpg(process.pid, signal.SIGCONT)
                assert children
        code = process.wait()
    finally:
        killer.cancel()
        reader.join()
        process.stdout.close()
        process.stderr.close()
    return Ended(code=code, out="".join(out), err="".join(lines), children=children)


def in_refinement(event: dict[str, Any]) -> bool:
    return event["event"] == "advance" and event["name"] == "refine" and event["done"] == 2


def in_candidates(event: dict[str, Any]) -> bool:
    return event["event"] == "advance" and event["name"] == "candidates" and event["done"] == 5


def all_gone(children: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline:
        if not any(map(alive, children)):
            return True
        time.sleep(0.2)
    return False


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.name() not in RAY_AGENTS
    except psutil.NoSuchProcess:
        return False


def refined(folder: Path) -> dict[str, float]:
    """Objects of the refinement in the store, but for what it goes on from.

    Waypoints go with the end of their stage, and there are some only where the signal came late.
    """
    found = snapshot(folder / "store").items()
    return {name: when for name, when in found if "/refine/" in name and "/waypoints/" not in name}


def test_ctrl_c_in_the_refinement_and_the_same_command_again(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Buys: a run on one worker, stopped and continued, ends in the very bytes of an undisturbed one on two."""
    command = arguments(model, tmp_path, workers=1)
    stopped = run(command, when=in_refinement, sign=signal.SIGINT)
    assert stopped.code == 130, stopped.err
    last = stopped.err.splitlines()[-1]
    assert last.startswith("interrupted; the run is kept: continue with `lrpq compress ")
    assert "Traceback" not in stopped.err
    document = json.loads(stopped.out)
    assert (document["error"]["type"], document["error"]["exit_code"]) == ("Interrupted", 130)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    assert all_gone(stopped.children)
    done = refined(tmp_path)
    before = {name: when for name, when in snapshot(tmp_path / "store").items() if "/waypoints/" not in name}
    assert 2 * 7 <= len(done) < LAYERS * 7
    assert not [name for name in done if name.endswith("manifest.json")]

    told = shlex.split(last.split("`lrpq ", 1)[1].rsplit("`", 1)[0])
    continued = run(told)
    assert continued.code == 0, continued.err
    manifest = json.loads(continued.out)
    assert {"calibrate", "evaluation text", "profile", "candidates", "forecast"} == set(manifest["reused"])
    stages = {event["name"] for event in continued.events if event["event"] == "stage"}
    assert stages == {"allocate", "refine", "guard", "assemble", "evaluate"}
    after = snapshot(tmp_path / "store")
    assert {name: after.get(name) for name in before} == before  # what was refined is not refined again
    assert contents(tmp_path / "out") == contents(undisturbed)
    assert manifest["degraded"] == json.loads((undisturbed / "lrpq.json").read_text())["degraded"]
    assert manifest["evaluation"]["lrpq"]["kl_nats"] > 0


def test_a_killed_driver_leaves_nothing_that_hinders_the_next(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Buys: kill -9 needs no cleaning up: workers end by themselves, the store is whole, the same command completes."""

    command = arguments(model, tmp_path, workers=2)
    killed = run(command, when=in_candidates, sign=signal.SIGKILL)
    assert killed.code == -signal.SIGKILL, killed.err
    assert not (tmp_path / "out").exists()
    assert all_gone(killed.children)
    before = snapshot(tmp_path / "store")
    costs = [name for name in before if "/candidates/" in name and "/costs-" in name]
    assert 5 <= len(costs) < 4 * LAYERS

    completed = run(command)
    assert completed.code == 0, completed.err
    left = next(e["total"] for e in completed.events if e["event"] == "stage" and e["name"] == "candidates")
    assert left == 4 * LAYERS - len(costs)
    after = snapshot(tmp_path / "store")
    published = {name: when for name, when in before.items() if not name.startswith(".")}
    assert {name: after.get(name) for name in published} == published
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_an_error_on_every_worker_is_still_one_line(model: Path, tmp_path: Path) -> None:
    """Buys: Ray and Prefect with nobody catching their output: what two workers and a flow say stays off stderr."""
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.mlp.down_proj.weight"][5, 7] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    failed = run(arguments(folder, tmp_path, workers=2))
    assert failed.code == 2
    other = [line for line in failed.err.splitlines() if not line.startswith('{"event"')]
    assert len(other) == 1, failed.err
    assert other[0].startswith("error: tensor model.layers.3.mlp.down_proj.weight in ")
    assert json.loads(failed.out)["error"]["type"] == "ModelError"
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_the_evaluation_finds_the_checkpoint_complete(job: Job, model: Path, undisturbed: Path) -> None:
    """Buys: the output folder is filled before the evaluation; its own run must not call it somebody else's."""
    config = job.config(model, "stopped", evaluation__control=False, evaluation__num_windows=3)
    with job.sharing() as progress:

        def interrupts(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flows.compression, "run_evaluate", interrupts)
            with pytest.raises(KeyboardInterrupt):
                run_compress(config, progress)
    folder = job.folder / "stopped"
    before = snapshot(folder)
    assert contents(folder) == contents(undisturbed)
    found = job.run(config)
    assert {"refine", "assemble"} <= set(found["reused"])
    assert found["evaluation"]["lrpq"]["kl_nats"] > 0
    assert {name for name, when in snapshot(folder).items() if before.get(name) != when} == {"lrpq.json"}
