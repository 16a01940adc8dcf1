"""What each choice of the recipe is worth: KL on held-out windows, paired with the default's, for several seeds.

    python -m benchmarks.ablation MODEL --calibration FILE --text FILE [--device cuda] [--seeds 0 1 2] [--json FILE]

One process, the core's functions alone (no Ray, no store), so that it runs on a bare GPU machine. Every variant differs
from the default in what its name says; all share the tokens of their seed and the allocation of `--relevance`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lrpq.allocate.budget import BudgetBits
from lrpq.allocate.knapsack import solve_exact
from lrpq.allocate.problem import CostRow, build_problem
from lrpq.evaluate.divergence import score_windows
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.gptq import factorize, gptq, predicted_cost
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import normalized
from lrpq.quant.packing import storage_bits
from lrpq.refine.quantize import quantize_refined
from lrpq.refine.sweep import RefineSweep, merge_products
from lrpq.relevance.composite import Relevance
from lrpq.relevance.sweep import BlockSums, ProfileSweep, Shard, merge_block_sums
from lrpq.shards import root, split
from tasks.calibration.load import load_windows
from tasks.calibration.sources import parse_source

NUM_SHARDS = 4
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The default; variants replace a field."""

    relevance: Relevance = Relevance.BLEND
    power: float = 0.5
    floor: float = 0.03
    strength: float = 0.5
    correction_damping: float = 0.1
    damping: float = 0.01
    grid: Grid = Grid.SIGNED


