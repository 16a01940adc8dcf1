"""Budgets, keep rules, fused groups and what is refused."""

from __future__ import annotations

import math

import pytest

from lrpq.allocate.budget import BudgetBits, BudgetBytes, Sizes, parse_bytes
from lrpq.allocate.keep import KeepRule, parse_keep
from lrpq.allocate.knapsack import solve_exact, solve_lagrangian
from lrpq.allocate.problem import CostRow, Group, Option, Problem, build_problem
from lrpq.allocate.targets import Target
from lrpq.errors import BudgetError, ConfigError, QuantizationError
from lrpq.model.layers import Choice, LinearSpec

SHAPES = {
    "self_attn.q_proj": (128, 128, "qkv"),
    "self_attn.k_proj": (64, 128, "qkv"),
    "self_attn.v_proj": (64, 128, "qkv"),
    "self_attn.o_proj": (128, 128, "o"),
    "mlp.gate_proj": (256, 128, "gate_up"),
    "mlp.up_proj": (256, 128, "gate_up"),
    "mlp.down_proj": (128, 256, "down"),
}
BITS = (2, 3, 4, 8)


def linears(blocks: int = 2) -> list[LinearSpec]:
    return [
        LinearSpec(
            name=f"model.layers.{block}.{path}",
            block=block,
            d_out=d_out,
            d_in=d_in,
            input_site=site,
            fused_group=f"model.layers.{block}.{site}",
        )
        for block in range(blocks)
        for path, (d_out, d_in, site) in SHAPES.items()
    ]


def row(module: LinearSpec, bits: int, *, cost: float | None = None, group_size: int = 64) -> CostRow:
    choice = Choice(bits=bits, group_size=group_size)
    return CostRow(
        module=module,
        choice=choice,
        storage_bits=module.num_weights * bits + 16 * module.d_out * choice.groups(module.d_in),
        cost_nats=module.num_weights * 4.0**-bits if cost is None else cost,
    )


def rows(blocks: int = 2) -> list[CostRow]:
    return [row(module, bits) for module in linears(blocks) for bits in BITS]


def keep(*texts: str) -> list[KeepRule]:
    return [parse_keep(text) for text in texts]


