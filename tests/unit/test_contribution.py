"""LRP-QViT's integer program, against all plans of a small model."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from lrpq.allocate.problem import CostRow
from lrpq.compare.contribution import contributions, weight_widths
from lrpq.errors import QuantizationError
from lrpq.importance.gather import BlockEvidence, ModuleSums
from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.packing import storage_bits

WIDTHS = (3, 4, 5)


def layer(name: str, d_out: int, d_in: int) -> LinearSpec:
    return LinearSpec(name=name, block=0, d_out=d_out, d_in=d_in, input_site=name, fused_group=name)


def rows_of(layers: list[LinearSpec]) -> list[CostRow]:
    choices = [Choice(bits=bits, group_size=-1) for bits in WIDTHS]
    return [
        CostRow(module=spec, choice=choice, storage_bits=storage_bits(spec.d_out, spec.d_in, choice), cost_nats=1.0)
        for spec in layers
        for choice in choices
    ]


@pytest.mark.parametrize("seed", range(5))
def test_no_plan_within_the_budget_gives_relevance_more_bits(seed: int) -> None:
    draw = random.Random(seed)
    layers = [layer(f"l{i}", draw.choice([16, 32, 48]), draw.choice([16, 32, 64])) for i in range(6)]
    raw = [draw.random() for _ in layers]
    scores = {spec.name: value / sum(raw) for spec, value in zip(layers, raw, strict=True)}
    rows = rows_of(layers)
    size = {(row.module.name, row.choice.bits): row.storage_bits for row in rows if row.choice is not None}
    budget = sum(size[spec.name, 4] for spec in layers) / sum(spec.num_weights for spec in layers) + 1e-9
    capacity = budget * sum(spec.num_weights for spec in layers)

    def gained(widths: tuple[int, ...]) -> float:
        return sum(scores[spec.name] * bits for spec, bits in zip(layers, widths, strict=True))

    best = max(
        gained(widths)
        for widths in itertools.product(WIDTHS, repeat=len(layers))
        if sum(size[spec.name, bits] for spec, bits in zip(layers, widths, strict=True)) <= capacity
    )
    plan = weight_widths(rows, scores, budget_bits=budget)
    found = tuple(choice.bits for spec in layers if (choice := plan.choices[spec.name]) is not None)
    assert len(found) == len(layers)
    assert plan.storage_bits <= capacity
    assert gained(found) == pytest.approx(best, rel=1e-6)
    assert gained(found) > gained((4,) * len(layers))


def evidence(relevance: dict[str, float]) -> BlockEvidence:
    modules = {
        name: ModuleSums(squares={}, trace=torch.zeros(()), relevance=torch.tensor(value, dtype=torch.float64))
        for name, value in relevance.items()
    }
    return BlockEvidence(modules=modules, hessians={}, weights={}, squares={}, outputs={}, num_tokens=1, cosine=None)


def test_contributions_are_shares_of_all_blocks() -> None:
    found = contributions({0: evidence({"a": 3.0, "b": 1.0}), 1: evidence({"c": 4.0})})
    assert found == {"a": 0.375, "b": 0.125, "c": 0.5}
    with pytest.raises(QuantizationError, match=r"relevance of all layers together is 0; expected more"):
        contributions({0: evidence({"a": 0.0})})
