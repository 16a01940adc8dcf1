"""Whole plans measured in one pass, and evidence at a quantized point, against whole models with the weights put in."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrpq.compare import allocation
from lrpq.compare.codes import Codes, stitched
from lrpq.compare.planned import cooperative, demotion_game, demotion_levels, level_pairs, reestimated, swapped
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Gathered, Workbench
from lrpq.errors import ConfigError, QuantizationError
from lrpq.importance.evidence import ModuleEvidence
from lrpq.importance.joint import joint_kl
from lrpq.importance.registry import MEASURES, Measure
from lrpq.importance.shapley import Game
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.relevance.rules import Pass

WINDOWS, LENGTH, VOCABULARY, LAYERS = 6, 12, 128, 3
TOKENS = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
TERMS = Terms(bits=(2, 3, 4), group_sizes=(32,), dtype=torch.float32, shards=2, micro_batch=2)
BUDGET = 3.6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("joint") / "llama", layers=LAYERS, tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.mul_(0.02)  # logits of a few units
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bench(folder: Path) -> Workbench:
    return Workbench(ModelSource(folder), TOKENS[:4], TERMS, held_out=TOKENS[4:])


@pytest.fixture(scope="module")
def gathered(bench: Workbench) -> Gathered:
    measures = {DEFAULT.allocation: MEASURES[DEFAULT.allocation]}
    return bench.gather(measures, weightings=("blend",), candidates_by="blend", keep_candidates=True, with_outputs=True)


def whole(folder: Path, codes: Codes) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, q in codes.items():
        model.get_submodule(name).weight.data = q.dequantize(torch.float32)
    return model


@torch.no_grad()
def kl_of(folder: Path, codes: Codes, windows: Tensor) -> list[float]:
    """KL of a whole model with these codes, a window each."""
    p, q = (whole(folder, c)(windows).logits[:, :-1].double().log_softmax(-1) for c in ({}, codes))
    return [float(x) for x in (p.exp() * (p - q)).sum(-1).mean(-1)]


def codes_at(gathered: Gathered, choices: dict[str, Choice]) -> Codes:
    return {name: next(q for q in gathered.candidates[name] if q.choice == choice) for name, choice in choices.items()}


def test_joint_kl_is_that_of_whole_models(folder: Path, bench: Workbench, gathered: Gathered) -> None:
    """Plans that share their first blocks, and one that changes nothing; every weight asked for once."""
    stream = bench.stream()
    asked: list[tuple[int, Hashable]] = []

    def weights(block: int, key: Hashable) -> dict[str, Tensor]:
        asked.append((block, key))
        choice = Choice(bits=int(str(key)), group_size=32)
        names = [spec.name for spec in stream.block_specs(block)]
        return {n: q.dequantize(torch.float32) for n, q in codes_at(gathered, dict.fromkeys(names, choice)).items()}

    plans = {"a": ["2", "3", "2"], "b": ["2", "3", "4"], "c": [None, None, "2"], "d": ["3", None, "4"]}
    plans |= {"again": ["2", "3", "2"], "none": [None, None, None]}
    found = joint_kl(stream, TOKENS[4:], plans, weights, micro_batch=2)
    assert len(asked) == len(set(asked)) == 2 + 1 + 2
    assert found["none"] == [0.0, 0.0]
    assert found["again"] == found["a"]
    for name in ("a", "b", "c", "d"):
        choices = {
            spec.name: Choice(bits=int(str(plans[name][spec.block])), group_size=32)
            for spec in stream.specs
            if plans[name][spec.block] is not None
        }
        assert found[name] == pytest.approx(kl_of(folder, codes_at(gathered, choices), TOKENS[4:]), rel=1e-3)
    with pytest.raises(QuantizationError, match="plan short: 1 blocks"):
        joint_kl(stream, TOKENS[4:], {"short": ["2"]}, weights)


def test_evidence_at_a_quantized_point_is_that_of_the_quantized_model(
    folder: Path, bench: Workbench, gathered: Gathered, tmp_path: Path
) -> None:
    """The same as of a checkpoint with those weights; but W and what is rounded stay the original's."""
    plan = allocation.by_costs(gathered.costs[DEFAULT.allocation], budget_bits=BUDGET)
    codes = stitched(gathered.candidates, plan)
    whole(folder, codes).save_pretrained(tmp_path / "there")
    there = Workbench(ModelSource(tmp_path / "there"), TOKENS[:4], TERMS)

    def evidence(of: Workbench, at: Codes | None) -> dict[str, ModuleEvidence]:
        seen: dict[str, ModuleEvidence] = {}

        def keep(module: ModuleEvidence) -> float:
            seen[module.spec.name] = module
            return 0.0

        passes = frozenset({Pass.LRP})
        measure = Measure(source="test", score=keep, weighting="blend", passes=passes)
        of.gather({"keep": measure}, weightings=(), candidates_by="blend", at=at)
        return seen

    found, wanted, before = evidence(bench, codes), evidence(there, None), evidence(bench, None)
    for name, module in found.items():
        c, H = wanted[name].curvature[Pass.FISHER], wanted[name].hessians["blend"]
        torch.testing.assert_close(module.curvature[Pass.FISHER], c, rtol=1e-3, atol=float(c.max()) * 1e-5)
        torch.testing.assert_close(module.hessians["blend"], H, rtol=1e-3, atol=float(H.abs().max()) * 1e-5)
        assert torch.equal(module.W, before[name].W)
        assert not torch.equal(module.W, wanted[name].W)
        assert not torch.allclose(module.curvature[Pass.FISHER], before[name].curvature[Pass.FISHER], rtol=1e-3)