# --- reading what the user writes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40GB", 40 * 10**9),
        ("40gb", 40 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("900MB", 9 * 10**8),
        ("2KiB", 2048),
        ("1TB", 10**12),
        ("123", 123),
        ("0.3TB", 3 * 10**11),  # 0.3 * 10**12 in floats is 299999999999.99994
        ("1.0005kB", 1000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "0.5B", "40 bits", "1e9", "4,5GB", "40GBB", "٤GB"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_bytes(text)


def test_keep_rules() -> None:
    assert parse_keep("model.layers.0.*=8") == KeepRule(pattern="model.layers.0.*", bits=8)
    assert str(parse_keep(" *.down_proj = 16 ")) == "*.down_proj=16"
    for text in ("model.layers.0.*", "=8", "a=", "a=4.5", "a=0", "a=17", "a=-4", "a=²"):
        with pytest.raises(ConfigError, match="keep rule"):
            parse_keep(text)


# --- budgets


def test_bits_are_read_as_decimals() -> None:
    # 4.35 * 100 is 434.99999999999994 in floats
    assert BudgetBits(bits=4.35).capacity_bits(Sizes(minimum_bits=1, num_weights=100, left_bits=0)) == 435
    assert BudgetBits(bits=2.55).capacity_bits(Sizes(minimum_bits=1, num_weights=10, left_bits=0)) == 25
    # a budget of all weights of 405B to the bit
    many = Sizes(minimum_bits=1, num_weights=405_000_000_007, left_bits=0)
    assert BudgetBits(bits=3.1).capacity_bits(many) == 31 * 405_000_000_007 // 10


@pytest.mark.parametrize("bits", [16.001, 17.0, 0.0, -1.0, math.nan, math.inf])
def test_bits_outside_are_refused(bits: float) -> None:
    with pytest.raises(BudgetError):
        BudgetBits(bits=bits)


def test_a_budget_below_the_smallest_names_it() -> None:
    # 2 bits and a 16-bit scale for 64 weights: 2.25
    with pytest.raises(BudgetError, match=r"smallest possible is 2\.2500 bits"):
        build_problem(rows(), budget=BudgetBits(bits=2.2))
    plan = solve_exact(build_problem(rows(), budget=BudgetBits(bits=2.25)))
    assert plan.average_bits == 2.25
    assert plan.binding


def test_a_budget_wider_than_the_widest_choice_is_not_binding() -> None:
    for solve in (solve_exact, solve_lagrangian):
        plan = solve(build_problem(rows(), budget=BudgetBits(bits=16.0)))
        assert set(plan.choices.values()) == {Choice(bits=8, group_size=64)}
        assert plan.average_bits == 8.25
        assert not plan.binding
        assert plan.gap == 0.0


def test_bytes_bound_the_whole_checkpoint() -> None:
    fixed = 12_345
    weights_at_16 = sum(module.num_weights for module in linears() if module.kind == "down_proj")
    rules = keep("*.down_proj=16")
    problem = build_problem(rows(), budget=BudgetBytes(total_bytes=300_000, fixed_bytes=fixed), keep=rules)
    assert problem.capacity_bits == 8 * (300_000 - fixed) - 16 * weights_at_16
    plan = solve_exact(problem)
    assert fixed + (plan.left_bits + plan.storage_bits) / 8 <= 300_000
    assert plan.left_bits == 16 * weights_at_16

    everything = fixed + 2 * sum(module.num_weights for module in linears())
    build_problem(rows(), budget=BudgetBytes(total_bytes=everything, fixed_bytes=fixed), keep=rules)
    with pytest.raises(BudgetError, match=f"above the {everything} bytes"):
        build_problem(rows(), budget=BudgetBytes(total_bytes=everything + 1, fixed_bytes=fixed), keep=rules)
    with pytest.raises(BudgetError, match="positive"):
        BudgetBytes(total_bytes=0, fixed_bytes=0)
    with pytest.raises(ConfigError, match="fixed size"):
        BudgetBytes(total_bytes=1, fixed_bytes=-1)


def test_another_budget_for_the_same_problem() -> None:
    problem = build_problem(rows(), budget=BudgetBits(bits=3.25), keep=keep("*.0.*down_proj=16"))
    again = build_problem(rows(), budget=BudgetBits(bits=4.0), keep=keep("*.0.*down_proj=16"))
    assert problem.with_budget(BudgetBits(bits=4.0)) == again
    with pytest.raises(BudgetError, match="smallest possible"):
        problem.with_budget(BudgetBits(bits=1.0))


# --- keep rules


def test_keep_is_honoured_and_counts_as_quantized() -> None:
    problem = build_problem(rows(), budget=BudgetBits(bits=6.0), keep=keep("model.layers.0.*=8"))
    plan = solve_exact(problem)
    for module in linears():
        choice = plan.choices[module.name]
        assert choice is not None
        assert (choice.bits == 8) == (module.block == 0)
    assert plan.num_weights == sum(module.num_weights for module in linears())
    assert plan.average_bits <= 6.0


def test_keep_at_16_leaves_the_module_out_of_the_average() -> None:
    problem = build_problem(rows(), budget=BudgetBits(bits=4.25), keep=keep("*.down_proj=16"))
    plan = solve_exact(problem)
    down = [module.name for module in linears() if module.kind == "down_proj"]
    assert list(plan.names_at_16) == down
    assert plan.left_at_16 == dict.fromkeys(down, "keep rule '*.down_proj=16'")
    assert plan.num_weights == sum(m.num_weights for m in linears() if m.name not in down)
    # the others get what they would without it
    assert {choice for choice in plan.choices.values() if choice} == {Choice(bits=4, group_size=64)}
    assert list(plan.choices) == sorted(module.name for module in linears())


def test_keep_on_one_fused_member_holds_for_all() -> None:
    plan = solve_exact(build_problem(rows(), budget=BudgetBits(bits=4.0), keep=keep("*.0.*v_proj=8", "*.1.*k_proj=16")))
    for name in ("q_proj", "k_proj", "v_proj"):
        assert plan.choices[f"model.layers.0.self_attn.{name}"] == Choice(bits=8, group_size=64)
        assert plan.choices[f"model.layers.1.self_attn.{name}"] is None


def test_keep_rules_refused() -> None:
    budget = BudgetBits(bits=4.0)
    with pytest.raises(ConfigError, match=r"matches no module; near names: .*model\.layers\.1\.mlp\.down_proj"):
        build_problem(rows(), budget=budget, keep=keep("model.layers.1.mlp.down=8"))
    with pytest.raises(ConfigError, match=r"no 5-bit candidate; available: 2, 3, 4, 8 or 16"):
        build_problem(rows(), budget=budget, keep=keep("*.o_proj=5"))
    with pytest.raises(ConfigError, match=r"both match model\.layers\.0"):
        build_problem(rows(), budget=budget, keep=keep("*.o_proj=8", "model.layers.0.*=4"))
    with pytest.raises(ConfigError, match="served as one layer"):
        build_problem(rows(), budget=budget, keep=keep("*.q_proj=8", "*.k_proj=4"))
    with pytest.raises(ConfigError, match="no module may be quantized"):
        build_problem(rows(), budget=budget, keep=keep("*=16"))
    # two rules that agree do not disturb each other
    build_problem(rows(), budget=BudgetBits(bits=8.0), keep=keep("*.o_proj=8", "model.layers.0.*=8"))


# --- groups and rows


def test_options_of_a_group_are_sums_over_what_all_members_have() -> None:
    q, k = linears()[:2]
    v = linears()[2]
    given = [
        row(q, 2, cost=1.0), row(q, 3, cost=0.5), row(q, 4, cost=0.25),
        row(k, 3, cost=0.125), row(k, 4, cost=0.0625),
        row(v, 8, cost=0.0), row(v, 4, cost=2.0), row(v, 3, cost=4.0),
    ]  # fmt: skip
    (group,) = build_problem(given, budget=BudgetBits(bits=4.25)).groups
    weights = q.num_weights + k.num_weights + v.num_weights
    assert [(o.choice, o.storage_bits, o.cost_nats) for o in group.options] == [
        (Choice(bits=3, group_size=64), weights * 3 + weights // 4, 4.625),
        (Choice(bits=4, group_size=64), weights * 4 + weights // 4, 2.3125),
    ]
    with pytest.raises(QuantizationError, match=r"k_proj.*no candidate that all of them have"):
        build_problem([row(q, 2), row(k, 3)], budget=BudgetBits(bits=4.0))


def test_16_bits_can_be_an_option() -> None:
    modules = [m for m in linears() if m.kind == "o_proj"]
    given = [row(m, bits, cost=4.0**-bits * (1000.0 if m.block else 1.0)) for m in modules for bits in BITS]
    given += [CostRow(module=m, choice=None, storage_bits=16 * m.num_weights, cost_nats=0.0) for m in modules]
    plan = solve_exact(build_problem(given, budget=BudgetBits(bits=10.25)))
    assert plan.choices == {
        "model.layers.0.self_attn.o_proj": Choice(bits=4, group_size=64),
        "model.layers.1.self_attn.o_proj": None,
    }
    assert plan.names_at_16 == ("model.layers.1.self_attn.o_proj",)
    assert plan.left_at_16 == {}
    assert plan.average_bits == (16 + 4.25) / 2


@pytest.mark.parametrize("cost", [-1e-9, math.nan, math.inf])
def test_bad_costs_name_the_module(cost: float) -> None:
    given = rows()
    given[5] = row(given[5].module, 3, cost=cost)
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.self_attn\.k_proj: cost of 3b/g64"):
        build_problem(given, budget=BudgetBits(bits=4.0))


def test_bad_rows() -> None:
    given = rows()
    budget = BudgetBits(bits=4.0)
    with pytest.raises(QuantizationError, match="two costs"):
        build_problem([*given, given[0]], budget=budget)
    module = given[0].module
    other = LinearSpec(name=module.name, block=1, d_out=1, d_in=64, input_site="o", fused_group="x")
    with pytest.raises(QuantizationError, match="two modules"):
        build_problem([*given, row(other, 5)], budget=budget)
    empty = CostRow(module=module, choice=Choice(bits=6, group_size=64), storage_bits=0, cost_nats=0.0)
    with pytest.raises(QuantizationError, match="0 bits"):
        build_problem([*given, empty], budget=budget)
    with pytest.raises(ConfigError, match="no costs"):
        build_problem([], budget=budget)


def test_problems_that_are_none() -> None:
    option = Option(choice=None, storage_bits=1, cost_nats=0.0)
    group = Group(name="a", members=(linears()[0],), options=(option,))
    with pytest.raises(ConfigError, match="nothing to allocate"):
        Problem(groups=(), capacity_bits=1)
    with pytest.raises(ConfigError, match="must differ"):
        Problem(groups=(group, group), capacity_bits=9)
    with pytest.raises(ConfigError, match="needs an option"):
        Problem(groups=(Group(name="a", members=group.members, options=()),), capacity_bits=9)


# --- target


def test_vllm_names_what_it_leaves_at_16_bits() -> None:
    # SmolLM2-135M's widths: 576 is no multiple of 128, so only down_proj (d_in 1536) runs quantized
    shapes = {"self_attn.o_proj": (576, 576, "o"), "mlp.down_proj": (576, 1536, "down")}
    modules = [
        LinearSpec(name=f"model.layers.0.{path}", block=0, d_out=o, d_in=i, input_site=site, fused_group=f"0.{site}")
        for path, (o, i, site) in shapes.items()
    ]
    given = [row(module, bits) for module in modules for bits in BITS]
    problem = build_problem(given, budget=BudgetBits(bits=5.0), target=Target.VLLM)
    plan = solve_exact(problem)
    assert plan.choices == {
        "model.layers.0.mlp.down_proj": Choice(bits=4, group_size=64),
        "model.layers.0.self_attn.o_proj": None,
    }
    assert plan.left_at_16 == {
        "model.layers.0.self_attn.o_proj": "vllm: model.layers.0.self_attn.o_proj: d_in 576 is no multiple of 128"
    }
    with pytest.raises(BudgetError, match=r"smallest possible is 4\.2500 bits"):
        build_problem(given, budget=BudgetBits(bits=3.0), target=Target.VLLM)
    with pytest.raises(ConfigError, match=r"no module may be quantized.*d_in 576"):
        build_problem([r for r in given if r.module.kind == "o_proj"], budget=BudgetBits(bits=5.0), target=Target.VLLM)


def test_vllm_leaves_a_fused_group_as_a_whole() -> None:
    # on 2 GPUs k_proj's and v_proj's parts are 32 rows wide, which stops q_proj too; o_proj and down_proj
    # keep 64 and 128 columns, of which 64 are too few
    problem = build_problem(rows(), budget=BudgetBits(bits=5.0), target=Target.VLLM, tensor_parallel=2)
    plan = solve_exact(problem)
    left = {name.rsplit(".", 1)[-1] for name in plan.left_at_16}
    assert left == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "k_proj: d_out 32 on each of 2 GPUs" in plan.left_at_16["model.layers.1.self_attn.q_proj"]
    assert {choice.bits for choice in plan.choices.values() if choice} <= {4, 8}
    # a width asked for by the user cannot make it run
    kept = build_problem(
        rows(),
        budget=BudgetBits(bits=8.25),
        target=Target.VLLM,
        tensor_parallel=2,
        keep=keep("model.layers.0.*=8"),
    )
    assert {item.module.name for item in kept.left} == set(plan.left_at_16)
    with pytest.raises(ConfigError, match="no 3-bit candidate; available: 4, 8 or 16"):
        build_problem(rows(), budget=BudgetBits(bits=8.0), target=Target.VLLM, keep=keep("*.down_proj=3"))
