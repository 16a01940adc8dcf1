"""What the card can do: large products and copies, in this run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.gpu.measure import measured
from benchmarks.gpu.report import Ceiling, Report, Row

PART = "ceiling"
SIZE = {"cuda": 8192, "cpu": 2048}
COPY_BYTES = {"cuda": 4 << 30, "cpu": 1 << 28}
TINY_SIZE, TINY_COPY_BYTES = 256, 1 << 20
REPEATS = 5


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """``ieee`` for float32, ``tf32`` on units that have it; what it was before is set again."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def measure_ceiling(report: Report, device: torch.device, *, tiny: bool) -> None:
    """Measure and set ``report.ceiling``."""
    n = TINY_SIZE if tiny else SIZE[device.type]
    count = (TINY_COPY_BYTES if tiny else COPY_BYTES[device.type]) // 4
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, n, generator=g, device=device)
    flops = 2.0 * n**3
    half = x.bfloat16()
    bf16 = measured(lambda: half @ half, device, repeats=REPEATS)
    with float32_products("ieee"):
        fp32 = measured(lambda: x @ x, device, repeats=REPEATS)
    with float32_products("tf32"):
        tf32 = measured(lambda: x @ x, device, repeats=REPEATS)
    y = torch.empty(count, device=device)
    z = torch.empty_like(y)
    copy = measured(lambda: z.copy_(y), device, repeats=REPEATS)
    host = torch.empty(count, pin_memory=device.type == "cuda")
    out = measured(lambda: host.copy_(y), device, repeats=REPEATS)
    back = measured(lambda: y.copy_(host), device, repeats=REPEATS)
    report.ceiling = Ceiling(
        bf16=flops / bf16.seconds,
        fp32=flops / fp32.seconds,
        tf32=flops / tf32.seconds,
        copy=2 * y.nbytes / copy.seconds,
        to_host=y.nbytes / out.seconds,
        to_device=y.nbytes / back.seconds,
    )
    for name, found in (("bf16", bf16), ("fp32", fp32), ("tf32", tf32)):
        report.add(Row(part=PART, name=f"{name} product {n}^3", seconds=found.seconds, flops=flops))
    for name, moved, nbytes in (
        ("copy", copy, 2 * y.nbytes),
        ("to pinned host", out, y.nbytes),
        ("back", back, y.nbytes),
    ):
        rate = {"GB/s": nbytes / moved.seconds / 1e9}
        report.add(Row(part=PART, name=name, seconds=moved.seconds, bytes=float(nbytes), figures=rate))
