"""A model that is rotated as it is read: the tensors that a written rotation has, and the function of the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from tiny_models import CASES, VOCABULARY, write_tiny
from transformers import AutoModelForCausalLM

from lrpq.checkpoint.assemble import planned_size, write_checkpoint
from lrpq.checkpoint.formats import CheckpointFormat
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.checkpoint.verify import verify_checkpoint
from lrpq.errors import CheckpointError, ModelError
from lrpq.model.described import DescribedModel
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.rtn import round_to_nearest
from lrpq.transform.graph import GRAPHS
from lrpq.transform.orthogonal import RotationKind
from lrpq.transform.rotated import RotatedSource, Rotation, StoredRotatedSource, open_rotated
from lrpq.transform.rotation import RotationScope, rotate

ROTATABLE = [
    name
    for name, case in CASES.items()
    if case.architecture in GRAPHS and GRAPHS[case.architecture].no_rotation is None
]
HADAMARD = Rotation(kind=RotationKind.HADAMARD, scope=RotationScope.RESIDUAL_AND_VALUES, seed=3)
TOLERANCE = 1e-5  # of the largest logit, in float32
TOKENS = torch.randint(3, VOCABULARY - 8, (2, 24), generator=torch.Generator().manual_seed(5))


def written(source: ModelSource, folder: Path, rotation: Rotation, dtype: torch.dtype | None = None) -> ModelSource:
    """The same rotation, written to a folder."""
    generator = torch.Generator().manual_seed(rotation.seed)
    rotate(source, folder, generator=generator, kind=rotation.kind, scope=rotation.scope, dtype=dtype)
    return ModelSource(folder)


def streamed(source: ModelSource, tokens: torch.Tensor) -> torch.Tensor:
    stream = BlockStream(source, dtype=torch.float32)
    hidden = stream.embed(tokens)
    for index, block in stream.stream(range(stream.num_blocks)):
        hidden = stream.run(block, index, hidden)
    with stream.head() as (norm, head):
        return head(norm(hidden))


@torch.no_grad()
def plain(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("name", ROTATABLE)
def test_tensors_are_those_that_rotate_writes(name: str, tmp_path: Path) -> None:
    """Tied and untied heads, biases, fused projections, experts, shards that split a block, three stored types."""
    original = open_source(write_tiny(tmp_path / "model", name))
    rotated = open_rotated(original.folder, HADAMARD)
    exact = written(original, tmp_path / "float32", HADAMARD, torch.float32)
    stored = written(original, tmp_path / "stored", HADAMARD)
    assert rotated.names() == exact.names()
    assert rotated.config_document() == stored.config_document()
    tied = bool(CASES[name].options.get("tie_word_embeddings", False))
    assert (original.config.tie_word_embeddings, rotated.config.tie_word_embeddings) == (tied, False)
    assert set(rotated.names()) - set(original.names()) == ({"lm_head.weight"} if tied else set())
    changed = 0
    for tensor in rotated.names():
        assert tensor in rotated
        assert rotated.dtype(tensor) == stored.dtype(tensor)
        assert rotated.shape(tensor) == stored.shape(tensor)
        assert rotated.nbytes(tensor) == stored.nbytes(tensor)
        computed = rotated.read_rows([tensor])
        assert torch.equal(computed.float(), exact.read(tensor))
        assert computed.dtype is torch.float32 or torch.equal(computed, original.read(tensor))  # not folded
        assert torch.equal(rotated.read(tensor), stored.read(tensor))
        assert rotated.read(tensor).dtype is stored.dtype(tensor)
        as_stored = StoredRotatedSource(original, HADAMARD).read_rows([tensor])
        assert torch.equal(as_stored, stored.read(tensor))
        changed += tensor not in original or not torch.equal(computed, original.read(tensor).float())
    assert changed > len(rotated.names()) / 2
    assert isinstance(rotated, RotatedSource)
    assert rotated.added_bytes == (original.nbytes("model.embed_tokens.weight") if tied else 0)


def test_parts_on_disk_make_the_layer(tmp_path: Path) -> None:
    """Several tensors that are one layer in the model are folded one by one and then put together."""
    original = open_source(write_tiny(tmp_path / "model", "qwen3-moe"))
    rotated, exact = RotatedSource(original, HADAMARD), written(original, tmp_path / "out", HADAMARD, torch.float32)
    parts = [f"model.layers.1.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up")]
    assert torch.equal(rotated.read_rows(parts), torch.cat([exact.read(part) for part in parts]))


@pytest.mark.parametrize("name", ROTATABLE)
def test_streamed_forward_is_the_originals(name: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", name)
    expected = plain(folder, TOKENS)
    found = streamed(open_rotated(folder, HADAMARD), TOKENS)
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE


def test_a_head_on_disk_beside_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    """Some checkpoints store both; then no name is added, and the two become different."""
    folder = write_llama(tmp_path / "model", tied=False)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"tie_word_embeddings": True}))
    rotated = RotatedSource(open_source(folder), HADAMARD)
    assert rotated.names() == open_source(folder).names()
    assert rotated.added_bytes == 0
    assert rotated.config.tie_word_embeddings is False


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt-neox", "gemma2", "gemma3", "gemma3-multimodal"])
def test_what_cannot_be_rotated_is_refused(name: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", name)
    with pytest.raises(ModelError, match="cannot be rotated"):
        open_rotated(folder, HADAMARD)
    assert open_rotated(folder, None).names()


def test_a_value_beyond_the_stored_type(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama-fp16")
    source = open_source(folder)

    class Huge(ModelSource):
        def read(self, name: str) -> torch.Tensor:
            found = super().read(name)
            return torch.full_like(found, 6e4) if name == "model.embed_tokens.weight" else found

    assert torch.isfinite(source.read("model.embed_tokens.weight")).all()
    rotated = RotatedSource(Huge(folder), HADAMARD)
    assert torch.isfinite(rotated.read_rows(["model.embed_tokens.weight"])).all()
    with pytest.raises(ModelError, match=r"embed_tokens.* leaves the range of torch\.float16"):
        rotated.read("model.embed_tokens.weight")
    with pytest.raises(ModelError, match=r"model\.nothing is missing"):
        rotated.read("model.nothing")


def test_nothing_large_is_kept(tmp_path: Path) -> None:
    """What a rotated source holds between two reads grows with the blocks' norms, not with their matrices."""
    rotated = RotatedSource(open_source(write_llama(tmp_path / "model", hidden=256, ffn=512)), HADAMARD)
    held: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            held[value.untyped_storage().data_ptr()] = value.nbytes
        elif isinstance(value, list | tuple):
            for item in value:
                count(item)

    for made in rotated._made.values():
        for fold in made.folds:
            count(getattr(fold, "factor", None))
            Q = getattr(fold, "Q", None)
            count([Q.signs, *Q.factors] if Q is not None else None)
    gains = 8 * 256 * (2 * 3 + 1)
    assert 0 < sum(held.values()) <= gains + 8 * 256 + 2 * 8 * 16 * 16 + 3 * (8 * 64 + 8 * 64 * 64)


