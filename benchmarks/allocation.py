"""Exact against Lagrangian allocation on problems of real models' sizes: seconds, gap, budget left unused.

Costs are synthetic: a log-normal scale per module, 4^-bits, a little less for finer groups, and noise of a
few per cent, so that some wider choices cost more, as measured costs do.
Run: ``python benchmarks/allocation.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lrpq.allocate.budget import BudgetBits
from lrpq.allocate.knapsack import frontier, solve_exact, solve_lagrangian
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow, Problem, build_problem
from lrpq.model.layers import Choice, LinearSpec
from lrpq.notation import SCALE_BITS

CHOICES = [Choice(bits=bits, group_size=size) for bits in (2, 3, 4, 5, 8) for size in (64, 128)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Shape of a Llama-like model."""

    name: str
    blocks: int
    hidden: int
    kv: int
    ffn: int


SIZES = [
    Size(name="1B", blocks=16, hidden=2048, kv=512, ffn=8192),
    Size(name="8B", blocks=32, hidden=4096, kv=1024, ffn=14336),
    Size(name="70B", blocks=80, hidden=8192, kv=1024, ffn=28672),
    Size(name="405B", blocks=126, hidden=16384, kv=1024, ffn=53248),
]


def linears(size: Size) -> Iterator[LinearSpec]:
    """Yield the linear layers of every block."""
    shapes = [
        ("self_attn.q_proj", size.hidden, size.hidden, "qkv"),
        ("self_attn.k_proj", size.kv, size.hidden, "qkv"),
        ("self_attn.v_proj", size.kv, size.hidden, "qkv"),
        ("self_attn.o_proj", size.hidden, size.hidden, "o"),
        ("mlp.gate_proj", size.ffn, size.hidden, "gate_up"),
        ("mlp.up_proj", size.ffn, size.hidden, "gate_up"),
        ("mlp.down_proj", size.hidden, size.ffn, "down"),
    ]
    for block in range(size.blocks):
        for path, d_out, d_in, site in shapes:
            yield LinearSpec(
                name=f"model.layers.{block}.{path}",
                block=block,
                d_out=d_out,
                d_in=d_in,
                input_site=site,
                fused_group=f"model.layers.{block}.{site}",
            )


def rows(size: Size, *, seed: int) -> Iterator[CostRow]:
    """Yield synthetic costs of every module and choice."""
    random_source = random.Random(seed)  # noqa: S311 - synthetic costs
    for module in linears(size):
        scale = module.num_weights * math.exp(random_source.gauss(0.0, 1.5)) * 1e-9
        for choice in CHOICES:
            storage = module.num_weights * choice.bits + SCALE_BITS * module.d_out * choice.groups(module.d_in)
            finer = 1.0 if choice.group_size == 128 else 0.85
            noise = math.exp(random_source.gauss(0.0, 0.05))
            yield CostRow(
                module=module,
                choice=choice,
                storage_bits=storage,
                cost_nats=scale * 4.0**-choice.bits * finer * noise,
            )


def measure(problem: Problem) -> dict[str, float]:
    """Time both methods and check the budget."""
    start = time.perf_counter()
    lagrangian = solve_lagrangian(problem)
    middle = time.perf_counter()
    exact = solve_exact(problem)
    end = time.perf_counter()
    points = len(frontier(problem))
    plans: list[Plan] = [lagrangian, exact]
    if any(plan.storage_bits > problem.capacity_bits for plan in plans):
        raise SystemExit("a plan is above its budget")
    unused = [(problem.capacity_bits - plan.storage_bits) / problem.num_weights for plan in plans]
    return {
        "lagrangian_seconds": middle - start,
        "exact_seconds": end - middle,
        "frontier_seconds": time.perf_counter() - end,
        "frontier_points": points,
        "lagrangian_gap": lagrangian.gap,
        "exact_gap": exact.gap,
        "lagrangian_over_exact": lagrangian.cost_nats / exact.cost_nats - 1,
        "lagrangian_unused_bits": unused[0],
        "exact_unused_bits": unused[1],
    }


def main() -> None:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/allocation.json"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{len(CHOICES)} choices a group; seconds, gap to the proved bound, unused bits a weight")
    print("| model | groups | budget | lagr. s | exact s | lagr. gap | exact gap | unused | unused exact |")
    print("|---|---|---|---|---|---|---|---|---|")
    found = []
    for size in SIZES:
        every = list(rows(size, seed=arguments.seed))
        for bits in (2.5, 3.25, 4.25):
            problem = build_problem(every, budget=BudgetBits(bits=bits))
            row = measure(problem)
            found.append({"model": size.name, "groups": len(problem.groups), "budget_bits": bits, **row})
            print(
                f"| {size.name} | {len(problem.groups)} | {bits} | {row['lagrangian_seconds']:.3f} "
                f"| {row['exact_seconds']:.3f} | {row['lagrangian_gap']:.1e} | {row['exact_gap']:.1e} "
                f"| {row['lagrangian_unused_bits']:.1e} | {row['exact_unused_bits']:.1e} |"
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
