"""Correct one layer for the errors before it, quantize it, and keep of every row what is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant.correction import correct, target_error
from lrpq.quant.doubts import Doubts
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import Rounding, Rows, gptq, row_chunks
from lrpq.quant.grid import Grid, QuantizedWeight, fetch, power_of_two
from lrpq.quant.hessian import factor_damped, normalized
from lrpq.quant.polish import Polisher, polish, rounds_of
from lrpq.quant.row_feedback import (
    DEFAULT_BLOCKS,
    RowBlocks,
    interacts,
    joint_error,
    joint_error_of,
    row_weights,
    stacked,
)
from lrpq.quant.trellis import SEGMENT_ROWS, SHARES, check_parts, share_of_grid, summed
from lrpq.refine.products import SiteProducts
from lrpq.refine.row_parts import row_parts

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

ALONE_ELEMENTS = 2**27
"""Weights that are swept alone on a GPU: stacked with others they would not be faster, and take twice the memory."""
AT_ONCE_ELEMENTS = 2**24
"""Weights of a layer up to which all blocks of uniform codes are at hand at once: 64 MB a copy, and a small layer waits
for its launches, which are fewer. As in quant/side_by_side.py; not swept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """A quantized layer and how it went."""

    weight: QuantizedWeight
    rejected_rows: int
    """Rows whose corrected weights were worse on their own calibration error: these are not corrected."""
    rows: int
    damping_steps: int
    """How often the damping, GPTQ's or the correction's, was raised because C was not positive definite."""
    dead_inputs: int
    rows_alone: int = 0
    """Parts of which rows that make up for each other's errors were worse together than rows on their own, which were
    kept."""


def quantize_refined(
    W: Float[Tensor, "d_out d_in"],
    products: SiteProducts,
    choice: Choice,
    *,
    strength: float,
    damping: float = 0.01,
    correction_damping: float = 0.1,
    polish_rounds: int = 2,
    outputs: Sequence[Float[Tensor, "chunk chunk"]] | None = None,
    row_blocks: int = DEFAULT_BLOCKS,
    grid: Grid = Grid.SIGNED,
    parts: Sequence[int] | None = None,
    on_step: Callable[[], None] = lambda: None,
    name: str,
) -> Refined:
    """GPTQ on the inputs of the quantized prefix, after a correction towards the original outputs; then polished.

    The corrected target is W + a W D (C + damping)^-1, with P for W D where there is one. A row's calibration error is
    the weighted distance between the output that is wanted (quant/correction.py) and its quantized output on the real
    inputs; each row keeps the better of the corrected and the plain codes. Rows do not interact in GPTQ, so this guard
    can act on each; of a trellis it acts on segments. Where streams are then rounded in blocks, uniform codes of as
    many bits stand in for them here, and nowhere else: they take a small part of the time, and choose as well
    (docs/log.md).

    Args:
        W: original weights, float32.
        products: C and D or P of its input site, all shards merged.
        choice: bits and group size.
        strength: a in the formula; 0 corrects nothing.
        damping: share of the mean diagonal of C that GPTQ adds to it.
        correction_damping: the same for the correction, which needs more: it fits d_in numbers a row to the
            calibration tokens, and a held-out text pays for what it fits of their noise (docs/log.md).
        polish_rounds: rounds of coordinate descent on the codes and a refit of the scales (quant/polish.py), towards
            what each row was rounded from, or what the errors of other rows then make of it; rows whose calibration
            error that raises stay as rounded; 0 is none. Of trellis codes one round at most (`rounds_of`).
        outputs: second moments of the gradients at its outputs (relevance/outputs.py), with which blocks of rows make
            up for the errors of the blocks before them (quant/row_feedback.py); None rounds each row on its own.
        row_blocks: how many such blocks, at most; 1 rounds each row on its own.
        grid: signed or symmetric.
        parts: rows of each part of W that is rounded for itself, by the site's factors, which they share; by default as
            ``row_parts`` cuts W. Some parts of a layer give the same codes as all of them: W, P and ``outputs`` are
            then of their rows.
        on_step: called whenever rows have been rounded or polished; about once for each block of them.
        name: module name for errors.

    Raises:
        QuantizationError: chunks of ``outputs`` lie across parts, or parts or chunks across segments of a trellis.
    """
    C = normalized(products.hessian, name=name).to(W.device)
    factor = factorize(C, damping=damping, name=name)
    cuts = _slices(parts) if parts is not None else row_parts(*W.shape)
    if choice.trellis:
        check_parts([rows.stop - rows.start for rows in cuts], name=name)
        check_parts([len(G) for G in outputs or ()], name=name)
    chunks = [None] * len(cuts) if outputs is None else _by_part(outputs, cuts, name=name)
    prefixes: list[_Prefix | None] = [None] * len(cuts)
    corrected: list[Tensor | None] = [None] * len(cuts)
    damping_steps = 0
    if strength != 0.0 and not (products.shift is None and products.pull is None):
        C, prefixes = _Prefix.of(W, C, products, cuts)
        corrected, damping_steps = _corrected(C, prefixes, strength, damping=correction_damping, name=name)
    found: list[_Part] = []
    for rows, prefix, of_rows in zip(cuts, prefixes, chunks, strict=True):
        target = corrected.pop(0)
        feedback = _Feedback(
            row_blocks=row_blocks,
            polish_rounds=polish_rounds,
            grid=grid,
            on_step=on_step,
            name=name,
        )
        first = replace(choice, trellis=False) if _in_blocks(of_rows, choice, feedback) else choice
        if prefix is None or target is None:
            own = _rows(W[rows], of_rows, first)
            weight = gptq(W[rows], factor, [first], grid=grid, rows=own, name=name)[0]
            rounded = _Rounded(target=W[rows], weight=weight)
        else:
            both = _round_both(W[rows], target, factor, first, of_rows, grid, name)
            rounded = prefix.better(target, *both, of_rows, choice)
        del target
        on_step()
        found.append(_finished(W[rows], C, prefix, rounded, factor, choice, of_rows, feedback))
    return Refined(
        weight=stacked([part.weight for part in found]),
        rejected_rows=sum(part.rejected_rows for part in found),
        rows=W.shape[0],
        damping_steps=factor.num_damping_steps + damping_steps,
        dead_inputs=factor.num_dead,
        rows_alone=sum(part.alone for part in found),
    )