def test_the_second_plan_is_the_best_for_the_second_costs(bench: Workbench, gathered: Gathered) -> None:
    first = allocation.by_costs(gathered.costs[DEFAULT.allocation], budget_bits=BUDGET)
    found = reestimated(bench, gathered, DEFAULT, first, BUDGET)
    codes = bench.codes(first.choices, DEFAULT, gathered)
    measures = {DEFAULT.allocation: MEASURES[DEFAULT.allocation]}
    again = bench.gather(measures, weightings=(), candidates_by="blend", at=codes)
    rows = again.costs[DEFAULT.allocation]
    assert found.plan == allocation.by_costs(rows, budget_bits=BUDGET)
    other = allocation.chosen(rows, first.choices, budget_bits=BUDGET)
    assert found.plan.cost_nats <= other.cost_nats
    changed = [name for name, choice in found.plan.choices.items() if choice != first.choices[name]]
    assert found.counts == {"modules_changed": len(changed)}


def test_swaps_keep_storage_and_lower_the_measured_kl(folder: Path, bench: Workbench, gathered: Gathered) -> None:
    """From a bad start, a plan that gives the wider width to the wrong half, by whole models."""
    rows = gathered.costs[DEFAULT.allocation]
    specs = {row.module.name: row.module for row in rows}
    by_cost = sorted(specs, key=lambda n: next(r.cost_nats for r in rows if r.module.name == n and r.choice.bits == 2))
    wide = set(by_cost[: len(by_cost) // 2])  # the modules that matter least
    bad = {name: Choice(bits=4 if name in wide else 2, group_size=32) for name in specs}
    start = allocation.chosen(rows, bad, budget_bits=8.0)
    found = swapped(bench, gathered, start, 8.0)
    assert found.plan.storage_bits == start.storage_bits
    assert 1 <= found.counts["swaps_accepted"] <= 4
    assert 8 < found.counts["swaps_tried"] <= 32
    before, after = (kl_of(folder, stitched(gathered.candidates, plan), TOKENS[4:]) for plan in (start, found.plan))
    assert sum(after) < sum(before)


def test_the_game_is_played_with_blocks_of_whole_models(folder: Path, bench: Workbench, gathered: Gathered) -> None:
    rows = gathered.costs[DEFAULT.allocation]
    levels = demotion_levels(rows, BUDGET)
    assert levels == (2, 4)
    found = demotion_game(bench, gathered, levels)
    low, high = ({spec.name: Choice(bits=bits, group_size=32) for spec in bench.stream().specs} for bits in levels)
    ends = [sum(kl_of(folder, codes_at(gathered, c), TOKENS[:4])) / 4 for c in (low, high)]
    assert sum(found.values) == pytest.approx(ends[0] - ends[1], rel=1e-3)
    planned = cooperative(rows, found, levels, BUDGET)
    assert planned.plan.average_bits <= BUDGET
    by_block: dict[int, set[Choice | None]] = {}
    for spec in bench.stream().specs:
        by_block.setdefault(spec.block, set()).add(planned.plan.choices[spec.name])
    assert all(len(choices) == 1 for choices in by_block.values())
    assert planned.counts["blocks_demoted"] == 2  # 2.5 and 4.5 bits all in: one of three blocks may stay
    assert planned.counts["orders"] == 8


def test_the_block_that_matters_stays_wide(gathered: Gathered) -> None:
    rows, none = gathered.costs[DEFAULT.allocation], ((0.0,) * LAYERS,) * LAYERS
    for important in range(LAYERS):
        values = tuple(5.0 if block == important else 1.0 for block in range(LAYERS))
        game = Game(values=values, covariance=none, num_orders=1)
        plan = cooperative(rows, game, (2, 4), BUDGET).plan
        wide = {name.split(".")[2] for name, choice in plan.choices.items() if choice and choice.bits == 4}
        assert wide == {str(important)}


def test_levels_leave_something_to_decide(gathered: Gathered) -> None:
    """Four bits in groups of 32 are 4.5: a budget that they use up is for the next two widths."""
    rows = list(gathered.costs[DEFAULT.allocation])
    fours = [row for row in rows if row.choice is not None and row.choice.bits == 4]
    rows += [
        replace(row, choice=Choice(bits=6, group_size=32), storage_bits=row.storage_bits * 13 // 9) for row in fours
    ]
    assert [demotion_levels(rows, budget) for budget in (3.0, 4.49, 4.5, 5.0, 9.0)] == [(2, 4), (2, 4), *[(4, 6)] * 3]


def test_levels_around_a_budget() -> None:
    assert level_pairs((2, 3, 4, 5, 6, 8)) == [(2, 4), (3, 5), (4, 6), (6, 8)]
    with pytest.raises(ConfigError, match="2, 3"):
        level_pairs((3, 2))
