"""What follows the sweeps for the seven matrices of a block: candidates at six widths, and refined quantization."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import flops, matrices
from benchmarks.gpu.measure import measured, release
from benchmarks.gpu.quantizer import GRID, WIDTHS
from benchmarks.gpu.report import Figure, Report, Row
from benchmarks.gpu.shapes import BlockShape
from benchmarks.gpu.timers import Timers
from lrpq.model.layers import Choice
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import predicted_cost
from lrpq.quant.hessian import HessianSum
from lrpq.quant.side_by_side import quantize_side_by_side
from lrpq.refine.products import SiteProducts
from lrpq.refine.quantize import Refined, quantize_refined
from lrpq.relevance.outputs import CHUNK_ROWS

CANDIDATES, QUANTIZE = "candidates", "quantize"
BITS = 4
PREFIX_ERROR = 0.05
"""Size of the errors at the inputs, as a share of the inputs: D is H times a random matrix of that norm."""
GRADIENT_RANK_SHARE = 8
FUNCTIONS = {
    "factorisation": "lrpq.quant.factor:factorize",
    "damped Cholesky, permuted or not": "lrpq.quant.hessian:factor_damped",
    "scale search": "lrpq.quant.scale_search:search_scales_transposed",
    "column loop": "lrpq.quant.gptq:Rounding.__call__",
    "cost": "lrpq.quant.gptq:predicted_cost",
    "correction's solve": "lrpq.quant.correction:correct",
    "errors of rows": "lrpq.quant.correction:target_error",
    "descent": "lrpq.quant.descent:descend_checked",
    "streams, rounded": "lrpq.quant.trellis_loop:gptq_trellis",
    "streams, polished": "lrpq.quant.trellis_loop:descend_trellis",
    "refit of scales": "lrpq.quant.refit:refit_checked",
    "losses of rows": "lrpq.quant.gptq:loss",
    "losses of codes": "lrpq.quant.gptq:loss_of",
    "polish, the rest": "lrpq.quant.polish:Polisher.__call__",
    "rounding in blocks, the rest": "lrpq.quant.row_feedback:RowBlocks.round",
    "rounding in blocks at once, the rest": "lrpq.quant.row_feedback:RowBlocks.round_at_once",
    "streams of all blocks": "lrpq.quant.gptq:round_stream_blocks",
    "small blocks": "lrpq.quant.gptq:round_grid_blocks",
    "improving blocks, the rest": "lrpq.quant.row_feedback:RowBlocks.improve",
    "joint errors": "lrpq.quant.row_feedback:joint_error_of",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """Options of `lrpq.refine.quantize.quantize_refined`."""

    group_size: int
    polish_rounds: int
    row_blocks: int
    trellis: bool = False
    """Whether codes are a trellis's."""
    strength: float = 0.5


def measure_candidates(report: Report, device: torch.device, shape: BlockShape, *, group_size: int) -> None:
    """Every layer at six widths and one group size: factorisation once a site, search, column loop, cost."""
    choices = [Choice(bits=bits, group_size=group_size) for bits in WIDTHS]
    total, counted = 0.0, 0.0
    timers = Timers(device, FUNCTIONS)
    for site, members in shape.sites.items():
        d_in = shape.layers[members[0]][1]
        H = matrices.hessian(d_in, seed=1, device=device)
        weights = [matrices.weights(shape.layers[m][0], d_in, seed=i, device=device) for i, m in enumerate(members)]

        def make(H: Tensor = H, weights: list[Tensor] = weights) -> int:
            factor = factorize(H)
            layers = ((str(i), W) for i, W in enumerate(weights))
            for W, found in quantize_side_by_side(layers, factor, choices, grid=GRID):
                predicted_cost(W, found, H, torch.ones(len(W), device=device))
            return len(weights)

        found = measured(make, device)
        with timers.watching():
            make()
        d_outs = [len(W) for W in weights]
        necessary = flops.cholesky(d_in) + sum(
            flops.column_loop(d_out, d_in, len(WIDTHS)) + flops.quadratic_form(d_out, d_in, len(WIDTHS))
            for d_out in d_outs
        )
        total, counted = total + found.seconds, counted + necessary
        report.add(
            Row(
                part=CANDIDATES,
                name=f"{shape.name} {site}: {', '.join(members)}",
                seconds=found.seconds,
                flops=necessary,
                peak_bytes=found.peak_bytes,
            )
        )
        del H, weights, make
        release(device)
    _sum(report, CANDIDATES, shape, total, counted, timers)


