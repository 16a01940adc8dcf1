"""A streamed forward is the model's own, whatever the checkpoint looks like on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_llama
from transformers import AutoModelForCausalLM

from lrpq.errors import ModelError
from lrpq.model.safetensors_source import ModelSource, resolve_model
from lrpq.model.streaming import BlockStream


def streamed_logits(stream: BlockStream, tokens: torch.Tensor) -> torch.Tensor:
    hidden = stream.embed(tokens)
    with torch.no_grad():
        for index, block in stream.stream(range(stream.num_blocks)):
            hidden = stream.run(block, index, hidden)
        with stream.head() as (norm, head):
            return head(norm(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tied", "shard"), [(False, "5GB"), (True, "100KB")])
def test_streamed_forward_equals_the_models_own(tmp_path: Path, dtype: torch.dtype, tied: bool, shard: str) -> None:
    folder = write_llama(tmp_path / "m", dtype=dtype, tied=tied, max_shard_size=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "100KB")
    compute = torch.float32 if dtype == torch.float16 else dtype
    tokens = torch.randint(0, 128, (3, 17), generator=torch.Generator().manual_seed(1))
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=compute).eval()
    with torch.no_grad():
        expected = own(tokens).logits
    stream = BlockStream(ModelSource(folder), dtype=compute)
    assert torch.equal(streamed_logits(stream, tokens), expected)


def test_only_one_block_has_weights(llama_folder: Path) -> None:
    stream = BlockStream(ModelSource(llama_folder), dtype=torch.float32)
    stream.embed(torch.zeros(1, 4, dtype=torch.long))

    def materialised() -> list[str]:
        return [n for n, p in stream.model.named_parameters() if not p.is_meta]

    assert materialised() == []
    for index, _ in stream.stream([2, 0, 1]):
        assert {name.split(".")[2] for name in materialised()} == {str(index)}
    assert materialised() == []
    with pytest.raises(RuntimeError), stream.block(1):
        raise RuntimeError
    assert materialised() == []


def test_a_walk_that_turns_reads_its_last_block_once(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = BlockStream(ModelSource(llama_folder), dtype=torch.float32)
    stream.embed(torch.zeros(1, 4, dtype=torch.long))
    read: list[int] = []
    bring = stream._bring_block
    monkeypatch.setattr(stream, "_bring_block", lambda index: (read.append(index), bring(index))[1])
    weights: dict[int, list[torch.Tensor]] = {}
    walked = []
    for index, block in stream.stream([0, 1, 2, 2, 1, 0]):
        walked.append(index)
        weights.setdefault(index, []).append(block.self_attn.o_proj.weight.detach().clone())
    assert walked == [0, 1, 2, 2, 1, 0]
    assert read == [0, 1, 2, 1, 0]
    assert all(torch.equal(*both) for both in weights.values())


def test_overrides_replace_weights(llama_folder: Path) -> None:
    stream = BlockStream(ModelSource(llama_folder), dtype=torch.float32)
    name = stream.block_specs(1)[3].name
    with stream.block(1, {name: torch.full((64, 64), 7.0)}) as block:
        assert torch.equal(block.self_attn.o_proj.weight, torch.full((64, 64), 7.0))
    with stream.block(1) as block:
        assert not torch.equal(block.self_attn.o_proj.weight, torch.full((64, 64), 7.0))


@pytest.mark.parametrize(("stored", "reads"), [(torch.bfloat16, 0), (torch.float32, 1)])
def test_a_weight_has_the_digits_on_disk_wherever_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, reads: int
) -> None:
    """A block in memory answers for its layers, but for what was rounded on the way or replaced."""
    stream = BlockStream(ModelSource(write_llama(tmp_path / "m", dtype=stored)), dtype=torch.bfloat16, prefetch=False)
    kept, replaced = stream.block_specs(1)[3], stream.block_specs(1)[4]
    there = {spec: stream.source.read(f"{spec.name}.weight").float() for spec in (kept, replaced)}
    assert all(torch.equal(stream.weight(spec), W) for spec, W in there.items())
    stream.embed(torch.zeros(1, 4, dtype=torch.long))
    with stream.block(1, {replaced.name: torch.zeros_like(there[replaced])}) as block:
        asked: list[tuple[str, ...]] = []
        read_rows = stream.source.read_rows
        monkeypatch.setattr(stream.source, "read_rows", lambda names: (asked.append(tuple(names)), read_rows(names))[1])
        for spec, W in there.items():
            assert torch.equal(stream.weight(spec), W)
        assert len(asked) == reads + 1
        stream.weight(kept).zero_()
        assert block.self_attn.o_proj.weight.any()
        with stream.swapped(block, {kept.name: torch.zeros_like(there[kept])}):
            assert torch.equal(stream.weight(kept), there[kept])
    asked.clear()
    assert torch.equal(stream.weight(kept), there[kept])
    assert len(asked) == 1


def test_specs_name_every_linear_of_the_blocks(llama_folder: Path) -> None:
    stream = BlockStream(ModelSource(llama_folder), dtype=torch.float32)
    assert len(stream.specs) == 3 * 7
    assert list(stream.sites(2)) == ["qkv", "o", "gate_up", "down"]
    q = stream.specs[0]
    assert (q.name, q.d_out, q.d_in, q.fused_group) == ("model.layers.0.self_attn.q_proj", 64, 64, "model.layers.0.qkv")
    assert torch.equal(stream.weight(q), stream.source.read(q.name + ".weight"))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m", max_shard_size="100KB")
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=shard.name):
        ModelSource(folder)


def test_corrupt_header_is_named(llama_folder: Path) -> None:
    shard = first_shard(llama_folder)
    shard.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match=shard.name):
        ModelSource(llama_folder)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m", max_shard_size="100KB")
    shard = first_shard(folder)
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        ModelSource(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(llama_folder: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    shard = first_shard(llama_folder)
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    stream = BlockStream(ModelSource(llama_folder), dtype=torch.float32)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"), stream.block(1):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM.*supported: GPT2LMHeadModel, .*LlamaForCausalLM"),
        ({"architectures": ["GPTNeoXForCausalLM"]}, "module gpt_neox.layers: not in the LlamaForCausalLM"),
        ({"intermediate_size": 256}, "config.json asks for"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized"),
    ],
)
def test_configuration_that_does_not_fit(llama_folder: Path, change: dict[str, object], message: str) -> None:
    path = llama_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        BlockStream(ModelSource(llama_folder), dtype=torch.float32)


def test_folder_without_safetensors(tmp_path: Path, llama_folder: Path) -> None:
    first_shard(llama_folder).unlink()
    with pytest.raises(ModelError, match="no \\*\\.safetensors"):
        ModelSource(llama_folder)
    with pytest.raises(ModelError, match=r"no config\.json"):
        ModelSource(tmp_path)


def test_index_cannot_leave_the_folder(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m", max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="leaves the model folder"):
        ModelSource(folder)


def test_unknown_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for model in ("/no/such/folder", "./nothing-here", "no-owner/no-such-model"):
        with pytest.raises(ModelError) as caught:
            resolve_model(model)
        assert model in str(caught.value)
        assert "\n" not in str(caught.value)
