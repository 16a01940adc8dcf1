"""What can be won after rounding: layer-wise losses against plain GPTQ, on the calibration tokens and on others.

    python -m benchmarks.after_rounding MODEL --calibration FILE [--blocks 0 7 15 29] [--json FILE]

Relevance-weighted Hessians of two disjoint draws of windows from one text, both as the profile makes them. Weights are
quantized on the first; every loss is measured on both, since what is fitted after rounding may fit its noise. A ratio
is the loss of the layers of a site under H, over that of plain GPTQ (diag(H) in the scale search, damping 0.01), and
its geometric mean over blocks. Seconds are processor time of one thread, over those of plain GPTQ with its search.
One process, the core's functions alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.best_rows import gptq_best_rows
from lrpq.quant.descent import descend
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import gptq, loss
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import damped_cholesky, normalized
from lrpq.quant.importance import DEFAULT_SHARE, search_importance
from lrpq.quant.lowrank import low_rank
from lrpq.quant.polish import polish
from lrpq.quant.refit import refit
from lrpq.quant.scale_search import search_scales
from lrpq.relevance.composite import Relevance
from lrpq.relevance.sweep import ProfileSweep, Shard
from tasks.calibration.load import load_windows
from tasks.calibration.sources import parse_source

CHOICES = tuple(Choice(bits=bits, group_size=group) for group in (64, -1) for bits in (2, 3, 4))
BASELINE = "gptq"
GRID = Grid.SIGNED
LORC_RANK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The layers of one site, stacked, and the Hessian they are quantized on."""

    W: Tensor
    H: Tensor
    factor: Factor
    plain: list[QuantizedWeight]
    """Plain GPTQ, of every choice."""
    priced: list[QuantizedWeight]
    """GPTQ with the importance of its own factor in the scale search."""

    def damped(self, damping: float) -> Tensor:
        H = self.H.clone()
        H.diagonal().add_(damping * float(H.diagonal().mean()))
        return H

    def descended(self, sweeps: int, damping: float) -> list[QuantizedWeight]:
        return [d.weight for d in descend(self.W, self.plain, self.damped(damping), sweeps=sweeps)]

    def refitted(self, start: Sequence[QuantizedWeight]) -> list[QuantizedWeight]:
        return [refit(self.W, q, self.H).weight for q in start]

    def polished(
        self, start: Sequence[QuantizedWeight], rounds: int = 2, damping: float = 0.03
    ) -> list[QuantizedWeight]:
        return [p.weight for p in polish(self.W, start, self.H, rounds=rounds, damping=damping)]

    def importance(self, share: float) -> list[QuantizedWeight]:
        v = search_importance(self.factor, share=share)
        scales = [search_scales(self.W, v, choice, grid=GRID) for choice in CHOICES]
        return gptq(self.W, self.factor, CHOICES, scales=scales, grid=GRID)

    def best_rows(self) -> list[QuantizedWeight]:
        scales = [q.scales for q in self.priced]
        return gptq_best_rows(self.W, self.factor, CHOICES, self.H, scales=scales, grid=GRID)

    def again(self) -> list[QuantizedWeight]:
        scales = [q.scales for q in self.refitted(self.plain)]
        return gptq(self.W, self.factor, CHOICES, scales=scales, grid=GRID)


# Polish has damping .03 unless said. The seconds are those of the step alone; where it starts from `priced`, that GPTQ
# costs what plain GPTQ does.
VARIANTS: Mapping[str, Callable[[Layer], list[QuantizedWeight]]] = {
    "descent, 1 sweep, damping 0": lambda x: x.descended(1, 0.0),
    "descent, 4 sweeps, damping 0": lambda x: x.descended(4, 0.0),
    "descent, 4 sweeps, damping .01": lambda x: x.descended(4, 0.01),
    "descent, 4 sweeps, damping .03": lambda x: x.descended(4, 0.03),
    "descent, 4 sweeps, damping .1": lambda x: x.descended(4, 0.1),
    "descent, 16 sweeps, damping .03": lambda x: x.descended(16, 0.03),
    "refit": lambda x: x.refitted(x.plain),
    "gptq again with refitted scales": lambda x: x.again(),
    "polish": lambda x: x.polished(x.plain),
    "importance .5": lambda x: x.importance(0.5),
    "importance .75": lambda x: x.importance(0.75),
    "importance 1": lambda x: x.importance(1.0),
    "importance .5, best rows": lambda x: x.best_rows(),
    "importance .5, polish 1 round": lambda x: x.polished(x.priced, 1),
    "importance .5, polish": lambda x: x.polished(x.priced),
    "importance .5, polish, damping .1": lambda x: x.polished(x.priced, damping=0.1),
    "importance .5, polish 4 rounds": lambda x: x.polished(x.priced, 4),
    "importance .5, best rows, polish": lambda x: x.polished(x.best_rows()),
}


def hessians(stream: BlockStream, tokens: Tensor, blocks: Sequence[int]) -> dict[tuple[int, str], Tensor]:
    """Block, site -> H of all tokens, with the default token weights."""
    shard = Shard(index=0, first_window=0, tokens=tokens)
    found = {}
    with KeptInputs(memory_bytes=1 << 36) as kept:
        sweep = ProfileSweep(
            stream,
            [shard],
            num_shards=1,
            relevance=Relevance.BLEND,
            floor=0.03,
            power=0.5,
            seed=0,
            micro_batch=4,
            kept=kept,
        )
        sweep.embed()
        for index, block in stream.stream(range(stream.num_blocks)):
            sweep.forward(index, block)
        sweep.seed_gradients()
        for index, block in stream.stream(range(stream.num_blocks - 1, min(blocks) - 1, -1)):
            ((_, sums),) = sweep.backward(index, block)[0].items()
            if index in blocks:
                found |= {(index, site): normalized(h) for site, h in sums.hessians.items()}
    return found


