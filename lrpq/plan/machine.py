"""How fast a machine is: about a minute of the pipeline's own functions on one worker, each timed a few times.

What a rate stands for is in lrpq/plan/work.py. Where a rate has a part for every step and a part for every element, two
sizes are timed and both parts follow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from lrpq.kernels.trellis import round_segments
from lrpq.model.layers import Choice
from lrpq.plan import trellis
from lrpq.plan.kernels import quantize, search_trials
from lrpq.plan.trace import trace_llama
from lrpq.plan.work import Work
from lrpq.quant.descent import descend
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import HessianSum, normalized
from lrpq.quant.packing import pack, unpack
from lrpq.quant.refit import refit
from lrpq.quant.scale_search import search_scales_transposed
from lrpq.quant.trellis import SEGMENT_ROWS, WIDTHS, codebook, segment_edges
from lrpq.quant.trellis_loop import LEAF_COLUMNS
from lrpq.relevance.attribute import block_backward
from lrpq.relevance.composite import Relevance
from lrpq.relevance.rules import PassSwitch

REPEATS = 3
CPU_WIDTHS = (128, 512, 1024, 2048, 4096)
CUDA_WIDTHS = (128, 512, 2048, 8192, 16384)
CHOICE = Choice(bits=4, group_size=64)
CHOICES = tuple(Choice(bits=bits, group_size=64) for bits in (2, 3, 4, 5, 6, 8))
UNBOUND = 1e30
"""Rate of what takes no time; JSON has no infinity."""
ROWS = 2048
"""Tokens, or rows of a weight, that are multiplied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates of one worker on a kind of machine."""

    name: str
    device: str
    """``cpu`` or ``cuda``."""
    threads: int
    """Of the worker."""
    rates: Mapping[str, float]
    """Kind of work -> units a second, see lrpq/plan/work.py; ``disk-read``, ``disk-write``, ``store-read``,
    ``store-write``: bytes a second."""
    process_bytes: int
    """Resident memory of a worker that has imported everything and computed nothing."""
    device_bytes: int = 0
    """Memory of the device; 0 is the host's."""
    host_bytes: int = 0
    assumed: tuple[str, ...] = ()
    """Rates that were not measured, and where they are from."""
    source: str = ""
    """How the rates were found."""
    extra: Mapping[str, float] = field(default_factory=dict)


def measured_rates(device: str, *, say: Callable[[str], None] = lambda text: None) -> dict[str, float]:
    """Rates of everything that computes; disks and stores are measured by who has them."""
    where = torch.device(device)
    generator = torch.Generator(device=where).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=where)

    rates: dict[str, float] = {}
    for width in CPU_WIDTHS if where.type == "cpu" else CUDA_WIDTHS:
        for dtype in (torch.float32, torch.bfloat16):
            say(f"{str(dtype).removeprefix('torch.')} products, {width} wide")
            a, b = random(ROWS, width).to(dtype), random(width, width).to(dtype)
            seconds = _seconds(partial(torch.matmul, a, b), where)
            rates[f"matmul:{str(dtype).removeprefix('torch.')}:{width}"] = 2.0 * ROWS * width * width / seconds
    say("factorisations")
    width = 2048 if where.type == "cpu" else 8192
    X = random(width + 64, width)
    H = X.T @ X / len(X) + 0.1 * torch.eye(width, device=where)
    rates["factor"] = width**3 / 3 / _seconds(lambda: torch.linalg.cholesky_ex(H), where)
    say("elementwise operations")
    a, b = random(ROWS, 4096), random(ROWS, 1)
    rates["wide"] = 4.0 * a.numel() / _seconds(lambda: a * b, where)
    rates |= _vector(where, rates, say)
    rates |= _quantizer(where, random, rates, say)
    return rates


def exercise(device: str) -> None:
    """A little of everything that computes, for its traces in a process."""
    where = torch.device(device)
    generator = torch.Generator(device=where).manual_seed(0)
    rates = {f"matmul:{dtype}:1024": 1e15 for dtype in ("float32", "bfloat16")}

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=where)

    _vector(where, rates, lambda text: None)
    _quantizer(where, random, rates, lambda text: None)


def _vector(where: torch.device, rates: Mapping[str, float], say: Callable[[str], None]) -> dict[str, float]:
    """Bytes a second of elementwise operations: what a block's passes take besides its products."""
    say("a decoder block, forward and backward")
    hidden, windows, length = (1024, 2, 512) if where.type == "cpu" else (4096, 4, 2048)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        num_hidden_layers=1,
        vocab_size=64,
        max_position_embeddings=length,
        attn_implementation="sdpa",
    )
    traced = trace_llama(config, windows=windows, length=length, passes=Relevance.BLEND.passes)
    with where:
        block = LlamaDecoderLayer(config, layer_idx=0).to(torch.bfloat16).eval().requires_grad_(False)
        rotary = LlamaRotaryEmbedding(config)
        x = torch.randn(windows, length, hidden).bfloat16()
        position = rotary(x, torch.arange(length)[None])
    arguments = {"position_embeddings": position, "attention_mask": None}
    names = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    sites = {name: [(name, block.get_submodule(name))] for name in names if not name.endswith(("k_proj", "v_proj"))}
    upstream = {running: torch.randn_like(x) for running in Relevance.BLEND.passes}
    switch = PassSwitch()
    seconds = _seconds(lambda: block_backward(block, arguments, x, upstream, sites, switch=switch), where)
    products = Work(amounts={f"matmul:bfloat16:{hidden}": traced.backward.flops}).seconds(rates)
    left = max(seconds - products, 0.1 * seconds)
    with torch.no_grad():
        forward = _seconds(lambda: block(x, **arguments), where)
    return {"vector": traced.backward.vector_bytes / left, "block-forward": traced.forward.flops / forward}


