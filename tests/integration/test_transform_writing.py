"""The folder of a transformed model: whole or absent, the same for one seed, in the types and files asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import CASES, write_tiny, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrpq.checkpoint.layout import ShardWriter
from lrpq.checkpoint.publish import published_folder
from lrpq.errors import CheckpointError, ConfigError
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.transform.folds import FoldedTensor, FoldPlan, ScaleColumns
from lrpq.transform.orthogonal import RotationKind
from lrpq.transform.rotation import rotate
from lrpq.transform.writing import write_folded


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def types(folder: Path) -> set[str]:
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            found |= {shard.get_slice(name).get_dtype() for name in shard.keys()}  # noqa: SIM118
    return found


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "llama-rope-scaled")


@pytest.mark.parametrize("kind", RotationKind)
def test_one_seed_gives_the_same_bytes(kind: RotationKind, original: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        rotate(open_source(original), tmp_path / name, generator=seeded(seed), kind=kind)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["model.safetensors"] != files(tmp_path / "c")["model.safetensors"]


def test_what_a_model_folder_holds_is_carried_over(original: Path, tmp_path: Path) -> None:
    write_tokenizer(original, bos=True)
    (original / "README.md").write_text("a card of the original")
    (original / "pytorch_model.bin").write_bytes(b"pickle")
    rotate(open_source(original), tmp_path / "rotated", generator=seeded())
    assert set(files(tmp_path / "rotated")) == {
        *("config.json", "model.safetensors", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    text = "def f(x): return x"
    assert AutoTokenizer.from_pretrained(tmp_path / "rotated")(text) == AutoTokenizer.from_pretrained(original)(text)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / "rotated"))
    assert after == before | {"tie_word_embeddings": False}


@pytest.mark.parametrize("failing", [3, 12])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, CheckpointError])
def test_an_interrupted_write_leaves_nothing(
    error: type[BaseException], failing: int, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = ShardWriter.write, iter(range(1000))

    def interrupted(self: ShardWriter, *arguments: Any) -> None:
        if next(calls) == failing:
            raise error("now")
        write(self, *arguments)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(error):
        rotate(open_source(original), tmp_path / "rotated", generator=seeded(), max_shard_bytes=40_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    rotate(open_source(original), tmp_path / "rotated", generator=seeded())
    assert ModelSource(tmp_path / "rotated").names()


def test_a_taken_output_is_refused_and_stays(original: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "lrpq.json").write_text("{}")  # not even a checkpoint of ours is replaced
    with pytest.raises(ConfigError, match="taken: is not empty; give another folder"):
        rotate(open_source(original), taken, generator=seeded())
    assert files(taken) == {"lrpq.json": b"{}"}
    for output in (original, original.parent):
        with pytest.raises(ConfigError, match="holds the original model"):
            rotate(open_source(original), output, generator=seeded())
    (taken / "lrpq.json").unlink()
    with published_folder(taken), pytest.raises(ConfigError, match="another process is writing it"):
        rotate(open_source(original), taken, generator=seeded())


@pytest.mark.parametrize("name", ["llama-fp16", "qwen3-bf16-sharded"])
def test_the_sources_type_is_kept_or_the_one_asked_for_written(name: str, tmp_path: Path) -> None:
    source = open_source(write_tiny(tmp_path / "model", name))
    rotate(source, tmp_path / "same", generator=seeded())
    report = rotate(source, tmp_path / "float32", generator=seeded(), dtype=torch.float32)
    assert types(tmp_path / "same") == types(tmp_path / "model")
    assert types(tmp_path / "float32") == {"F32"}
    assert report.written_bytes == 2 * report.source_bytes
    assert json.loads((tmp_path / "float32/config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "float32").dtype is torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "same").dtype is CASES[name].dtype


def test_files_are_cut_by_size(original: Path, tmp_path: Path) -> None:
    rotate(open_source(original), tmp_path / "one", generator=seeded())
    report = rotate(open_source(original), tmp_path / "many", generator=seeded(), max_shard_bytes=100_000)
    shards = [path for path in (tmp_path / "many").iterdir() if path.suffix == ".safetensors"]
    assert len(shards) > 3
    assert all(path.stat().st_size < 110_000 for path in shards)
    whole, cut = ModelSource(tmp_path / "one"), ModelSource(tmp_path / "many")
    assert whole.names() == cut.names()
    assert all(torch.equal(whole.read(name), cut.read(name)) for name in whole.names())
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.written_bytes
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "many").lm_head.weight.shape == (320, 64)
    with pytest.raises(ConfigError, match="max_shard_bytes is 0"):
        rotate(open_source(original), tmp_path / "none", generator=seeded(), max_shard_bytes=0)


def test_values_that_the_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = open_source(write_tiny(tmp_path / "model", "llama-fp16"))
    name = "model.layers.1.mlp.up_proj.weight"
    folds = (ScaleColumns(factor=torch.full((64,), 1e8, dtype=torch.float64)),)
    plan = FoldPlan(tensors={name: FoldedTensor(name=name, origin=name, folds=folds)})
    with pytest.raises(CheckpointError, match=rf"tensor {name}: .* range of torch\.float16; write float32"):
        write_folded(source, tmp_path / "out", plan)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert write_folded(source, tmp_path / "out", plan, dtype=torch.float32).folded == (name,)


def test_one_tensor_at_a_time_is_read(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is read when it is written and not before; gains, which are small, also when folds are planned."""
    events: list[str] = []
    read, write = ModelSource.read, ShardWriter.write

    def reading(self: ModelSource, name: str) -> torch.Tensor:
        events.append(f"read {name}")
        return read(self, name)

    def writing(self: ShardWriter, name: str, values: torch.Tensor) -> None:
        events.append(f"write {name}")
        write(self, name, values)

    monkeypatch.setattr(ModelSource, "read", reading)
    monkeypatch.setattr(ShardWriter, "write", writing)
    rotate(open_source(original), tmp_path / "rotated", generator=seeded())
    first = next(i for i, event in enumerate(events) if event.startswith("write")) - 1
    assert all("norm" in event for event in events[:first])
    assert [event.split()[0] for event in events[first:]] == ["read", "write"] * ((len(events) - first) // 2)
