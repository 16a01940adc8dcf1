"""What must hold of GPTQ for any layer, and what must not break on difficult ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant import column_loop
from lrpq.quant import gptq as gptq_module
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import gptq, loss, predicted_cost
from lrpq.quant.grid import Grid, QuantizedWeight, code_range
from lrpq.quant.hessian import accumulate, empty_hessian, normalized
from lrpq.quant.importance import search_importance
from lrpq.quant.rtn import round_to_nearest

ALL_BITS = [Choice(bits=bits, group_size=-1) for bits in (2, 3, 4, 5, 6, 8)]
few = settings(max_examples=25, deadline=None)
shapes = {"d_out": st.integers(1, 6), "d_in": st.integers(1, 40), "seed": st.integers(0, 10**6)}


def layer(d_out: int, d_in: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, d_in, generator=generator).double()
    X = torch.randn(2 * d_in + 3, d_in, generator=generator).double()
    X = X + torch.randn(len(X), 1, generator=generator).double()
    return W, X.T @ X / len(X)


def same(a: list[QuantizedWeight], b: list[QuantizedWeight]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x.codes, y.codes) and torch.equal(x.scales, y.scales) for x, y in pairs)


@few
@given(**shapes, leaf=st.integers(1, 50))
def test_the_leaf_size_does_not_change_the_codes(d_out: int, d_in: int, seed: int, leaf: int) -> None:
    W, H = layer(d_out, d_in, seed)
    factor = factorize(H)
    whole = gptq(W, factor, ALL_BITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(column_loop, "LEAF_COLUMNS", leaf)
        assert same(whole, gptq(W, factor, ALL_BITS))
    # compiled, in float32: scales are the same, codes but where a last digit decides
    W, factor = W.float(), factorize(H.float())
    whole = gptq(W, factor, ALL_BITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(column_loop, "COMPILED_LEAF", {"cpu": leaf})
        cut = gptq(W, factor, ALL_BITS)
    for a, b in zip(whole, cut, strict=True):
        assert torch.equal(a.scales, b.scales)
        assert (a.codes != b.codes).sum() <= 1 + a.codes.numel() // 20


@few
@given(**shapes, pick=st.sampled_from(ALL_BITS))
def test_several_choices_in_one_sweep_equal_each_alone(d_out: int, d_in: int, seed: int, pick: Choice) -> None:
    W, H = layer(d_out, d_in, seed)
    factor = factorize(H)
    together = gptq(W, factor, ALL_BITS)
    assert same([together[ALL_BITS.index(pick)]], gptq(W, factor, [pick]))


def test_group_sizes_may_differ_in_one_sweep() -> None:
    W, H = layer(5, 96, 0)
    factor = factorize(H)
    choices = [Choice(bits=b, group_size=g) for b, g in ((3, 32), (4, 48), (2, -1), (3, 12), (4, 96))]
    for grid in Grid:
        alone = [gptq(W, factor, [choice], grid=grid)[0] for choice in choices]
        together = gptq(W, factor, choices, grid=grid)
        assert same(together, alone)
        assert [q.scales.shape[1] for q in together] == [3, 2, 1, 8, 1]


def test_rows_do_not_interact(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = layer(23, 32, 1)
    factor = factorize(H)
    whole = gptq(W, factor, ALL_BITS)
    alone = [gptq(W[i : i + 1], factor, ALL_BITS) for i in range(23)]
    for choice in range(len(ALL_BITS)):
        assert torch.equal(whole[choice].codes, torch.cat([a[choice].codes for a in alone]))
    monkeypatch.setattr(gptq_module, "_CPU_ROWS", 30)  # several sweeps of five rows
    assert same(whole, gptq(W, factor, ALL_BITS))


@few
@given(**shapes)
def test_diagonal_hessian_gives_round_to_nearest(d_out: int, d_in: int, seed: int) -> None:
    W, H = layer(d_out, d_in, seed)
    H = H.diagonal().diag()
    for grid in (Grid.SYMMETRIC, Grid.SIGNED, Grid.ASYMMETRIC):
        factor = factorize(H)
        for q in gptq(W, factor, ALL_BITS, grid=grid):
            plain = round_to_nearest(W, q.choice, importance=search_importance(factor), grid=grid)
            assert same([q], [plain])


@few
@given(**shapes, act_order=st.booleans())
def test_internal_loss_is_the_damped_quadratic_form(d_out: int, d_in: int, seed: int, act_order: bool) -> None:
    """sum_k ((t_k - q_k) R_kk)^2 = dW H_damped dW^T, and the errors kept by the sweep are W - Q."""
    W, H = layer(d_out, d_in, seed)
    factor = factorize(H, damping=0.05, act_order=act_order)
    choices = [Choice(bits=2, group_size=-1), Choice(bits=4, group_size=-1)]
    quantized = gptq(W, factor, choices)
    scales = torch.stack([q.scales.T for q in quantized], dim=1).double()
    bounds = torch.tensor([code_range(c.bits) for c in choices]).double()
    Wt = W.T[factor.order]
    sweep = column_loop.sweep(Wt, factor, scales, bounds, d_in, Z=None)
    rounded = Wt.unsqueeze(1) - sweep.errors
    # t_k = w_k + sum_{j<k} D_j R_jk: what each column was rounded at, and to its nearest code
    targets = Wt.unsqueeze(1) + torch.einsum("jk,jcr->kcr", factor.R.triu(1), sweep.errors)
    low, high = bounds.unbind(1)
    nearest = (targets / scales[0]).clamp(low.view(1, -1, 1), high.view(1, -1, 1))
    assert ((nearest - sweep.codes).abs() < 0.5 + 1e-9).all()
    running = ((targets - rounded) * factor.diagonal.view(-1, 1, 1)).square().sum(0)
    damped = H + factor.damping * torch.eye(d_in, dtype=torch.float64)
    for i, q in enumerate(quantized):
        dW = W - q.dequantize(torch.float64)
        assert torch.allclose(sweep.errors[:, i].T, dW[:, factor.order], atol=1e-12)
        assert torch.allclose(running[i], torch.einsum("oi,ij,oj->o", dW, damped, dW), rtol=1e-9)
        assert (loss(W, q.dequantize(torch.float64), H) < running[i]).all()


@few
@given(**shapes, power=st.integers(-20, 20))
def test_scaling_all_relevance_changes_nothing(d_out: int, d_in: int, seed: int, power: int) -> None:
    W, H = layer(d_out, d_in, seed)
    assert same(gptq(W, factorize(H), ALL_BITS), gptq(W, factorize(H * 2.0**power), ALL_BITS))


@few
@given(d_out=st.integers(1, 6), d_in=st.integers(2, 40), seed=st.integers(0, 10**6))
def test_permuting_the_inputs_permutes_the_codes(d_out: int, d_in: int, seed: int) -> None:
    """With activation order the layout of the columns means nothing, up to groups."""
    W, H = layer(d_out, d_in, seed)
    mixed = torch.randperm(d_in, generator=torch.Generator().manual_seed(seed))
    straight = gptq(W, factorize(H), ALL_BITS)
    permuted = gptq(W[:, mixed], factorize(H[mixed][:, mixed]), ALL_BITS, scales=[q.scales for q in straight])
    for a, b in zip(straight, permuted, strict=True):
        assert torch.equal(a.codes[:, mixed], b.codes)


def test_columns_go_by_falling_activation_ties_by_index() -> None:
    H = torch.diag(torch.tensor([1.0, 3.0, 0.0, 3.0, 2.0]))
    factor = factorize(H)
    assert factor.order.tolist() == [1, 3, 4, 0, 2]
    assert factor.num_dead == 1
    assert factorize(H, act_order=False).order.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(factor.importance, H.diagonal())


def inputs(kind: str, d_in: int) -> torch.Tensor:
    X = torch.randn(300, d_in, generator=torch.Generator().manual_seed(0))
    if kind == "outliers":
        X[:, ::17] *= 1e4
    elif kind == "constant":
        X = torch.full((300, d_in), 0.7)
    elif kind == "rank one":
        X = X[:, :1] * torch.linspace(-2, 2, d_in)
    elif kind == "dead":
        X[:, 5:20] = 0
    elif kind == "all dead":
        X = torch.zeros(300, d_in)
    elif kind == "tiny":
        X = X * 1e-12
    elif kind == "few tokens":
        X = X[:2]
    return X


@pytest.mark.parametrize("grid", list(Grid))
@pytest.mark.parametrize("kind", ["outliers", "constant", "rank one", "dead", "all dead", "tiny", "few tokens"])
def test_difficult_inputs_stay_finite_and_deterministic(kind: str, grid: Grid) -> None:
    X = inputs(kind, 64)
    H = normalized(accumulate(empty_hessian(64), X, torch.ones(len(X))))
    W = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    W[:4, :32] = 0
    W[7] = 0
    choices = [Choice(bits=bits, group_size=32) for bits in (2, 3, 8)]
    factor = factorize(H)
    assert factor.num_dead == {"dead": 15, "all dead": 64}.get(kind, 0)
    quantized = gptq(W, factor, choices, grid=grid)
    assert same(quantized, gptq(W, factorize(H), choices, grid=grid))
    for q in quantized:
        low, high = code_range(q.choice.bits)
        assert int(q.codes.min()) >= low
        assert int(q.codes.max()) <= high
        assert torch.isfinite(q.dequantize()).all()
        assert (q.dequantize()[7] == 0).all()
    costs = predicted_cost(W, quantized, H, torch.ones(12))
    assert all(cost >= 0 and cost < float("inf") for cost in costs)
    if kind == "all dead":
        assert costs == [0.0, 0.0, 0.0]
    plain = predicted_cost(
        W, [round_to_nearest(W, c, importance=H.diagonal(), grid=grid) for c in choices], H, torch.ones(12)
    )
    assert all(ours <= theirs * 1.05 for ours, theirs in zip(costs, plain, strict=True))


@pytest.mark.parametrize(("d_out", "d_in"), [(1, 1), (1, 9), (4, 1), (2, 577)])
def test_ragged_layers(d_out: int, d_in: int) -> None:
    W, H = layer(d_out, d_in, 3)
    for q in gptq(W.float(), factorize(H.float()), ALL_BITS):
        assert q.codes.shape == (d_out, d_in)
        assert q.codes.dtype == torch.int8
        assert q.scales.shape == (d_out, 1)


def test_damping_grows_in_counted_steps_then_fails_by_name() -> None:
    # a slightly indefinite matrix: -0.02 of the mean needs damping 0.1, one step above 0.01
    H = torch.eye(8)
    H[0, 0] = H[1, 1] = 0.5
    H[0, 1] = H[1, 0] = 0.52
    factor = factorize(H)
    assert factor.num_damping_steps == 1
    assert factor.damping == pytest.approx(0.1 * float(H.diagonal().mean()), rel=1e-5)
    assert factorize(torch.ones(8, 8), damping=0.0).num_damping_steps > 0
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1e7
    with pytest.raises(QuantizationError, match="v_proj: its Hessian is not positive definite"):
        factorize(indefinite, name="v_proj")


def test_what_is_not_finite_or_does_not_fit_is_refused_by_name() -> None:
    W, H = (x.float() for x in layer(4, 64, 0))
    factor: Factor = factorize(H)
    broken = H.clone()
    broken[2, 3] = torch.nan
    with pytest.raises(QuantizationError, match="up_proj: its Hessian is not finite"):
        factorize(broken, name="up_proj")
    bad = W.clone()
    bad[0, 0] = torch.inf
    with pytest.raises(QuantizationError, match="up_proj: its weight is not finite"):
        gptq(bad, factor, ALL_BITS, name="up_proj")
    with pytest.raises(QuantizationError, match="up_proj: group size 48 does not divide its 64 inputs"):
        gptq(W, factor, [Choice(bits=4, group_size=48)], name="up_proj")
    with pytest.raises(QuantizationError, match="32 inputs but a Hessian of 64"):
        gptq(W[:, :32], factor, ALL_BITS)
    with pytest.raises(QuantizationError, match="at least one choice"):
        gptq(W, factor, [])
    with pytest.raises(QuantizationError, match="negative"):
        factorize(H, damping=-1.0)
    for weights in (torch.tensor([1.0, -1.0]), torch.tensor([1.0, torch.nan])):
        with pytest.raises(QuantizationError, match="token weights"):
            accumulate(empty_hessian(64), torch.ones(2, 64), weights)
    with pytest.raises(QuantizationError, match="3 token weights for 2 tokens"):
        accumulate(empty_hessian(64), torch.ones(2, 64), torch.ones(3))
    with pytest.raises(QuantizationError, match="k_proj: its 2 calibration tokens have no weight"):
        normalized(accumulate(empty_hessian(64), torch.ones(2, 64), torch.zeros(2)), name="k_proj")