def measure(W: Tensor, H: Tensor, held_out: Tensor, where: Mapping[str, object]) -> list[dict[str, object]]:
    """Losses of every variant and choice of one site."""
    factor = factorize(H)
    start = time.process_time()
    plain = gptq(W, factor, CHOICES, grid=GRID)
    unit = time.process_time() - start
    layer = Layer(W=W, H=H, factor=factor, plain=plain, priced=[])
    layer = replace(layer, priced=layer.importance(DEFAULT_SHARE))
    rows: list[dict[str, object]] = []

    def add(variant: str, choice: Choice, Q: Tensor, seconds: float) -> None:
        calibration, other = (float(loss(W, Q, each).sum()) for each in (H, held_out))
        losses = {"calibration_loss": calibration, "held_out_loss": other}
        rows.append({**where, "variant": variant, "choice": str(choice), **losses, "seconds_ratio": seconds / unit})

    for name, variant in {BASELINE: lambda x: x.plain, **VARIANTS}.items():
        start = time.process_time()
        found = variant(layer)
        seconds = time.process_time() - start
        for choice, q in zip(CHOICES, found, strict=True):
            add(name, choice, q.dequantize(), seconds)
    L = damped_cholesky(H).L
    for kind, factor_of in (("plain", None), ("under H", L)):
        for choice, q in zip(CHOICES, plain, strict=True):
            start = time.process_time()
            correction = low_rank(W - q.dequantize(), LORC_RANK, L=factor_of)
            seconds = len(CHOICES) * (time.process_time() - start)
            add(f"LoRC, rank {LORC_RANK}, {kind}", choice, q.dequantize() + correction.dense(), seconds)
            rows[-1]["added_bits_per_weight"] = correction.storage_bits / W.numel()
    return rows


def ratio(rows: Sequence[Mapping[str, object]], which: str, **wanted: str) -> float:
    """Geometric mean over blocks and sites, and choices where none is wanted."""
    base = {(r["block"], r["site"], r["choice"]): r[which] for r in rows if r["variant"] == BASELINE}
    chosen = [r for r in rows if all(r[key] == value for key, value in wanted.items())]
    return statistics.geometric_mean(float(r[which] / base[r["block"], r["site"], r["choice"]]) for r in chosen)  # type: ignore[operator]


def report(rows: Sequence[Mapping[str, object]]) -> None:
    variants = dict.fromkeys(str(r["variant"]) for r in rows)
    sites = dict.fromkeys(str(r["site"]) for r in rows)
    head = " ".join(f"{choice!s:>13}" for choice in CHOICES)
    print(f"\n{'calibration / held out, over plain GPTQ':40} {head}   time")
    for variant in variants:
        cells = [
            f"{ratio(rows, 'calibration_loss', variant=variant, choice=str(c)):.3f} / "
            f"{ratio(rows, 'held_out_loss', variant=variant, choice=str(c)):.3f}"
            for c in CHOICES
        ]
        seconds = statistics.fmean(float(str(r["seconds_ratio"])) for r in rows if r["variant"] == variant)
        print(f"{variant:40} {' '.join(cells)}  {seconds:5.2f}")
    print(f"\n{'held out, by site, all choices':40} " + " ".join(f"{site:>8}" for site in sites))
    for variant in variants:
        cells = [f"{ratio(rows, 'held_out_loss', variant=variant, site=site):8.3f}" for site in sites]
        print(f"{variant:40} {' '.join(cells)}")
    for site in sites:
        extra = {r.get("added_bits_per_weight") for r in rows if r["site"] == site} - {None}
        print(f"LoRC adds {', '.join(f'{float(str(bits)):.3f}' for bits in extra)} bits a weight in {site} (stacked)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64, help="to quantize on")
    parser.add_argument("--held-out", type=int, default=48, help="windows to measure on besides")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 7, 15, 29])
    parser.add_argument("--rows", type=int, default=512, help="of a site at most, evenly spread; rows do not interact")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stream = BlockStream(ModelSource(arguments.model), dtype=torch.bfloat16, device="cpu")
    tokens = load_windows(
        parse_source(f"text:{arguments.calibration}"),
        AutoTokenizer.from_pretrained(arguments.model),
        num_windows=arguments.windows + arguments.held_out,
        length=arguments.length,
        seed=arguments.seed,
    ).tokens
    parts = tokens.split([arguments.windows, arguments.held_out])
    calibration, held_out = (hessians(stream, part, arguments.blocks) for part in parts)
    rows: list[dict[str, object]] = []
    for block in arguments.blocks:
        for site, specs in stream.sites(block).items():
            W = torch.cat([stream.weight(spec) for spec in specs])
            W = W[:: -(-len(W) // arguments.rows)]
            where = {"block": block, "site": site}
            rows += measure(W, calibration[block, site], held_out[block, site], where)
            print(f"block {block}, {site}: done", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    report(rows)


if __name__ == "__main__":
    main()
