"""The compiled loops against the same loops in float64, written plainly."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrpq.kernels import loops
from lrpq.kernels.columns import round_columns
from lrpq.kernels.descent import descend_columns
from lrpq.kernels.scale_errors import write_errors, write_fit
from lrpq.kernels.threads import usable
from lrpq.model.layers import Choice
from lrpq.quant import column_loop, halves
from lrpq.quant import descent as descent_module
from lrpq.quant import gptq as gptq_module
from lrpq.quant import residual as residual_module
from lrpq.quant import scale_search as search_module
from lrpq.quant.descent import descend
from lrpq.quant.factor import factorize
from lrpq.quant.forms import QuadraticForms
from lrpq.quant.gptq import gptq, loss
from lrpq.quant.grid import Grid
from lrpq.quant.refit import refit
from lrpq.quant.row_feedback import joint_error

# one row, a strip, strips with a rest; fewer columns than are taken at a time, and more
SHAPES = [(1, 1), (1, 7), (64, 4), (70, 9), (131, 48)]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
BOUNDS = torch.tensor([[-4.0, 3.0], [-8.0, 7.0]])


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_columns_are_rounded_as_the_formula_says(rows: int, columns: int, device: str) -> None:
    T, W = numbers(columns, 2, rows, seed=1) * 3, numbers(columns, rows, seed=2) * 3
    S = numbers(3, 2, rows, seed=3).sign() * (0.2 + numbers(3, 2, rows, seed=4).abs())
    R = numbers(columns, columns, seed=5).triu(1) * 0.2 + torch.eye(columns)
    runs = torch.arange(columns) % 3
    found, codes = T.to(device, copy=True), torch.empty(columns, 2, rows, dtype=torch.int8, device=device)
    round_columns(found, *(x.to(device) for x in (W, S, R, BOUNDS, runs)), codes)
    errors, codes = found.cpu().double(), codes.cpu()
    targets = T.double() + torch.einsum("jk,jcr->kcr", R.double().triu(1), errors)
    s = S.double()[runs]
    ideal = (targets / s).clamp(BOUNDS[:, 0].view(1, 2, 1), BOUNDS[:, 1].view(1, 2, 1))
    assert ((ideal - codes).abs() < 0.5 + 1e-4).all()
    assert torch.allclose(errors, W.double().unsqueeze(1) - codes * s, atol=1e-5)
    assert codes.unique().numel() > 1 or rows * columns == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_columns_are_descended_as_the_formula_says(rows: int, columns: int, device: str) -> None:
    D, codes = numbers(columns, rows, seed=1), torch.randint(-4, 4, (columns, rows), dtype=torch.int8)
    G = numbers(columns, rows, seed=2) * 2
    S = numbers(2, rows, seed=3).sign() * (0.2 + numbers(2, rows, seed=4).abs())
    A = numbers(columns, 2 * columns, seed=5)
    own = A @ A.T / (2 * columns)
    inverse = 1 / own.diagonal()
    if columns > 2:
        inverse[2] = 0.0  # a dead input
    runs = torch.arange(columns) % 2
    bounds = torch.tensor([-4.0, 3.0]).unsqueeze(1).expand(2, rows).contiguous()
    before, D_before = codes.clone(), D.clone()
    moved = torch.zeros(rows, dtype=torch.bool)
    changed = [x.to(device) for x in (D, codes, moved)]
    G_, *fixed = (x.to(device) for x in (G, S, bounds, own, inverse, runs))
    descend_columns(G_, changed[0], changed[1], *fixed, changed[2])
    D, codes, moved = (x.cpu() for x in changed)
    steps = codes.double() - before.double()
    changes = steps * S.double()[runs]
    pulls = G.double() - own.double().tril(-1) @ changes
    ideal = (pulls * inverse.double().unsqueeze(1) / S.double()[runs]).clamp(
        -4.0 - before.double(), 3 - before.double()
    )
    assert ((ideal - steps).abs() < 0.5 + 1e-3).all()
    assert torch.allclose(D.double(), D_before.double() - changes, atol=1e-5)
    assert torch.equal(moved, (steps != 0).any(0))
    if columns > 2:
        assert (steps[2] == 0).all()


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_errors_and_fits_of_scales_are_the_weighted_sums(rows: int, width: int) -> None:
    w, v = numbers(3, width, rows, seed=1), numbers(3, 1, width, seed=2).abs()
    inverses = numbers(4, 3, 1, rows, seed=3) * 4
    errors = torch.empty_like(inverses)
    write_errors(w, v, inverses, errors, (-4, 3))
    x = w.double() * inverses.double()
    # the product is rounded to float32 before it is rounded to a code
    q = (w * inverses).round().clamp(-4, 3).double()
    weights = v.double().transpose(1, 2)
    assert torch.allclose(errors.double(), (weights * (x - q).square()).sum(2, keepdim=True), rtol=1e-4, atol=1e-6)
    product, squares = (torch.empty(3, 1, rows) for _ in range(2))
    write_fit(w, v, inverses[0], product, squares, (-4, 3))
    assert torch.allclose(product.double(), (weights * w.double() * q[0]).sum(1, keepdim=True), rtol=1e-4, atol=1e-4)
    assert torch.allclose(squares.double(), (weights * q[0].square()).sum(1, keepdim=True), rtol=1e-5)


def layer(d_out: int, d_in: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    X = numbers(4 * d_in, d_in, seed=6) * torch.logspace(0, 1, d_in)
    return numbers(d_out, d_in, seed=7).to(device), (X.T @ X / len(X)).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_product_by_halves_keeps_sixteen_digits(device: str) -> None:
    A, B, C = numbers(70, 64, seed=1), numbers(64, 100, seed=2), numbers(70, 100, seed=3)
    found = C.to(device, copy=True)
    halves.add_product(found, A.to(device), B.to(device), columns_at_once=48)  # a rest of four
    exact = C.double() + A.double() @ B.double()
    reach = A.double().abs() @ B.double().abs()
    assert ((found.cpu() - exact).abs() <= 2.0**-16 * reach).all()
    assert float(((A.bfloat16().double() @ B.bfloat16().double() + C - exact).abs() / reach).max()) > 2.0**-11


def test_losses_and_joint_errors_by_halves_are_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that takes every product for large; narrow parts with a rest."""
    W, H = layer(60, 96)
    q = gptq(W, factorize(H), [Choice(bits=3, group_size=32)], grid=Grid.SIGNED)[0]
    dW = q.dequantize() - W
    G, P = (lambda X: X @ X.T)(numbers(60, 80, seed=8)), numbers(60, 96, seed=9)
    taken: list[int] = []
    add_product = halves.add_product

    def counted(C: Tensor, A: Tensor, B: Tensor, **how: int) -> None:
        taken.append(len(B))
        add_product(C, A, B, **how)

    monkeypatch.setattr(halves, "add_product", counted)
    monkeypatch.setattr(halves, "_NARROW_COLUMNS", 7)
    for module in (halves, gptq_module):
        monkeypatch.setattr(module, "by_halves", lambda C, inner: True)
    by_row = loss(W, q.dequantize(), H)
    together = joint_error(dW, H, P, [G])
    assert len(taken) == 2 * gptq_module.LOSS_BLOCKS + 2
    E = dW.double() @ H.double() @ dW.double().T
    assert torch.allclose(by_row, E.diagonal(), rtol=1e-3)
    expected = float((G.double() * (E - 2 * P.double() @ dW.double().T)).sum())
    assert abs(together / expected - 1) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_costs_by_halves_are_the_forms_of_the_errors(device: str) -> None:
    """Also where one input outweighs all others, and for errors whose squares float32 cannot hold."""
    W, H = layer(60, 100, device)
    X = numbers(300, 100, seed=8).to(device) * torch.logspace(0, 2, 100, device=device)
    H = H + X.T @ X / len(X)
    dW = W - gptq(W, factorize(H), [Choice(bits=3, group_size=50)])[0].dequantize()
    dW[7], dW[9] = 0.0, dW[9] * 1e-25
    exact = ((dW.double() @ H.double()) * dW.double()).sum(1)
    found = QuadraticForms(H)(dW)
    assert found.dtype == torch.float64
    assert torch.allclose(found, exact, rtol=1e-3, atol=0.0)
    assert float(found.sum()) == pytest.approx(float(exact.sum()), rel=5e-5)
    plain = ((dW.bfloat16().double() @ H.bfloat16().double()) * dW.double()).sum()
    assert abs(float(plain / exact.sum()) - 1) > 3e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("whole", [False, True])
