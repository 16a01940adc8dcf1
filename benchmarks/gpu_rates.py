"""Rates of one GPU for tasks/estimate/gpus: products, factorisation, and the quantizer's loops, as JSON.

    CUBLAS_WORKSPACE_CONFIG=:4096:8 python -m benchmarks.gpu_rates

Needs PyTorch and lrpq's core alone. Seconds are the fastest of three calls after one; where a loop is timed at two
sizes, equal seconds mean that its steps bind it, not its elements.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lrpq.model.layers import Choice
from lrpq.quant.descent import descend
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import HessianSum, normalized
from lrpq.quant.refit import refit
from lrpq.quant.scale_search import search_scales_transposed

WIDTHS = (128, 512, 2048, 8192, 16384)
ROWS = (256, 16384)
REFITS = ((512, 1024), (4096, 1024), (8192, 512), (8192, 2048), (28672, 64), (28672, 256))
CHOICES = tuple(Choice(bits=bits, group_size=64) for bits in (2, 3, 4, 5, 6, 8))


def seconds(action: Callable[[], object]) -> float:
    action()
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def rounded(W: Tensor, choice: Choice) -> QuantizedWeight:
    groups = W.view(len(W), -1, choice.group_size)
    scales = (groups.abs().amax(-1) / 7.5).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).view(W.shape).to(torch.int8)
    return QuantizedWeight(codes=codes, scales=scales, choice=choice)


def main() -> None:
    found: dict[str, float] = {}
    for width in WIDTHS:
        for dtype in (torch.float32, torch.bfloat16):
            a, b = random(8192, width).to(dtype), random(width, width).to(dtype)
            name = f"matmul:{str(dtype).removeprefix('torch.')}:{width}, FLOP/s"
            found[name] = 2 * 8192 * width * width / seconds(lambda a=a, b=b: a @ b)
    X = random(8256, 8192)
    H = X.T @ X / len(X) + 0.1 * torch.eye(8192, device="cuda")
    found["factor, FLOP/s"] = 8192**3 / 3 / seconds(lambda: torch.linalg.cholesky_ex(H))
    a, b = random(8192, 8192), random(8192, 1)
    found["wide, bytes written/s"] = 4 * a.numel() / seconds(lambda: a * b)
    z = random(4096, 128256).bfloat16()
    found["widening and log-softmax, bytes written/s"] = 8 * z.numel() / seconds(lambda: z.float().log_softmax(-1))
    d_in = 512
    X = random(2048, d_in)
    small = normalized(HessianSum(xx=X.T @ X, weight_sum=2048.0, num_tokens=2048))
    factor = factorize(small)
    W = random(max(ROWS), d_in) * 0.02
    Wt = W.T.contiguous()

    def search() -> list[Tensor]:
        return search_scales_transposed(Wt, factor.importance, CHOICES, grid=Grid.SIGNED)

    found[f"search, {max(ROWS)} x {d_in}, s"] = seconds(search)
    scales = search()
    for rows in ROWS:
        own = [s[:rows] for s in scales]
        found[f"column loop, {rows} x {d_in}, s"] = seconds(
            lambda rows=rows, own=own: gptq(W[:rows], factor, CHOICES, scales=own, grid=Grid.SIGNED)
        )
        q = gptq(W[:rows], factor, [CHOICES[2]], scales=[own[2]], grid=Grid.SIGNED)
        found[f"descent, {rows} x {d_in}, s"] = seconds(lambda rows=rows, q=q: descend(W[:rows], q, small, sweeps=1))
    for d_in, rows in REFITS:
        X = random(256, d_in)
        H = X.T @ X / len(X) + 0.1 * torch.eye(d_in, device="cuda")
        W = random(rows, d_in) * 0.02
        weight = rounded(W, CHOICES[2])
        found[f"refit, {rows} x {d_in}, s"] = seconds(lambda W=W, H=H, q=weight: refit(W, q, H))
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **found}, indent=1))


if __name__ == "__main__":
    main()