def _quantizer(
    where: torch.device, random: Callable[..., Tensor], rates: Mapping[str, float], say: Callable[[str], None]
) -> dict[str, float]:
    """Elements a second of the quantizer's loops, and their steps a second."""
    d_in = 512 if where.type == "cpu" else 2048  # of fewer inputs a GPU sweeps a layer in another way
    small, large = (64, 768) if where.type == "cpu" else (256, 16384)
    X = random(4 * d_in, d_in)
    H = normalized(HessianSum(xx=X.T @ X, weight_sum=float(len(X)), num_tokens=len(X)))
    factor = factorize(H)
    found: dict[str, float] = {}
    say("search for scales")
    W = random(large, d_in) * 0.02
    Wt = W.T.contiguous()
    trials = sum(search_trials(choice, d_in, Grid.SIGNED) for choice in CHOICES)

    def search(Wt: Tensor = Wt) -> None:
        search_scales_transposed(Wt, factor.importance, CHOICES, grid=Grid.SIGNED)

    found["search"] = trials * large * d_in / _seconds(search, where)
    say("column loop")
    scales = {
        rows: search_scales_transposed(Wt[:, :rows].contiguous(), factor.importance, CHOICES, grid=Grid.SIGNED)
        for rows in (small, large)
    }

    def columns(rows: int) -> float:
        return _seconds(lambda: gptq(W[:rows], factor, CHOICES, scales=scales[rows], grid=Grid.SIGNED), where)

    limit_cpu = where.type == "cpu"
    steps, elements = [], []
    seconds = []
    for rows in (small, large):
        amounts = quantize(rows, d_in, CHOICES, kind=Grid.SIGNED, cpu=limit_cpu).amounts
        products = Work(amounts={k: n for k, n in amounts.items() if k.startswith("matmul")}).seconds(rates)
        steps.append(amounts["column-steps"])
        elements.append(amounts["columns"])
        seconds.append(max(columns(rows) - products, 1e-6))
    found["column-steps"], found["columns"] = _two_parts(steps, elements, seconds)
    say("polish")
    seconds, steps, elements = [], [], []
    for rows in (small, large):
        rounded = gptq(W[:rows], factor, [CHOICE], scales=[scales[rows][2]], grid=Grid.SIGNED)

        def down(rows: int = rows, rounded: list[QuantizedWeight] = rounded) -> None:
            descend(W[:rows], rounded, H, sweeps=1)

        steps.append(float(d_in))
        elements.append(float(d_in * rows))
        seconds.append(_seconds(down, where))
    found["descent-steps"], found["descent"] = _two_parts(steps, elements, seconds)
    say("packing")
    seconds_both = _seconds(lambda: unpack(pack(rounded[0]), CHOICE), where)
    found["pack"] = 2.0 * rounded[0].codes.numel() / seconds_both
    groups = CHOICE.groups(d_in)
    visited = sum((groups - g) * d_in // groups for g in range(groups)) + groups**3 / 3
    found["refit"] = visited * large / _seconds(lambda: refit(W, rounded[0], H), where)
    found["refit-steps"] = UNBOUND  # on a CPU its elements take the time; on a GPU give another rate
    say("trellis codes")
    return found | trellis_rates(where)


def trellis_rates(where: torch.device) -> dict[str, float]:
    """Rows a second that Viterbi's algorithm goes down one after another, of every width: a leaf of columns and
    segments for every thread, or as many as a GPU is taken to go down side by side."""
    cpu = where.type == "cpu"
    num_columns = LEAF_COLUMNS[where.type]
    segments = torch.get_num_threads() if cpu else trellis.SEGMENTS_AT_ONCE
    parts = [SEGMENT_ROWS * segments]
    T = torch.randn(num_columns, *parts, generator=torch.Generator(device=where).manual_seed(0), device=where)
    S, weights = torch.ones(1, *parts, device=where), torch.ones(*parts, device=where)
    R, codes = torch.eye(num_columns, device=where), torch.empty_like(T, dtype=torch.int8)
    runs = torch.zeros(num_columns, dtype=torch.int64, device=where)
    edges = segment_edges(parts, where)
    found: dict[str, float] = {}
    for bits in WIDTHS:
        book = codebook(bits, where)

        def down(bits: int = bits, book: Tensor = book) -> None:
            round_segments(T.clone(), T, S, R, weights, runs, book, codes, edges, bits=bits)

        work = trellis.round_segments(parts, num_columns, bits, cpu=cpu, threads=segments)
        found |= {kind: steps / _seconds(down, where) for kind, steps in work.amounts.items()}
    return found


def _two_parts(steps: list[float], elements: list[float], seconds: list[float]) -> tuple[float, float]:
    """Steps and elements a second from two sizes: seconds = steps / a + elements / b, neither part negative."""
    (s0, s1), (e0, e1), (t0, t1) = steps, elements, seconds
    determinant = s0 * e1 - s1 * e0
    per_step = (t0 * e1 - t1 * e0) / determinant
    per_element = (s0 * t1 - s1 * t0) / determinant
    if per_step <= 0:
        return UNBOUND, e1 / t1
    if per_element <= 0:
        return s1 / t1, UNBOUND
    return 1 / per_step, 1 / per_element


def _seconds(action: Callable[[], object], where: torch.device) -> float:
    """The fastest of some calls after one that warms up."""
    action()
    best = math.inf
    for _ in range(REPEATS):
        _wait(where)
        started = time.perf_counter()
        action()
        _wait(where)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)