def measure_quantize(report: Report, device: torch.device, shape: BlockShape, options: Refinement) -> None:
    """Every layer behind a quantized prefix: solve, column loop with guard, blocks of rows, polish.

    With timers: the few hundred times that they wait for the device are nothing beside seconds.
    """
    choice = Choice(bits=BITS, group_size=options.group_size, trellis=options.trellis)
    total, counted = 0.0, 0.0
    timers = Timers(device, FUNCTIONS)
    for site, members in shape.sites.items():
        d_in = shape.layers[members[0]][1]
        H = matrices.hessian(d_in, seed=1, device=device)
        for i, member in enumerate(members):
            d_out = shape.layers[member][0]
            W = matrices.weights(d_out, d_in, seed=i, device=device)
            products = _products(W, H, adds=site in flops.ADDING)
            outputs = gradients_moments(d_out, seed=i, device=device)
            # kernels are compiled by the first layer's own first call; large layers are not run twice
            if not total:
                refined(W, products, outputs, choice, options)
            with timers.watching():
                make = partial(refined, W, products, outputs, choice, options)
                found = measured(make, device, warm=False)
            necessary = refined_flops(d_out, d_in)
            total, counted = total + found.seconds, counted + necessary
            report.add(
                Row(
                    part=QUANTIZE,
                    name=f"{shape.name} {member} [{d_out}, {d_in}]",
                    seconds=found.seconds,
                    flops=necessary,
                    peak_bytes=found.peak_bytes,
                    figures={"rejected rows": found.value.rejected_rows, "rows alone": found.value.rows_alone},
                )
            )
            del W, products, outputs, found, make
            release(device)
        del H
        release(device)
    _sum(report, QUANTIZE, shape, total, counted, timers)


def refined_flops(d_out: int, d_in: int) -> float:
    """Two factorisations, the solve, one column loop with and one without the correction: what polish and blocks of
    rows add is not counted as necessary."""
    return 2 * flops.cholesky(d_in) + flops.solve(d_out, d_in) + flops.column_loop(d_out, d_in, 2)


def refined(
    W: Tensor, products: SiteProducts, outputs: list[Tensor] | None, choice: Choice, options: Refinement
) -> Refined:
    """One layer by the project's refinement."""
    return quantize_refined(
        W,
        products,
        choice,
        strength=options.strength,
        polish_rounds=options.polish_rounds,
        outputs=outputs,
        row_blocks=options.row_blocks,
        grid=GRID,
        name="layer",
    )


def _products(W: Tensor, H: Tensor, *, adds: bool) -> SiteProducts:
    """Sums as if every input had an error that is a random linear function of the inputs."""
    d = len(H)
    g = matrices.generator(7, H.device)
    D = torch.randn(d, d, generator=g, device=H.device).mul_(PREFIX_ERROR * d**-0.5) @ H
    sums = HessianSum(xx=H, weight_sum=1.0, num_tokens=matrices.TOKENS_A_CHANNEL * d)
    if not adds:
        return SiteProducts(hessian=sums, shift=D)
    return SiteProducts(hessian=sums, shift=None, pull=W @ D)


def gradients_moments(d_out: int, *, seed: int, device: torch.device) -> list[Tensor]:
    """Second moments of correlated output gradients, by chunks; all whole chunks alike."""
    made: dict[int, Tensor] = {}
    for start in range(0, d_out, CHUNK_ROWS):
        rows = min(CHUNK_ROWS, d_out - start)
        if rows not in made:
            g = matrices.generator(seed, device)
            common = torch.randn(2 * rows, max(1, rows // GRADIENT_RANK_SHARE), generator=g, device=device)
            mixing = torch.randn(common.shape[1], rows, generator=g, device=device) * common.shape[1] ** -0.5
            X = torch.randn(2 * rows, rows, generator=g, device=device) + common @ mixing
            made[rows] = X.T @ X
    return [made[min(CHUNK_ROWS, d_out - start)] for start in range(0, d_out, CHUNK_ROWS)]


def _sum(report: Report, part: str, shape: BlockShape, total: float, counted: float, timers: Timers) -> None:
    figures: dict[str, Figure] = dict(timers.ranked())
    if timers.absent:
        figures["NOT FOUND"] = ", ".join(timers.absent)
    report.add(Row(part=part, name=f"{shape.name}, by function, s", figures=figures))
    report.add(
        Row(
            part=part,
            name=f"{shape.name} {part}, one block",
            seconds=total,
            flops=counted,
            blocks=shape.blocks,
            figures={f"minutes for {shape.blocks} blocks (computed)": total * shape.blocks / 60},
        )
    )
