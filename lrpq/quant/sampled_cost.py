"""What every choice would cost the layers of a site, from GPTQ on a few of their rows.

Rows do not interact in GPTQ: a row's codes, and its error under H, are the same whether the others are there or not.
So a layer's cost is a sum over rows, 1/2 sum_j c_j l_j, and a sum can be estimated from some of its terms: with rows
drawn in proportion to p_j, sum_j p_j times the mean of c_j l_j / p_j over the drawn ones (Hansen and Hurwitz 1943, Ann.
Math. Statist. 14:333). What it misses is the spread of that ratio, so p_j should foresee the term: scales grow with a
row's weights, p_j = c_j |w_j|^2. The same rows serve all choices: what the draw misses of one it misses of the others,
and the ratios of a layer's costs are kept better than the costs.

Drawn are the rows at the midpoints of equal parts of sum_j p_j (systematic sampling, Madow 1949, ibid. 20:333): without
random numbers, rows of one attention head, which lie together, spread over, and a row of more than a part always among
them.

Cost of a site with n layers, r rows each, k choices: GPTQ on n r rows at k choices, and k n r forms in H.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from lrpq.model.layers import Choice
from lrpq.quant.factor import Factor
from lrpq.quant.gptq import gptq, loss
from lrpq.quant.grid import Grid

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

DEFAULT_ROWS = 32
"""Of a layer. SmolLM2, 8,192 tokens: a plan from 16, 32 and 64 rows costs 1.0, .6 and .3% more than one from all rows
at 3.25 bits, .8, .6 and .3% at 4.25 (docs/methods.md, section 4)."""


def sampled_costs(
    weights: Iterable[Float[Tensor, "d_out d_in"]],
    curvature: Iterable[Float[Tensor, "rows=d_out"]],
    factor: Factor,
    choices: Sequence[Choice],
    H: Float[Tensor, "d_in d_in"],
    *,
    num_rows: int = DEFAULT_ROWS,
    grid: Grid = Grid.SYMMETRIC,
    name: str = "layer",
) -> list[list[float]]:
    """An estimate of ``predicted_cost`` of the candidates that GPTQ would make; nats a token, by layer and choice.

    Args:
        weights: of the layers that read one input, in the dtype of the factor; one is held at a time.
        curvature: c of their rows.
        factor: of H.
        choices: bits and group sizes.
        H: undamped.
        num_rows: drawn of every layer, some perhaps more than once; a layer of no more rows is quantized whole.
        grid: of the codes.
        name: for errors, of the layers together.

    Raises:
        QuantizationError: as ``gptq``.
    """
    parts, factors = [], []
    for W, c in zip(weights, curvature, strict=True):
        c = c.to(W.device).double()
        foreseen = c * torch.linalg.vector_norm(W, dim=1).double().square()
        rows, times = (x.to(W.device) for x in draw_rows(foreseen.cpu(), num_rows))
        parts.append(W[rows])
        factors.append(0.5 * c[rows] * times)
    drawn = torch.cat(parts)
    candidates = gptq(drawn, factor, choices, grid=grid, name=name)
    losses = loss(drawn.repeat(len(choices), 1), torch.cat([q.dequantize(drawn.dtype) for q in candidates]), H)
    by_choice = losses.view(len(choices), -1).split([len(part) for part in parts], dim=1)
    return torch.stack([found @ weighed for found, weighed in zip(by_choice, factors, strict=True)]).tolist()


def draw_rows(
    foreseen: Float[Tensor, "rows=d_out"], number: int
) -> tuple[Int[Tensor, "drawn=rows"], Float[Tensor, "drawn=rows"]]:
    """Indices of some rows, rising, and how many rows each stands for: sum_j x_j ~ sum of times x_j over the drawn.

    That is exact for x in proportion to ``foreseen``, and for every x where there are no more than ``number`` rows or
    nothing is foreseen for any of them: then all are drawn. On the host: the running sum of floats has no deterministic
    kernel on GPUs.
    """
    total = foreseen.cumsum(0)
    if number >= len(foreseen) or not total[-1] > 0:
        return torch.arange(len(foreseen), device=foreseen.device), torch.ones_like(foreseen)
    middles = (torch.arange(number, dtype=total.dtype, device=total.device) + 0.5) * (total[-1] / number)
    rows, counts = torch.unique_consecutive(torch.searchsorted(total, middles), return_counts=True)
    return rows, counts * (total[-1] / number) / foreseen[rows]
