"""Bad input that only the pipeline sees: one line that says what, where and what to do; exit code 2."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipeline_case import WORKERS, Job, contents, snapshot, start_pool, start_server, write_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from flows import cli


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("bad-input"))


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    return write_model(job.folder / "model", layers=2, max_shard_size="200KB")


@pytest.fixture
def command(job: Job, model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def arguments(model: Path = model, **changed: str) -> list[str]:
        options = {
            "--budget": "3.5",
            "--output": str(tmp_path / "out"),
            "--store": str(tmp_path / "store"),
            "--calibration": "pydoc:calibrate",
            "--calibration-windows": "4",
            "--length": "48",
            "--evaluation-length": "48",
            "--evaluation-windows": "2",
            "--refine": "stitch",
            "--workers": str(WORKERS),
            "--device": "cpu",
        }
        options |= {"--" + name.replace("_", "-"): value for name, value in changed.items()}
        return ["compress", str(model), "--no-control", *(part for pair in options.items() for part in pair)]

    return arguments


@pytest.fixture
def fails(job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs a command that must be refused; returns its one line. Nothing may be left at the output afterwards."""

    def run(arguments: list[str]) -> str:
        output = Path(arguments[arguments.index("--output") + 1])
        before = snapshot(output) if output.is_dir() else None
        capfd.readouterr()  # what writing the model has said
        with job.sharing():
            assert cli.run(arguments) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        progress = ("calibrate: ", "evaluation text: ", "profile: ")
        lines = [line for line in captured.err.splitlines() if not line.startswith(progress)]
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in captured.err
        assert (snapshot(output) if output.is_dir() else None) == before
        assert not [path for path in output.parent.iterdir() if path.name.startswith(".out")]
        return lines[0]

    return run


def damaged(model: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of the model with one bad value in one tensor."""
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[7] = value
            save_file(tensors, path, metadata={"format": "pt"})
            return folder
    raise AssertionError(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(
    model: Path,
    tmp_path: Path,
    name: str,
    value: float,
    command: Callable[..., list[str]],
    fails: Callable[[list[str]], str],
) -> None:
    folder = damaged(model, tmp_path / "damaged", name, value)
    line = fails(command(folder))
    assert f"tensor {name} in {folder}" in line
    assert "1 values are NaN or infinite" in line


def test_a_truncated_shard_is_named(
    model: Path, tmp_path: Path, command: Callable[..., list[str]], fails: Callable[[list[str]], str]
) -> None:
    folder = tmp_path / "truncated"
    shutil.copytree(model, folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    line = fails(command(folder))
    assert f"shard {shard}: truncated or corrupt" in line
    assert "fetch the file again" in line
    assert not (tmp_path / "store" / "runs").exists()


def test_a_configuration_of_another_model(
    model: Path, tmp_path: Path, command: Callable[..., list[str]], fails: Callable[[list[str]], str]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    config = LlamaConfig.from_pretrained(folder)
    config.intermediate_size = 256
    config.save_pretrained(folder)
    line = fails(command(folder))
    assert "gate_proj.weight: shape (192, 128), config.json asks for (256, 128)" in line


def test_a_model_without_tokenizer(
    model: Path, tmp_path: Path, command: Callable[..., list[str]], fails: Callable[[list[str]], str]
) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").unlink()
    assert f"model {folder}: its tokenizer cannot be loaded" in fails(command(folder))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "the file is empty"), (" ", "1 tokens found, 48 needed"), ("a few words only", "tokens found, 48 needed")],
    ids=["empty", "blank", "short"],
)
def test_texts_that_fill_no_window(
    tmp_path: Path, text: str, expected: str, command: Callable[..., list[str]], fails: Callable[[list[str]], str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text)
    line = fails(command(calibration=f"text:{file}", evaluation="pydoc:evaluate"))
    assert f"text:{file}: " in line
    assert expected in line


def test_an_evaluation_text_that_fills_no_window_is_found_before_the_work(
    tmp_path: Path, command: Callable[..., list[str]], fails: Callable[[list[str]], str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a few words only")
    assert "tokens found, 48 needed" in fails(command(evaluation=f"text:{file}"))
    assert not list((tmp_path / "store").glob("*/profile"))


def test_a_store_that_cannot_be_written(
    tmp_path: Path, command: Callable[..., list[str]], fails: Callable[[list[str]], str]
) -> None:
    (tmp_path / "file").write_text("")
    for store in (str(tmp_path / "file" / "store"), "/proc/store"):
        assert f"cannot write to the store {store}" in fails(command(store=store))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(
    tmp_path: Path, command: Callable[..., list[str]], fails: Callable[[list[str]], str]
) -> None:
    (tmp_path / "store").mkdir(mode=0o500)
    assert "cannot write to the store" in fails(command())


def test_runs_outputs_and_what_a_failure_leaves(
    job: Job,
    model: Path,
    tmp_path: Path,
    command: Callable[..., list[str]],
    fails: Callable[[list[str]], str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One run that succeeds, after a failed one on the same workers, then everything that must not disturb it."""
    broken = damaged(model, tmp_path / "damaged", "model.layers.1.mlp.up_proj.weight", float("nan"))
    fails(command(broken))
    with job.sharing():
        assert cli.run(command(run_id="mine")) == 0
    capfd.readouterr()
    written = contents(tmp_path / "out")
    assert written
    stored = snapshot(tmp_path / "store")

    line = fails(command(run_id="mine", seed="5", length="32", output=str(tmp_path / "other")))
    assert "run mine in " in line
    assert "calibration.length: stored 48, asked 32" in line
    assert "seed: stored 0, asked 5" in line
    assert "give the stored values or another run id" in line

    assert "is not empty; give another folder, or --overwrite" in fails(command(run_id="mine", budget="4"))
    assert "is not empty" in fails(command(seed="1"))
    assert contents(tmp_path / "out") == written
    assert snapshot(tmp_path / "store") == stored

    with job.sharing():
        assert cli.run([*command(run_id="mine", budget="4"), "--overwrite"]) == 0
    assert contents(tmp_path / "out") != written


def test_gradients_that_overflow_name_their_layer(
    job: Job, tmp_path: Path, command: Callable[..., list[str]], fails: Callable[[list[str]], str]
) -> None:
    """Finite weights, activations that are not: an error on a worker, told like any other."""
    folder = write_model(tmp_path / "huge", layers=2, dtype=torch.float32)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38
    save_file(tensors, path, metadata={"format": "pt"})
    line = fails(command(folder, scales="bfloat16"))  # powers of two would bring the layer down
    assert "not finite" in line
