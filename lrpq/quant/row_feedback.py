"""Rows in blocks: every block of outputs makes up for the errors of the blocks before it.

With D = T - Q and g_t the gradient of the loss at the layer's outputs, the loss changes by about

    1/2 tr(G D H D^T),   G = mean_t g_t g_t^T,  H = mean_t x_t x_t^T

(a Kronecker-factored Fisher, Martens and Grosse 2015, arXiv:1503.05671; for rounding on both sides YAQA, Tseng et al.
2025, arXiv:2505.22988). GPTQ sees the diagonal of G alone, with which rows do not interact. With all of it, rows A that
are rounded move the best place of the others to

    T_B + R_BB^-T R_AB^T D_A,   R R^T = G in the order of the rows, R upper triangular,

which is GPTQ's own rule for columns (quant/gptq.py), applied to rows. Rows of one block do not see each other: the more
blocks, the more of G is used, and the more often the column loop runs.

All rows together can then be improved, each towards the place that the errors before it now make the best: Jacobi's
way, every row against the last errors of the others. What improves a row on its own, as quant/polish.py does, thus need
not run block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import Rows
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.halves import multiplied
from lrpq.quant.trellis import whole_segments
from lrpq.quant.wavefront import Blocks

if TYPE_CHECKING:
    from jaxtyping import Float

DEFAULT_DAMPING = 0.5
"""Share of the mean diagonal of G. G has one sampled gradient a token, so its small directions are noise: .5 left 1.5%
less KL than .05 (docs/log.md)."""
LEAST_ROWS = 48
"""Of a block: smaller ones cost as many steps of the column loop. 32 won another 3% at 3.25 bits and nothing at 5.25,
with one seed, for twice the time of the codes (docs/log.md)."""

DEFAULT_BLOCKS = 12
"""12 that are polished together left 1.4% less KL than 4, each polished by itself, in the same time (docs/log.md)."""
IMPROVED_ELEMENTS = 2**27
"""Weights that are improved together, which bounds the memory of temporaries: all rows of a chunk up to 32,768 inputs.
The descent goes column by column however few rows there are: with 2^25 a 70B block's codes took 16.8 s, with this 8.8
(docs/gpu.md)."""
_SOLVED_AT_ONCE = 2048
"""Rows of a chunk up to which one call solves for all blocks, with as much again to multiply; not swept."""
MOVED_AT_ONCE = 2**22
"""Weights of a chunk up to which one product moves all targets: more arithmetic in fewer launches, 16 MB; not swept."""
RoundRows = Callable[[Tensor, Tensor], QuantizedWeight]
"""From targets [rows, d_in] and their scales [rows, groups] to codes."""
RoundBlocks = Callable[[Tensor, Tensor, Tensor | None, Sequence[Blocks]], QuantizedWeight]
"""From the targets of all rows, their scales, weights of rows that stay together, and their blocks to codes."""
ImproveRows = Callable[[Tensor, QuantizedWeight, Rows], QuantizedWeight]
"""From targets [rows, d_in] and codes of these rows to others."""


class RowBlocks:
    """A layer on its way from one block of rows to the next, those with the largest G_jj first, or in their own order
    where rows have to stay together.

    FLOPs besides those of what rounds and improves: about c^3 / 2 for every chunk of c rows, and c^2 d_in for its
    rounding and for each improvement, twice that where one product moves all targets. Memory: T twice over, a block's
    targets (all, for what rounds all blocks at once), and of every chunk two matrices like its G.

    Args:
        T: what the codes should reproduce, float32.
        scales: that the codes are rounded with, those that T asks for: what moves a row's target moves its scales by so
            little that nothing is lost with them as they are (docs/log.md).
        outputs: G of consecutive chunks of rows, in any unit; rows of different chunks do not see each other.
        num_blocks: of every chunk, at most: no block has fewer than 48 rows, but a
            last one of rows that stay together; 1 rounds each row on its own.
        damping: share of the mean diagonal of G that is added to it.
        together: rows that stay side by side: a trellis's segments; no block cuts them.
        name: module name for errors.

    Raises:
        QuantizationError: the chunks do not make up the rows, or a G is not finite or stays indefinite.
    """

    def __init__(
        self,
        T: Float[Tensor, "d_out d_in"],
        scales: Float[Tensor, "d_out groups"],
        outputs: Sequence[Float[Tensor, "chunk chunk"]],
        *,
        num_blocks: int,
        damping: float = DEFAULT_DAMPING,
        together: int = 1,
        name: str = "layer",
    ) -> None:
        rows = sum(len(G) for G in outputs)
        if not rows == len(T) == len(scales):
            raise QuantizationError(
                f"{name}: {len(T)} rows, scales of {len(scales)} and output gradients of {rows}; they must be of one"
                " layer"
            )
        self._chunks: list[_Chunk] = []
        start = 0
        for G in outputs:
            blocks = blocks_of(len(G), num_blocks, together=together)
            factor = None
            if blocks > 1:
                by_size = together == 1
                factor = factorize(G, damping=damping, act_order=by_size, name=f"{name}, output gradients")
            weights = None if together == 1 else row_weights([G], damping=damping)
            own = slice(start, start + len(G))
            self._chunks.append(_Chunk(T[own], scales[own], factor, blocks, together, weights))
            start += len(G)

    def round(self, round_rows: RoundRows) -> None:
        """Round uniform codes block by block; chunks do not see each other, so that one call rounds the same block of
        all."""
        for block in range(max(len(chunk.blocks) for chunk in self._chunks)):
            own = [chunk for chunk in self._chunks if block < len(chunk.blocks)]
            targets = [chunk.targets(block) for chunk in own]
            scales = [chunk.scales[chunk.blocks[block]] for chunk in own]
            parts = [len(rows) for rows in targets]
            for chunk, part in zip(own, round_rows(_cat(targets), _cat(scales)).split(parts), strict=True):
                chunk.put(block, part)

    def round_at_once(self, round_blocks: RoundBlocks) -> None:
        """Round all blocks by something that knows how the earlier ones move the later ones."""
        chunks = self._chunks
        weights = [chunk.weights for chunk in chunks if chunk.weights is not None]
        parts = [len(chunk.T) for chunk in chunks]
        blocks = [Blocks(sizes=[b.stop - b.start for b in chunk.blocks], pull=chunk.pull) for chunk in chunks]
        targets, scales = _cat([chunk.T for chunk in chunks]), _cat([chunk.scales for chunk in chunks])
        found = round_blocks(targets, scales, _cat(weights) if weights else None, blocks)
        for chunk, part in zip(chunks, found.split(parts), strict=True):
            chunk.put_all(part)

    def improve(self, improve_rows: ImproveRows) -> None:
        """Improve the rounded rows, each towards what the others' errors now make of its target."""
        for chunk in self._chunks:
            chunk.improve(improve_rows)

    def weight(self) -> QuantizedWeight:
        """All rows in their own order."""
        return stacked([chunk.weight() for chunk in self._chunks])


