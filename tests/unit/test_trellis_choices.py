"""Choices with trellis codes: which layers have them, what they take, and what they are expected to cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lrpq.allocate.options import CostRow
from lrpq.allocate.trellis import (
    check_streams,
    takes_trellis,
    with_trellis_codes,
    without_streams,
)
from lrpq.errors import ConfigError, QuantizationError
from lrpq.model.layers import HEAD, Choice, LinearSpec, all_choices
from lrpq.quant.packing import storage_bits
from lrpq.quant.trellis import LEFT, SHARES, WIDTHS, segment_edges, share_of_grid

SPEC = LinearSpec(name="model.layers.0.mlp.up_proj", block=0, d_out=256, d_in=128, input_site="up", fused_group="up")
CHOICES = all_choices((2, 3, 4, 5, 6, 8), (32, 64, 128, -1), scale_bits=8)


def rows_of(spec: LinearSpec) -> list[CostRow]:
    return [
        CostRow(module=spec, choice=c, storage_bits=storage_bits(spec.d_out, spec.d_in, c), cost_nats=4.0**-c.bits)
        for c in CHOICES
    ]


def test_codes_of_every_width_with_a_codebook_are_a_trellis_and_the_others_stay() -> None:
    left = CostRow(module=SPEC, choice=None, storage_bits=16 * SPEC.num_weights, cost_nats=0.0)
    found = with_trellis_codes([*rows_of(SPEC), left])
    assert [row.choice for row in found[:-1]] == [replace(c, trellis=c.bits != 8) for c in CHOICES]
    assert found[-1] == left
    assert [row for row in found if row.choice is not None and row.choice.bits == 8] == [
        row for row in rows_of(SPEC) if row.choice is not None and row.choice.bits == 8
    ]


def test_a_trellis_takes_as_many_bits_and_costs_its_share() -> None:
    for before, after in zip(rows_of(SPEC), with_trellis_codes(rows_of(SPEC)), strict=True):
        assert before.choice is not None
        assert after.choice is not None
        assert after.storage_bits == before.storage_bits
        share = 1.0 if before.choice.bits == 8 else SHARES[before.choice.group_size][before.choice.bits]
        assert after.cost_nats == pytest.approx(share * before.cost_nats, rel=1e-12)
        assert share_of_grid(after.choice) == share
        assert share_of_grid(before.choice) == 1.0


@pytest.mark.parametrize("d_out", [1, 15, 16, 127, 128, 129, 143, 144, 1000, 4096])
def test_a_layer_has_a_trellis_just_where_its_segments_are_long_enough(d_out: int) -> None:
    try:
        segment_edges([d_out])
        expected = True
    except QuantizationError:
        expected = False
    spec = replace(SPEC, d_out=d_out)
    assert takes_trellis(spec) is expected
    assert any(row.choice is not None and row.choice.trellis for row in with_trellis_codes(rows_of(spec))) is expected


def test_a_layer_of_several_tensors_has_a_trellis_where_none_is_cut() -> None:
    stacked = replace(SPEC, tensors=("a.weight", "b.weight"))
    assert takes_trellis(stacked)
    assert not takes_trellis(replace(stacked, d_out=320))  # 160 rows each: segments of one stack would lie in both
    assert takes_trellis(replace(SPEC, d_out=320))


def test_a_model_without_rows_for_streams_is_refused_and_a_few_layers_are_counted() -> None:
    short = replace(SPEC, name="model.layers.0.self_attn.k_proj", d_out=8)
    check_streams([SPEC, short])
    with pytest.raises(ConfigError, match=r"--codes trellis: 1 of 1 layers, with 100% .* such as .*k_proj with 8"):
        check_streams([short, replace(SPEC, input_site=HEAD)])
    choices = {"a": Choice(bits=3, group_size=64), "b": Choice(bits=3, group_size=64, trellis=True), "c": None}
    specs = [replace(SPEC, name=name) for name in "abcd"] + [replace(SPEC, name="head", input_site=HEAD)]
    assert without_streams({**choices, "d": Choice(bits=8, group_size=64), "head": choices["a"]}, specs) == 1
    # experts of a block have streams all or none
    expert = replace(SPEC, routed=True, fused_group="block.0.experts")
    stacked = replace(expert, name="gate_up", d_out=192, tensors=("gate.weight", "up.weight"))
    assert not any(
        row.choice.trellis for row in with_trellis_codes([*rows_of(expert), *rows_of(stacked)]) if row.choice
    )
    with pytest.raises(ConfigError, match=r"2 of 2 layers, with 100% .* such as gate_up with 96 \+ 96"):
        check_streams([expert, stacked])


def test_the_head_keeps_the_codes_of_its_candidates() -> None:
    assert not takes_trellis(replace(SPEC, input_site=HEAD))


def test_shares_say_less_error_the_wider_a_group_and_never_that_of_another_bit() -> None:
    """A bit is worth 4; what a trellis saves is less, more where a uniform grid has to reach farther, and no more than
    codebooks save on normal numbers beside a grid that leaves five times the bound."""
    for bits in WIDTHS:
        by_size = [SHARES[size][bits] for size in (32, 64, 128, -1)]
        assert sorted(by_size, reverse=True) == by_size
        assert by_size[0] < 1
        assert min(by_size) > max(0.25, LEFT[bits] * 4**bits / 5)


def test_choices_with_and_without_a_trellis_have_other_names() -> None:
    assert str(Choice(bits=3, group_size=64, scale_bits=8, trellis=True)) == "3b/g64/f8/trellis"
