"""What could be saved where launches take the time: graphs, layers side by side, both streams together.

Each row compares a way that lrpq goes with one that it does not, in turns on the same inputs:

    a column sweep as a CUDA graph: its replay, and its capture, which a sweep would need for itself alone, as addresses
    are part of a graph and every layer is swept once;

    the layers of a site, swept one after another and side by side;

    a block's forward on two micro-batches one after the other, and on both as one, with the same weights: more than
    original and quantized stream could gain together, whose weights differ from the first quantized site on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import matrices
from benchmarks.gpu.measure import measured, release
from benchmarks.gpu.model import RandomSource, random_tokens
from benchmarks.gpu.quantizer import GRID, WIDTHS
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.shapes import LLAMA, TINY, BlockShape
from lrpq.model.layers import Choice
from lrpq.model.streaming import BlockStream
from lrpq.quant.column_loop import sweep
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.grid import code_ranges
from lrpq.quant.scale_search import search_scales
from lrpq.quant.side_by_side import quantize_side_by_side

PART = "launches"
SMALL = BlockShape(name="SmolLM2", hidden=576, ffn=1536, heads=9, kv_heads=3, blocks=30)
MATRICES = [(576, 576), (576, 1536), (2048, 2048), (4096, 4096), (8192, 8192)]
GROUP_SIZE = 64
REPEATS = 7
LENGTH, MICRO_BATCH = 1024, 4


def measure_launches(report: Report, device: torch.device, *, tiny: bool) -> None:
    """Print all three; graphs on a GPU alone."""
    shapes = [TINY["8B"]] if tiny else [SMALL, LLAMA["8B"], LLAMA["70B"]]
    if device.type == "cuda":
        for d_out, d_in in MATRICES:
            _graph(report, device, d_out, d_in)
            release(device)
    for shape in shapes:
        for site, members in shape.sites.items():
            if len(members) > 1:
                _side_by_side(report, device, shape, site)
                release(device)
    for shape in shapes:
        _streams(report, device, shape, length=16 if tiny else LENGTH)
        release(device)


def _graph(report: Report, device: torch.device, d_out: int, d_in: int) -> None:
    """One width's sweep as it is launched, captured, and replayed."""
    factor = factorize(matrices.hessian(d_in, seed=1, device=device))
    W = matrices.weights(d_out, d_in, seed=2, device=device)
    choice = Choice(bits=4, group_size=GROUP_SIZE)
    S = search_scales(W, factor.importance, choice, grid=GRID).T.float().unsqueeze(1).contiguous()
    bounds = code_ranges((choice.bits,), torch.float32, device)
    swept = partial(sweep, W.T[factor.order].contiguous(), factor, S, bounds, GROUP_SIZE, Z=None)
    launched = measured(swept, device, repeats=REPEATS)
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        swept()
    torch.cuda.synchronize()
    captured = measured(partial(_captured, swept), device, repeats=REPEATS)
    replayed = measured(partial(_replay, captured.value), device, repeats=REPEATS)
    again = measured(swept, device, repeats=REPEATS)
    seconds = min(launched.seconds, again.seconds)
    figures = {"replay to this": replayed.seconds / seconds, "capture to this": captured.seconds / seconds}
    report.add(Row(part=PART, name=f"{d_out}x{d_in}, 1 width: column sweep", seconds=seconds, figures=figures))


def _captured(action: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> bool:
    graph.replay()
    return True


def _side_by_side(report: Report, device: torch.device, shape: BlockShape, site: str) -> None:
    """All candidates of a site's layers, each swept by itself and as lrpq does it."""
    members = shape.sites[site]
    d_in = shape.layers[members[0]][1]
    factor = factorize(matrices.hessian(d_in, seed=1, device=device))
    layers = [(m, matrices.weights(shape.layers[m][0], d_in, seed=i, device=device)) for i, m in enumerate(members)]
    group_size = min(GROUP_SIZE, d_in)
    choices = [Choice(bits=bits, group_size=group_size) for bits in WIDTHS]
    ways = {"alone": _alone, "together": _together}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(2):  # in turns
        for name, way in ways.items():
            best[name] = min(best[name], measured(partial(way, layers, factor, choices), device, repeats=2).seconds)
    figures = {"one after another to this": best["alone"] / best["together"]}
    name = f"{shape.name} {', '.join(members)}, {len(choices)} widths: side by side"
    report.add(Row(part=PART, name=name, seconds=best["together"], figures=figures))


def _alone(layers: list[tuple[str, Tensor]], factor: Factor, choices: list[Choice]) -> int:
    return len([gptq(W, factor, choices, grid=GRID, name=name) for name, W in layers])


def _together(layers: list[tuple[str, Tensor]], factor: Factor, choices: list[Choice]) -> int:
    return len(list(quantize_side_by_side(layers, factor, choices, grid=GRID)))


def _streams(report: Report, device: torch.device, shape: BlockShape, *, length: int) -> None:
    """A block's forward twice, and once on twice as many windows."""
    source = RandomSource(shape, layers=1, length=length, device=device)
    stream = BlockStream(source, dtype=torch.bfloat16, device=device)
    with torch.no_grad(), stream.embedding():
        tokens = random_tokens(2 * MICRO_BATCH, length)
        halves, both = [stream.embed(half) for half in tokens.split(MICRO_BATCH)], stream.embed(tokens)
    blocks = stream.stream(range(1))
    _, module = next(blocks)

    @torch.no_grad()
    def one_by_one() -> int:
        return len([stream.run(module, 0, hidden) for hidden in halves])

    @torch.no_grad()
    def at_once() -> int:
        return len(stream.run(module, 0, both))

    best = {one_by_one: float("inf"), at_once: float("inf")}
    for _ in range(2):
        for way in best:
            best[way] = min(best[way], measured(way, device, repeats=REPEATS).seconds)
    blocks.close()
    figures = {"both together to this": best[at_once] / best[one_by_one]}
    name = f"{shape.name}: forward of 2 x {MICRO_BATCH} x {length} tokens, one after the other"
    report.add(Row(part=PART, name=name, seconds=best[one_by_one], figures=figures))