def row_weights(
    outputs: Sequence[Float[Tensor, "chunk chunk"]], *, damping: float = DEFAULT_DAMPING
) -> Float[Tensor, "rows=d_out"]:
    """Damped G_jj of all rows: how much the squared errors of a row count beside those of others; all alike where there
    is no gradient."""
    weights = torch.cat([G.diagonal() + damping * G.diagonal().mean() for G in outputs])
    return torch.where(weights > 0, weights, 1.0)


def interacts(outputs: Sequence[Float[Tensor, "chunk chunk"]], *, num_blocks: int, together: int = 1) -> bool:
    """Whether any rows are cut into more than one block."""
    return any(blocks_of(len(G), num_blocks, together=together) > 1 for G in outputs)


def blocks_of(rows: int, num_blocks: int, *, together: int = 1) -> int:
    """Blocks that a chunk is cut into when ``num_blocks`` are asked for."""
    most = rows // LEAST_ROWS if together == 1 else -(-rows // together)
    return max(1, min(num_blocks, most))


def joint_error(
    dW: Float[Tensor, "d_out d_in"],
    C: Float[Tensor, "d_in d_in"],
    P: Float[Tensor, "d_out d_in"] | None,
    outputs: Sequence[Float[Tensor, "chunk chunk"]],
) -> Float[Tensor, ""]:
    """tr(G E) for the errors E of all rows together, up to a term that does not depend on the codes.

    E = dW C dW^T - 2 P dW^T, as `lrpq.quant.correction.target_error` has it row by row. Large products on a GPU are by
    halves (quant/halves.py).

    Args:
        dW: quantized minus original weights.
        C: Hessian of the quantized prefix.
        P: what the outputs lack behind the prefix (quant/correction.py); None where nothing is corrected.
        outputs: as for `RowBlocks`, undamped.

    Returns:
        float64; `float` would wait for the device.
    """
    return _joint(lambda rows: dW[rows], C, P, outputs)


def joint_error_of(
    weight: QuantizedWeight,
    W: Float[Tensor, "d_out d_in"],
    C: Float[Tensor, "d_in d_in"],
    P: Float[Tensor, "d_out d_in"] | None,
    outputs: Sequence[Float[Tensor, "chunk chunk"]],
) -> Float[Tensor, ""]:
    """``joint_error`` of codes, of which some rows are dequantized at a time."""
    return _joint(lambda rows: weight.rows(rows).dequantize(torch.float32).sub_(W[rows]), C, P, outputs)


