"""A whole tuning of tiny models: what it returns is what it measured, and never worse than the start."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, write_tiny
from torch import Tensor

from lrpq.errors import CalibrationError, ConfigError, QuantizationError
from lrpq.evaluate.divergence import score_windows
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import Grid, QuantizedWeight, code_range
from lrpq.quant.packing import pack, unpack
from lrpq.quant.rtn import round_to_nearest
from lrpq.tune.options import Trained, TuneOptions, rate_factor
from lrpq.tune.run import Tuned, tune
from lrpq.tune.sweep import TuneSweep

CHOICE = Choice(bits=2, group_size=8)
ALL = Trained.SCALES | Trained.VECTORS | Trained.CODES
WINDOWS = torch.randint(3, VOCABULARY - 8, (8, 16), generator=torch.Generator().manual_seed(5))
HELD_OUT = torch.randint(3, VOCABULARY - 8, (3, 16), generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tune") / "llama", "llama", hidden_size=32)


def stream_of(folder: Path, dtype: torch.dtype = torch.float32) -> BlockStream:
    return BlockStream(open_source(folder), dtype=dtype)


def quantized(stream: BlockStream, choice: Choice = CHOICE, *, grid: Grid = Grid.SIGNED) -> dict[str, QuantizedWeight]:
    return {spec.name: round_to_nearest(stream.weight(spec), choice, grid=grid) for spec in stream.specs}


def options(**changes: Any) -> TuneOptions:
    rates = {"scale_rate": 1e-2, "vector_rate": 1e-2, "code_rate": 5e-3}
    return TuneOptions(**{"trained": ALL, "epochs": 4, "batch": 3, "micro_batch": 2, **rates, **changes})


def tuned(stream: BlockStream, how: TuneOptions, *, resident: bool = False) -> Tuned:
    with KeptInputs(memory_bytes=1 << 30) as kept:
        return tune(stream, WINDOWS, HELD_OUT, quantized(stream), how, kept=kept, resident=resident)


def scored(
    stream: BlockStream, windows: Tensor, weights: Mapping[str, QuantizedWeight], vectors: Mapping[str, Tensor]
) -> list[float]:
    """KL as the evaluation finds it."""

    def of_block(block: int) -> dict[str, Tensor]:
        inside = f"{stream.family.blocks}.{block}."
        found = {name: w.dequantize(stream.dtype) for name, w in weights.items()}
        found |= {name.removesuffix(".weight"): v for name, v in vectors.items()}
        if block == stream.num_blocks:
            return {name: w for name, w in found.items() if not name.startswith(f"{stream.family.blocks}.")}
        return {name: w for name, w in found.items() if name.startswith(inside)}

    return [score.kl_nats for score in score_windows(stream, windows, {"tuned": of_block})["tuned"]]


@pytest.mark.parametrize("trained", [*Trained, ALL], ids=str)
def test_the_divergence_falls_and_is_the_one_that_evaluation_finds(folder: Path, trained: Trained) -> None:
    stream = stream_of(folder)
    start = quantized(stream)
    result = tuned(stream, options(trained=trained))
    assert result.best_epoch > 0
    assert result.diverged is None
    assert len(result.epochs) == 5
    best = result.epochs[result.best_epoch]
    assert best.held_out_mean == min(epoch.held_out_mean for epoch in result.epochs)
    assert best.held_out_kl == pytest.approx(scored(stream, HELD_OUT, result.weights, result.vectors), rel=1e-4)
    assert result.epochs[0].held_out_kl == pytest.approx(scored(stream, HELD_OUT, start, {}), rel=1e-4)
    before = scored(stream, WINDOWS, start, {})
    after = scored(stream, WINDOWS, result.weights, result.vectors)
    assert sum(after) < 0.95 * sum(before)

    norms = {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"}
    if Trained.VECTORS in trained:
        assert {name.split(".", 3)[-1] if "layers" in name else "norm.weight" for name in result.vectors} == norms
        assert len(result.vectors) == 5
    else:
        assert not result.vectors
    for name, weight in result.weights.items():
        assert weight.scales.dtype == torch.bfloat16
        assert weight.codes.dtype == torch.int8
        assert weight.codes.min() >= code_range(2)[0]
        assert weight.codes.max() <= code_range(2)[1]
        assert torch.equal(weight.scales.sign(), start[name].scales.sign())
        stored = unpack(pack(weight), CHOICE)
        assert torch.equal(stored.dequantize(), weight.dequantize())
    changed = [name for name in start if not torch.equal(start[name].codes, result.weights[name].codes)]
    assert bool(changed) == (Trained.CODES in trained)
    changed = [name for name in start if not torch.equal(start[name].scales, result.weights[name].scales)]
    assert bool(changed) == (Trained.SCALES in trained)


def test_training_sees_what_is_stored(folder: Path) -> None:
    stream = stream_of(folder, torch.bfloat16)
    with KeptInputs(memory_bytes=1 << 30) as kept:
        sweep = TuneSweep(stream, WINDOWS, quantized(stream), options(), kept=kept)
        sweep.prepare()
        for factor in (1.0, 0.3):
            sweep.step([0, 1, 2], factor)
        weights, vectors = sweep.export()
        assert all(vector.dtype == torch.bfloat16 for vector in vectors.values())
        seen: dict[str, Tensor] = {}
        for block, part in enumerate(sweep._parts[:-1]):
            with part.present() as tensors:
                seen |= {f"model.layers.{block}.{key}": tensor for key, tensor in tensors.items()}
        nats = sweep.divergence(range(4))
    for name, weight in weights.items():
        assert torch.equal(seen[f"{name}.weight"], weight.dequantize(torch.bfloat16))
    for name, vector in vectors.items():
        assert name == "model.norm.weight" or torch.equal(seen[name], vector)
    assert nats == pytest.approx(scored(stream, WINDOWS[:4], weights, vectors), rel=1e-3)


@pytest.mark.parametrize("rate", [3.0, 1e30])
def test_an_absurd_rate_gives_the_start_back(folder: Path, rate: float) -> None:
    stream = stream_of(folder)
    start = quantized(stream, Choice(bits=6, group_size=16))
    how = options(scale_rate=rate, vector_rate=rate, code_rate=rate, epochs=2)
    with KeptInputs(memory_bytes=1 << 30) as kept:
        result = tune(stream, WINDOWS, HELD_OUT, start, how, kept=kept)
    assert result.best_epoch == 0
    assert not result.vectors
    for name, weight in start.items():
        assert torch.equal(result.weights[name].codes, weight.codes)
        assert torch.equal(result.weights[name].scales, weight.scales)


def test_a_divergence_that_is_not_finite_ends_the_training_and_is_said(folder: Path) -> None:
    result = tuned(stream_of(folder), options(trained=Trained.VECTORS, vector_rate=1e38))
    assert result.best_epoch == 0
    assert result.diverged is not None
    assert "not finite" in result.diverged
    assert len(result.epochs) < 5


def test_neither_residence_nor_a_second_run_changes_a_byte(folder: Path) -> None:
    results = [
        tuned(stream_of(folder, torch.bfloat16), options(), resident=resident) for resident in (False, False, True)
    ]
    assert results[0].best_epoch > 0
    for other in results[1:]:
        assert other.epochs == results[0].epochs
        for name, weight in results[0].weights.items():
            assert torch.equal(weight.codes, other.weights[name].codes)
            assert torch.equal(weight.scales, other.weights[name].scales)
        for name, vector in results[0].vectors.items():
            assert torch.equal(vector, other.vectors[name])
    assert tuned(stream_of(folder, torch.bfloat16), options(seed=1)).epochs != results[0].epochs


def test_nothing_of_the_model_is_read_after_the_preparation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(folder)
    start = quantized(stream)
    copies = {name: (w.codes.clone(), w.scales.clone()) for name, w in start.items()}
    with KeptInputs(memory_bytes=0) as kept:  # everything through files
        sweep = TuneSweep(stream, WINDOWS, start, options(), kept=kept)
        sweep.prepare()
        assert all(p.is_meta for p in stream.model.parameters())
        with monkeypatch.context() as patched:
            patched.setattr(type(stream.source), "read_rows", None)
            before = sweep.divergence([0, 1])
            sweep.step([0, 1], 1.0)
            assert sweep.divergence([0, 1]) != before
        assert all(p.is_meta for p in stream.model.parameters())
        assert kept.count == 0
    for name, weight in start.items():  # the caller's start is the caller's
        assert torch.equal(weight.codes, copies[name][0])
        assert torch.equal(weight.scales, copies[name][1])


@pytest.mark.parametrize("name", ["mixtral", "gemma2", "gpt2"])
def test_other_families(name: str, tmp_path: Path) -> None:
    """Experts, capped logits, a converted architecture with a tied head; layers at 16 bits stay as they are."""
    stream = stream_of(write_tiny(tmp_path / "model", name))
    windows = torch.randint(3, VOCABULARY - 8, (6, 16), generator=torch.Generator().manual_seed(5))
    start = {k: w for k, w in quantized(stream).items() if not k.endswith(("q_proj", "k_proj"))}
    with KeptInputs(memory_bytes=1 << 30) as kept:
        result = tune(stream, windows[:5], windows[5:], start, options(), kept=kept)
    assert result.best_epoch > 0
    assert set(result.weights) == set(start)


def test_what_cannot_be_tuned_is_refused_by_name(folder: Path) -> None:
    stream = stream_of(folder)
    start = quantized(stream)
    name = next(iter(start))
    with KeptInputs(memory_bytes=1 << 30) as kept:
        with pytest.raises(QuantizationError, match=f"{name}: has zero points"):
            tune(stream, WINDOWS, HELD_OUT, quantized(stream, grid=Grid.ASYMMETRIC), options(), kept=kept)
        with pytest.raises(QuantizationError, match=r"no.such: .* no such layer"):
            tune(stream, WINDOWS, HELD_OUT, {"no.such": start[name]}, options(), kept=kept)
        cut = QuantizedWeight(codes=start[name].codes[:8], scales=start[name].scales[:8], choice=CHOICE)
        with pytest.raises(QuantizationError, match=f"{name}: codes are"):
            tune(stream, WINDOWS, HELD_OUT, {name: cut}, options(), kept=kept)
        for windows, held_out in ((WINDOWS[:0], HELD_OUT), (WINDOWS, HELD_OUT[:0]), (WINDOWS, HELD_OUT[:, :9])):
            with pytest.raises(CalibrationError, match="of one length"):
                tune(stream, windows, held_out, start, options(), kept=kept)
        with pytest.raises(CalibrationError, match="2 tokens"):
            tune(stream, WINDOWS[:, :1], HELD_OUT[:, :1], start, options(), kept=kept)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch": 0},
        {"scale_rate": 0.0},
        {"code_rate": math.nan},
        {"warm_up": 1.0},
        {"trained": Trained(0)},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tuning: "):
        options(**wrong)


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 20, warm_up=0.1) for step in range(20)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert all(a > b for a, b in itertools.pairwise(factors[2:]))
    assert 0 < factors[-1] < 0.01
    assert rate_factor(0, 1, warm_up=0.1) == 1.0
