"""What is quantized in parts: large sites of models that have few, whatever the number of workers."""

from __future__ import annotations

from dataclasses import replace

from lrpq.model.layers import Choice, LinearSpec
from tasks.site_parts import NUM_PARTS, cut_sites, part_of

CHOICES = [Choice(bits=bits, group_size=size) for bits in (2, 3, 4) for size in (64, -1)]


def block(index: int, hidden: int, ffn: int) -> list[LinearSpec]:
    shapes = {"qkv": (2 * hidden, hidden), "o": (hidden, hidden), "gate_up": (2 * ffn, hidden), "down": (hidden, ffn)}
    return [
        LinearSpec(
            name=f"{index}.{site}",
            block=index,
            d_out=d_out,
            d_in=d_in,
            input_site=site,
            fused_group=f"{index}.{site}",
            tensors=(f"{index}.{site}.weight",),
        )
        for site, (d_out, d_in) in shapes.items()
    ]


def test_a_large_block_s_sites_are_cut_and_a_large_model_s_are_not() -> None:
    one = block(0, 8192, 28672)
    assert cut_sites(one, CHOICES) == {(0, "gate_up"), (0, "down")}
    assert cut_sites(one, [Choice(bits=4, group_size=64)]) == {(0, "gate_up")}  # 2^28 weights are too few
    many = [replace(spec, block=index) for index in range(80) for spec in one]
    assert cut_sites(many, CHOICES) == frozenset()
    assert cut_sites(block(0, 576, 1536), CHOICES) == frozenset()


def test_a_choice_that_does_not_fit_counts_for_nothing() -> None:
    odd = [Choice(bits=4, group_size=64), Choice(bits=3, group_size=96)]
    assert cut_sites(block(0, 8192, 28672), odd) == cut_sites(block(0, 8192, 28672), odd[:1])


def test_parts_are_all_choices_once() -> None:
    for count in range(2, 13):
        parts = [part_of(range(count), part) for part in range(NUM_PARTS)]
        assert [choice for part in parts for choice in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert part_of([1, 2, 3], None) == [1, 2, 3]
