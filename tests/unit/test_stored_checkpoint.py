"""Reading a written checkpoint back: the very codes that were written, or an error that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_llama
from safetensors.torch import load_file, save_file

from lrpq.checkpoint.assemble import write_checkpoint
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.errors import CheckpointError
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.rtn import round_to_nearest

CHOICES = {
    "model.layers.0.self_attn.q_proj": Choice(bits=3, group_size=32),
    "model.layers.0.self_attn.k_proj": Choice(bits=3, group_size=32),
    "model.layers.0.mlp.down_proj": Choice(bits=8, group_size=-1),
    "model.layers.1.self_attn.q_proj": Choice(bits=4, group_size=64),
    "model.layers.1.mlp.up_proj": Choice(bits=5, group_size=-1),
}


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return ModelSource(write_llama(tmp_path / "model", layers=2))


def codes(source: ModelSource, name: str) -> QuantizedWeight:
    return round_to_nearest(source.read(f"{name}.weight"), CHOICES[name])


def written(source: ModelSource, output: Path, *, max_shard_bytes: int = 10**9) -> Path:
    write_checkpoint(
        source,
        output,
        quantized=lambda name: codes(source, name),
        choices=CHOICES,
        manifest={},
        max_shard_bytes=max_shard_bytes,
    )
    return output


@pytest.fixture(params=[10**9, 50_000], ids=["one file", "shards"])
def checkpoint(request: pytest.FixtureRequest, source: ModelSource, tmp_path: Path) -> Path:
    return written(source, tmp_path / "out", max_shard_bytes=request.param)


def test_codes_come_back_as_they_were_written(checkpoint: Path, source: ModelSource) -> None:
    stored = StoredCheckpoint(checkpoint)
    assert stored.modules() == sorted(CHOICES)
    for name, choice in CHOICES.items():
        assert stored.choice(name) == choice
        found, expected = stored.codes(name), codes(source, name)
        assert found is not None
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)
        assert found.choice == choice


def test_a_module_left_alone_has_neither_choice_nor_codes(checkpoint: Path) -> None:
    stored = StoredCheckpoint(checkpoint)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        assert stored.choice(name) is None
        assert stored.codes(name) is None


def test_a_module_of_another_model_is_not_taken_for_one_left_alone(checkpoint: Path) -> None:
    stored = StoredCheckpoint(checkpoint)
    with pytest.raises(CheckpointError, match=r"module model\.layers\.2\.mlp\.up_proj: has neither codes nor a weight"):
        stored.codes("model.layers.2.mlp.up_proj")


def test_a_folder_that_is_no_checkpoint(source: ModelSource, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json; expected a folder written by lrpq compress"):
        StoredCheckpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="not the configuration of a packed checkpoint"):
        StoredCheckpoint(source.folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": "marlin-24"}, "format 'marlin-24'; expected pack-quantized"),
        ({"config_groups": {"group_0": {}}}, "not the configuration"),
        ({"config_groups": {"g": {"targets": ["re:("], "weights": {"strategy": "channel", "num_bits": 4}}}}, "not the"),
        ({"config_groups": {}}, "has packed codes but no group"),
    ],
)
def test_a_configuration_that_does_not_fit(checkpoint: Path, change: dict[str, object], expected: str) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=expected):
        StoredCheckpoint(checkpoint).codes("model.layers.0.mlp.down_proj")


def test_a_truncated_file_is_named(checkpoint: Path) -> None:
    path = max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{path.name}: missing, truncated or damaged"):
        StoredCheckpoint(checkpoint)


def test_a_missing_shard_is_named(source: ModelSource, tmp_path: Path) -> None:
    output = written(source, tmp_path / "out", max_shard_bytes=50_000)
    path = sorted(output.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name}: missing, truncated or damaged"):
        StoredCheckpoint(output)


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"weight_map": {"a": "../model/model.safetensors"}}', '{"weight_map": 3}']
)
def test_an_index_that_is_none(source: ModelSource, tmp_path: Path, index: str) -> None:
    output = written(source, tmp_path / "out", max_shard_bytes=50_000)
    (output / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"not a safetensors index|leaves the folder"):
        StoredCheckpoint(output)


def test_codes_without_their_scales(source: ModelSource, tmp_path: Path) -> None:
    output = written(source, tmp_path / "out")
    path = output / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.down_proj.weight_scale"]
    save_file(tensors, path)
    stored = StoredCheckpoint(output)
    with pytest.raises(
        CheckpointError, match=r"down_proj\.weight_scale: is in no file .*; the checkpoint is incomplete"
    ):
        stored.codes("model.layers.0.mlp.down_proj")
    assert stored.codes("model.layers.1.mlp.up_proj") is not None


def test_codes_of_another_width_than_their_group_says(source: ModelSource, tmp_path: Path) -> None:
    output = written(source, tmp_path / "out")
    path = output / "config.json"
    text = path.read_text()
    assert '"num_bits": 8' in text
    path.write_text(text.replace('"num_bits": 8', '"num_bits": 6'))
    with pytest.raises(CheckpointError, match="is no 6b/channel layer"):
        StoredCheckpoint(output).codes("model.layers.0.mlp.down_proj")
