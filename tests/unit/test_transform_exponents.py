"""Sites scaled by powers of two: the very logits of the original, and weights whose scales fit 8 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import write_llama
from safetensors.torch import load_file, save_file
from tiny_images import write_classifier
from tiny_models import CASES, VOCABULARY, write_tiny
from transformers import AutoModelForCausalLM

from lrpq.errors import ModelError
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.transform.exponents import Exponents, ScaledSource, StoredScaledSource, exponents_plan
from lrpq.transform.graph import GRAPHS
from lrpq.transform.magnitudes import TARGET, SiteMagnitudes, best_residual, choose_exponents
from lrpq.transform.orthogonal import RotationKind
from lrpq.transform.rotated import RotatedSource, Rotation, StoredRotatedSource
from lrpq.transform.rotation import RotationScope
from lrpq.transform.writing import write_folded

TOKENS = torch.randint(3, VOCABULARY - 8, (2, 24), generator=torch.Generator().manual_seed(5))
SCALED = ["llama", "llama-rope-scaled", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3-moe"]
"""Heads of their own and tied ones, biases of all layers and of q, k, v alone, norms inside attention, fused layers,
experts; in all of them two query heads share their values."""
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
    assert exponents.residual != 0
    assert all(k != 0 for of_block in exponents.blocks for k in (of_block["qkv"], of_block["gate_up"]))
    assert (exponents.head != 0) is not source.config.tie_word_embeddings
    expected = streamed(source, dtype)
    for scaled in (ScaledSource(source, exponents), StoredScaledSource(source, exponents)):
        assert torch.equal(streamed(scaled, dtype), expected)
    report = write_folded(source, tmp_path / "scaled", exponents_plan(source, exponents))
    found = open_source(tmp_path / "scaled")
    assert found.config.rms_norm_eps == source.config.rms_norm_eps * 4.0**exponents.residual
    assert torch.equal(plain(tmp_path / "scaled", dtype), plain(source.folder, dtype))
    assert {ScaledSource(source, exponents).read_rows([key]).dtype for key in found.names()} == {dtype}
    changed = {key for key in found.names() if not torch.equal(found.read(key), source.read(key))}
    assert changed == set(report.folded)
    kept = [key for key in found.names() if key not in changed]
    of_kept = ("q_norm", "k_norm", "q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_proj.bias", "up_proj.bias")
    assert all(key.removesuffix(".weight").endswith(of_kept) for key in kept)


@pytest.mark.parametrize("std", [0.001, 0.02, 1.0])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "mixtral"])
def test_scales_land_in_range(name: str, std: float, tmp_path: Path) -> None:
    """Of all rows, from 2 to 8 bits."""
    source = written_as(tmp_path / "model", name, torch.bfloat16, std=std)
    before, after = absmax_by_module(source), absmax_by_module(ScaledSource(source, choose_exponents(source)))
    in_range = [float(absmax.min()) / 2**7 >= SMALLEST for absmax in before.values()]
    assert not any(in_range) or std == 1
    for module, absmax in after.items():
        assert float(absmax.min()) / 2**7 >= SMALLEST, module
        assert float(absmax.max()) / 2 <= LARGEST, module
        assert abs(math.log2(float(absmax.median())) - TARGET) < 1, module


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_norms_inside_attention(name: str, tmp_path: Path) -> None:
    """They have one epsilon with those of the residual stream, so not all layers reach the target; the range of 2 to 7
    bits all do."""
    source = written_as(tmp_path / "model", name, torch.bfloat16, std=0.02)
    after = absmax_by_module(ScaledSource(source, choose_exponents(source)))
    for module, absmax in after.items():
        assert float(absmax.median()) / 2**6 >= SMALLEST, module
        assert float(absmax.max()) / 2 <= LARGEST, module


def test_exponents_are_the_best_integers() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(number: int) -> tuple[float, ...]:
        return tuple((4 * torch.randn(number, generator=generator, dtype=torch.float64) - 4).tolist())

    for normed, plain, writing in [(2, 1, 2), (0, 3, 2), (2, 0, 1), (0, 0, 2), (1, 2, 0), (0, 2, 0), (0, 0, 0)]:
        sites = [SiteMagnitudes(plain=some(plain), normed=some(normed)) for _ in range(2)]
        written = some(writing)

        def squares(site: SiteMagnitudes, r: int, k: int) -> float:
            kinds = [m + k for m in site.plain], [m + k + r for m in site.normed]
            return sum(fmean((m - TARGET) ** 2 for m in kind) for kind in kinds if kind)

        def total(r: int, ks: Sequence[int], sites: Any = sites, written: Any = written) -> float:
            return sum((m + r - TARGET) ** 2 for m in written) + sum(map(squares, sites, (r, r), ks))

        r = best_residual(sites, written)
        found = total(r, [site.best(r)[0] for site in sites])
        brute = min(
            sum((m + r - TARGET) ** 2 for m in written)
            + sum(min(squares(site, r, k) for k in range(-50, 51)) for site in sites)
            for r in range(-50, 51)
        )
        assert found == pytest.approx(brute, abs=1e-9)


def test_a_layer_of_zeros_has_no_say(tmp_path: Path) -> None:
    source = written_as(tmp_path / "model", "llama", torch.float32)
    before = choose_exponents(source)
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.gate_proj.weight"].zero_()
    for name in ("q", "k", "v", "o"):
        tensors[f"model.layers.1.self_attn.{name}_proj.weight"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_source(tmp_path / "model")
    after = choose_exponents(source)
    assert after.blocks[0] == before.blocks[0]
    assert after.blocks[1] == before.blocks[1] | {"qkv": 0}
    assert after.residual == before.residual
    assert torch.equal(streamed(ScaledSource(source, after), torch.float32), streamed(source, torch.float32))


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
    reason = "gain - 1" if "Gemma" in architecture else "norms have biases"
    expected = f"{architecture} cannot be scaled by powers of two: .*{reason}.*; compress it with scales of 16 bits"
    with pytest.raises(ModelError, match=expected):
        choose_exponents(source)
    with pytest.raises(ModelError, match="cannot be scaled by powers of two"):
        ScaledSource(source, Exponents(blocks=({}, {}), residual=0, head=0))


def test_image_classifiers_are_refused(tmp_path: Path) -> None:
    source = open_source(write_classifier(tmp_path / "model", "vit"))
    with pytest.raises(
        ModelError, match="ViTForImageClassification cannot be scaled by powers of two: its norms have b"
    ):
        choose_exponents(source)


def test_float16_is_refused(tmp_path: Path) -> None:
    source = open_source(write_tiny(tmp_path / "model", "llama-fp16"))
    for refused in (
        choose_exponents,
        lambda source: ScaledSource(source, Exponents(blocks=({}, {}), residual=0, head=0)),
    ):
        with pytest.raises(ModelError, match=r"is stored in float16.*give the model in bfloat16"):
            refused(source)


OF_BLOCK = {"qkv": 1, "gate_up": 2}


@pytest.mark.parametrize(
    "exponents",
    [
        Exponents(blocks=(OF_BLOCK,), residual=0, head=0),
        Exponents(blocks=(OF_BLOCK, {"fc1": 2}), residual=0, head=0),
        Exponents(blocks=(OF_BLOCK, OF_BLOCK), residual=0, head=3),
    ],
)
def test_exponents_of_another_model(exponents: Exponents, tmp_path: Path) -> None:
    source = open_source(write_tiny(tmp_path / "model", "qwen2"))
    expected = "has 2 blocks with norms before gate_up, qkv and a tied head; the powers of two are another model's"
    with pytest.raises(ModelError, match=expected):
        ScaledSource(source, exponents)
    assert ScaledSource(source, Exponents(blocks=(OF_BLOCK, OF_BLOCK), residual=0, head=0)).names()


@pytest.mark.parametrize("on_disk", ["embedding", "head", "both"])
def test_a_tied_head_is_scaled_wherever_its_tensor_lies(on_disk: str, tmp_path: Path) -> None:
    source = written_as(tmp_path / "model", "qwen2", torch.float32)
    path = tmp_path / "model/model.safetensors"
    stored = load_file(path)
    if on_disk != "embedding":
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    if on_disk == "head":
        del stored["model.embed_tokens.weight"]
    save_file(stored, path, metadata={"format": "pt"})
    source = open_source(tmp_path / "model")
    exponents = choose_exponents(source)
    assert torch.equal(streamed(ScaledSource(source, exponents), torch.float32), streamed(source, torch.float32))
    write_folded(source, tmp_path / "scaled", exponents_plan(source, exponents))
    assert torch.equal(plain(tmp_path / "scaled", torch.float32), plain(source.folder, torch.float32))


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
        assert float(absmax.min()) / 2**7 >= SMALLEST, module
        assert float(absmax.max()) / 2 <= LARGEST, module
    # what is stored is what computes, rounded once
    for key in scaled.names():
        assert torch.equal(scaled.read(key), scaled.read_rows([key]).to(scaled.dtype(key)))
        assert torch.equal(as_stored.read_rows([key]), scaled.read(key))
