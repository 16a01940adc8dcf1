"""Hessians and output moments: rate of the project's own sums, and what other products would give, against float64."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import flops, matrices
from benchmarks.gpu.measure import measured, release
from benchmarks.gpu.products import PRODUCTS, Product
from benchmarks.gpu.report import Report, Row
from lrpq.quant.hessian import HessianSum, accumulate, empty_hessian, mirror
from lrpq.relevance.outputs import add_outputs, empty_outputs

PART = "sums"
TOKENS, TINY_TOKENS = 8192, 64
"""A micro-batch of four windows."""
CHECKED = 256
"""Columns that are also summed in float64."""
REPEATS = 3


def measure_sums(report: Report, device: torch.device, widths: list[int], *, tiny: bool) -> None:
    """Print seconds and errors of one micro-batch of bfloat16 inputs with float32 weights."""
    tokens = TINY_TOKENS if tiny else TOKENS
    for d in widths:
        g = matrices.generator(5, device)
        X = (
            torch.randn(tokens, d, generator=g, device=device) * matrices.channel_scales(d, seed=6, device=device)
        ).bfloat16()
        s = torch.rand(tokens, generator=g, device=device) + 0.03
        exact = X.double().T @ (X[:, :CHECKED].double() * s.double().unsqueeze(1))
        sizes = (X.double().square() * s.double().unsqueeze(1)).sum(0).sqrt()
        scale = sizes.unsqueeze(1) * sizes[:CHECKED]
        label = f"{tokens} tokens, {d} inputs"
        own = measured(partial(_hessian, X, s), device, repeats=REPEATS)
        full = mirror(own.value).xx[:, :CHECKED]
        _add(report, f"{label}: Hessian by lrpq", own.seconds, flops.hessian(d, tokens), _error(full, exact, scale))
        del own, full
        moments = measured(partial(_moments, X), device, repeats=REPEATS)
        _add(report, f"{label}: output moments by lrpq", moments.seconds, flops.moments(d, tokens), None)
        del moments
        release(device)
        for name, product in PRODUCTS.items():
            found = measured(partial(_square, X, s, product), device, repeats=REPEATS)
            error = _error(found.value[:, :CHECKED], exact, scale)
            # all of the square is multiplied: twice the necessary
            _add(report, f"{label}: square in {name}", found.seconds, flops.hessian(d, tokens), error)
            del found
            release(device)


def _hessian(X: Tensor, s: Tensor) -> HessianSum:
    return accumulate(empty_hessian(X.shape[1], X.device), X, s)


def _moments(X: Tensor) -> list[Tensor]:
    total = empty_outputs(X.shape[1], X.device)
    add_outputs(total, X)
    return total


def _square(X: Tensor, s: Tensor, product: Product) -> Tensor:
    total = torch.zeros(X.shape[1], X.shape[1], device=X.device)
    # the inputs are bfloat16 numbers as they are; only the weighted ones need parts
    wide = X.float()
    inputs = [X] if product.narrow is not None and product.split(wide[:1])[0].dtype == X.dtype else [wide]
    product.add(total, inputs, product.split(wide * s.unsqueeze(1)))
    return total


def _error(found: Tensor, exact: Tensor, scale: Tensor) -> float:
    """Largest error of an entry, relative to the root of the product of its diagonal entries."""
    return float(((found.double() - exact).abs() / scale).amax())


def _add(report: Report, name: str, seconds: float, necessary: float, error: float | None) -> None:
    figures = {} if error is None else {"largest error": error}
    report.add(Row(part=PART, name=name, seconds=seconds, flops=necessary, figures=figures))