DEFAULT = Recipe()
VARIANTS: Mapping[str, Recipe] = {
    "default": DEFAULT,
    "fisher": replace(DEFAULT, relevance=Relevance.FISHER),
    "lrp": replace(DEFAULT, relevance=Relevance.LRP),
    "no token weights": replace(DEFAULT, relevance=Relevance.NONE),
    "power 1": replace(DEFAULT, power=1.0),
    "no correction": replace(DEFAULT, strength=0.0),
    "correction damping 0.01": replace(DEFAULT, correction_damping=0.01),
    "correction strength 1": replace(DEFAULT, strength=1.0),
    "symmetric grid": replace(DEFAULT, grid=Grid.SYMMETRIC),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Sums and token weights of all blocks."""

    sums: Mapping[int, BlockSums]
    weights: Mapping[int, Mapping[int, Mapping[str, Tensor]]]
    """Block -> shard -> site -> s."""


class Bench:
    """One model, one set of calibration tokens."""

    def __init__(self, source: ModelSource, tokens: Tensor, evaluation: Tensor, *, device: str, seed: int) -> None:
        self.source, self.tokens, self.evaluation = source, tokens, evaluation
        self.device, self.seed = device, seed
        self.micro_batch = 16 if device == "cuda" else 4
        self._profiles: dict[tuple[Relevance, float, float], Profile] = {}

    def stream(self) -> BlockStream:
        return BlockStream(self.source, dtype=torch.bfloat16, device=self.device)

    def profile(self, recipe: Recipe) -> Profile:
        key = (recipe.relevance, recipe.power, recipe.floor)
        if key in self._profiles:
            return self._profiles[key]
        stream = self.stream()
        shards = [
            Shard(index=i, first_window=r.start, tokens=self.tokens[r.start : r.stop])
            for i, r in enumerate(split(len(self.tokens), NUM_SHARDS))
        ]
        with KeptInputs(memory_bytes=1 << 36) as kept:
            sweep = ProfileSweep(
                stream,
                shards,
                num_shards=NUM_SHARDS,
                relevance=recipe.relevance,
                floor=recipe.floor,
                power=recipe.power,
                seed=self.seed,
                micro_batch=self.micro_batch,
                kept=kept,
            )
            sweep.embed()
            for index, block in stream.stream(range(stream.num_blocks)):
                sweep.forward(index, block)
            sweep.seed_gradients()
            sums, weights = {}, {}
            for index, block in stream.stream(range(stream.num_blocks - 1, -1, -1)):
                parts, weights[index] = sweep.backward(index, block)
                sums[index] = root(parts, NUM_SHARDS, merge_block_sums)
        self._profiles[key] = Profile(sums=sums, weights=weights)
        return self._profiles[key]

    def costs(self, recipe: Recipe) -> list[CostRow]:
        profile, stream, rows = self.profile(recipe), self.stream(), []
        choices = [Choice(bits=bits, group_size=GROUP_SIZE) for bits in BITS]
        for block, sums in sorted(profile.sums.items()):
            for site, specs in stream.sites(block).items():
                H = normalized(sums.hessians[site])
                factor = factorize(H, damping=recipe.damping)
                for spec in specs:
                    W = stream.weight(spec)
                    c = (sums.curvature[spec.name] / sums.num_tokens).to(self.device)
                    candidates = gptq(W, factor, choices, grid=recipe.grid, name=spec.name)
                    for candidate, cost in zip(candidates, predicted_cost(W, candidates, H, c), strict=True):
                        bits = storage_bits(spec.d_out, spec.d_in, candidate.choice)
                        rows.append(CostRow(module=spec, choice=candidate.choice, storage_bits=bits, cost_nats=cost))
        return rows

    def refine(self, choices: Mapping[str, Choice | None], recipe: Recipe) -> dict[str, Tensor]:
        """The refined weights as dense numbers."""
        return {name: weight.dequantize(torch.bfloat16) for name, weight in self.quantize(choices, recipe).items()}

    def quantize(self, choices: Mapping[str, Choice | None], recipe: Recipe) -> dict[str, QuantizedWeight]:
        stream = self.stream()
        shards = {i: self.tokens[r.start : r.stop] for i, r in enumerate(split(len(self.tokens), NUM_SHARDS))}
        sweep = RefineSweep(
            stream,
            shards,
            num_shards=NUM_SHARDS,
            micro_batch=self.micro_batch,
            with_shift=recipe.strength > 0,
        )
        sweep.embed()
        weights = None if recipe.relevance is Relevance.NONE else self.profile(recipe).weights
        quantized: dict[str, QuantizedWeight] = {}
        for block, module in stream.stream(range(stream.num_blocks)):
            before: dict[str, Tensor] = {}
            for site, specs in stream.sites(block).items():
                s = None if weights is None else {shard: w.values[site] for shard, w in weights[block].items()}
                merged = root(sweep.products(block, module, specs, s, before), NUM_SHARDS, merge_products)
                for spec in specs:
                    choice = choices[spec.name]
                    assert choice is not None
                    refined = quantize_refined(
                        stream.weight(spec),
                        merged,
                        choice,
                        strength=recipe.strength,
                        damping=recipe.damping,
                        correction_damping=recipe.correction_damping,
                        grid=recipe.grid,
                        name=spec.name,
                    )
                    quantized[spec.name] = refined.weight
                before |= {spec.name: quantized[spec.name].dequantize(stream.dtype) for spec in specs}
            sweep.advance(block, module, before)
        return quantized

    def kl(self, dense: Mapping[str, Tensor]) -> list[float]:
        """KL of every window, nats per token."""
        stream = self.stream()

        def weights(block: int) -> dict[str, Tensor]:
            return {spec.name: dense[spec.name] for spec in stream.block_specs(block)}

        scores = score_windows(stream, self.evaluation, {"variant": weights}, micro_batch=self.micro_batch // 2)
        return [score.kl_nats for score in scores["variant"]]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[3.25, 4.25])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source, tokenizer = ModelSource(arguments.model), AutoTokenizer.from_pretrained(arguments.model)

    def windows(path: Path, seed: int) -> Tensor:
        spread = path == arguments.text
        return load_windows(
            parse_source(f"text:{path}"),
            tokenizer,
            num_windows=32 if spread else arguments.windows,
            length=arguments.length,
            seed=seed,
            placement="spread" if spread else "random",
        ).tokens

    rows = []
    for seed in arguments.seeds:
        bench = Bench(
            source,
            windows(arguments.calibration, seed),
            windows(arguments.text, 0),
            device=arguments.device,
            seed=seed,
        )
        costs = bench.costs(DEFAULT)
        for budget in arguments.budgets:
            problem = build_problem(costs, budget=BudgetBits(bits=budget))
            plan = solve_exact(problem).choices
            uniform = dict.fromkeys(plan, Choice(bits=int(budget), group_size=GROUP_SIZE))
            control = replace(DEFAULT, relevance=Relevance.NONE, strength=0.0)
            found = {"control": bench.kl(bench.refine(uniform, control))}
            for name in arguments.variants:
                found[name] = bench.kl(bench.refine(plan, VARIANTS[name]))
            for name, values in found.items():
                mean, error = mean_and_error(values)
                pairs = [a - b for a, b in zip(values, found.get("default", values), strict=True)]
                shift, shift_error = mean_and_error(pairs)
                rows.append({"seed": seed, "budget": budget, "variant": name, "kl_nats": values})
                print(
                    f"seed {seed}  {budget} bits  {name:26} KL {mean:.5f} +- {error:.5f}   "
                    f"against default {shift:+.5f} +- {shift_error:.5f}",
                    flush=True,
                )
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
