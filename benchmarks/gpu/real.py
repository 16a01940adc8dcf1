"""Loss of the codes on a real model's weights and Hessians, with all precisions of the updates, against float64."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.precision import sweep
from benchmarks.gpu.products import PRODUCTS
from benchmarks.gpu.quantizer import GRID, ONE_WIDTH, REFERENCE_ROWS
from benchmarks.gpu.reference import paper_gptq, total_loss
from benchmarks.gpu.report import Figure, Report, Row
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.hessian import normalized

PART = "gptq"
CHOICE = Choice(bits=ONE_WIDTH, group_size=64)


def measure_real(report: Report, device: torch.device, model: Path, tokens: Tensor) -> None:
    """First, middle and last block: every layer's first rows by lrpq and by the paper's algorithm in float64."""
    source = open_source(model)
    bench = Workbench(source, tokens, Terms(device=str(device), shards=1))
    stream = bench.stream()
    last = stream.num_blocks - 1
    wanted = {0, last // 2, last}
    walk = bench.walk_back(weightings=[DEFAULT.weighting], hessians_by=[DEFAULT.weighting])
    ratios: list[float] = []
    by_product = dict.fromkeys(PRODUCTS, 0.0)
    for block, evidence in zip(range(last, -1, -1), walk, strict=True):
        if block not in wanted:
            continue
        for site, specs in stream.sites(block).items():
            H = normalized(evidence.hessians[DEFAULT.weighting][site], name=specs[0].name)
            factor = factorize(H, name=specs[0].name)
            for spec in specs:
                W = stream.weight(spec)[:REFERENCE_ROWS].contiguous()
                q = gptq(W, factor, [CHOICE], grid=GRID, name=spec.name)[0]
                reference = paper_gptq(
                    W.double(), H.double(), q.scales, CHOICE, damping=factor.damping, order=factor.order
                )
                # in units of what float64 leaves, so that every layer counts alike
                unit = total_loss(W, reference, H.double())
                ratios.append(total_loss(W, q.dequantize(torch.float32), H.double()) / unit - 1)
                for name, product in PRODUCTS.items():
                    Q, _ = sweep(W, factor, q.scales, CHOICE, product)
                    by_product[name] += total_loss(W, Q, H.double()) / unit
    figures: dict[str, Figure] = {
        "layers": len(ratios),
        "mean": sum(ratios) / len(ratios),
        "largest": max(ratios, key=abs),
    }
    where = f"{model.name}, blocks {', '.join(map(str, sorted(wanted)))}"
    report.add(Row(part=PART, name=f"{where}: loss to float64 - 1", figures=figures))
    report.add(
        Row(
            part="precision",
            name=f"{where}: mean loss to float64 - 1",
            figures={name: total / len(ratios) - 1 for name, total in by_product.items()},
        )
    )
