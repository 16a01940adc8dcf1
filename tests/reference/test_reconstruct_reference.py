"""Reconstruction: its objective, its gradients and its grids in float64, and what it makes of a trained classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_images import gratings, images, train_classifier, write_classifier
from torch import Tensor, nn

from lrpq.activations.calibrate import BlockGrids, Means, calibrate
from lrpq.activations.grids import ActivationGrid, LogarithmicGrid, UniformGrid, between, quantized
from lrpq.checkpoint.activations import zero_point
from lrpq.compare.recipes import CONTROL, Recipe, Rounding
from lrpq.compare.terms import Terms
from lrpq.compare.vision import Behind, QuantizedClassifier, quantize_classifier
from lrpq.errors import CalibrationError, ConfigError
from lrpq.evaluate.classification import score_images
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight, code_range
from lrpq.quant.rtn import round_to_nearest
from lrpq.refine.sweep import RefineSweep
from lrpq.tune.block import BlockTraining, Case, Start
from lrpq.tune.grids import grid_state
from lrpq.tune.objective import block_error
from lrpq.tune.options import Reconstruction
from lrpq.tune.reconstruct import Rebuilder

FEW = Reconstruction(steps=40, batch=16, checks=1, draws=2)
NEAREST = replace(CONTROL, rounding=Rounding.NEAREST)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("together", [0.0, 0.3, 1.0])
def test_objective_is_its_formula(together: float) -> None:
    """Written out entry by entry."""
    draws, n, t, h = 3, 5, 4, 6
    g, e, chosen = noise(draws, n, t, h), noise(2, t, h, seed=1), torch.tensor([4, 1])
    objective = block_error(g, together=together)
    c = [float(g[..., j].square().mean()) for j in range(h)]
    whole = apart = 0.0
    for k, i in enumerate(chosen.tolist()):
        for draw in range(draws):
            whole += float((g[draw, i] * e[k]).sum()) ** 2 / draws / 2
        for token in range(t):
            s = float(g[:, i, token].square().mean())
            apart += sum(s * c[j] / (sum(c) / h) * float(e[k, token, j]) ** 2 for j in range(h)) / 2
    expected = 0.5 * (together * whole + (1 - together) * apart)
    assert float(objective(e, chosen)) == pytest.approx(expected, rel=1e-12)


def test_grids_in_training_compute_what_is_stored_and_have_lsqs_gradient() -> None:
    x = (4 * noise(400)).requires_grad_()
    low, high = torch.tensor(-3.0).double(), torch.tensor(5.0).double()
    for grid in (between(low, high, 4), between(low, high, 4, exact_zero=False)):
        state = grid_state(grid)
        assert state.shift is not None
        with torch.no_grad():
            state.shift.fill_(0.07)
        y, stored = state(x), state.export()
        assert isinstance(stored, UniformGrid)
        assert torch.equal(y, quantized(x.detach(), stored))
        shift_gradient, x_gradient = torch.autograd.grad(y.sum(), [state.shift, x])
        v = ((x - stored.offset) / stored.scale).detach()
        inside = (v > 0) & (v < 15)
        at_step = torch.where(inside, v.round() - v, v.clamp(0, 15))
        zero = float((stored.offset / stored.scale).round())
        if bool(stored.offset == grid.offset):  # a bound that stays where it is
            assert not bool((quantized(torch.zeros(1).double(), stored) == 0).any())
        else:  # a zero point that stays a whole number
            assert bool((quantized(torch.zeros(1).double(), stored) == 0).all())
            assert zero_point(stored) == zero_point(grid) is not None  # so it is stored as the start is
            at_step = at_step + torch.where(inside, 0.0, zero)
        assert float(shift_gradient) == pytest.approx(float((at_step * grid.scale).sum()), rel=1e-5)
        torch.testing.assert_close(x_gradient, inside.double())
    fixed: ActivationGrid = LogarithmicGrid(bits=3, scale=1.0, steps_per_octave=1)
    p = torch.softmax(noise(4, 9), -1).requires_grad_()
    state = grid_state(fixed)
    assert state.shift is None
    assert torch.equal(state(p), quantized(p.detach(), fixed))
    assert torch.equal(torch.autograd.grad(state(p).sum(), p)[0], torch.ones_like(p))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> BlockStream:
    folder = write_classifier(tmp_path_factory.mktemp("small") / "model", "vit")
    return BlockStream(open_source(folder), dtype=torch.float64)


def rounded(stream: BlockStream, block: int) -> dict[str, QuantizedWeight]:
    choice = Choice(bits=4, group_size=-1)
    return {s.name: round_to_nearest(stream.weight(s), choice) for s in stream.block_specs(block)}


def rebuilder(stream: BlockStream, x: Tensor, grids: Sequence[BlockGrids]) -> Rebuilder:
    kept = KeptInputs(memory_bytes=1 << 30)  # all of it in memory: there is nothing to close
    return Rebuilder(stream, x, grids, replace(FEW, batch=6), seed=3, micro_batch=4, kept=kept)


def of_block(owner: Rebuilder, block: int, module: nn.Module, start: Start) -> BlockTraining:
    """As the rebuilder makes it."""
    case = Case(
        inputs=owner.quantized,
        target=owner.run(block, module, owner.original),
        error=owner.objective(block),
        training=owner.training,
        held_out=owner.held_out,
    )
    return BlockTraining(owner.stream, block, module, start, case, owner.options, seed=0, micro_batch=4)


@torch.no_grad()
def test_gradients_are_differences_of_the_error(small: BlockStream) -> None:
    """Of every dense weight along a direction, without grids: with them only the straight-through ones exist."""
    x, codes = images(8).double(), rounded(small, 0)
    owner = rebuilder(small, x, ({}, {}))
    chosen = owner.training
    with small.block(0) as module:
        training = of_block(owner, 0, module, Start(codes=codes, grids={}))
        objective, target = training.case.error, training.case.target
        found, at_shifts = training.gradients(chosen)
        assert not at_shifts
        for spec in small.block_specs(0):
            W = codes[spec.name].dequantize(torch.float64)
            direction = noise(*W.shape, seed=7)
            ends = []
            for step in (-1e-5, 1e-5):
                dense = {name: q.dequantize(torch.float64) for name, q in codes.items()}
                dense[spec.name] = W + step * direction
                with small.swapped(module, dense):
                    ends.append(
                        float(objective(owner.run(0, module, owner.quantized[chosen]) - target[chosen], chosen))
                    )
            reference = (ends[1] - ends[0]) / 2e-5
            gradient = found[f"{small.local_name(spec)}.weight"]
            if spec.kind == "k_proj" and abs(reference) < 1e-9:
                continue
            assert float((gradient * direction).sum()) == pytest.approx(reference, rel=1e-4, abs=1e-10)


@torch.no_grad()
def test_training_computes_what_the_quantized_block_does(small: BlockStream) -> None:
    """The error of the start, by the forward that is trained and by the one that is deployed."""
    x = images(8).double()
    calibration = calibrate(small, x, widths=[6], means=Means.ALL & ~Means.CHANNELS)
    grids, codes = calibration.grids(calibration.uniform(6)), rounded(small, 0)
    owner = rebuilder(small, x, grids)
    seen: list[float] = []
    with small.block(0) as module:
        start = Start(codes=codes, grids=grids[0])
        training = of_block(owner, 0, module, start)
        objective = training.case.error

        def noted(error: Tensor, chosen: Tensor) -> Tensor:
            loss = objective(error, chosen)
            seen.append(float(loss.detach()))
            return loss

        again = BlockTraining(
            small, 0, module, start, replace(training.case, error=noted), owner.options, seed=0, micro_batch=4
        )
        again.gradients(owner.training)
        assert training.check(0).training == pytest.approx(seen[0], rel=1e-3)


@torch.no_grad()
def test_weights_that_change_at_the_end_of_a_block_reach_the_next(small: BlockStream) -> None:
    """RefineSweep knows inputs inside the block from before; it has to forget them."""
    x = images(4).double()
    sweep = RefineSweep(small, {0: x}, num_shards=1, micro_batch=4, with_shift=True)
    sweep.embed()
    first = {name: w.dequantize(torch.float64) for name, w in rounded(small, 0).items()}
    second = {name: 0.5 * w for name, w in first.items()}
    with small.block(0) as module:
        for specs in small.sites(0).values():
            sweep.products(0, module, specs, None, first)
        sweep.forget()
        sweep.advance(0, module, second)
        with small.swapped(module, second):
            torch.testing.assert_close(sweep.quantized[0][0], small.run(module, 0, small.embed(x)))


TERMS = Terms(dtype=torch.float32, micro_batch=32, shards=4)
CALIBRATION = gratings(64, seed=1)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_classifier(tmp_path_factory.mktemp("trained") / "vit", "vit", steps=120)


def made(
    folder: Path, scratch: Path, how: Reconstruction | None, recipe: Recipe = NEAREST, bits: tuple[int, ...] = (4,)
) -> QuantizedClassifier:
    return quantize_classifier(
        open_source(folder),
        CALIBRATION,
        weight_bits=(3,),
        average_bits=3,
        activation_bits=bits,
        recipe=recipe,
        folded=scratch,
        behind=Behind.WEIGHTS,
        reconstruct=how,
        terms=TERMS,
    )


def test_rebuilt_blocks_are_nearer_to_the_original(trained: Path, tmp_path: Path) -> None:
    """From plain rounding, on other images; what is stored stays on its grid."""
    plain, ours = made(trained, tmp_path / "a", None), made(trained, tmp_path / "b", FEW)
    assert plain.rebuilt == ()
    assert [outcome.block for outcome in ours.rebuilt] == [0, 1]
    assert all(outcome.after <= outcome.before for outcome in ours.rebuilt)
    assert all(outcome.kl_after <= outcome.kl_before for outcome in ours.rebuilt)
    assert all(outcome.after < outcome.before for outcome in ours.rebuilt if outcome.accepted)
    assert any(outcome.accepted and outcome.training_after < outcome.training_before for outcome in ours.rebuilt)
    low, high = code_range(3)
    for name, weight in ours.codes.items():
        assert weight.choice == plain.codes[name].choice
        assert weight.scales.dtype == torch.bfloat16
        assert low <= int(weight.codes.min()) <= int(weight.codes.max()) <= high
    assert any(not torch.equal(w.codes, plain.codes[name].codes) for name, w in ours.codes.items())
    stream = BlockStream(open_source(trained), dtype=torch.float32)
    variants = {name: (found.stream, found.variant) for name, found in (("plain", plain), ("ours", ours))}
    scores = score_images(stream, *gratings(400, seed=2), variants)
    assert float(scores["ours"].kl_nats.mean()) < 0.7 * float(scores["plain"].kl_nats.mean())


def test_a_block_whose_held_out_error_does_not_fall_stays(trained: Path, tmp_path: Path) -> None:
    plain = made(trained, tmp_path / "a", None)
    wild = made(trained, tmp_path / "b", replace(FEW, steps=2, checks=1, code_rate=50.0, scale_rate=5.0, grid_rate=5.0))
    assert not any(outcome.accepted for outcome in wild.rebuilt)
    assert all(outcome.after == outcome.before for outcome in wild.rebuilt)
    for name, weight in wild.codes.items():
        assert torch.equal(weight.codes, plain.codes[name].codes)
        assert torch.equal(weight.scales, plain.codes[name].scales)
    for ours, theirs in zip(wild.grids, plain.grids, strict=True):
        for name, grid in ours.items():
            assert torch.equal(torch.as_tensor(grid.scale), torch.as_tensor(theirs[name].scale))  # type: ignore[attr-defined]


def test_weights_alone_are_rebuilt_and_the_same_again(trained: Path, tmp_path: Path) -> None:
    how = replace(FEW, steps=6, checks=1, drop=0.5)
    found, again = (made(trained, tmp_path / name, how, bits=()) for name in "ab")
    assert found.grids == ({}, {})
    assert found.rebuilt == again.rebuilt
    assert len(found.rebuilt) == 2
    for name, weight in found.codes.items():
        assert torch.equal(weight.codes, again.codes[name].codes)
        assert torch.equal(weight.scales, again.codes[name].scales)


def test_numbers_out_of_range_are_refused(small: BlockStream) -> None:
    with pytest.raises(ConfigError, match="steps is 0"):
        Reconstruction(steps=0)
    with pytest.raises(ConfigError, match="code_rate is -1"):
        Reconstruction(code_rate=-1)
    with pytest.raises(ConfigError, match="held_out above 0"):
        Reconstruction(held_out=0)
    with pytest.raises(CalibrationError, match="holds out one of 4 images, and there are 3"):
        rebuilder(small, images(3).double(), ({}, {}))
