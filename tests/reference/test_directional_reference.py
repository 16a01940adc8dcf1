"""Directional costs against the model's own logits in float64, and the bit-operation program against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tiny_images import images, write_classifier
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lrpq.activations.attention import KEY, PATTERN, POINTS, QUERY, VALUE, with_points
from lrpq.activations.calibrate import Calibration, Candidate, Means, Place, attention_of, calibrate, watched
from lrpq.activations.clipping import best, channel_candidates, squared_error
from lrpq.activations.directional import responses
from lrpq.activations.folding import folding_of
from lrpq.activations.grids import UniformGrid, quantized
from lrpq.activations.operations import allocate_operations, even_operations
from lrpq.activations.together import Unit, allocate_together, even_spending
from lrpq.allocate.budget import BudgetBits
from lrpq.allocate.problem import CostRow, build_problem
from lrpq.errors import BudgetError
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.packing import storage_bits
from lrpq.quant.rtn import round_to_nearest
from lrpq.relevance.head import sequence_generator
from lrpq.relevance.probes import random_signs, root_times

Change = Callable[[int, Any], AbstractContextManager[Any]]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_draws_are_roots_of_the_fisher_information() -> None:
    """All signs there are, each once."""
    logits = 3 * noise(6, dtype=torch.float64)
    p = torch.softmax(logits, -1)
    drawn = torch.stack([root_times(logits, torch.tensor(e).double()) for e in itertools.product((-1, 1), repeat=6)])
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), p.diag() - p[:, None] * p, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> BlockStream:
    folder = write_classifier(tmp_path_factory.mktemp("directional") / "model", "vit")
    return BlockStream(open_source(folder), dtype=torch.float64)


@torch.no_grad()
def logits(stream: BlockStream, x: Tensor, change: Change = lambda *_: nullcontext()) -> Tensor:
    hidden = stream.embed(x)
    for index, block in stream.stream(range(stream.num_blocks)):
        with change(index, block):
            hidden = stream.run(block, index, hidden)
    with stream.head() as (tail, head):
        z: Tensor = head(tail(hidden))[:, 0]
    return z


@contextmanager
def moved(stream: BlockStream, index: int, block: Any, place: str, error: Tensor) -> Iterator[None]:
    """One place moves by an error, in a block at hand; a site's reaches all its layers."""
    if place in POINTS:
        with with_points(attention_of(stream, block), {place: lambda x: x + error}):
            yield
        return
    layers = [block.get_submodule(stream.local_name(spec)) for spec in stream.sites(index)[place]]
    handles = [layer.register_forward_pre_hook(lambda _, a: (a[0] + error,)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def derivative(stream: BlockStream, x: Tensor, change: Callable[[float], Change]) -> Tensor:
    """Of the logits, by central differences."""
    return (logits(stream, x, change(1e-3)) - logits(stream, x, change(-1e-3))) / 2e-3


def test_responses_are_derivatives_of_the_logits(stream: BlockStream) -> None:
    """Every site, every point of attention and every layer, each moved alone in all its tokens."""
    x, draws = images(4).double(), 2
    found = calibrate(stream, x, widths=[3])
    grids = {key: {3: place.candidates[3].original_grid} for key, place in found.places.items()}
    weights = {s.name: [round_to_nearest(stream.weight(s), Choice(bits=3, group_size=-1))] for s in stream.specs}
    ours = responses(stream, x, grids, weights, seed=5, draws=range(draws), micro_batch=3)
    z = logits(stream, x)
    v = torch.stack(
        [
            root_times(z[i % 4], random_signs(z.shape[1], sequence_generator(5, i % 4 + 4 * (i // 4))))
            for i in range(draws * 4)
        ]
    ).view(draws, 4, -1)
    seen: dict[tuple[int, str], Tensor] = {}
    hidden = stream.embed(x)
    with torch.no_grad():
        for index, block in stream.stream(range(stream.num_blocks)):
            with watched(stream, index, block, lambda name, t, index=index: seen.update({(index, name): t})):
                hidden = stream.run(block, index, hidden)
    assert set(seen) == set(ours.places and {key[:2] for key in ours.places})
    for (at, place), by_width in grids.items():
        error = quantized(seen[at, place], by_width[3]) - seen[at, place]

        def change(step: float, at: int = at, place: str = place, error: Tensor = error) -> Change:
            return lambda i, block: moved(stream, i, block, place, step * error) if i == at else nullcontext()

        reference = (v * derivative(stream, x, change)).sum(-1).flatten()
        torch.testing.assert_close(torch.cat(ours.places[at, place, 3]), reference, rtol=1e-3, atol=1e-5)
        assert ours.costs().places[at, place, 3] == pytest.approx(float(reference.square().mean() / 2), rel=1e-3)
    for spec in stream.specs:
        (rounded,), W = weights[spec.name], stream.weight(spec).double()
        dW = rounded.dequantize(torch.float64) - W

        def swapped(step: float, spec: LinearSpec = spec, W: Tensor = W, dW: Tensor = dW) -> Change:
            new = {spec.name: W + step * dW}
            return lambda i, block: stream.swapped(block, new) if i == spec.block else nullcontext()

        reference = (v * derivative(stream, x, swapped)).sum(-1).flatten()
        torch.testing.assert_close(torch.cat(ours.modules[spec.name, rounded.choice]), reference, rtol=1e-3, atol=1e-5)


def test_a_grid_carried_over_to_a_folded_model_has_the_same_codes() -> None:
    x = noise(200, 12) * torch.logspace(-2, 1, 12) + noise(12, seed=1)
    three, four = (best(channel_candidates(x, bits), squared_error(x)) for bits in (3, 4))
    folding = folding_of(four)
    folded = (x.double() - folding.before) / folding.ratio + folding.grid.offset.double()
    carried = folding.of_grid(three)
    v = ((x - three.offset) / three.scale).double()
    clear = ((v - v.floor() - 0.5).abs() > 1e-3) & (carried.scale > 0)
    assert torch.equal(carried.codes(folded)[clear], three.codes(x).double()[clear])
    torch.testing.assert_close(folding.channels.scale, four.scale)
    torch.testing.assert_close(folding.channels.offset, four.offset)


def small_case(seed: int) -> tuple[Calibration, list[LinearSpec], dict[Any, float], dict[Any, float]]:
    """One block: a site with two layers, one with one, and attention; costs fall with the widths."""
    generator = torch.Generator().manual_seed(seed)
    grid = UniformGrid(bits=4, scale=torch.tensor(1.0), offset=torch.tensor(0.0))

    def cost(width: int) -> float:
        return float(torch.rand((), generator=generator) + 0.1) * 4.0**-width

    sizes = {"qkv": (40, 8), "down": (80, 16), QUERY: (40, 4), KEY: (40, 4), PATTERN: (50, 5), VALUE: (40, 4)}
    places, place_costs = {}, {}
    for name, (num, row) in sizes.items():
        candidates = {b: Candidate(grid=grid, folding=None, cost=0.0) for b in (3, 5)}
        places[0, name] = Place(num_values=num, row=row, candidates=candidates)
        place_costs |= {(0, name, b): cost(b) for b in candidates}
    specs = [
        LinearSpec(name=n, block=0, d_out=d_out, d_in=sizes[site][1], input_site=site, fused_group=n)
        for n, site, d_out in (("q", "qkv", 8), ("k", "qkv", 6), ("fc2", "down", 8))
    ]
    module_costs = {(s.name, Choice(bits=b, group_size=-1)): cost(b) for s in specs for b in (2, 4)}
    return Calibration(places=places), specs, place_costs, module_costs


@pytest.mark.parametrize("seed", range(4))
def test_bit_operations_are_spent_best(seed: int) -> None:
    """Brute force over all widths of all places and layers."""
    calibration, specs, place_costs, module_costs = small_case(seed)
    budget = even_operations(calibration, specs, weight_bits=3, activation_bits=4)
    keys = list(calibration.places)
    macs = {"q": 40 * 8, "k": 40 * 6, "fc2": 80 * 8}
    lowest = math.inf
    for a in itertools.product((3, 5), repeat=len(keys)):
        width = {name: b for (_, name), b in zip(keys, a, strict=True)}
        inside = 40 * 5 * width[QUERY] * width[KEY] + 50 * 4 * width[PATTERN] * width[VALUE]
        spent_on_places = sum(place_costs[*key, b] for key, b in zip(keys, a, strict=True))
        for w in itertools.product((2, 4), repeat=len(specs)):
            bops = inside + sum(macs[s.name] * b * width[s.input_site] for s, b in zip(specs, w, strict=True))
            choices = [(s.name, Choice(bits=b, group_size=-1)) for s, b in zip(specs, w, strict=True)]
            if bops <= budget:
                lowest = min(lowest, spent_on_places + sum(module_costs[c] for c in choices))
    found = allocate_operations(calibration, specs, place_costs, module_costs, budget=budget)
    assert found.spent <= budget
    assert found.cost_nats == pytest.approx(lowest, rel=1e-5)
    assert found.bound_nats <= found.cost_nats * (1 + 1e-9)
    assert set(found.places) == set(keys)
    assert set(found.modules) == {"q", "k", "fc2"}
    least = even_operations(calibration, specs, weight_bits=2, activation_bits=3)
    assert allocate_operations(calibration, specs, place_costs, module_costs, budget=least).spent == least
    with pytest.raises(BudgetError, match=f"too few for these widths; the least is {least}"):
        allocate_operations(calibration, specs, place_costs, module_costs, budget=least - 1)


@pytest.mark.parametrize("seed", range(4))
def test_bits_are_spent_best_on_weights_and_activations_together(seed: int) -> None:
    """Brute force over all widths of all places and layers."""
    calibration, specs, place_costs, module_costs = small_case(seed)
    rows = [
        CostRow(
            module=spec,
            choice=choice,
            storage_bits=storage_bits(spec.d_out, spec.d_in, choice),
            cost_nats=module_costs[spec.name, choice],
        )
        for spec in specs
        for choice in (Choice(bits=2, group_size=-1), Choice(bits=4, group_size=-1))
    ]
    problem = build_problem(rows, budget=BudgetBits(bits=16), fused=False)
    budget = even_spending(calibration, problem, Unit.BITS, weight_bits=3.25, activation_bits=4)
    values = {key: place.num_values for key, place in calibration.places.items()}
    assert budget == int(3.25 * sum(spec.num_weights for spec in specs)) + 4 * sum(values.values())
    storage = {(row.module.name, row.choice): row.storage_bits for row in rows}
    lowest = math.inf
    for a in itertools.product((3, 5), repeat=len(values)):
        on_places = sum(width * n for width, n in zip(a, values.values(), strict=True))
        cost = sum(place_costs[*key, width] for key, width in zip(values, a, strict=True))
        for w in itertools.product((2, 4), repeat=len(specs)):
            chosen = [(s.name, Choice(bits=b, group_size=-1)) for s, b in zip(specs, w, strict=True)]
            if on_places + sum(storage[c] for c in chosen) <= budget:
                lowest = min(lowest, cost + sum(module_costs[c] for c in chosen))
    found = allocate_together(calibration, problem, place_costs, Unit.BITS, budget=budget)
    on_places = sum(width * values[key] for key, width in found.places.items())
    assert found.spent == on_places + sum(storage[c] for c in found.modules.items()) <= budget
    assert found.cost_nats == pytest.approx(lowest, rel=1e-5)
    assert found.bound_nats <= found.cost_nats * (1 + 1e-9)
    assert found.places.keys() == values.keys()
    least = 3 * sum(values.values()) + sum(storage[s.name, Choice(bits=2, group_size=-1)] for s in specs)
    assert allocate_together(calibration, problem, place_costs, Unit.BITS, budget=least).spent == least
    with pytest.raises(BudgetError, match=f"too few for these widths; the least is {least}"):
        allocate_together(calibration, problem, place_costs, Unit.BITS, budget=least - 1)


def test_multiplications_are_those_that_torch_counts(stream: BlockStream) -> None:
    x = images(3).double()
    found = calibrate(stream, x, widths=[8], means=Means.NONE)
    hidden, counted = stream.embed(x), 0
    for index, block in stream.stream(range(stream.num_blocks)):
        with FlopCounterMode(display=False) as counter, with_points(attention_of(stream, block), {}), torch.no_grad():
            hidden = stream.run(block, index, hidden)
        counted += counter.get_total_flops()
    assert 3 * even_operations(found, stream.specs, weight_bits=1, activation_bits=1) == counted / 2