def test_updates_by_halves_move_no_loss(whole: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = layer(200, 192, device)
    factor = factorize(H)
    monkeypatch.setattr(column_loop, "in_one_launch", lambda tensor, *, columns, rows: False)
    monkeypatch.setattr(column_loop, "by_halves", lambda W: False)
    plain = gptq(W, factor, CHOICES, grid=Grid.SIGNED)
    calls: list[int] = []
    add_interleaved = column_loop.add_interleaved

    def counted(C: Tensor, A: Tensor, D: Tensor) -> None:
        calls.append(len(A))
        add_interleaved(C, A, D)

    monkeypatch.setattr(column_loop, "add_interleaved", counted)
    monkeypatch.setattr(column_loop, "by_halves", lambda W: True)
    monkeypatch.setattr(column_loop, "SPLIT_WHOLE", 1024 if whole else 0)
    monkeypatch.setattr(column_loop, "COMPILED_LEAF", {"cpu": 48, "cuda": 48})
    found = gptq(W, factor, CHOICES, grid=Grid.SIGNED)
    assert len(calls) == 3
    for a, b in zip(found, plain, strict=True):
        assert (a.codes == b.codes).float().mean() > 0.995
        losses = [float(loss(W, q.dequantize(), H).sum()) for q in (a, b)]
        assert losses[0] == pytest.approx(losses[1], rel=5e-4)


CHOICES = [Choice(bits=bits, group_size=size) for bits, size in ((2, 32), (3, -1), (4, 96), (8, 48))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leaves", [False, True])
def test_a_layer_comes_out_as_by_vector_operations(leaves: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same scales and codes but for fp32's last digit, which moves a few of ten thousand; the same loss."""
    W, H = layer(200, 192, device)
    factor = factorize(H)
    for module in (column_loop, descent_module) if leaves else ():  # as large layers are done on a GPU
        monkeypatch.setattr(module, "in_one_launch", lambda tensor, *, columns, rows: False)
    fast = gptq(W, factor, CHOICES, grid=Grid.SIGNED)
    fast_after = [*(d.weight for d in descend(W, fast, H)), *(refit(W, q, H).weight for q in fast)]
    for module in (column_loop, gptq_module, descent_module, search_module, residual_module):
        monkeypatch.setattr(module, "usable", lambda tensor: False)
    plain = gptq(W, factor, CHOICES, grid=Grid.SIGNED)
    plain_after = [*(d.weight for d in descend(W, fast, H)), *(refit(W, q, H).weight for q in fast)]
    for a, b in zip([*fast, *fast_after], [*plain, *plain_after], strict=True):
        assert (a.scales == b.scales).float().mean() > 0.995
        assert (a.codes == b.codes).float().mean() > 0.995
        losses = [float(loss(W, q.dequantize(), H).sum()) for q in (a, b)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("whole", [False, True])
def test_descent_by_halves_moves_no_loss(whole: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 40 columns, which do not divide the width."""
    X = numbers(300, 192, seed=1) @ (torch.eye(192) + numbers(192, 192, seed=2) / 14)
    H, W = (X.T @ X / 300).to(device), numbers(70, 192, seed=3).to(device)
    start = gptq(W, factorize(H), CHOICES, grid=Grid.SIGNED)
    expected = descend(W, start, H, sweeps=3)
    monkeypatch.setattr(descent_module, "in_one_launch", lambda tensor, *, columns, rows: False)
    monkeypatch.setattr(descent_module, "_worth_halves", lambda state, H: True)
    monkeypatch.setattr(descent_module, "GPU_BLOCK_COLUMNS", 40)
    monkeypatch.setattr(descent_module, "SPLIT_WHOLE", 1024 if whole else 0)
    found = descend(W, start, H, sweeps=3, block_columns=40)
    for a, b, before in zip(found, expected, start, strict=True):
        assert (a.weight.codes == b.weight.codes).float().mean() > 0.995
        losses = [float(loss(W, q.dequantize(), H).sum()) for q in (a.weight, b.weight, before)]
        assert abs(losses[0] / losses[1] - 1) < 1e-3
        assert losses[0] < 0.98 * losses[2]


def test_neither_threads_nor_strips_change_a_digit() -> None:
    """Of whole layers with threads; of the loops themselves also row by row: products around them may differ there."""
    W, H = layer(150, 96)
    factor = factorize(H)
    alone = [gptq(W[i : i + 1].contiguous(), factor, CHOICES, grid=Grid.SIGNED) for i in range(len(W))]
    whole = gptq(W, factor, CHOICES, grid=Grid.SIGNED)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shared = gptq(W, factor, CHOICES, grid=Grid.SIGNED)
    finally:
        torch.set_num_threads(before)
    for i, q in enumerate(whole):
        assert torch.equal(q.codes, shared[i].codes)
        assert torch.equal(q.scales, shared[i].scales)
        assert torch.equal(q.scales, torch.cat([rows[i].scales for rows in alone]))
    assert usable(W)
    assert not usable(W.double())


@pytest.mark.parametrize("row", [0, 63, 64, 100, 130])
def test_a_row_is_rounded_and_descended_as_if_alone(row: int) -> None:
    columns, rows, one = 48, 131, slice(row, row + 1)
    T, W = numbers(columns, 1, rows, seed=1) * 3, numbers(columns, rows, seed=2) * 3
    S = 0.2 + numbers(2, rows, seed=3).abs()
    R = numbers(columns, columns, seed=4).triu(1) * 0.2 + torch.eye(columns)
    runs = torch.arange(columns) // 24
    found = []
    for rows_of in (slice(None), one):
        errors = T[:, :, rows_of].clone(memory_format=torch.contiguous_format)
        codes = torch.empty(errors.shape, dtype=torch.int8)
        w, s = W[:, rows_of].contiguous(), S[:, rows_of].contiguous()
        round_columns(errors, w, s.unsqueeze(1), R, BOUNDS[:1], runs, codes)
        D, n = errors[:, 0].clone(), codes[:, 0].clone()
        own = R @ R.T
        bounds = BOUNDS[0].unsqueeze(1).expand(2, D.shape[1]).contiguous()
        moved = torch.zeros(D.shape[1], dtype=torch.bool)
        G = w * 2  # any: what a product gives need not be the same for one row and for many
        descend_columns(G, D, n, s, bounds, own, 1 / own.diagonal(), runs, moved)
        found.append((errors, codes, D, n, moved))
    for whole, alone in zip(*found, strict=True):
        picked = whole[..., one]
        assert torch.equal(picked, alone)


def test_loops_depend_on_no_other_file() -> None:
    """numba's cache on disk looks at the file of a loop alone: a constant from elsewhere could change unseen."""
    source = Path(loops.__file__).read_text(encoding="utf-8")
    imported = {
        alias
        for node in ast.walk(ast.parse(source))
        for alias in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        )
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert "numba" in imported
    assert not {name for name in imported if str(name).split(".")[0] in ("lrpq", "tasks", "flows")}
