"""Sites scaled by powers of two: the very logits of the original, and weights whose scales fit 8 bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from safetensors.torch import load_file, save_file
from tiny_models import CASES, VOCABULARY, write_tiny
from transformers import AutoModelForCausalLM

from lrpq.errors import ModelError
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.transform.exponents import Exponents, ScaledSource, StoredScaledSource, exponents_plan
from lrpq.transform.graph import GRAPHS
from lrpq.transform.magnitudes import TARGET, best_pair, choose_exponents
from lrpq.transform.orthogonal import RotationKind
from lrpq.transform.rotated import RotatedSource, Rotation, StoredRotatedSource
from lrpq.transform.rotation import RotationScope
from lrpq.transform.writing import write_folded

TOKENS = torch.randint(3, VOCABULARY - 8, (2, 24), generator=torch.Generator().manual_seed(5))
SCALED = ["llama", "llama-rope-scaled", "mistral", "qwen2", "qwen3", "phi3"]
"""Heads of their own and tied ones, biases of all layers and of q, k, v alone, norms inside attention, fused layers; in
all of them two query heads share their values."""
REFUSED = [
    name for name, case in CASES.items() if case.architecture in GRAPHS and GRAPHS[case.architecture].no_exponents
]
HADAMARD = Rotation(kind=RotationKind.HADAMARD, scope=RotationScope.RESIDUAL_AND_VALUES, seed=3)
SMALLEST, LARGEST = 2.0**-6, 448.0
"""Normal numbers of float8_e4m3fn."""


def streamed(source: ModelSource, dtype: torch.dtype) -> torch.Tensor:
    stream = BlockStream(source, dtype=dtype)
    hidden = stream.embed(TOKENS)
    for index, block in stream.stream(range(stream.num_blocks)):
        hidden = stream.run(block, index, hidden)
    with stream.head() as (norm, head):
        return head(norm(hidden))


@torch.no_grad()
def plain(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(input_ids=TOKENS, use_cache=False).logits


def written_as(folder: Path, name: str, dtype: torch.dtype, *, std: float | None = None) -> ModelSource:
    """A tiny model, stored in a type; its matrices as small or large as asked for."""
    write_tiny(folder, name)
    path = folder / "model.safetensors"
    tensors = {key: value.to(dtype) for key, value in load_file(path).items()}
    if std is not None:
        tensors = {key: value if value.ndim < 2 else value / value.std() * std for key, value in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return open_source(folder)


def absmax_by_module(source: ModelSource) -> dict[str, torch.Tensor]:
    """Absmax of all rows of every layer of the blocks, 64 or 96 columns wide."""
    stream = BlockStream(source, dtype=torch.float32)
    return {spec.name: stream.weight(spec).abs().amax(1) for spec in stream.specs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCALED)
def test_logits_are_the_originals_to_the_last_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = written_as(tmp_path / "model", name, dtype)
    exponents = choose_exponents(source)
    assert all(set(of_block) == {"qkv", "o", "gate_up", "down"} for of_block in exponents.blocks)
    assert all(k != 0 for of_block in exponents.blocks for k in of_block.values())
    assert (exponents.head != 0) is not source.config.tie_word_embeddings
    expected = streamed(source, dtype)
    for scaled in (ScaledSource(source, exponents), StoredScaledSource(source, exponents)):
        assert torch.equal(streamed(scaled, dtype), expected)
    report = write_folded(source, tmp_path / "scaled", exponents_plan(source, exponents))
    assert not report.skipped
    assert torch.equal(plain(tmp_path / "scaled", dtype), plain(source.folder, dtype))
    # every layer of the blocks and every norm before one is another
    found, original = open_source(tmp_path / "scaled"), source
    changed = {key for key in found.names() if not torch.equal(found.read(key), original.read(key))}
    kept = {key for key in found.names() if key not in changed}
    assert changed == set(report.folded)
    assert all(
        any(part in key for part in ("embed", "lm_head", "model.norm", "q_norm", "k_norm", "bias")) for key in kept
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize(("std", "widths"), [(0.001, (2, 6)), (0.02, (2, 8)), (1.0, (2, 8))])
def test_scales_land_in_range(name: str, std: float, widths: tuple[int, int], tmp_path: Path) -> None:
    """Typical groups at all widths, and no group's scale above the largest number but for the tiniest weights."""
    source = written_as(tmp_path / "model", name, torch.bfloat16, std=std)
    low, high = widths
    before, after = absmax_by_module(source), absmax_by_module(ScaledSource(source, choose_exponents(source)))
    if std < 0.1:
        assert not all(float(absmax.median()) / 2 ** (high - 1) >= SMALLEST for absmax in before.values())
    for module, absmax in after.items():
        assert float(absmax.median()) / 2 ** (high - 1) >= SMALLEST, module
        assert float(absmax.max()) / 2 ** (low - 1) <= LARGEST, module


def test_exponents_balance_a_chain() -> None:
    for readers, feed, last in [
        ([-4.0, -4.1], -4.0, -4.2),
        ([0.0], 6.0, -20.0),
        ([-9.0, -2.0], None, -3.0),
        ([3.0], 2.0, None),
        ([], -5.0, 8.0),
        ([TARGET], TARGET, TARGET),
        ([], None, None),
    ]:

        def worst(a: int, b: int, readers: Any = readers, feed: Any = feed, last: Any = last) -> float:
            known = [m + a for m in readers]
            known += [] if feed is None else [feed + a - b]
            known += [] if last is None else [last + b]
            return max((abs(m - TARGET) for m in known), default=0.0)

        brute = min(worst(a, b) for a in range(-80, 81) for b in range(-80, 81))
        assert worst(*best_pair(readers, feed, last)) == brute
    assert best_pair([-5.0, -5.0], -5.0, -5.0) == (12, 6)
    assert best_pair([TARGET], TARGET, TARGET) == (0, 0)
    assert best_pair([], None, None) == (0, 0)


