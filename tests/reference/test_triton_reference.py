"""Triton's kernels that have no counterpart on CPUs, against the formulas in float64 or what a CPU does instead.

They run on a GPU, or where Triton is installed by its interpreter:

    TRITON_INTERPRET=1 python -m pytest tests/reference/test_triton_reference.py
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from lrpq.quant import scale_search as search_module
from lrpq.quant.grid import Grid
from lrpq.quant.stored_scales import nearest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="no interpreter")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
BOUNDS = torch.tensor([[-4.0, 3.0], [-8.0, 7.0]])


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# groups of one strip and of several, of columns that no block divides, and rows of many sizes
SEARCHED = [(40, 128, 64, 1.0), (33, 96, 96, 1e-30), (5, 48, 8, 1e25)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [Grid.SIGNED, Grid.SYMMETRIC])
@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize(("rows", "columns", "width", "scale"), SEARCHED)
def test_the_search_of_a_gpu_finds_what_that_of_a_cpu_finds(
    rows: int, columns: int, width: int, scale: float, scale_bits: int, kind: Grid, device: str
) -> None:
    """Nearly every scale; and where a last digit decided otherwise, one as good in float64."""
    from lrpq.kernels.scale_search_cuda import search_scales

    bits = (2, 3, 4, 5, 6, 8)
    scale = scale if scale_bits == 16 else scale**0.1  # float8 ends at 2^-9 and 448
    W = numbers(columns, rows, seed=1) / numbers(4, columns, rows, seed=2).square().mean(0).sqrt() * scale
    W[:width, 0] = 0.0
    v = numbers(columns, seed=3).mul(1.5).exp()
    expected = search_module._search_groups(W, v, width, scale_bits, bits, kind)
    groups = W.view(-1, width, rows)
    found = torch.empty(len(bits), rows, len(groups), dtype=torch.bfloat16, device=device).transpose(1, 2)
    table = search_module._table(bits, width, scale_bits, kind, torch.device(device))
    search_scales(groups.to(device), v.view(-1, width).to(device), table, found, scale_bits=scale_bits)
    found = found.cpu()
    assert (found == expected).double().mean() > 0.98
    assert (found[:, 0, 0] == 1).all()
    for b, a, e in zip(bits, found.double(), expected.double(), strict=True):
        errors = []
        for s in (a.unsqueeze(1), e.unsqueeze(1)):
            q = (groups.double() / s).round().clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1)
            errors.append((v.double().view(-1, width, 1) * (groups.double() - q * s).square()).sum(1))
        assert torch.allclose(errors[0], errors[1], rtol=1e-4, atol=0.0)
        assert (s.abs() > 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_are_read_across_and_half_precise_are_searched_alike(device: str) -> None:
    from lrpq.kernels.scale_search_cuda import search_scales

    W, v = numbers(37, 64, seed=1).bfloat16(), numbers(64, seed=2).abs()
    table = search_module._table((3,), 32, 16, Grid.SIGNED, torch.device(device))
    results = []
    for groups in (W.T.view(2, 32, 37), W.T.float().contiguous().view(2, 32, 37)):
        found = torch.empty(1, 2, 37, dtype=torch.bfloat16, device=device)
        search_scales(groups.to(device), v.view(2, 32).to(device), table, found, scale_bits=16)
        results.append(found.cpu())
    assert torch.equal(*results)
    assert torch.equal(results[0], search_module._search_groups(W.T, v, 32, 16, [3], Grid.SIGNED))


# rows and columns: one, fewer than a block, a block and more; groups that no block divides
PAIRS = [(1, 8, 2), (70, 96, 6), (3, 24, 3), (5, 200, 2), (65, 192, 3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns", "groups"), PAIRS)
def test_products_of_groups_are_those_of_the_formula(rows: int, columns: int, groups: int, device: str) -> None:
    from lrpq.kernels.group_products_cuda import group_products

    codes = torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    X = numbers(50, columns, seed=2)
    H = X.T @ X
    A = torch.full((rows, groups, groups), torch.nan, dtype=torch.float64, device=device)
    group_products(codes.to(device), H.to(device), A)
    Z, blocks = codes.double().view(rows, groups, -1), H.double().view(groups, columns // groups, groups, -1)
    expected = torch.einsum("rgi,gihj,rhj->rgh", Z, blocks, Z)
    # the interpreter cuts off what the halves leave, 2^-16
    assert torch.allclose(A.cpu(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(A, A.transpose(1, 2))


# rows and columns: less than a program and a leaf, just these, more with rests
WHOLE = [(1, 1), (7, 5), (32, 16), (11, 96), (40, 75)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns"), WHOLE)
def test_a_sweep_in_one_launch_rounds_as_the_formula_says(rows: int, columns: int, device: str) -> None:
    from lrpq.kernels.columns_cuda import round_columns

    W = numbers(columns, rows, seed=2) * 3
    S = numbers(3, 2, rows, seed=3).sign() * (0.2 + numbers(3, 2, rows, seed=4).abs())
    R = numbers(columns, columns, seed=5).triu(1) * 0.2 + torch.eye(columns)
    runs = torch.arange(columns) % 3
    found = torch.full((columns, 2, rows), torch.nan, device=device)
    codes = torch.empty(found.shape, dtype=torch.int8, device=device)
    round_columns(found, *(x.to(device) for x in (W, S, R.T.contiguous().T, BOUNDS, runs)), codes, fresh=True)
    errors, codes = found.cpu().double(), codes.cpu()
    targets = W.double().unsqueeze(1) + torch.einsum("jk,jcr->kcr", R.double().triu(1), errors)
    s = S.double()[runs]
    ideal = (targets / s).clamp(BOUNDS[:, 0].view(1, 2, 1), BOUNDS[:, 1].view(1, 2, 1))
    assert ((ideal - codes).abs() < 0.5 + 1e-4).all()
    assert torch.allclose(errors, W.double().unsqueeze(1) - codes * s, atol=1e-5)
    assert codes.unique().numel() > 1 or rows * columns == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns"), WHOLE)
def test_some_columns_are_rounded_as_on_a_cpu_and_their_errors_halved(rows: int, columns: int, device: str) -> None:
    from lrpq.kernels import columns as on_host
    from lrpq.kernels import columns_cuda

    T, W = numbers(columns, 2, rows, seed=1) * 3, numbers(columns, rows, seed=2) * 3
    S = numbers(3, 2, rows, seed=3).sign() * (0.2 + numbers(3, 2, rows, seed=4).abs())
    R = numbers(columns, columns, seed=5).triu(1) * 0.2 + torch.eye(columns)
    fixed = (W, S, R, BOUNDS, torch.arange(columns) % 3)
    written = (torch.empty(T.shape, dtype=torch.int8), torch.empty(columns, 3, 2, rows, dtype=torch.bfloat16))
    expected = [T.clone(), *(x.clone() for x in written)]
    on_host.round_columns(expected[0], *fixed, *expected[1:])
    found = [x.to(device, copy=True) for x in (T, *written)]
    columns_cuda.round_columns(found[0], *(x.to(device) for x in fixed), *found[1:])
    errors, codes, halves = (x.cpu() for x in found)
    assert torch.equal(codes, expected[1])
    assert torch.allclose(errors, expected[0], atol=1e-5)
    # the interpreter cuts digits off where a GPU rounds
    assert (halves[:, 0].float() + halves[:, 1].float() - errors).abs().max() <= 2.0**-15 * errors.abs().max()
    assert torch.equal(halves[:, 0], halves[:, 2])
    assert (halves[:, 0].float() - errors).abs().max() <= 2.0**-7 * errors.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns"), WHOLE)
def test_columns_are_descended_leaf_by_leaf_as_on_a_cpu(rows: int, columns: int, device: str) -> None:
    from lrpq.kernels import descent, descent_cuda

    D, codes = numbers(columns, rows, seed=1), torch.randint(-4, 4, (columns, rows), dtype=torch.int8)
    G, A = numbers(columns, rows, seed=2) * 2, numbers(columns, 2 * columns, seed=5)
    S = numbers(2, rows, seed=3).sign() * (0.2 + numbers(2, rows, seed=4).abs())
    own = A @ A.T / (2 * columns)
    bounds = torch.tensor([-4.0, 3.0]).unsqueeze(1).expand(2, rows).contiguous()
    fixed = (S, bounds, own, 1 / own.diagonal(), torch.arange(columns) % 2)
    expected = [x.clone() for x in (D, codes, torch.zeros(rows, dtype=torch.bool))]
    descent.descend_columns(G.clone(), *expected[:2], *fixed, expected[2])
    found = [x.to(device, copy=True) for x in (D, codes, torch.zeros(rows, dtype=torch.bool))]
    halves = torch.empty(columns, 3, rows, dtype=torch.bfloat16, device=device)
    on_device = [x.to(device) for x in fixed]
    descent_cuda.descend_columns(G.to(device, copy=True), *found[:2], *on_device, found[2], halves)
    assert torch.equal(found[1].cpu(), expected[1])
    assert torch.allclose(found[0].cpu(), expected[0], atol=1e-5)
    assert torch.equal(found[2].cpu(), expected[2])
    # the interpreter cuts digits off where a GPU rounds
    assert (halves[:, 0].float() + halves[:, 1].float() - found[0]).abs().max() <= 2.0**-15 * found[0].abs().max()
    assert torch.equal(halves[:, 0], halves[:, 2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), WHOLE)
def test_sweeps_in_one_launch_descend_as_single_columns_do(rows: int, columns: int, sweeps: int, device: str) -> None:
    from lrpq.kernels.descent_cuda import descend_sweeps

    D, codes = numbers(columns, rows, seed=1), torch.randint(-4, 4, (columns, rows), dtype=torch.int8)
    S = numbers(2, rows, seed=3).sign() * (0.2 + numbers(2, rows, seed=4).abs())
    A = numbers(columns, 2 * columns, seed=5)
    H = A @ A.T / (2 * columns)
    inverse = 1 / H.diagonal()
    if columns > 2:
        inverse[2] = 0.0  # a dead input
    runs = torch.arange(columns) % 2
    bounds = torch.tensor([-4.0, 3.0]).unsqueeze(1).expand(2, rows).contiguous()
    changed = [x.to(device, copy=True) for x in (D, codes, torch.ones(rows, dtype=torch.bool))]
    fixed = [x.to(device) for x in (S, bounds, H, inverse, runs)]
    descend_sweeps(changed[0], changed[1], *fixed, changed[2], sweeps=sweeps)
    steps, errors, s = codes.double(), D.double(), S.double()[runs]
    for _ in range(sweeps):
        moved = torch.zeros(rows, dtype=torch.bool)
        for k in range(columns):
            pull = H.double()[k] @ errors * inverse.double()[k] / s[k]
            n = torch.minimum(torch.maximum(pull, -4 - steps[k]), 3 - steps[k]).round()
            steps[k] += n
            errors[k] -= n * s[k]
            moved |= n != 0
    found = changed[1].cpu().double()
    assert (found == steps).double().mean() > 0.998  # products by halves decide a near tie otherwise
    assert torch.allclose(changed[0].cpu().double(), D.double() - (found - codes.double()) * s, atol=1e-5)
    alike = (found == steps).all(0)
    assert torch.equal(changed[2].cpu()[alike], moved[alike])
    after = [torch.einsum("kr,kl,lr->", E, H.double(), E) for E in (changed[0].cpu().double(), errors, D.double())]
    assert abs(after[0] / after[1] - 1) < 1e-3
    assert after[0] < after[2] or rows * columns == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns", "groups"), PAIRS)
def test_errors_and_their_quadratic_forms_are_those_of_the_formula(
    rows: int, columns: int, groups: int, device: str
) -> None:
    from lrpq.kernels.row_errors_cuda import quadratic_forms, write_errors

    T, codes = numbers(rows, columns, seed=1), torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scales = (0.05 + numbers(rows, groups, seed=2).abs()).bfloat16()
    expected = T - (codes.view(rows, groups, -1) * scales.float().unsqueeze(2)).view(rows, columns)
    found = torch.full((columns, rows), torch.nan, device=device).T
    write_errors(T.to(device), codes.T.contiguous().to(device).T, scales.to(device), found)
    assert torch.equal(found.cpu(), expected)
    X = numbers(3 * columns, columns, seed=3)
    H = X.T @ X
    for unit in (1.0, 2.0**-80, 2.0**60):
        forms = quadratic_forms((expected * unit).to(device), H.to(device)).cpu()
        exact = torch.einsum("rj,jk,rk->r", expected.double(), H.double(), expected.double()) * unit**2
        assert torch.allclose(forms, exact, rtol=1e-5, atol=0.0)
    assert (quadratic_forms(torch.zeros(2, columns, device=device), H.to(device)) == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize(("rows", "columns", "groups"), PAIRS)
def test_rows_of_a_refit_are_summed_and_judged(
    rows: int, columns: int, groups: int, scale_bits: int, device: str
) -> None:
    from lrpq.kernels.refit_cuda import group_sums, judge, part_empty

    codes, X = torch.randint(-8, 8, (rows, columns), dtype=torch.int8), numbers(rows, columns, seed=1)
    sums = torch.empty(groups, rows, dtype=torch.float64, device=device).T
    group_sums(codes.to(device), X.to(device), sums)
    assert torch.allclose(sums.cpu(), (codes * X.double()).view(rows, groups, -1).sum(2), rtol=1e-12, atol=1e-12)

    root = numbers(rows, groups, groups, seed=2).double()
    A = root @ root.transpose(1, 2) + torch.eye(groups).double()
    A[0, 1], A[0, :, 1] = 0.0, 0.0  # a group without codes
    old = nearest(0.2 + numbers(rows, groups, seed=3).abs(), scale_bits).bfloat16()
    ds = numbers(rows, groups, seed=4).double() * 0.1
    b = torch.einsum("rgh,rh->rg", A, ds)  # then ds is the best step
    parted = [x.to(device, copy=True) for x in (A, b + 1.0)]
    part_empty(*parted)
    expected = A.clone()
    expected[0, 1, 1] = 1.0
    assert torch.equal(parted[0].cpu(), expected)
    assert float(parted[1][0, 1]) == 0.0
    assert (parted[1].cpu() == b + 1.0).sum() == b.numel() - 1

    info = torch.zeros(rows, dtype=torch.int32)
    ds[0, 1] = 0.0
    if rows > 4:
        info[1] = 3  # not solved
        ds[2, 0] = torch.nan
        ds[3, 0] = -2 * old[3, 0].double()  # would change its sign
        b[4] = -b[4]  # the wrong way: the error grows
    new, rejected = torch.empty_like(old, device=device), torch.empty(rows, dtype=torch.bool, device=device)
    judge(*(x.to(device) for x in (A, b, ds, info, old)), new, rejected, scale_bits=scale_bits)
    steps = torch.where((info == 0).unsqueeze(1) & torch.isfinite(ds), ds, 0.0)
    after = nearest(old.double() + steps, scale_bits).bfloat16()
    step = after.double() - old.double()
    growth = torch.einsum("rg,rgh,rh->r", step, A, step) - 2 * (step * b).sum(1)
    better = (growth < 0) & (after.double() * old.double() > 0).all(1)
    assert torch.equal(rejected.cpu(), ~better)
    assert torch.equal(new.cpu(), torch.where(better.unsqueeze(1), after, old))
    if rows > 4:
        assert not better[[1, 3, 4]].any()
        assert better.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 2, 9, 24, 32])
def test_equations_of_rows_are_solved(groups: int, device: str) -> None:
    from lrpq.kernels.refit_cuda import solve

    root = numbers(6, groups, groups, seed=groups).double()
    units = torch.logspace(-30, 30, 6, dtype=torch.float64).view(6, 1, 1)
    A = (root @ root.transpose(1, 2) + 1e-6 * torch.eye(groups).double()) * units
    wanted = numbers(6, groups, seed=7).double()
    b = torch.einsum("rgh,rh->rg", A, wanted)
    A[3] -= 2 * A[3].diagonal().max() * torch.eye(groups).double()  # not positive definite
    A[4, 0, 0] = torch.nan
    ds = torch.full_like(b, torch.nan, device=device)
    info = torch.full((6,), 7, dtype=torch.int32, device=device)
    solve(A.to(device), b.to(device), ds, info)
    assert (info.cpu() != 0).tolist() == [False, False, False, True, True, False]
    fine = torch.tensor([0, 1, 2, 5])
    exact = torch.linalg.solve(A[fine], b[fine])
    reached = torch.einsum("rgh,rh->rg", A[fine], ds.cpu()[fine])
    assert torch.allclose(reached / units[fine, 0], b[fine] / units[fine, 0], rtol=1e-9, atol=1e-9)
    assert torch.allclose(ds.cpu()[fine], exact, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Conversion of an array")  # by the interpreter
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_streams_are_decoded_as_on_a_cpu(bits: int, dtype: torch.dtype, device: str) -> None:
    """Bit for bit, more columns than a program has, whole segments alone: the rest of the rows is left as it is."""
    from lrpq.kernels.streams_cuda import decode_segments
    from lrpq.quant.packed_streams import decode_streams, pack_streams
    from lrpq.quant.trellis import codebook

    if device == "cpu" and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter cuts float32 off where a GPU rounds to bfloat16")
    rows, d_in = 300, 96
    g, bound = torch.Generator().manual_seed(bits), 2 ** (bits - 1)
    words = pack_streams(torch.randint(-bound, bound, (rows, d_in), generator=g, dtype=torch.int8), bits)
    scales = numbers(rows, 6, seed=1).bfloat16()
    expected = decode_streams(words, scales, bits, dtype)
    found = torch.zeros(rows, d_in, dtype=dtype, device=device)
    book = codebook(bits).to(device)
    decode_segments(words.to(device), scales.to(device), book, found, bits=bits, rows=128)
    assert torch.equal(found[:256].cpu(), expected[:256])
    assert not found[256:].any()
