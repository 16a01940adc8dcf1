"""GPTQ and coordinate descent with trellis codes: what a column should be comes from the columns before it, and its
codes from Viterbi's algorithm (quant/trellis.py).

In GPTQ rows do not interact, and a factor of a row cannot change its codes. Here a segment's rows share a stream and
so share its errors out: a column's codes minimise sum_j c_j s_j^2 (t_j / s_j - q_j)^2, with c_j the curvature at the
row's output. Descent takes a column at a time to the best stream given all other columns: with D = T - Q the target is
Q_k + (D H)_k / H_kk, the same loop with another factor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.kernels.trellis import round_segments
from lrpq.model.layers import Choice
from lrpq.quant.column_loop import halvings
from lrpq.quant.factor import Factor
from lrpq.quant.grid import QuantizedWeight, group_width, power_of_two
from lrpq.quant.stored_scales import storable
from lrpq.quant.trellis import LEFT, check_width, codebook

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float, Int, Int8, Int32, Int64

LEAF_COLUMNS = {"cpu": 32, "cuda": 64}
"""Columns of one call of a large layer: on a GPU a segment's errors are fed back by one program, beside what its codes
take."""
MOST_COLUMNS, MOST_WEIGHTS = 2048, 2**24
"""Of a layer that one launch on a GPU goes through; not swept. The more there are, the more a segment waits for what
its errors, and those of other rows, do to its targets."""
_SMALLEST, _SMALLEST_UNIT = 2.0**-40, 2.0**-100
"""Scale of a group of zeros, in units of the layer's largest weight, and where all are zero."""
_LEAST_MEAN = 2.0**-10
"""Of a group, in units of its largest weight."""
_WITHIN = 2.5
"""Scales that a weight may be large without being cut off. Of 2 to 3 in steps of .25 the best in groups of
64 of a layer of Gemma 3, at 5 and 6 bits (docs/log.md)."""
_LOWEST, _HIGHEST = 0.95, 5.0
SCALES_TRIED = 16
"""Multiples of a root mean square, from the lowest to the highest."""


