"""The command line end to end, without the pipeline: bad input, help, JSON on stdout, interruption.

The flow itself is replaced by a stand-in here; everything in front of it and behind it is real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_llama
from tiny_images import write_classifier

from flows import cli
from flows.config import PlanConfig
from lrpq.errors import QuantizationError
from tasks.store.manifest import StageManifest, claim_run, utc_now, write_manifest
from tasks.store.objects import open_store


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache, and none changes the environment of the others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LRPQ_STORE", raising=False)
    monkeypatch.delenv("LRPQ_DEBUG", raising=False)
    for name in ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_LOGGING_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "1" if name == "DO_NOT_TRACK" else "false"))
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama", layers=1)


@pytest.fixture
def valid(model: Path, tmp_path: Path) -> list[str]:
    """Arguments that pass every check."""
    texts = ["--calibration", "pydoc:calibrate", "--length", "64", "--evaluation-length", "64"]
    return ["compress", str(model), "--budget", "3.25", "--output", str(tmp_path / "out"), *texts]


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Put a stand-in in the place of the flow."""

    def replace(run: Callable[..., Any]) -> None:
        module = types.ModuleType("flows.compress")
        for name in ("run_compress", "run_reallocate", "run_evaluate"):
            setattr(module, name, run)
        monkeypatch.setitem(sys.modules, "flows.compress", module)

    return replace


def fails(capfd: pytest.CaptureFixture[str], arguments: list[str], *, code: int = 2) -> str:
    """Run and check the shape of a failure; returns its one line."""
    assert cli.run(arguments) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err.strip()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["--budget", "17"], "budget of 17 bits is above 16"),
        (["--budget", "1.9"], "smallest possible is 2 bits"),
        (["--budget", "three"], "'--budget'"),
        (["--budget-bytes", "40GB"], "two budgets"),
        (["--keep", "model.layers.0"], "expected PATTERN=BITS"),
        (["--keep", "*=7"], "7 bits are not among the choices"),
        (["--run-id", "Run 1"], "run id 'Run 1': expected"),
        (["--bits", "3,x"], "--bits '3,x': expected whole numbers"),
        (["--bits", "7"], "7 is not one of"),
        (["--group-size", "63"], "63 is not one of"),
        (["--relevance", "lpr"], "'fisher', 'lrp', 'cp-lrp' or 'blend'"),
        (["--tensor-parallel", "2"], "--tensor-parallel 2"),
        (["--workers", "0"], "--workers: expected greater than or equal to 1, got 0"),
        (["--calibration", "hubb:x", "--no-evaluate"], "did you mean hub:DATASET"),
        (["--calibration", "text:none.txt", "--no-evaluate"], "text:none.txt: no such file"),
        (["--calibration", "text:none.txt"], "no text to measure on"),
        (["--evaluation", "text:none.txt"], "text:none.txt: no such file"),
        (["--length", "4096"], "--length 4096: the model reads at most 512 tokens"),
        (["--config", "none.toml"], "config file none.toml: cannot be read"),
        (["--store", "ftp://x/y"], "unknown scheme"),
        (["--bugdet", "3"], "No such option: --bugdet"),
    ],
)
def test_bad_options(valid: list[str], changed: list[str], expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    line = fails(capfd, valid + changed)
    assert line.startswith("error: ")
    assert expected in line


def test_nothing_is_written_by_a_refused_command(
    valid: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fails(capfd, [*valid, "--budget", "17"])
    assert list(tmp_path.iterdir()) == []


def test_misspelt_key_in_a_file(valid: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lrpq.toml"
    file.write_text("[run.candidates]\ngroup_size = [64]\n")
    line = fails(capfd, [*valid, "--config", str(file)])
    assert line == f"error: {file}: unknown key 'group_size' in [run.candidates]; did you mean 'group_sizes'?"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing", None, "no such folder"),
        ("empty", {}, "no config.json"),
        ("pickled", {"config.json": "{}", "pytorch_model.bin": ""}, "no *.safetensors"),
        ("broken", {"config.json": "{}", "model.safetensors": "not one"}, "model.safetensors"),
    ],
)
def test_models_that_are_none(
    valid: list[str],
    tmp_path: Path,
    name: str,
    content: dict[str, str] | None,
    expected: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / name
    if content is not None:
        folder.mkdir()
        for file, text in content.items():
            (folder / file).write_text(text)
    if name == "broken":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    line = fails(capfd, [valid[0], str(folder), *valid[2:]])
    assert str(folder) in line
    assert expected in line


def test_unsupported_family_is_named(
    valid: list[str], tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}))
    assert "BloomForCausalLM" in fails(capfd, [valid[0], str(folder), *valid[2:]])