def _joint(errors: Callable[[slice], Tensor], C: Tensor, P: Tensor | None, outputs: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=C.device)
    step, start = whole_segments(IMPROVED_ELEMENTS // len(C)), 0
    for G in outputs:
        cuts = [slice(top, min(top + step, len(G))) for top in range(0, len(G), step)]
        for own in cuts:
            rows = slice(start + own.start, start + own.stop)
            part = errors(rows)
            pull = multiplied(part, C)
            if P is not None:
                pull.sub_(P[rows], alpha=2.0)
            for other in cuts:
                if len(cuts) > 1:
                    part = errors(slice(start + other.start, start + other.stop))
                total += multiplied(G[own, other], part).mul_(pull).sum(dtype=torch.float64)
        start += len(G)
    return total


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Chunk:
    """Rows that see each other, in the order in which they are rounded."""

    def __init__(
        self,
        T: Float[Tensor, "rows d_in"],
        scales: Float[Tensor, "rows groups"],
        factor: Factor | None,
        num_blocks: int,
        together: int,
        weights: Float[Tensor, "rows=size"] | None,
    ) -> None:
        self.weights = weights
        """Damped G_jj; rows are in their own order where these count."""
        self._order = None if factor is None else factor.order
        self.T, self.scales = (T, scales) if factor is None else (T[factor.order], scales[factor.order])
        self._errors: Tensor | None = None
        """T - Q of the rows that are rounded, where they move others."""
        self._found: list[QuantizedWeight] = []
        size = -(-len(T) // (num_blocks * together)) * together
        self.blocks = [slice(start, min(start + size, len(T))) for start in range(0, len(T), size)]
        self.pull = None if factor is None else _pull(factor, self.blocks)
        """How errors of the rows of earlier blocks (columns) move targets."""

    def targets(self, block: int) -> Float[Tensor, "rows d_in"]:
        """What the block should reproduce, now that those before it are rounded."""
        rows = self.blocks[block]
        if block == 0 or self.pull is None or self._errors is None:
            return self.T[rows]
        return multiplied(self.pull[rows, : rows.start], self._errors[: rows.start]).add_(self.T[rows])

    def put(self, block: int, found: QuantizedWeight) -> None:
        """The block, rounded."""
        rows = self.blocks[block]
        self._found.append(found)
        if self.pull is not None:
            self._errors = torch.zeros_like(self.T) if self._errors is None else self._errors
            torch.sub(self.T[rows], found.dequantize(self.T.dtype), out=self._errors[rows])

    def put_all(self, found: QuantizedWeight) -> None:
        """All blocks, rounded."""
        self._found = [found]
        if self.pull is not None:
            self._errors = found.dequantize(self.T.dtype).neg_().add_(self.T)

    def improve(self, improve_rows: ImproveRows) -> None:
        """Better codes for all rows, some at a time."""
        whole = stacked(self._found)
        targets = self.T if self._errors is None else self._targets()
        step = whole_segments(IMPROVED_ELEMENTS // self.T.shape[1])
        self._found = []
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            of_rows = Rows(parts=(len(targets[rows]),), weights=None if self.weights is None else self.weights[rows])
            self._found.append(improve_rows(targets[rows], whole.rows(rows), of_rows))
            if self._errors is not None:
                torch.sub(self.T[rows], self._found[-1].dequantize(self.T.dtype), out=self._errors[rows])

    def _targets(self) -> Float[Tensor, "rows d_in"]:
        """Those of all rows; of a large chunk in the memory of the errors: later rows, which pull at none before them,
        first."""
        assert self._errors is not None
        if self.pull is not None and self.T.numel() <= MOVED_AT_ONCE:
            return torch.addmm(self.T, self.pull, self._errors)
        for block in reversed(range(len(self.blocks))):
            self._errors[self.blocks[block]] = self.targets(block)
        return self._errors

    def weight(self) -> QuantizedWeight:
        """All rows in their own order."""
        whole = stacked(self._found)
        if self._order is None:
            return whole
        codes, scales = torch.empty_like(whole.codes), torch.empty_like(whole.scales)
        codes[self._order], scales[self._order] = whole.codes, whole.scales
        return QuantizedWeight(codes=codes, scales=scales, choice=whole.choice)


def _pull(factor: Factor, blocks: Sequence[slice]) -> Float[Tensor, "rows rows"]:
    """R_BB^-T R_AB^T for each block B and all rows A before it; zero elsewhere. R's unit columns cancel in it: R_BB and
    R_AB are scaled alike."""
    count, size = len(blocks), blocks[0].stop
    if len(factor.R) == count * size and len(factor.R) <= _SOLVED_AT_ONCE:
        lower = factor.R.T.reshape(count, size, count, size)
        own = lower.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        before = lower.new_ones(count, count).tril(-1).view(count, 1, count, 1)
        all_rows = (lower * before).reshape(count, size, count * size)
        solved = torch.linalg.solve_triangular(own, all_rows, upper=False, unitriangular=True)
        return solved.reshape(count * size, count * size)
    pull = torch.zeros_like(factor.R)
    for rows in blocks[1:]:
        own, before = factor.R[rows, rows], factor.R[: rows.start, rows]
        pull[rows, : rows.start] = torch.linalg.solve_triangular(own.T, before.T, upper=False, unitriangular=True)
    return pull


def stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Rows of one layer, one part after the other, without zero points."""
    if len(parts) == 1:
        return parts[0]
    return QuantizedWeight(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        choice=parts[0].choice,
    )
