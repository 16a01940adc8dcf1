"""Rows in blocks: every block of outputs makes up for the errors of the blocks before it.

With D = T - Q and g_t the gradient of the loss at the layer's outputs, the loss changes by about

    1/2 tr(G D H D^T),   G = mean_t g_t g_t^T,  H = mean_t x_t x_t^T

(a Kronecker-factored Fisher, Martens and Grosse 2015, arXiv:1503.05671; for rounding on both sides YAQA, Tseng et al.
2025, arXiv:2505.22988). GPTQ sees the diagonal of G alone, with which rows do not interact. With all of it, rows A that
are rounded move the best place of the others to

    T_B + R_BB^-T R_AB^T D_A,   R R^T = G in the order of the rows, R upper triangular,

which is GPTQ's own rule for columns (quant/gptq.py), applied to rows. Rows of one block do not see each other: the more
blocks, the more of G is used, and the more often the column loop runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from lrpq.errors import QuantizationError
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.halves import multiplied

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

DEFAULT_DAMPING = 0.5
"""Share of the mean diagonal of G. G has one sampled gradient a token, so its small directions are noise: .5 left 1.5%
less KL than .05 (docs/log.md)."""
LEAST_ROWS = 128
"""Of a block: smaller ones cost as many steps of the column loop and win little."""

DEFAULT_BLOCKS = 4
"""Most of what 12 blocks win is won by 4, at a third of the calls (docs/log.md)."""
RoundRows = Callable[["Tensor"], QuantizedWeight]
"""From targets [rows, d_in] to codes and scales."""


def quantize_in_blocks(
    T: Float[Tensor, "d_out d_in"],
    outputs: Sequence[Float[Tensor, "chunk chunk"]],
    round_rows: RoundRows,
    *,
    num_blocks: int,
    damping: float = DEFAULT_DAMPING,
    name: str = "layer",
) -> QuantizedWeight:
    """Round a layer block by block of rows, those with the largest G_jj first; a block of all chunks at once.

    FLOPs besides those of ``round_rows``: c^3 / 3 + c^2 d_in for every chunk of c rows. Memory: T twice over, a block's
    targets, and a factor of every chunk.

    Args:
        T: what the codes should reproduce, float32.
        outputs: G of consecutive chunks of rows, in any unit; rows of different chunks do not see each other.
        round_rows: how one block is rounded; rows it is given are rounded independently.
        num_blocks: of every chunk, at most: no block has fewer than 128 rows; 1 rounds each row on its own.
        damping: share of the mean diagonal of G that is added to it.
        name: module name for errors.

    Raises:
        QuantizationError: the chunks do not make up the rows, or a G is not finite or stays indefinite.
    """
    if sum(len(G) for G in outputs) != len(T):
        raise QuantizationError(
            f"{name}: {len(T)} rows, and output gradients of {sum(len(G) for G in outputs)}; they must be of one layer"
        )
    chunks: list[_Chunk] = []
    start = 0
    for G in outputs:
        blocks = blocks_of(len(G), num_blocks)
        factor = factorize(G, damping=damping, name=f"{name}, output gradients") if blocks > 1 else None
        chunks.append(_Chunk(T[start : start + len(G)], factor, blocks))
        start += len(G)
    for block in range(max(len(chunk.blocks) for chunk in chunks)):
        # chunks do not see each other: one call rounds the same block of all
        own = [chunk for chunk in chunks if block < len(chunk.blocks)]
        targets = [chunk.targets(block) for chunk in own]
        found = round_rows(targets[0] if len(own) == 1 else torch.cat(targets))
        for chunk, part in zip(own, found.split([len(rows) for rows in targets]), strict=True):
            chunk.put(block, part)
    return stacked([chunk.weight() for chunk in chunks])


def interacts(outputs: Sequence[Float[Tensor, "chunk chunk"]], *, num_blocks: int) -> bool:
    """Whether any rows are cut into more than one block."""
    return any(blocks_of(len(G), num_blocks) > 1 for G in outputs)


def blocks_of(rows: int, num_blocks: int) -> int:
    """Blocks that a chunk is cut into when ``num_blocks`` are asked for."""
    return max(1, min(num_blocks, rows // LEAST_ROWS))


def joint_error(
    dW: Float[Tensor, "d_out d_in"],
    C: Float[Tensor, "d_in d_in"],
    P: Float[Tensor, "d_out d_in"] | None,
    outputs: Sequence[Float[Tensor, "chunk chunk"]],
) -> float:
    """tr(G E) for the errors E of all rows together, up to a term that does not depend on the codes.

    E = dW C dW^T - 2 P dW^T, as `lrpq.quant.correction.target_error` has it row by row. Large products on a GPU are by
    halves (quant/halves.py).

    Args:
        dW: quantized minus original weights.
        C: Hessian of the quantized prefix.
        P: what the outputs lack behind the prefix (quant/correction.py); None where nothing is corrected.
        outputs: as for `quantize_in_blocks`, undamped.
    """
    total, start = 0.0, 0
    for G in outputs:
        rows = slice(start, start + len(G))
        start += len(G)
        part = dW[rows]
        pull = multiplied(part, C)
        if P is not None:
            pull.sub_(P[rows], alpha=2.0)
        total += float(multiplied(G, part).mul_(pull).sum(dtype=torch.float64))
    return total


class _Chunk:
    """Rows that see each other, on the way from one block to the next."""

    def __init__(self, T: Float[Tensor, "rows d_in"], factor: Factor | None, num_blocks: int) -> None:
        self._factor = factor
        self._T = T if factor is None else T[factor.order]
        self._errors = None if factor is None else torch.zeros_like(self._T)
        self._found: list[QuantizedWeight] = []
        size = -(-len(T) // num_blocks)
        self.blocks = [slice(start, min(start + size, len(T))) for start in range(0, len(T), size)]

    def targets(self, block: int) -> Float[Tensor, "rows d_in"]:
        """What the block should reproduce, now that those before it are rounded."""
        rows = self.blocks[block]
        targets = self._T[rows]
        if block == 0 or self._factor is None or self._errors is None:
            return targets
        # the unit columns of factor.R cancel: R_BB and R_AB are scaled alike
        R, start = self._factor.R, rows.start
        pull = multiplied(R[:start, rows].T, self._errors[:start])
        return targets + torch.linalg.solve_triangular(R[rows, rows].T, pull, upper=False, unitriangular=True)

    def put(self, block: int, found: QuantizedWeight) -> None:
        """The block, rounded."""
        rows = self.blocks[block]
        self._found.append(found)
        if self._errors is not None and rows.stop < len(self._T):
            self._errors[rows] = self._T[rows] - found.dequantize(self._T.dtype)

    def weight(self) -> QuantizedWeight:
        """All rows in their own order."""
        whole = stacked(self._found)
        if self._factor is None:
            return whole
        order = self._factor.order
        codes, scales = torch.empty_like(whole.codes), torch.empty_like(whole.scales)
        codes[order], scales[order] = whole.codes, whole.scales
        return QuantizedWeight(codes=codes, scales=scales, choice=whole.choice)


def stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Rows of one layer, one part after the other, without zero points."""
    if len(parts) == 1:
        return parts[0]
    return QuantizedWeight(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        choice=parts[0].choice,
    )