def test_image_classifiers_are_refused(valid: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_classifier(tmp_path / "vit", "vit")
    capfd.readouterr()  # transformers' bars
    message = fails(capfd, [valid[0], str(folder), *valid[2:]])
    assert "ViTForImageClassification classifies images: give images to calibrate on with --images" in message


def test_unknown_hub_model(
    valid: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = fails(capfd, [valid[0], "nobody/has-this-model", *valid[2:]])
    assert "'nobody/has-this-model'" in line
    assert "neither a local folder nor a hub model" in line


def test_output_that_is_not_empty(valid: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "is not empty; give another folder, or --overwrite" in fails(capfd, valid)
    # and not even --overwrite deletes what lrpq has not written
    assert "holds no lrpq.json" in fails(capfd, [*valid, "--overwrite"])
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_output_that_is_no_folder(valid: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert "is a file" in fails(capfd, valid)
    assert "is a file" in fails(capfd, [*valid, "--output", str(tmp_path / "out" / "below")])


def test_output_that_holds_what_is_read(
    valid: list[str], tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "lrpq.json").write_text("{}")
    for arguments, what in (
        ([valid[0], str(checkpoint), *valid[2:]], "the model"),
        ([*valid, "--store", str(checkpoint / "store")], "the store"),
    ):
        assert f"{what} " in fails(capfd, [*arguments, "--output", str(checkpoint), "--overwrite"])
    assert (checkpoint / "lrpq.json").exists()


def test_store_that_is_a_file(valid: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").write_text("")
    assert f"cannot write to the store {tmp_path / 'store'}" in fails(
        capfd, [*valid, "--store", str(tmp_path / "store")]
    )


def test_unknown_run_and_bad_run_id(
    flow: Callable[[Callable[..., Any]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    assert "run id '../etc'" in fails(capfd, ["status", "../etc"])
    assert "run id '../etc'" in fails(capfd, ["reallocate", "../etc", "--budget", "3", "--output", "o"])
    assert "no budget" in fails(capfd, ["reallocate", "run-1", "--output", "o"])
    assert "no output" in fails(capfd, ["reallocate", "run-1", "--budget", "3"])


def test_evaluate_needs_a_text(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "give --evaluation SOURCE" in fails(capfd, ["evaluate", str(model), "--reference", str(model)])


def test_with_json_an_error_is_the_document(valid: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*valid, "--budget", "17", "--json"]) == 2
    captured = capfd.readouterr()
    document = json.loads(captured.out)
    assert document["error"]["type"] == "BudgetError"
    assert document["error"]["exit_code"] == 2
    assert captured.err == f"error: {document['error']['message']}\n"


MANIFEST: dict[str, Any] = {
    "run_id": "llama-1",
    "model": "m",
    "budget": {"asked_bits": 3.25, "reached_bits": 3.2},
    "seconds": {"profile": 0.0},
    "reused": ["profile"],
    "evaluation": {"lrpq": {"perplexity": float("inf"), "kl_nats": 0.5}},
}


def test_json_is_all_there_is_on_stdout(
    valid: list[str], flow: Callable[[Callable[..., Any]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    def noisy(config: Any, progress: Any) -> dict[str, Any]:
        print("a library greets")
        os.write(1, b"a C library greets\n")
        subprocess.run([sys.executable, "-S", "-c", "print('a child greets')"], check=True)
        progress.stage("profile", 1)
        progress.advance("profile")
        progress.done("profile", seconds=0.1, reused=False)
        return MANIFEST

    flow(noisy)
    assert cli.run([*valid, "--json"]) == 0
    captured = capfd.readouterr()
    document = json.loads(captured.out)
    assert document["run_id"] == "llama-1"
    assert document["evaluation"]["lrpq"]["perplexity"] is None
    assert captured.err.count(" greets") == 3
    events = [json.loads(line) for line in captured.err.splitlines() if line.startswith("{")]
    assert [event["event"] for event in events] == ["stage", "advance", "done"]


def test_flow_gets_what_was_asked_for(
    valid: list[str], model: Path, flow: Callable[[Callable[..., Any]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    flow(lambda config, progress: asked.append(config) or MANIFEST)
    options = [
        "--keep",
        "*.0.*=16",
        "--keep",
        "*.q_proj=4",
        "--bits",
        "4,3",
        "--group-size",
        "channel,64",
        "--no-control",
    ]
    assert cli.run([*valid, *options, "--seed", "5"]) == 0
    (config,) = asked
    assert config.run.model == str(model)
    assert config.run.seed == 5
    assert config.run.candidates.bits == (3, 4)
    assert config.run.candidates.group_sizes == (64, -1)
    assert config.plan.keep == ("*.0.*=16", "*.q_proj=4")
    assert config.evaluation.source == "pydoc:evaluate"
    assert not config.evaluation.control
    assert "nothing to compute" in capfd.readouterr().out


def test_the_same_command_twice_is_no_mistake(
    valid: list[str], tmp_path: Path, flow: Callable[[Callable[..., Any]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    def writes(config: Any, progress: Any) -> dict[str, Any]:
        from flows.run_config import default_run_id

        config.output.mkdir(exist_ok=True)
        found = MANIFEST | {"run_id": default_run_id(config.run), "configuration": json.loads(config.model_dump_json())}
        (config.output / "lrpq.json").write_text(json.dumps(found))
        return found

    flow(writes)
    assert cli.run(valid) == 0
    assert cli.run(valid) == 0
    capfd.readouterr()
    assert "is not empty" in fails(capfd, [*valid, "--budget", "4.25"])
    assert "is not empty" in fails(capfd, [*valid, "--seed", "1"])
    assert cli.run([*valid, "--budget", "4.25", "--overwrite"]) == 0


def test_interruption_keeps_the_run_and_says_how_to_continue(
    valid: list[str], flow: Callable[[Callable[..., Any]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: Any, progress: Any) -> dict[str, Any]:
        progress.stage("profile", 3)
        raise KeyboardInterrupt

    flow(interrupted)
    assert cli.run([*valid, "--run-id", "mine", "--json"]) == 130
    captured = capfd.readouterr()
    assert captured.err.splitlines()[-1].startswith("interrupted; the run is kept: continue with `lrpq compress ")
    assert "--run-id mine" in captured.err
    assert json.loads(captured.out)["error"]["type"] == "Interrupted"


def test_errors_inside_the_flow(
    valid: list[str],
    flow: Callable[[Callable[..., Any]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refuses(config: Any, progress: Any) -> dict[str, Any]:
        raise RuntimeError("flow run failed") from QuantizationError("layer x: two\nlines")

    def breaks(config: Any, progress: Any) -> dict[str, Any]:
        raise ZeroDivisionError("a mistake of ours")

    flow(refuses)
    assert fails(capfd, valid) == "error: layer x: two lines"
    flow(breaks)
    line = fails(capfd, valid, code=1)
    (log,) = (tmp_path / "cache" / "lrpq" / "logs").iterdir()
    assert "unexpected ZeroDivisionError: a mistake of ours" in line
    assert str(log) in line
    assert "in breaks" in log.read_text()
    monkeypatch.setenv("LRPQ_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run(valid)


def test_reallocate_passes_the_plan_on(
    flow: Callable[[Callable[..., Any]], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    flow(lambda **given: asked.append(given) or MANIFEST)
    output = str(tmp_path / "o")
    assert cli.run(["reallocate", "run-1", "--budget", "4.25", "--refine", "stitch", "--output", output, "--json"]) == 0
    assert asked[0]["plan"] == PlanConfig(budget_bits=4.25, refine="stitch")
    assert (asked[0]["run_id"], asked[0]["output"]) == ("run-1", tmp_path / "o")
    assert json.loads(capfd.readouterr().out)["run_id"] == "llama-1"


def test_runs_and_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / "store")
    assert cli.run(["runs", "--json", "--store", url]) == 0
    assert json.loads(capfd.readouterr().out)["runs"] == []
    store = open_store(url)
    claim_run(store, "run-1", {"model": "org/[m]"})
    manifest = StageManifest(
        stage="profile",
        key="ab",
        inputs={},
        parameters={},
        environment={},
        code="",
        objects={},
        seconds=3.5,
        created=utc_now(),
    )
    write_manifest(store, "run-1/profile/ab/manifest.json", manifest)
    assert cli.run(["runs", "--store", url]) == 0
    text = capfd.readouterr().out
    assert "org/[m]" in text
    assert "profile" in text
    assert cli.run(["status", "run-1", "--store", url, "--json"]) == 0
    (stage,) = json.loads(capfd.readouterr().out)["stages"]
    assert (stage["stage"], stage["complete"], stage["seconds"]) == ("profile", True, 3.5)
    assert "run-2" in fails(capfd, ["status", "run-2", "--store", url])


def test_console_script_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "compress",
        "/no/such/model",
        "--budget",
        "3",
        "--output",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: model '/no/such/model': no such folder; give a folder of safetensors or a hub id (MODEL)\n"
    )


def test_help_and_version_import_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "ray", "prefect", "datasets", "pyarrow", "numpy", "fsspec")
    program = (
        "import sys; from flows.cli import run\n"
        "assert run(['compress', '--help']) == 0 and run(['--version']) == 0\n"
        f"print(sorted(set({heavy!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "lrpq 0.1.0" in done.stdout
    assert "--calibration-windows" in done.stdout