def test_a_layer_of_zeros_has_no_say(tmp_path: Path) -> None:
    source = written_as(tmp_path / "model", "llama", torch.float32)
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.gate_proj.weight"].zero_()
    for name in ("q", "k", "v", "o"):
        tensors[f"model.layers.1.self_attn.{name}_proj.weight"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    before, source = choose_exponents(source), open_source(tmp_path / "model")
    after = choose_exponents(source)
    assert after.blocks[0]["qkv"] == before.blocks[0]["qkv"]
    assert after.blocks[1] == before.blocks[1] | {"qkv": 0, "o": 0}
    found = absmax_by_module(ScaledSource(source, after))
    for layer in ("up", "down"):  # two unknowns for two layers
        assert abs(math.log2(float(found[f"model.layers.0.mlp.{layer}_proj"].median())) - TARGET) < 1


def test_few_rows_are_read_and_the_same_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_llama(tmp_path / "model", hidden=128, ffn=512)
    bytes_read = 0
    read_bytes = ModelSource._read_bytes

    def counting(self: ModelSource, name: str, start: int, memory: Any) -> None:
        nonlocal bytes_read
        bytes_read += memory.nbytes
        read_bytes(self, name, start, memory)

    monkeypatch.setattr(ModelSource, "_read_bytes", counting)
    found = choose_exponents(open_source(folder))
    assert 0 < bytes_read <= 16 * 4 * (3 * (6 * 128 + 512) + 128)
    assert choose_exponents(open_source(folder)) == found
    monkeypatch.undo()

    class Unsliced(ModelSource):
        def read(self, name: str) -> torch.Tensor:
            return super().read(name)

    assert not Unsliced(folder).reads_files
    assert choose_exponents(Unsliced(folder)) == found


def test_some_rows_of_a_tensor(tmp_path: Path) -> None:
    source = written_as(tmp_path / "model", "llama", torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(source.read_some(name, [3, 0, 63]), source.read(name)[[3, 0, 63]])
    assert source.read_some("model.norm.weight", [5]).tolist() == source.read("model.norm.weight")[5:6].tolist()
    assert source.read_some(name, []).shape == (0, 96)
    with pytest.raises(IndexError):
        source.read_some(name, [64])
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    tensors[name][7, 2] = math.inf
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_source(tmp_path / "model")
    assert source.read_some(name, [6, 8]).shape == (2, 96)
    with pytest.raises(ModelError, match="1 values are NaN or infinite"):
        source.read_some(name, [7])


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_rounded_is_refused(name: str, tmp_path: Path) -> None:
    source = open_source(write_tiny(tmp_path / "model", name))
    architecture = CASES[name].architecture
    reason = (
        "gain - 1"
        if "Gemma" in architecture
        else "routers"
        if "ixtral" in architecture or "Moe" in architecture
        else "MLP"
    )
    with pytest.raises(ModelError, match=f"{architecture} cannot be scaled by powers of two: .*{reason}"):
        choose_exponents(source)
    with pytest.raises(ModelError, match="cannot be scaled by powers of two"):
        ScaledSource(source, Exponents(blocks=({}, {})))


def test_float16_is_refused(tmp_path: Path) -> None:
    source = open_source(write_tiny(tmp_path / "model", "llama-fp16"))
    for refused in (choose_exponents, lambda source: ScaledSource(source, Exponents(blocks=({}, {})))):
        with pytest.raises(ModelError, match=r"is stored in float16.*give the model in bfloat16"):
            refused(source)


@pytest.mark.parametrize(
    ("exponents", "expected"),
    [
        (Exponents(blocks=({},)), "has 2 blocks, and a head that is tied; .* another model, with 1 blocks"),
        (Exponents(blocks=({}, {"fc1": 2})), "block 1 has no site fc1"),
        (Exponents(blocks=({}, {}), head=3), "a head that is tied"),
    ],
)
def test_exponents_of_another_model(exponents: Exponents, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=expected):
        ScaledSource(open_source(write_tiny(tmp_path / "model", "qwen2")), exponents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_on_top_of_a_rotation(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The rotated model's logits, chosen by a few rows of the original; a head that the rotation unties is scaled."""
    source = written_as(tmp_path / "model", name, dtype, std=0.02)
    rotated, stored = RotatedSource(source, HADAMARD), StoredRotatedSource(source, HADAMARD)
    exponents = choose_exponents(source, rotated.plan)
    assert exponents.head > 0
    scaled = ScaledSource(rotated, exponents)
    assert torch.equal(streamed(scaled, torch.float32), streamed(rotated, torch.float32))
    as_stored = StoredScaledSource(stored, exponents)
    assert torch.equal(streamed(as_stored, dtype), streamed(stored, dtype))
    assert scaled.original is source
    assert (scaled.unties_head, scaled.added_bytes) == (rotated.unties_head, rotated.added_bytes)
    for module, absmax in absmax_by_module(scaled).items():
        assert float(absmax.median()) / 2**6 >= SMALLEST, module
        assert float(absmax.max()) / 2 <= LARGEST, module
    # what is stored is what computes, rounded once
    for key in scaled.names():
        assert torch.equal(scaled.read(key), scaled.read_rows([key]).to(scaled.dtype(key)))
        assert torch.equal(as_stored.read_rows([key]), scaled.read(key))