def test_a_described_model_has_the_rotated_ones_names_and_bytes(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen2")
    described, real = RotatedSource(DescribedModel(folder), HADAMARD), RotatedSource(open_source(folder), HADAMARD)
    assert described.names() == real.names()
    assert {n: described.nbytes(n) for n in described.names()} == {n: real.nbytes(n) for n in real.names()}
    assert described.read("model.layers.0.self_attn.o_proj.weight").is_meta


@pytest.mark.parametrize("format", [CheckpointFormat.COMPRESSED_TENSORS, CheckpointFormat.DENSE])
@pytest.mark.parametrize("name", ROTATABLE)
def test_a_checkpoint_of_it_is_written_and_proved(name: str, format: CheckpointFormat, tmp_path: Path) -> None:
    source = open_rotated(write_tiny(tmp_path / "model", name), HADAMARD)
    stream = BlockStream(source, dtype=torch.float32)
    by_name = {spec.name: spec for spec in stream.specs}
    choices = {
        spec.name: Choice(bits=4, group_size=32) for spec in stream.specs if spec.input_site != "o" or spec.block
    }

    def load(module: str) -> QuantizedWeight:
        return round_to_nearest(stream.weight(by_name[module]), choices[module], name=module)

    output = tmp_path / "out"
    made = {"quantized": load, "choices": choices, "specs": stream.specs, "format": format}
    size = write_checkpoint(source, output, manifest={}, **made)
    assert size == planned_size(source, choices, specs=stream.specs, format=format)
    assert size.total_bytes == sum(path.stat().st_size for path in output.glob("*.safetensors"))
    proof = verify_checkpoint(output, source, **made)
    assert proof.max_abs_difference == 0.0
    assert proof.loader == "transformers"
    model: Any = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.tie_word_embeddings is False
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    # a checkpoint of the original's weights is not taken for one of the rotated model's
    with pytest.raises(CheckpointError, match=r"values differ|was not meant to be written"):
        verify_checkpoint(output, open_source(tmp_path / "model"), **made)
    if format is CheckpointFormat.COMPRESSED_TENSORS:
        assert StoredCheckpoint(output).modules()
