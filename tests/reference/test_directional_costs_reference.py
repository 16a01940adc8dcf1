"""Costs along a layer's own error against the second order of the model's KL divergence, logits in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import write_llama
from torch import Tensor

from lrpq.importance.directional import directional_costs
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.rtn import round_to_nearest

WINDOWS, LENGTH = 8, 12
SEEDS = 20
CHOICES = (Choice(bits=3, group_size=32), Choice(bits=5, group_size=-1))


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> BlockStream:
    folder: Path = tmp_path_factory.mktemp("directional-costs") / "model"
    return BlockStream(open_source(write_llama(folder, layers=2)), dtype=torch.float64)


@torch.no_grad()
def log_probabilities(stream: BlockStream, tokens: Tensor, changed: dict[str, Tensor]) -> Tensor:
    hidden = stream.embed(tokens)
    for index, block in stream.stream(range(stream.num_blocks)):
        with stream.swapped(block, {n: w for n, w in changed.items() if n.startswith(f"model.layers.{index}.")}):
            hidden = stream.run(block, index, hidden)
    with stream.head() as (norm, head):
        found: Tensor = head(norm(hidden)).log_softmax(-1)
    return found


def test_it_is_the_second_order_of_the_divergence(stream: BlockStream) -> None:
    """Every layer and two choices; the mean over draws of the labels, within what n draws leave open."""
    tokens = torch.randint(3, 128, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    rounded: dict[str, list[QuantizedWeight]] = {
        spec.name: [round_to_nearest(stream.weight(spec), choice) for choice in CHOICES] for spec in stream.specs
    }
    drawn = [
        directional_costs(stream, tokens, lambda spec: rounded[spec.name], seed=seed, micro_batch=3)
        for seed in range(SEEDS)
    ]
    with stream.embedding():
        before = log_probabilities(stream, tokens, {})
        for spec in stream.specs:
            W = stream.weight(spec).double()
            for q in rounded[spec.name]:
                step = 1e-3  # of the error: the divergence is then its second order
                moved = {spec.name: W + step * (q.dequantize(torch.float64) - W)}
                after = log_probabilities(stream, tokens, moved)
                kl = float((before.exp() * (before - after)).sum()) / tokens.numel() / step**2
                found = math.fsum(costs[spec.name][q.choice] for costs in drawn) / SEEDS
                assert found == pytest.approx(kl, rel=5 * math.sqrt(2 / (SEEDS * WINDOWS))), (spec.name, q.choice)


def test_windows_computed_together_or_alone_cost_the_same(stream: BlockStream) -> None:
    tokens = torch.randint(3, 128, (5, LENGTH), generator=torch.Generator().manual_seed(2))

    def costs(micro_batch: int) -> list[float]:
        found = directional_costs(
            stream,
            tokens,
            lambda spec: [round_to_nearest(stream.weight(spec), CHOICES[0])],
            seed=0,
            micro_batch=micro_batch,
        )
        return [of[CHOICES[0]] for of in found.values()]

    assert costs(1) == pytest.approx(costs(5), rel=1e-6)