def trellis_scales(
    Wt: Float[Tensor, "d_in d_out"], importance: Float[Tensor, "columns=d_in"], choice: Choice, *, name: str = "layer"
) -> BFloat16[Tensor, "d_out groups"]:
    """Scales for a search that is made before any stream is known, as stored.

    Codebooks are for a variance of 1 and end near 4, so a scale is about the root mean square of its group, and larger
    where that would cut off its largest weights: of 16 multiples of it the one with the least

        D s^2 + mean max(|w| - 2.5 s, 0)^2,

    D what is left of numbers that a codebook is for. Values beyond 2.5 are few, and a stream is at few of them in a
    row. The more bits, the more a weight counts that is cut off: on a layer of Gemma 3 this leaves .62 and .32 times
    the error of root mean squares at 5 and 6 bits, of whole rows .19 times at 6 (docs/log.md).
    """
    check_width(choice.bits, name=name)
    d_in, d_out = Wt.shape
    width = group_width(choice, d_in, name=name)
    groups = Wt.float().view(d_in // width, width, d_out).abs()
    largest = groups.amax(1)
    unit = torch.where(largest > 0, largest, 1.0)
    groups = groups / unit.unsqueeze(1)
    weights = importance.float().view(-1, width, 1)
    total = weights.sum(1, keepdim=True)
    weights = torch.where(total > 0, weights / total.clamp(min=torch.finfo(torch.float32).tiny), 1 / width)
    # where the weights that count are zeros, the others still need values
    mean = torch.maximum((groups.square() * weights).sum(1), groups.new_tensor(_LEAST_MEAN**2)).sqrt()
    best, least = mean, torch.full_like(mean, torch.inf)
    for step in range(SCALES_TRIED):
        s = mean * (_LOWEST * (_HIGHEST / _LOWEST) ** (step / (SCALES_TRIED - 1)))
        beyond = (groups - _WITHIN * s.unsqueeze(1)).clamp_(min=0).square_()
        error = LEFT[choice.bits] * s.square() + (beyond * weights).sum(1)
        best = torch.where(error < least, s, best)
        least = torch.minimum(error, least)
    # a group of zeros has the smallest values there are
    none = torch.clamp(_SMALLEST * largest.amax(), min=_SMALLEST_UNIT)
    scales = torch.where(largest > 0, best * unit, none)
    return storable(scales.T.contiguous(), 3, choice.scale_bits).bfloat16()


def at_once(d_in: int, rows: int) -> bool:
    """Whether a GPU goes through all columns of a layer in one launch."""
    return d_in <= MOST_COLUMNS and d_in * rows <= MOST_WEIGHTS


def leaf_columns(d_in: int, rows: int, *, cpu: bool) -> int:
    """Columns of one call of ``round_segments``."""
    if cpu:
        return LEAF_COLUMNS["cpu"]
    return d_in if at_once(d_in, rows) else LEAF_COLUMNS["cuda"]


def gptq_trellis(
    Wt: Float[Tensor, "d_in rows"],
    factor: Factor,
    S: Float[Tensor, "runs rows"],
    choice: Choice,
    weights: Float[Tensor, "rows=size"],
    edges: Int32[Tensor, "edges=size"],
) -> Int8[Tensor, "d_in rows"]:
    """Codes of the weights, whose columns are in the order of the sweep, as the codes' are.

    FLOPs: d_in^2 a row as GPTQ's, and 2^14 (1 + 32/128) d_in a row.
    """
    return _sweep(Wt.clone(), Wt, factor.R, S, factor.order // (len(Wt) // len(S)), choice, weights, edges)


def descend_trellis(
    T: Float[Tensor, "rows d_in"],
    quantized: QuantizedWeight,
    H: Float[Tensor, "d_in d_in"],
    weights: Float[Tensor, "rows=size"],
    edges: Int32[Tensor, "edges=size"],
) -> QuantizedWeight:
    """One sweep over the columns, each to the best stream given all others; columns by falling H_kk.

    A column whose H_kk is zero goes to its own target. Twice GPTQ's products.
    """
    d_in = T.shape[1]
    diagonal = H.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    Q = quantized.dequantize(torch.float32)
    pull = ((T - Q) @ H).mul_(inverse)
    pull += torch.where(diagonal > 0, 0.0, T - Q)
    Qt = Q.T[order].contiguous()
    targets = Qt + pull.T[order]
    R = (H * inverse)[order][:, order]
    width = d_in // quantized.scales.shape[1]
    S = quantized.scales.T.float().contiguous()
    codes = _sweep(targets, Qt, R, S, order // width, quantized.choice, weights, edges)
    found = torch.empty_like(quantized.codes)
    found[:, order] = codes.T
    return QuantizedWeight(codes=found, scales=quantized.scales, choice=quantized.choice)


def _sweep(
    T: Float[Tensor, "d_in rows"],
    W: Float[Tensor, "d_in rows"],
    R: Float[Tensor, "d_in d_in"],
    S: Float[Tensor, "runs rows"],
    runs: Int[Tensor, "columns=size"],
    choice: Choice,
    weights: Float[Tensor, "rows=size"],
    edges: Int32[Tensor, "edges=size"],
) -> Int8[Tensor, "d_in rows"]:
    """Targets, of which errors W - Q are made, through all columns by halves, as `lrpq.quant.column_loop` does.

    All in units of a power of two near the largest scale, whose squares then neither vanish nor overflow.
    """
    unit = power_of_two(S.abs().amax())
    codes = torch.empty(T.shape, dtype=torch.int8, device=T.device)
    book, S, W, R = codebook(choice.bits, T.device), (S / unit).contiguous(), W / unit, R.float()
    T.div_(unit)
    rows_of: Int64[Tensor, columns] = runs.to(torch.int64)
    for first, middle, last in halvings(0, len(T), leaf_columns(*T.shape, cpu=not T.is_cuda)):
        if middle == last:
            k = slice(first, last)
            round_segments(T[k], W[k], S, R[k, k], weights, rows_of[k], book, codes[k], edges, bits=choice.bits)
        else:
            T[middle:last].addmm_(R[first:middle, middle:last].T, T[first:middle])
    return codes
