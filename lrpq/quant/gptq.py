"""GPTQ: round the columns one after another, each correcting for the rounding errors before it.

Frantar et al. 2023 (arXiv:2210.17323), Algorithm 1, for all bit widths in one sweep over the columns.

The paper propagates E_j = (w_j - q_j) / U_jj, where U^T U = H^-1 (damped): column k is rounded at t_k = w_k -
sum_{j<k} E_j U_jk. All errors together are W - Q = E U, so E = (W - Q) R with R = U^-1, upper triangular with
R R^T = H. In terms of R the same target is

    t_k = w_k + sum_{j<k} (w_j - q_j) R_jk / R_kk,

which needs neither the inverse of H nor that of R: the factorisation is one Cholesky of the reversed matrix,
d^3/3 FLOPs, where inverse-then-Cholesky takes 4/3 d^3, and no digits are lost to an inverse. (It is Babai's
nearest plane algorithm on the lattice with basis R; Chen et al. 2025, arXiv:2507.18553, show the
equivalence.) The targets equal the paper's in exact arithmetic; a test holds the codes to those of a plain
implementation by explicit inverses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.kernels.threads import usable
from lrpq.model.layers import Choice
from lrpq.quant.column_loop import sweep
from lrpq.quant.doubts import Doubts
from lrpq.quant.factor import Factor
from lrpq.quant.forms import QuadraticForms
from lrpq.quant.grid import (
    Grid,
    QuantizedWeight,
    code_ranges,
    ends,
    fetch,
    group_width,
    largest,
    power_of_two,
    refuse_unless_finite,
    zero_points,
)
from lrpq.quant.halves import add_in_parts, by_halves, multiplied
from lrpq.quant.importance import search_importance
from lrpq.quant.residual import has_kernel, write_residual
from lrpq.quant.scale_search import search_scales_transposed
from lrpq.quant.trellis import segment_edges, whole_segments
from lrpq.quant.trellis_loop import gptq_trellis, trellis_scales
from lrpq.quant.wavefront import Blocks, round_grid_blocks, round_stream_blocks

if TYPE_CHECKING:
    from jaxtyping import Float

# Stacked rows of one sweep. On CPU they keep the inner levels of the recursion in cache (2,304 .. 18,432
# swept: 4,608 and 9,216 are equal, 2,304 is dominated by dispatch); on GPU they only bound the memory.
_CPU_ROWS = 4608
_GPU_ELEMENTS = 2**29  # of d_in times stacked rows: 11 bytes each
_WHOLE_ROWS = 64  # of which a part of the rows is made up on a GPU: products of odd lengths take twice as long
# Cut of the loss: rows whose differences stay in cache, column blocks of which only one triangle is
# multiplied.
_LOSS_ROWS = 1024
LOSS_BLOCKS = 8
# On a GPU the rows of several candidates at once, and one product where eight would be bound by their launches.
_GPU_LOSS_ELEMENTS = 2**26
_GPU_LOSS_WIDTH = 2048
_HALVES_ELEMENTS = 2**27


def gptq(
    W: Float[Tensor, "d_out d_in"],
    factor: Factor,
    choices: Sequence[Choice],
    *,
    scales: Sequence[Float[Tensor, "d_out groups"]] | None = None,
    H: Float[Tensor, "d_in d_in"] | None = None,
    grid: Grid = Grid.SYMMETRIC,
    rows: Rows | None = None,
    name: str = "layer",
) -> list[QuantizedWeight]:
    """Quantize W for every choice in one sweep over the columns; results in the order of ``choices``.

    Rows do not interact: layers that share an input may be stacked and the result taken apart with ``split``. Those of
    a trellis do, within a segment, which is why ``rows`` then says what is stacked; a choice of them is a sweep of its
    own.
    ``scales`` (rounded to bfloat16 first; one tensor a choice) are searched where not given, with the importance that
    ``search_importance`` finds in the factor, or diag(H) of another ``H``. Computes in the dtype of the factor (fp32;
    fp64 in tests).
    Memory besides inputs and results: W twice and the codes once more, and 5 bytes times d_in times at most 4,608 rows
    on CPU, where compiled loops copy these rows of W and of the scales too.

    Raises QuantizationError naming the layer for values that are not finite or so large that the column loop could
    overflow (from about 1e30 in fp32), a scale of zero, or a group size that does not divide d_in.
    """
    rounding = Rounding(factor, choices, H=H, grid=grid, name=name)
    return rounding(W, scales, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Which rows a weight has, for choices with a trellis; for others they are all alike."""

    parts: Sequence[int]
    """Rows of every layer, or part of a layer, that is stacked."""
    weights: Float[Tensor, "rows=size"] | None = None
    """How much the squared errors of a row count beside those of others, positive; None: all the same."""

    @classmethod
    def of(cls, W: Float[Tensor, "rows d_in"], rows: Rows | None, *, name: str = "layer") -> Rows:
        """Those of one layer where nothing is said.

        Raises:
            QuantizationError: they are not those of W.
        """
        rows = rows if rows is not None else cls(parts=(len(W),))
        if sum(rows.parts) != len(W) or (rows.weights is not None and len(rows.weights) != len(W)):
            weighed = "" if rows.weights is None else f" and {len(rows.weights)} weights of rows"
            raise QuantizationError(
                f"{name}: {len(W)} rows, parts of {list(rows.parts)}{weighed}; they must be of one weight"
            )
        return rows

    def weights_on(self, W: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows=size"]:
        """The weights as float32 where W is."""
        return W.new_ones(len(W), dtype=torch.float32) if self.weights is None else self.weights.to(W.device).float()


class Rounding:
    """``gptq`` of rows of one site, some at a time: what their calls have in common is made once.

    Args:
        factor: of the site.
        choices: of all rows.
        H: another one whose diagonal weighs the search for scales.
        grid: of the codes.
        doubts: where what would wait for the device is asked; by default every call waits.
        name: module name for errors.

    Raises:
        QuantizationError: no choice, or a group size that does not divide d_in.
    """

    def __init__(
        self,
        factor: Factor,
        choices: Sequence[Choice],
        *,
        H: Float[Tensor, "d_in d_in"] | None = None,
        grid: Grid = Grid.SYMMETRIC,
        doubts: Doubts | None = None,
        name: str = "layer",
    ) -> None:
        self._factor, self._choices, self._grid, self._doubts, self._name = factor, choices, grid, doubts, name
        d_in = len(factor.order)
        if not choices:
            raise QuantizationError(f"{name}: give at least one choice")
        self._widths = [group_width(choice, d_in, name=name) for choice in choices]
        self._run = math.gcd(*self._widths)
        self._importance = search_importance(factor, name=name) if H is None else H.diagonal()
        self._back = torch.argsort(factor.order)
        self._site_ends = list(ends([self._importance, factor.R]))

    def __call__(
        self,
        W: Float[Tensor, "rows d_in"],
        scales: Sequence[Float[Tensor, "rows groups"]] | None = None,
        rows: Rows | None = None,
    ) -> list[QuantizedWeight]:
        """Codes of the rows for every choice, in the order of the choices.

        Raises:
            QuantizationError: as ``gptq``; of what waits for the device, where the doubts are settled.
        """
        factor, choices, name = self._factor, self._choices, self._name
        d_in = W.shape[1]
        if d_in != len(factor.order):
            raise QuantizationError(
                f"{name}: {d_in} inputs but a Hessian of {len(factor.order)}; pass its own input's factor"
            )
        if scales is not None and len(scales) != len(choices):
            raise QuantizationError(f"{name}: give one tensor of scales for each choice or none at all")
        Wt = W.T.to(factor.R.dtype).contiguous()
        if scales is None:
            scales = self._search(Wt)
        scales = [s.bfloat16() for s in scales]
        self._check(W, scales)
        uniform = [i for i, choice in enumerate(choices) if not choice.trellis]
        found = dict(zip(uniform, self._on_grids(Wt, [scales[i] for i in uniform], uniform), strict=True))
        if len(uniform) < len(choices):
            rows = Rows.of(W, rows, name=name)
            edges, weights = segment_edges(rows.parts, W.device, name=name), rows.weights_on(W)
            Wt = Wt[factor.order].float()
            for i, choice in enumerate(choices):
                if choice.trellis:
                    codes = gptq_trellis(Wt, factor, scales[i].T.float(), choice, weights, edges)
                    codes = codes.index_select(0, self._back).T.contiguous()
                    found[i] = QuantizedWeight(codes=codes, scales=scales[i], choice=choice)
        return [found[i] for i in range(len(choices))]

    def in_blocks(
        self,
        W: Float[Tensor, "rows d_in"],
        scales: Float[Tensor, "rows groups"],
        weights: Float[Tensor, "rows=size"] | None,
        blocks: Sequence[Blocks],
        *,
        on_step: Callable[[], None] = lambda: None,
    ) -> QuantizedWeight:
        """Codes of rows whose blocks move each other's targets, for one choice without zero points.

        Args:
            W: targets of all blocks.
            scales: of W.
            weights: of the rows of trellis codes, as `Rows` has them.
            blocks: that make up the rows.
            on_step: called about as often as there are blocks.

        Raises:
            QuantizationError: as ``gptq``, of the targets as they were moved; of what waits for the device, where the
                doubts are settled.
        """
        factor, (choice,) = self._factor, self._choices
        scales = scales.bfloat16()
        Wt, S = W.T.to(factor.R.dtype).contiguous()[factor.order], scales.T.to(factor.R.dtype)
        if choice.trellis:
            weights = Rows(parts=[len(W)], weights=weights).weights_on(W)
            targets = Wt.float(), factor, S.float(), choice
            done = round_stream_blocks(*targets, weights=weights, chunks=blocks, on_step=on_step)
        else:
            done = round_grid_blocks(Wt, factor, S, choice, chunks=blocks, on_step=on_step)
        self._check(done.targets, [scales])
        codes = done.codes.index_select(0, self._back).T.contiguous()
        return QuantizedWeight(codes=codes, scales=scales, choice=choice)

    def scales(self, W: Float[Tensor, "rows d_in"]) -> list[Float[Tensor, "rows groups"]]:
        """What is searched where no scales are given, of every choice."""
        return self._search(W.T.to(self._factor.R.dtype).contiguous())

    def _search(self, Wt: Tensor) -> list[Tensor]:
        uniform = [choice for choice in self._choices if not choice.trellis]
        found = iter(search_scales_transposed(Wt, self._importance, uniform, grid=self._grid, name=self._name))
        return [
            trellis_scales(Wt, self._importance, choice, name=self._name) if choice.trellis else next(found)
            for choice in self._choices
        ]

    def _on_grids(self, Wt: Tensor, scales: Sequence[Tensor], which: Sequence[int]) -> list[QuantizedWeight]:
        """Codes of the choices of uniform grids, in one sweep."""
        if not which:
            return []
        factor, choices = self._factor, [self._choices[i] for i in which]
        num_rows, d_in = Wt.shape[1], len(Wt)
        zeros = [zero_points(Wt.T, choice) for choice in choices] if self._grid is Grid.ASYMMETRIC else []
        # one row of scales for every run of columns that lies in one group of every choice
        widths = [self._widths[i] for i in which]
        S = _stack(scales, widths, self._run).to(Wt)
        Z = _stack(zeros, widths, self._run).to(Wt) if zeros else None
        bounds = code_ranges(tuple(choice.bits for choice in choices), Wt.dtype, Wt.device)
        codes = torch.empty(d_in, len(choices), num_rows, dtype=torch.int8, device=Wt.device)
        Wt = Wt[factor.order]
        step = min(num_rows, rows_at_once(d_in, len(choices), cpu=Wt.device.type == "cpu"))
        memory = Wt.new_empty(d_in * len(choices) * step)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            Z_rows = None if Z is None else Z[:, :, rows]
            done = sweep(Wt[:, rows], factor, S[:, :, rows], bounds, self._run, Z=Z_rows, memory=memory)
            codes[:, :, rows] = done.codes
        return [
            QuantizedWeight(
                codes=codes[:, i].index_select(0, self._back).T.contiguous(), scales=s, choice=choice, zero_points=z
            )
            for i, (s, choice, z) in enumerate(zip(scales, choices, zeros or [None] * len(choices), strict=True))
        ]

    def _check(self, W: Tensor, scales: Sequence[Tensor]) -> None:
        """Doubt that weights and importance are finite, that no target t_k = w_k + sum_j D_j R_jk can overflow, and
        that no scale is zero or not finite.

        Where this passes, the column loop makes no infinity and no NaN, which would end as codes like any other.
        """
        factor, choices, name = self._factor, self._choices, self._name
        dtype = factor.R.dtype

        def judge(found: list[float]) -> None:
            scaled, (weighed, pull, weight, *steps) = found[: len(choices)], largest(found[len(choices) :])
            refuse_unless_finite(weight, "weight", name=name)
            refuse_unless_finite(weighed, "Hessian", name=name)
            for step in steps:
                refuse_unless_finite(step, "grid of scales", name=name)
            grid_end = max(2**choice.bits * step for step, choice in zip(steps, choices, strict=True))
            reach = weight + (weight + grid_end) * len(factor.R) * pull
            if not reach < torch.finfo(dtype).max:
                raise QuantizationError(
                    f"{name}: weights up to {weight:.3g} and a grid up to {grid_end:.3g} may overflow {dtype} while"
                    " columns correct each other; check the source model"
                )
            if not all(scaled):
                raise QuantizationError(f"{name}: a scale is zero; give a group of zeros a scale of 1")

        doubts = Doubts() if self._doubts is None else self._doubts
        doubts.ask([*(s.all() for s in scales), *self._site_ends, *ends([W, *scales])], judge)
        if self._doubts is None:
            doubts.settle()


def rows_at_once(d_in: int, num_choices: int, *, cpu: bool) -> int:
    """Rows of a weight in one sweep of ``gptq``, at most."""
    if cpu:
        return max(1, _CPU_ROWS // num_choices)
    return max(1, _GPU_ELEMENTS // d_in // num_choices // _WHOLE_ROWS) * _WHOLE_ROWS


def _stack(tensors: Sequence[Tensor], widths: Sequence[int], run: int) -> Tensor:
    """[d_out, groups] of every choice -> [runs, choices, d_out], a group repeated over the runs it spans."""
    repeated = [x.T.repeat_interleave(width // run, dim=0) for x, width in zip(tensors, widths, strict=True)]
    return torch.stack(repeated, dim=1)


def loss(
    W: Float[Tensor, "d_out d_in"], Q: Float[Tensor, "d_out d_in"], H: Float[Tensor, "d_in d_in"]
) -> Float[Tensor, "rows=d_out"]:
    """Layer-wise error of every row, diag((W - Q) H (W - Q)^T), with the *undamped* H; float64, not halved.

    Products are in the dtype of H, large ones on a GPU by halves (quant/halves.py), and so are sums over the 8 blocks
    of columns; within a block they are summed in float64. H is symmetric, so each pair of column blocks is multiplied
    once: (1 + 1/8) d_in^2 FLOPs a row instead of 2 d_in^2. Each row is in units of a power of two meanwhile, which
    changes no digit: errors below 1e-19 would vanish when squared in fp32 and pass for none. A form in a semi-definite
    H is not negative; what fp32 rounds below zero, as it does where H has low rank, is zero.

    The error that GPTQ minimises includes damping; it ranks bit widths wrongly and is nowhere returned.
    """
    return _loss(lambda rows: (W[rows] - Q[rows]).to(H.dtype), *W.shape, H=H)


def loss_of(
    W: Float[Tensor, "d_out d_in"], quantized: QuantizedWeight, H: Float[Tensor, "d_in d_in"]
) -> Float[Tensor, "rows=d_out"]:
    """``loss``, with a Q that is made for some rows at a time: it then stays in cache."""
    return _loss(lambda rows: _errors(W[rows], quantized.rows(rows), H), *W.shape, H=H)


def _errors(W: Tensor, quantized: QuantizedWeight, H: Tensor) -> Tensor:
    if has_kernel(W, quantized, H):
        errors: Tensor = write_residual(W, quantized, H.new_empty(W.shape))
    else:
        errors = (W - quantized.dequantize(H.dtype)).to(H.dtype)
    return errors


def _loss(errors: Callable[[slice], Tensor], d_out: int, d_in: int, *, H: Tensor) -> Tensor:
    total = torch.zeros(d_out, dtype=torch.float64, device=H.device)
    for rows in row_chunks(d_out, H):
        total[rows] = _forms(errors(rows), H)
    return total.clamp_(min=0.0)


def row_chunks(d_out: int, H: Float[Tensor, "d_in d_in"]) -> Iterator[slice]:
    """Rows whose errors are looked at at once."""
    step = whole_segments(_GPU_LOSS_ELEMENTS // len(H)) if H.is_cuda else _LOSS_ROWS
    return (slice(top, min(d_out, top + step)) for top in range(0, d_out, step))


def _forms(dW: Tensor, H: Tensor) -> Tensor:
    """dW_j H dW_j^T of every row, float64; changes dW."""
    d_in = dW.shape[1]
    if H.is_cuda and usable(H) and d_in <= _GPU_LOSS_WIDTH:
        from lrpq.kernels.row_errors_cuda import quadratic_forms

        return quadratic_forms(dW.contiguous(), H)  # a transposed weight leaves its strides to its errors
    step = max(1, -(-d_in // LOSS_BLOCKS))
    unit = power_of_two(torch.maximum(dW.amax(1), -dW.amin(1)))
    dW.div_(unit.unsqueeze(1))
    products = dW.new_zeros(len(dW), step)
    for start in range(0, d_in, step):
        stop = min(d_in, start + step)
        half = multiplied(dW[:, start:stop], H[start:stop, start:stop])
        if by_halves(half, d_in - stop):
            add_in_parts(half, 2.0 * dW[:, stop:], H[stop:, start:stop])
        else:
            half.addmm_(dW[:, stop:], H[stop:, start:stop], alpha=2.0)
        products[:, : stop - start].addcmul_(half, dW[:, start:stop])
    forms: Tensor = products.sum(1, dtype=torch.float64) * unit.double().square()
    return forms


def predicted_cost(
    W: Float[Tensor, "d_out d_in"],
    quantized: Sequence[QuantizedWeight],
    H: Float[Tensor, "d_in d_in"],
    curvature: Float[Tensor, "rows=d_out"],
) -> list[float]:
    """Predicted growth of the model's loss, nats a token, for each candidate: 1/2 sum_j c_j dW_j H dW_j^T.

    Some rows of one candidate at a time are dequantized; on a GPU all of several candidates, as many as memory is meant
    for, and of a wide layer the forms are computed by halves (quant/forms.py). Sums in float64.
    """
    c = curvature.double()
    if H.is_cuda and usable(H) and len(H) > _GPU_LOSS_WIDTH:
        forms = QuadraticForms(H)
        return [0.5 * cost for cost in fetch(*(_by_halves(W, q, H, forms) @ c for q in quantized))]
    at_once = _GPU_LOSS_ELEMENTS // max(1, W.numel()) if H.is_cuda else 1
    if at_once <= 1:
        return [0.5 * cost for cost in fetch(*(loss_of(W, q, H) @ c for q in quantized))]
    costs: list[Tensor] = []
    for start in range(0, len(quantized), at_once):
        errors = torch.cat([_errors(W, q, H) for q in quantized[start : start + at_once]])
        costs += (_forms(errors, H).clamp_(min=0.0).view(-1, len(W)) @ c).unbind()
    return [0.5 * cost for cost in fetch(*costs)]


def _by_halves(W: Tensor, quantized: QuantizedWeight, H: Tensor, forms: QuadraticForms) -> Tensor:
    step = whole_segments(_HALVES_ELEMENTS // len(H))
    chunks = (slice(top, top + step) for top in range(0, len(W), step))
    return torch.cat([forms(_errors(W[rows], quantized.rows(rows), H)) for rows in chunks])
