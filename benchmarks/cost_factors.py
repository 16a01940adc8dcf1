"""What a cost's product of means gets wrong, layer by layer, and what one factor a layer mends of it.

    python -m benchmarks.cost_factors MODEL --calibration FILE [--blocks 0,14,29] [--windows 8] [--length 512]
        [--bits 3] [--group-size 64] [--seed 0]

A cost is 1/2 sum_j c_j dW_j H dW_j^T, c_j = mean_t g_tj^2 (docs/methods.md, section 1). The same with nothing averaged
first, rows by themselves, is 1/2 mean_t sum_j g_tj^2 (dW_j x_t)^2. The quotient of the two, for the error dW that GPTQ
makes under H, is the factor that a layer's cost should have ("exact"); beside it the factors that a run could use:

    trace      mean_t |g_t|^2 |x_t|^2 over that of the product: what costs are scaled to (ADR 27), no window bounded
    channels   the mean over inputs k of mean_t |g_t|^2 x_tk^2 over that of the product
    whitened   mean_t |g_t|^2 q_t over that of the product, q_t = sum_k R_kk^2 z_tk^2 with z = R^-1 x and R the factor
               that GPTQ works with: what a token sees of errors that are R_kk times the same noise at every step

for H of tokens that count alike ("plain") and by the layer's own gradients, floor and power as a run's ("weighted"; a
run takes a site's layers together, and the blend with relevance). At the end the spread over layers of each factor's
logarithm around the exact one's. The model is held whole, in float32; needs neither Ray nor Prefect nor a GPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrpq.compare.terms import Terms
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.matched_curvature import matched_curvature, trace_of
from tasks.calibration.load import load_windows
from tasks.calibration.sources import parse_source

FACTORS = ("none", "trace", "channels", "whitened")
WEIGHTINGS = ("plain", "weighted")
TERMS = Terms(bits=(), group_sizes=())
"""Floor and power of token weights, and damping, by default."""


@dataclass(slots=True)
class Seen:
    """Of one layer, by window."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def joined(self) -> tuple[Tensor, Tensor]:
        """All tokens' inputs and gradients, float64."""
        return torch.cat(self.inputs).double(), torch.cat(self.gradients).double()


@contextmanager
def watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Seen]]:
    """While inside, what layers read and the gradients at their outputs are kept."""
    seen = {name: Seen() for name in layers}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        seen[name].inputs.append(x.detach().flatten(0, -2))
        y.register_hook(lambda g: seen[name].gradients.append(g.detach().flatten(0, -2)))  # type: ignore[no-untyped-call]

    handles = [
        layer.register_forward_hook(lambda _, args, y, name=name: note(name, args[0], y))
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def explain(model: nn.Module, windows: Tensor, *, seed: int) -> None:
    """Gradients of labels that are drawn from the model itself, window by window."""
    generator = torch.Generator().manual_seed(seed)
    for window in windows:
        logits = model(window[None]).logits[0, :-1].float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        F.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
        model.zero_grad()


def token_weights(g2: Tensor, weighting: str) -> Tensor:
    """What tokens count in H, from their squared gradients."""
    return torch.ones_like(g2) if weighting == "plain" else (g2 + TERMS.floor * g2.mean()).pow(TERMS.power)


def factors(x: Tensor, g: Tensor, W: Tensor, choice: Choice, weighting: str, *, name: str) -> dict[str, float]:
    """Factors of one layer by FACTORS, and the exact one."""
    g2, c = g.square().sum(1), g.square().mean(0)
    s = token_weights(g2, weighting)
    H = (x.T * s) @ x / s.sum()
    factor = factorize(H.float(), damping=TERMS.damping, name=name)
    dW = (gptq(W, factor, [choice], name=name)[0].dequantize(torch.float32) - W).double()
    product = float((c * ((dW @ H) * dW).sum(1)).sum())
    energy = (g2 @ x.square()) / len(x)
    live = H.diagonal() > 0
    R = (factor.R * factor.diagonal).double()
    z = torch.linalg.solve_triangular(R, x[:, factor.order].T, upper=True)
    q = factor.diagonal.double().square() @ z.square()
    matched = matched_curvature(c, float(energy.sum()), trace_of(H))
    return {
        "none": 1.0,
        "trace": float(matched.sum() / c.sum()),
        "channels": float((energy[live] / H.diagonal()[live]).mean() / c.sum()),
        "whitened": float(g2 @ q / len(x) / (c.sum() * (s @ q) / s.sum())),
        "exact": float((g.T.square() * (dW @ x.T).square()).sum()) / len(x) / product,
    }


def spread(found: Sequence[Mapping[str, float]], name: str) -> str:
    """Mean and standard deviation over layers of a factor's logarithm less the exact one's."""
    logs = [math.log(row[name] / row["exact"]) for row in found]
    return f"{fmean(logs):+.2f} +- {stdev(logs):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--blocks", default="0", help="by commas")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    windows = load_windows(
        parse_source(f"text:{arguments.calibration}"),
        AutoTokenizer.from_pretrained(arguments.model),
        num_windows=arguments.windows,
        length=arguments.length,
        seed=arguments.seed,
    ).tokens
    stream = BlockStream(open_source(arguments.model), dtype=torch.float32)
    blocks = [int(part) for part in arguments.blocks.split(",")]
    if not all(0 <= block < stream.num_blocks for block in blocks):
        raise SystemExit(f"--blocks {arguments.blocks}: the model has blocks 0 to {stream.num_blocks - 1}")
    specs: list[LinearSpec] = [spec for block in blocks for spec in stream.block_specs(block)]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    with watched({spec.name: model.get_submodule(spec.name) for spec in specs}) as seen:
        explain(model, windows, seed=arguments.seed)
    choice = Choice(bits=arguments.bits, group_size=arguments.group_size)
    found: dict[str, list[dict[str, float]]] = {weighting: [] for weighting in WEIGHTINGS}
    columns = [*FACTORS[1:], "exact"]
    print("| layer | " + " | ".join(f"{w}: {c}" for w in WEIGHTINGS for c in columns) + " |")
    print("|---" * (1 + len(WEIGHTINGS) * len(columns)) + "|")
    for spec in specs:
        x, g = seen.pop(spec.name).joined()
        W = model.get_submodule(spec.name).weight.detach().float()
        for weighting in WEIGHTINGS:
            found[weighting].append(factors(x, g, W, choice, weighting, name=spec.name))
        cells = [f"{found[w][-1][column]:.3f}" for w in WEIGHTINGS for column in columns]
        print(f"| {spec.name} | " + " | ".join(cells) + " |", flush=True)
    for weighting in WEIGHTINGS:
        spreads = ", ".join(f"{name} {spread(found[weighting], name)}" for name in FACTORS)
        print(f"{weighting}, logarithm over exact: {spreads}")


if __name__ == "__main__":
    main()