def _slices(sizes: Sequence[int]) -> tuple[slice, ...]:
    ends = list(accumulate(sizes))
    return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))


def _by_part(outputs: Sequence[Tensor], cuts: Sequence[slice], *, name: str) -> list[Sequence[Tensor]]:
    """The chunks of every part."""
    starts = [0, *accumulate(len(G) for G in outputs)]
    if not {rows.start for rows in cuts} <= set(starts):
        raise QuantizationError(f"{name}: output gradients of chunks that lie across parts of its rows")
    return [[G for G, start in zip(outputs, starts, strict=False) if rows.start <= start < rows.stop] for rows in cuts]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Rows that are done."""

    weight: QuantizedWeight
    rejected_rows: int
    alone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Feedback:
    """How rounded rows are improved."""

    row_blocks: int
    polish_rounds: int
    grid: Grid
    on_step: Callable[[], None]
    name: str


def _finished(
    W: Tensor,
    C: Tensor,
    prefix: _Prefix | None,
    rounded: _Rounded,
    factor: Factor,
    choice: Choice,
    outputs: Sequence[Tensor] | None,
    how: _Feedback,
) -> _Part:
    """Blocks of rows that make up for each other's errors, or polished rows on their own."""
    weight: QuantizedWeight | None = None
    together = _in_blocks(outputs, choice, how)
    if together:
        assert outputs is not None
        outputs = [G.to(W.device) for G in outputs]
        weight = _with_feedback(W, C, prefix, rounded, factor, choice, outputs, how)
    alone = together and weight is None
    if weight is None:
        weight = rounded.weight
        if how.polish_rounds:
            own = _rows(W, outputs, choice)
            rounds = rounds_of(choice, how.polish_rounds)
            polished = polish(rounded.target, [weight], C, rounds=rounds, rows=own, name=how.name)[0].weight
            weight = polished if prefix is None else prefix.lower(polished, weight, outputs)
    assert weight.choice == choice  # what stood in for streams goes nowhere
    return _Part(weight=weight, rejected_rows=rounded.rejected_rows, alone=alone)


def _rows(W: Tensor, outputs: Sequence[Tensor] | None, choice: Choice, *, times: int = 1) -> Rows:
    """The rows of a layer's part, so many times over; weighed where that counts."""
    weights = row_weights(outputs).repeat(times) if choice.trellis and outputs is not None else None
    return Rows(parts=[len(W)] * times, weights=weights)


