"""Parts outside the blocks: what is refused, their one choice, and how the allocation counts it."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest

from lrpq.allocate.baselines import nearest_uniform, two_level
from lrpq.allocate.budget import BudgetBits
from lrpq.allocate.keep import parse_keep
from lrpq.allocate.knapsack import solve_exact, solve_lagrangian
from lrpq.allocate.parts import NOT_LOADED, Part, check_parts, fixed_choice
from lrpq.allocate.problem import CostRow, build_problem
from lrpq.allocate.targets import Target
from lrpq.errors import BudgetError, ConfigError
from lrpq.model.layers import HEAD, Choice, LinearSpec
from lrpq.quant.packing import storage_bits

BITS = (2, 3, 4, 8)
HEAD_CHOICE = Choice(bits=6, group_size=-1)


def spec(name: str, block: int, d_out: int) -> LinearSpec:
    site = HEAD if name == "lm_head" else "o"
    return LinearSpec(name=name, block=block, d_out=d_out, d_in=64, input_site=site, fused_group=name)


def rows(*, with_head: bool = True) -> list[CostRow]:
    """Three layers with four choices each, and a head with one."""
    layers = [spec(f"model.layers.{i}.o_proj", i, 8 * (i + 1)) for i in range(3)]
    choices = [Choice(bits=bits, group_size=64) for bits in BITS]
    asked = [(layer, choice) for layer in layers for choice in choices]
    if with_head:
        asked.append((spec("lm_head", 3, 40), HEAD_CHOICE))
    return [
        CostRow(
            module=module,
            choice=choice,
            storage_bits=storage_bits(module.d_out, module.d_in, choice),
            cost_nats=(module.block + 1.3) * 4.0**-choice.bits,
        )
        for module, choice in asked
    ]


FIXED = {"lm_head"}
WEIGHTS = 64 * (8 + 16 + 24 + 40)


@pytest.mark.parametrize("bits", [4.2, 4.6, 5.5])
def test_the_budget_pays_for_it_and_the_rest_is_chosen_at_its_best(bits: float) -> None:
    given = rows()
    problem = build_problem(given, budget=BudgetBits(bits=bits), fixed=FIXED)
    assert problem.num_weights == WEIGHTS
    head = given[-1]
    options = [[row for row in given if row.module.block == block] for block in range(3)]
    best = min(
        math.fsum(row.cost_nats for row in (*picks, head))
        for picks in itertools.product(*options)
        if sum(row.storage_bits for row in (*picks, head)) <= bits * WEIGHTS
    )
    for solve in (solve_exact, solve_lagrangian):
        plan = solve(problem)
        assert plan.choices["lm_head"] == HEAD_CHOICE
        assert list(plan.choices)[-1] == "lm_head"
        assert plan.storage_bits <= bits * WEIGHTS
        assert plan.num_weights == WEIGHTS
    assert solve_exact(problem).cost_nats == pytest.approx(best)


def test_keep_rules_do_not_see_it() -> None:
    keep = [parse_keep("*=8")]
    *layers, head = solve_exact(
        build_problem(rows(), budget=BudgetBits(bits=8.0), keep=keep, fixed=FIXED)
    ).choices.values()
    assert head == HEAD_CHOICE
    assert set(layers) == {Choice(bits=8, group_size=64)}
    with pytest.raises(ConfigError, match="keep rule 'lm_head=6' matches no module"):
        build_problem(rows(), budget=BudgetBits(bits=8.0), keep=[parse_keep("lm_head=6")], fixed=FIXED)
    with pytest.raises(ConfigError, match="nothing to allocate"):
        build_problem(rows(), budget=BudgetBits(bits=8.0), keep=[parse_keep("*=16")], fixed=FIXED)


def test_a_budget_below_what_it_leaves_is_refused() -> None:
    smallest = (64 * 40 * 6 + 16 * 40 + 64 * 48 * 2.25) / WEIGHTS
    build_problem(rows(), budget=BudgetBits(bits=smallest + 1e-4), fixed=FIXED)
    with pytest.raises(BudgetError, match=f"smallest possible is {smallest:.3f}"):
        build_problem(rows(), budget=BudgetBits(bits=smallest - 1e-3), fixed=FIXED)


def test_baselines_leave_it_as_it_is() -> None:
    problem = build_problem(rows(), budget=BudgetBits(bits=5.5), fixed=FIXED)
    others = build_problem(rows(with_head=False), budget=BudgetBits(bits=3.25))
    head_bits = rows()[-1].storage_bits
    for bits in BITS:
        at_bits = (head_bits + (bits + 0.25) * others.num_weights) / WEIGHTS
        plan = nearest_uniform(problem, at_bits=at_bits)
        assert plan.average_bits == pytest.approx(at_bits)
        assert plan.choices == {**nearest_uniform(others, at_bits=bits + 0.25).choices, "lm_head": HEAD_CHOICE}
    low, high = Choice(bits=2, group_size=64), Choice(bits=4, group_size=64)
    names = [group.name for group in others.groups]
    ranked = two_level(problem, dict.fromkeys(names, 1.0), low=low, high=high)
    assert ranked.choices["lm_head"] == HEAD_CHOICE
    assert {ranked.choices[name] for name in names} == {high}


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("part", Part)
def test_what_the_table_names_is_refused(target: Target, part: Part) -> None:
    head, tied = part is not Part.EMBEDDINGS, part is Part.TIED_HEAD
    check = partial(check_parts, target, format="compressed-tensors", tied=tied)
    check(head=False, embeddings=False)
    if part not in NOT_LOADED[target]:
        check(head=head, embeddings=not head)
        return
    option = "--quantize-head" if head else "--quantize-embeddings"
    with pytest.raises(ConfigError) as refusal:
        check(head=head, embeddings=not head)
    text = str(refusal.value)
    assert text.startswith(f"{option} with --target {target.value}: {NOT_LOADED[target][part]}; leave it out")
    elsewhere = [other.value for other in Target if part not in NOT_LOADED[other]]
    assert ("or give --target" in text) == bool(elsewhere)


def test_a_format_that_holds_no_packed_head_is_refused() -> None:
    check = partial(check_parts, Target.TRANSFORMERS, head=True, embeddings=False, tied=False)
    check(format="compressed-tensors")
    check(format="dense")
    with pytest.raises(ConfigError, match=r"--quantize-head with --format gptq: .*; leave it out, or give --format"):
        check(format="gptq")


@pytest.mark.parametrize(
    ("sizes", "d_in", "size"),
    [((64,), 128, 64), ((32, 64), 128, 32), ((64, 128), 192, 64), ((128,), 192, -1), ((-1,), 128, -1), ((64,), 50, -1)],
)
def test_the_one_choice(sizes: tuple[int, ...], d_in: int, size: int) -> None:
    assert fixed_choice(5, sizes, d_in) == Choice(bits=5, group_size=size)
