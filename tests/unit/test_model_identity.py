"""The fingerprint of a model folder: the same for the same model, another for another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_llama
from safetensors.torch import load_file, save_file

from tasks.model_identity import SAMPLE_BYTES, SAMPLES, model_fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", layers=1)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def edit_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))


def rename_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weighs"] = tensors.pop("model.norm.weight")
    save_file(tensors, path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "configuration": edit_config,
    "a tensor's name": rename_tensor,
    "the last byte": lambda folder: flip(folder / "model.safetensors", -1),
    "a byte in the middle": lambda folder: flip(folder / "model.safetensors", 40_000),
    "one byte more": lambda folder: lengthen(folder / "model.safetensors"),
    "a file's name": lambda folder: (folder / "model.safetensors").rename(folder / "m.safetensors"),
    "a tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "merges": lambda folder: (folder / "merges.txt").write_text("a b"),
    "a chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ x }}"),
    "a SentencePiece model": lambda folder: (folder / "tokenizer.model").write_bytes(b"x"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_makes_another_model_makes_another_fingerprint(folder: Path, change: str) -> None:
    before = model_fingerprint(folder)
    CHANGES[change](folder)
    assert model_fingerprint(folder) != before


def test_place_and_description_do_not_count(folder: Path, tmp_path: Path) -> None:
    before = model_fingerprint(folder)
    (folder / "README.md").write_text("about")
    (folder / "cache").mkdir()
    assert model_fingerprint(folder) == before
    other = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, other)
    assert model_fingerprint(other) == before
    linked = tmp_path / "linked"  # as in the hub's cache
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert model_fingerprint(linked) == before


def test_sharding_counts_and_other_weights_too(tmp_path: Path) -> None:
    one = write_llama(tmp_path / "one", layers=1)
    sharded = write_llama(tmp_path / "sharded", layers=1, max_shard_size="100KB")
    seeded = write_llama(tmp_path / "seeded", layers=1, seed=1)
    half = write_llama(tmp_path / "half", layers=1, dtype=torch.bfloat16)
    assert len({model_fingerprint(folder) for folder in (one, sharded, seeded, half)}) == 4


def test_a_large_file_is_sampled_from_its_first_to_its_last_byte(tmp_path: Path) -> None:
    """A change over as much as lies between two samples is always seen, wherever it is."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    path = folder / "model.safetensors"
    size = 3 * SAMPLES * SAMPLE_BYTES
    save_file({"w": torch.zeros(size // 4)}, path)
    before = model_fingerprint(folder)
    gap = size // (SAMPLES - 1)
    for start in (1000, size // 3, size - gap):
        content = path.read_bytes()
        path.write_bytes(content[:start] + b"\1" * gap + content[start + gap :])
        assert model_fingerprint(folder) != before
        path.write_bytes(content)
    assert model_fingerprint(folder) == before