def _in_blocks(outputs: Sequence[Tensor] | None, choice: Choice, how: _Feedback) -> bool:
    """Whether blocks of rows make up for each other's errors."""
    return outputs is not None and interacts(outputs, num_blocks=how.row_blocks, together=_together(choice))


def _together(choice: Choice) -> int:
    """Rows that stay side by side."""
    return SEGMENT_ROWS if choice.trellis else 1


def _round_both(
    W: Tensor,
    corrected: Tensor,
    factor: Factor,
    choice: Choice,
    outputs: Sequence[Tensor] | None,
    grid: Grid,
    name: str,
) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Codes of the plain and of the corrected weights, in one sweep but where one of them fills a GPU."""
    if W.is_cuda and W.numel() >= ALONE_ELEMENTS:
        own = _rows(W, outputs, choice)
        plain, with_correction = (gptq(T, factor, [choice], grid=grid, rows=own, name=name)[0] for T in (W, corrected))
    else:
        own = _rows(W, outputs, choice, times=2)
        both = gptq(torch.cat([W, corrected]), factor, [choice], grid=grid, rows=own, name=name)[0]
        plain, with_correction = both.split([len(W), len(W)])
    return plain, with_correction


def _with_feedback(
    W: Tensor,
    C: Tensor,
    prefix: _Prefix | None,
    rounded: _Rounded,
    factor: Factor,
    choice: Choice,
    outputs: Sequence[Tensor],
    how: _Feedback,
) -> QuantizedWeight | None:
    """Blocks of rows that make up for each other's errors, then polished together: what has the lowest joint error on
    the way; None where that is higher than that of ``rounded``. Where uniform codes stand in for that, what streams
    would leave is taken to be the usual share of their errors; they are made, for ``rounded``, where that is lower.

    Each row is polished against the errors that the others had before, so that where outputs depend on each other much,
    polishing all at once may raise what it lowers row by row.
    """
    doubts = Doubts()
    rounding = Rounding(factor, [choice], grid=how.grid, doubts=doubts, name=how.name)
    scales = rounded.weight.scales if rounded.weight.choice == choice else rounding.scales(rounded.target)[0]
    blocks = RowBlocks(
        rounded.target,
        scales,
        outputs,
        num_blocks=how.row_blocks,
        together=_together(choice),
        name=how.name,
    )
    if choice.trellis or W.numel() <= AT_ONCE_ELEMENTS:
        blocks.round_at_once(lambda T, S, weights, cuts: rounding.in_blocks(T, S, weights, cuts, on_step=how.on_step))
    else:

        def round_rows(T: Tensor, S: Tensor) -> QuantizedWeight:
            how.on_step()
            return rounding(T, [S])[0]

        blocks.round(round_rows)
    hessian, P = (C, None) if prefix is None else (prefix.C, prefix.pull)

    def error(weight: QuantizedWeight) -> Tensor:
        found: Tensor = joint_error_of(weight, W, hessian, P, outputs)
        return found

    best = blocks.weight()
    least = error(best)
    if how.polish_rounds:
        polisher = Polisher(C, doubts=doubts, name=how.name)
        for _ in range(rounds_of(choice, how.polish_rounds)):
            how.on_step()
            blocks.improve(lambda T, q, rows: polisher(T, [q], rounds=1, rows=rows)[0].weight)
            now = blocks.weight()
            best, least = _lower(now, error(now), best, least)
        del polisher
    del blocks
    doubts.settle()
    apart = error(rounded.weight)
    if rounded.weight.choice != choice:
        unrounded = joint_error(rounded.target - W, hessian, P, outputs)
        apart = unrounded + _share(choice) * (apart - unrounded)
    together, limit = fetch(least, apart)
    if not together <= limit and rounded.weight.choice != choice:  # also where one of them is not finite
        how.on_step()
        rows = _rows(W, outputs, choice)
        rounded.weight = gptq(rounded.target, factor, [choice], grid=how.grid, rows=rows, name=how.name)[0]
        (limit,) = fetch(error(rounded.weight))
    return best if together <= limit else None


def _share(choice: Choice) -> float:
    """Of the error of uniform codes, what streams are taken to leave: nothing where it was not measured, so that they
    are made and compared."""
    return share_of_grid(choice) if choice.group_size in SHARES else 0.0


def _lower(
    one: QuantizedWeight, error: Tensor, other: QuantizedWeight, others_error: Tensor
) -> tuple[QuantizedWeight, Tensor]:
    """The one with the lower error, without a wait for the device, and that error."""
    is_lower = error < others_error
    weight = replace(
        one,
        codes=torch.where(is_lower, one.codes, other.codes),
        scales=torch.where(is_lower, one.scales, other.scales),
    )
    return weight, torch.where(is_lower, error, others_error)


def _corrected(
    C: Tensor, prefixes: Sequence[_Prefix | None], strength: float, *, damping: float, name: str
) -> tuple[list[Tensor | None], int]:
    """Corrected weights of every part, and how often the damping had to grow."""
    diagonal = C.diagonal().clone()
    cholesky = factor_damped(C, damping=damping, name=name)
    C.diagonal().copy_(diagonal)
    found = [
        None if part is None else correct(part.W, part.pull, strength=strength, cholesky=cholesky, name=name)
        for part in prefixes
    ]
    return found, cholesky.num_damping_steps


@dataclass(slots=True, kw_only=True)
class _Rounded:
    """Codes, and what each row was rounded from."""

    target: Float[Tensor, "d_out d_in"]
    weight: QuantizedWeight
    rejected_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prefix:
    """What a layer's error behind the quantized prefix is measured by: see quant/correction.py."""

    W: Float[Tensor, "d_out d_in"]
    C: Float[Tensor, "d_in d_in"]
    pull: Float[Tensor, "d_out d_in"]
    """W D, or P where the layer adds to the hidden states."""

    @classmethod
    def of(
        cls, W: Tensor, C: Tensor, products: SiteProducts, cuts: Sequence[slice]
    ) -> tuple[Tensor, list[_Prefix | None]]:
        """C, and that of some parts of the rows, in units of a power of two near C's largest entry: with small inputs,
        W D would vanish in fp32. Changes C."""
        unit = power_of_two(C.diagonal().amax())
        C.div_(unit)
        if products.pull is not None:
            P = products.pull.to(W.device) / products.hessian.weight_sum / unit
            return C, [cls(W=W[rows], C=C, pull=P[rows]) for rows in cuts]
        assert products.shift is not None
        D = products.shift.to(W.device) / products.hessian.weight_sum / unit
        return C, [cls(W=W[rows], C=C, pull=W[rows] @ D) for rows in cuts]

    def error(self, quantized: QuantizedWeight) -> Float[Tensor, "rows=d_out"]:
        """``target_error`` of every row; some rows at a time are dequantized."""
        errors = [
            target_error(self.W[rows], quantized.rows(rows).dequantize(torch.float32), self.C, self.pull[rows])
            for rows in row_chunks(len(self.W), self.C)
        ]
        return torch.cat(errors)

    def better(
        self,
        corrected: Tensor,
        plain: QuantizedWeight,
        with_correction: QuantizedWeight,
        outputs: Sequence[Tensor] | None,
        choice: Choice,
    ) -> _Rounded:
        """Of every row the better of the plain codes and those of the corrected weights: of all rows that stay
        together with the choice."""
        kept = ~_is_more(self.error(with_correction), self.error(plain), choice, outputs)
        row = kept.unsqueeze(1)
        return _Rounded(
            target=torch.where(row, corrected, self.W),
            weight=replace(
                plain,
                codes=torch.where(row, with_correction.codes, plain.codes),
                scales=torch.where(row, with_correction.scales, plain.scales),
            ),
            rejected_rows=len(kept) - int(kept.sum()),
        )

    def lower(
        self, after: QuantizedWeight, before: QuantizedWeight, outputs: Sequence[Tensor] | None
    ) -> QuantizedWeight:
        """``after``, but for the rows whose error it raises."""
        worse = _is_more(self.error(after), self.error(before), after.choice, outputs).unsqueeze(1)
        return replace(
            after,
            codes=torch.where(worse, before.codes, after.codes),
            scales=torch.where(worse, before.scales, after.scales),
        )


def _is_more(
    one: Float[Tensor, "rows=d_out"],
    other: Float[Tensor, "rows=d_out"],
    choice: Choice,
    outputs: Sequence[Tensor] | None,
) -> Bool[Tensor, "rows=d_out"]:
    """Whether a row's error is the larger one; of a trellis that of its segment, rows weighed as in rounding."""
    if choice.trellis:
        weights = 1.0 if outputs is None else row_weights(outputs).to(one.device)
        one, other = summed(one * weights), summed(other * weights)
    return ~(one <= other)
