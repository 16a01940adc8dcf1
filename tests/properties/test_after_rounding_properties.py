"""What must hold of descent and refit for any layer, and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant import descent as descent_module
from lrpq.quant import refit as refit_module
from lrpq.quant.descent import descend
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.grid import Grid, QuantizedWeight, code_range
from lrpq.quant.polish import polish
from lrpq.quant.refit import refit
from lrpq.quant.rtn import round_to_nearest

BITS = (2, 3, 4, 6, 8)
few = settings(max_examples=25, deadline=None)
shapes = {"d_out": st.integers(1, 6), "d_in": st.integers(1, 40), "seed": st.integers(0, 10**6)}


def layer(d_out: int, d_in: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, d_in, generator=generator).double()
    X = torch.randn(2 * d_in + 3, d_in, generator=generator).double()
    X = X + torch.randn(len(X), 1, generator=generator).double()
    return W, X.T @ X / len(X)


def rounded(W: torch.Tensor, group_size: int = -1) -> list[QuantizedWeight]:
    return [round_to_nearest(W, Choice(bits=bits, group_size=group_size), grid=Grid.SIGNED) for bits in BITS]


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


@few
@given(**shapes, block=st.integers(1, 50), leaf=st.integers(1, 9))
def test_neither_blocks_nor_company_change_the_codes(d_out: int, d_in: int, seed: int, block: int, leaf: int) -> None:
    W, H = layer(d_out, d_in, seed)
    start = rounded(W)
    whole = descend(W, start, H, sweeps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent_module, "_LEAF_COLUMNS", leaf)
        patch.setattr(descent_module, "CPU_ROWS", 10)  # two rows at once
        patch.setattr(descent_module, "_CONDENSE_BELOW", 2.0)
        cut = descend(W, start, H, sweeps=3, block_columns=block)
    for q, a, b in zip(start, whole, cut, strict=True):
        (alone,) = descend(W, [q], H, sweeps=3)
        assert same(a.weight, b.weight)
        assert same(a.weight, alone.weight)
        assert a.changed_codes == b.changed_codes == alone.changed_codes
        assert a.unsettled_rows == b.unsettled_rows == alone.unsettled_rows
        low, high = code_range(q.choice.bits)
        assert int(a.weight.codes.min()) >= low
        assert int(a.weight.codes.max()) <= high


@few
@given(**shapes)
def test_permuted_rows_give_permuted_results(d_out: int, d_in: int, seed: int) -> None:
    W, H = layer(d_out, d_in, seed)
    order = torch.randperm(d_out, generator=torch.Generator().manual_seed(seed))
    straight = polish(W, rounded(W), H)
    permuted = polish(W[order], rounded(W[order]), H)
    for a, b in zip(straight, permuted, strict=True):
        assert torch.equal(a.weight.codes[order], b.weight.codes)
        assert torch.equal(a.weight.scales[order], b.weight.scales)


@few
@given(**shapes, power=st.integers(-20, 20))
def test_scaling_the_hessian_changes_nothing(d_out: int, d_in: int, seed: int, power: int) -> None:
    W, H = layer(d_out, d_in, seed)
    for a, b in zip(polish(W, rounded(W), H), polish(W, rounded(W), H * 2.0**power), strict=True):
        assert same(a.weight, b.weight)


@few
@given(**shapes)
def test_a_diagonal_hessian_leaves_rounding_as_it_is(d_out: int, d_in: int, seed: int) -> None:
    W, H = layer(d_out, d_in, seed)
    for found in descend(W, rounded(W), H.diagonal().diag()):
        assert found.changed_codes == 0
        assert found.unsettled_rows == 0


def test_group_sizes_may_differ_in_one_call() -> None:
    W, H = layer(5, 96, 0)
    start = gptq(W, factorize(H), [Choice(bits=b, group_size=g) for b, g in ((3, 32), (4, 48), (2, -1), (3, 12))])
    for found, q in zip(descend(W, start, H), start, strict=True):
        assert same(found.weight, descend(W, [q], H)[0].weight)


def test_ties_stay() -> None:
    """A target half way between two codes: staying is as good as moving."""
    W = torch.tensor([[0.5, 1.5, -0.5]]).double()
    codes = torch.tensor([[1, 1, 0]], dtype=torch.int8)
    q = QuantizedWeight(codes=codes, scales=torch.ones(1, 1).bfloat16(), choice=Choice(bits=4, group_size=-1))
    (found,) = descend(W, [q], torch.eye(3).double())
    assert torch.equal(found.weight.codes, codes)


def test_dead_inputs_keep_their_codes() -> None:
    W, H = layer(6, 20, 3)
    H[4:9] = H[:, 4:9] = 0.0
    start = rounded(W)
    for found, q in zip(descend(W, start, H), start, strict=True):
        assert torch.equal(found.weight.codes[:, 4:9], q.codes[:, 4:9])
        assert refit(W, found.weight, H).weight.codes.shape == W.shape
    for found, q in zip(descend(W, start, 0 * H), start, strict=True):
        assert same(found.weight, q)
        assert same(refit(W, q, 0 * H).weight, q)


def test_refit_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = layer(23, 32, 1)
    (q,) = gptq(W, factorize(H), [Choice(bits=3, group_size=8)])
    whole = refit(W, q, H)
    monkeypatch.setattr(refit_module, "_CPU_ELEMENTS", 100)  # three rows at once
    cut = refit(W, q, H)
    assert same(whole.weight, cut.weight)
    assert whole.rejected_rows == cut.rejected_rows


def test_what_does_not_belong_together_is_refused_by_name() -> None:
    W, H = layer(4, 16, 0)
    (q,) = gptq(W, factorize(H), [Choice(bits=3, group_size=8)])
    broken = H.clone()
    broken[1, 2] = torch.nan
    for call in (
        lambda W, H: descend(W, [q], H, name="k_proj"),
        lambda W, H: refit(W, q, H, name="k_proj"),
        lambda W, H: polish(W, [q], H, name="k_proj"),
    ):
        with pytest.raises(QuantizationError, match="k_proj: its Hessian is not finite"):
            call(W, broken)
        with pytest.raises(QuantizationError, match="k_proj: its target is not finite"):
            call(W * torch.inf, H)
        with pytest.raises(QuantizationError, match="k_proj: a target of 4 x 16, a Hessian of 8"):
            call(W, H[:8, :8])
    with pytest.raises(QuantizationError, match="k_proj: damping"):
        polish(W, [q], H, damping=-1.0, name="k_proj")


@pytest.mark.parametrize("weight_power", [-100, -30, 0, 30])
@pytest.mark.parametrize("hessian_power", [-60, 0, 60])
def test_units_change_nothing_in_single_precision(weight_power: int, hessian_power: int) -> None:
    W, H = (x.float() for x in layer(7, 48, 2))
    start = gptq(W, factorize(H), [Choice(bits=3, group_size=16)], grid=Grid.SIGNED)
    (expected,) = polish(W, start, H)
    (scaled,) = [
        QuantizedWeight(codes=q.codes, scales=q.scales * 2.0**weight_power, choice=q.choice, zero_points=None)
        for q in start
    ]
    (found,) = polish(W * 2.0**weight_power, [scaled], H * 2.0**hessian_power)
    assert torch.equal(found.weight.codes, expected.weight.codes)
    assert torch.equal(found.weight.scales, expected.weight.scales * 2.0**weight_power)
    assert found.restored_rows == expected.restored_rows


def test_what_could_overflow_is_refused_by_name() -> None:
    W, H = (x.float() for x in layer(4, 16, 0))
    (q,) = gptq(W, factorize(H), [Choice(bits=3, group_size=8)])
    with pytest.raises(QuantizationError, match=r"q_proj: errors up to .* may overflow"):
        descend(W * 1e30, [q], H * 1e10, name="q_proj")
    zero = QuantizedWeight(codes=q.codes, scales=q.scales * 0, choice=q.choice)
    with pytest.raises(QuantizationError, match="q_proj: a scale is zero"):
        descend(W, [zero], H, name="q_proj")
